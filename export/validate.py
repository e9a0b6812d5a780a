"""The cost model against the clock: rates of this machine and ticks of several sizes, measured in one run, predicted and compared."""

from __future__ import annotations

import importlib.util
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import onnx

from device.config import ModelConfig, TextConfig
from device.engine import OnnxRuntimeEngine
from device.tensors import Tensor
from export.cost import OutlineGraph, Work, count, moved_elements, of_size
from export.graph import TickGraph

SIZES = (0.5e6, 2e6, 8e6, 30e6, 100e6, 300e6)  # parameters
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)  # at which products are timed; those of a tick lie between
PRODUCT_WIDTH, PRODUCT_COUNT = 384, 12  # a chain of products over one weight of 0.6 MB: in the second-level cache
CHAIN = 20  # links of a norm, a GELU and a turn each
CHAIN_SHAPES = ((1, 8), (1536, 64))  # next to no values: the cost of a node; as many as the video's: the cost of a value
MEASURED_S = 1.0  # the least time that one figure is measured for
LARGEST_READ = 1 << 30  # bytes; more is no slower

_ANY = ModelConfig(text=TextConfig(words=("", "a"), acts=("none", "b")))  # of which the chains take nothing


class Machine(Protocol):
    """What predictions are made from, measured, and what they are compared with."""

    name: str
    overlaps: bool  # computes while it waits for memory

    def read_gb_s(self, size: int) -> float:
        """Reading `size` bytes again and again."""

    def product_gflops(self, rows: int) -> float:
        """Products of that many rows with a weight in the cache."""

    def chain_ms(self, rows: int, width: int) -> float:
        """CHAIN times a norm, a GELU and a turn (halves swapped, scaled, shifted) of f32[rows, width]."""

    def tick_ms(self, c: ModelConfig) -> float:
        """One tick, with random weights."""


class Rates:
    """The rates of a machine, each measured once."""

    def __init__(self, machine: Machine) -> None:
        self.name, self._overlaps = machine.name, machine.overlaps
        self.gflops = [machine.product_gflops(rows) for rows in ROWS]
        small, large = CHAIN_SHAPES
        times = [machine.chain_ms(*shape) for shape in (small, large)]
        moved, nodes = [_chain_moved(*shape) for shape in (small, large)], len(_chain(*small).nodes)
        self.moved_per_ms = (moved[1] - moved[0]) / max(times[1] - times[0], 1e-6)  # elements
        self.node_ms = max(times[0] - moved[0] / self.moved_per_ms, 0.0) / nodes

    def predict_ms(self, work: Work, read_gb_s: float) -> float:
        """The tick: products by memory and arithmetic (their sum unless they overlap), the rest by its values, and all nodes' own cost."""
        per_ms = read_gb_s * 1e6  # bytes
        total = len(work.nodes) * self.node_ms
        for node in work.nodes:
            if node.is_product:
                flops_per_ms = float(np.interp(node.rows, ROWS, self.gflops)) * 1e6
                parts = 4 * (node.weight_size + node.ring + node.moved) / per_ms, node.flops / flops_per_ms
                total += max(parts) if self._overlaps else sum(parts)
            else:
                total += node.moved / self.moved_per_ms
        return total

    def __str__(self) -> str:
        products = ", ".join(f"{g:.0f} at {rows}" for rows, g in zip(ROWS, self.gflops, strict=True))
        return (
            f"{self.name}: products of n rows, GFLOP/s: {products}; "
            f"{4 * self.moved_per_ms / 1e6:.1f} GB/s between them; {1e3 * self.node_ms:.2f} µs a node"
        )


def validate(c: ModelConfig, sizes: tuple[float, ...] = SIZES) -> str:
    """The tables: this CPU with ONNX Runtime on one thread, and an NVIDIA GPU with PyTorch where there is one."""
    return "\n\n".join(table(machine, c, sizes) for machine in machines())


def machines() -> list[Machine]:
    """What there is to measure on."""
    found: list[Machine] = [CpuMachine()]
    if importlib.util.find_spec("torch"):
        from export.distill.torch_machine import TorchMachine, has_gpu

        if has_gpu():
            found.append(TorchMachine("cuda"))
    return found


def table(machine: Machine, c: ModelConfig, sizes: tuple[float, ...]) -> str:
    """Prediction, measurement and ratio for models of the shape of `c` with about `sizes` parameters."""
    rates = Rates(machine)
    lines = [
        str(rates),
        "",
        "| parameters | width | MFLOP | MB read | GB/s at that size | predicted ms | measured ms | predicted / measured |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size in sizes:
        config = of_size(c, size)
        print(f"{machine.name}: width {config.trunk.width}", file=sys.stderr, flush=True)
        work = count(config)
        weights = {node.weight: node.weight_size for node in work.products}
        speed = machine.read_gb_s(4 * sum(weights.values()) + work.ring_bytes)  # caches: of a memory as large as the model's
        predicted, measured = rates.predict_ms(work, speed), machine.tick_ms(config)
        read = 4 * sum(node.weight_size for node in work.products) + work.ring_bytes
        lines.append(
            f"| {work.parameters / 1e6:.1f} M | {config.trunk.width} | {work.flops / 1e6:.0f} | {read / 1e6:.1f} | {speed:.1f} "
            f"| {predicted:.2f} | {measured:.2f} | {predicted / measured:.2f} |"
        )
    return "\n".join(lines)


def timed_ms(run: Callable[[], object]) -> float:
    """Median of as many runs as fill MEASURED_S, at least five, after one that does not count."""
    run()
    times: list[float] = []
    while len(times) < 5 or sum(times) < MEASURED_S * 1e3:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return median(times)


class CpuMachine:
    """This CPU, as the loop uses it: ONNX Runtime on one thread, which computes or waits."""

    overlaps = False

    def __init__(self) -> None:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        self.name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())

    def read_gb_s(self, size: int) -> float:
        values = np.ones(min(size, LARGEST_READ) // 4, np.float32)
        return values.nbytes / timed_ms(values.max) / 1e6

    def product_gflops(self, rows: int) -> float:
        graph = TickGraph(_ANY, {"w.weight": _random((PRODUCT_WIDTH, PRODUCT_WIDTH))})
        x = "x"
        for _ in range(PRODUCT_COUNT):
            x = graph.linear(x, "w")
        return PRODUCT_COUNT * 2 * rows * PRODUCT_WIDTH**2 / self._run_ms(graph, x, (rows, PRODUCT_WIDTH)) / 1e6

    def chain_ms(self, rows: int, width: int) -> float:
        graph = _chain(rows, width)
        return self._run_ms(graph, graph.nodes[-1].output[0], (rows, width))

    def tick_ms(self, c: ModelConfig) -> float:
        with tempfile.TemporaryDirectory() as folder:
            with (Path(folder) / RandomGraph.WEIGHTS_NAME).open("wb") as file:
                model = RandomGraph(c, file).build()
            onnx.save(model, Path(folder) / "graph.onnx")
            engine = OnnxRuntimeEngine(Path(folder) / "graph.onnx", c)
        rng = np.random.default_rng(0)
        for name, values in engine.inputs.items():  # the memory full, and nothing zero that could be fast for that
            if values.dtype == np.float32:
                values[...] = 1.0 if name.endswith("_valid") else rng.normal(0, 0.1, values.shape)
        return timed_ms(engine.run)

    @staticmethod
    def _run_ms(graph: TickGraph, end: str, shape: tuple[int, ...]) -> float:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(_closed(graph, end, shape).SerializeToString(), options, providers=["CPUExecutionProvider"])
        inputs = {"x": _random(shape)}
        return timed_ms(lambda: session.run(None, inputs))


class RandomGraph(OutlineGraph):
    """The tick graph with random weights that never are in memory all at once: they go to `file` one by one."""

    WEIGHTS_NAME = "weights.bin"

    def __init__(self, c: ModelConfig, file: Any) -> None:
        super().__init__(c)
        self._file, self._rng = file, np.random.default_rng(0)

    def stored(self, name: str, shape: tuple[int, ...]) -> onnx.TensorProto:
        values = self._rng.standard_normal(shape, np.float32) * np.float32(shape[0] ** -0.5)
        tensor = super().stored(name, shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.WEIGHTS_NAME), ("offset", self._file.tell()), ("length", values.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        values.tofile(self._file)
        return tensor


def _chain(rows: int, width: int) -> TickGraph:
    """Norms, GELUs and turned halves, as the model has them, over input x f32[rows, width]."""
    graph = TickGraph(_ANY, {"norm.weight": np.ones(width, np.float32)})
    turn, shift = graph.const(np.full(width, 0.9)), graph.const(np.full(width, 0.1))
    x = "x"
    for _ in range(CHAIN):
        left, right = graph.split(graph.gelu(graph.norm(x, "norm")), [width // 2] * 2, axis=1)
        x = graph.add(graph.mul(graph.concat(right, left, axis=1), turn), shift)
    return graph


def _chain_moved(rows: int, width: int) -> int:
    """Elements that its nodes read and write, as `export.cost` counts them."""
    graph = _chain(rows, width)
    return moved_elements(_closed(graph, graph.nodes[-1].output[0], (rows, width)))


def _closed(graph: TickGraph, end: str, shape: tuple[int, ...]) -> onnx.ModelProto:
    """A chain from x to y, both f32 of that shape, as a model."""
    graph.output("y", end)
    graph.table = (Tensor("x", "input", "float32", shape, "1", "start"), Tensor("y", "output", "float32", shape, "1", "end"))
    return graph.model()


def _random(shape: tuple[int, ...]) -> Any:
    return np.random.default_rng(0).normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
