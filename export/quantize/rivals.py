"""Three ways to int8 on the same checkpoint and the same calibration set: NVIDIA ModelOpt, ONNX Runtime, and our own placement.

`python -m export.quantize.rivals FLOAT_BUNDLE CALIBRATION DATA [ROW …]` prints the table of export/README.md, or the rows of these names.
ModelOpt is no dependency of anything else: install nvidia-modelopt into an environment of its own, or its rows are left out.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import onnx

from device.bundle import Bundle
from device.engine import OnnxRuntimeEngine
from export.quantize.closed_loop import Board, Life, Pair, live, tasks
from export.quantize.compare import ProbeEngine, compare
from export.quantize.placement import find_layers, place
from export.quantize.quantize import int8_precisions, measure
from export.quantize.ranges import METHODS, choose
from export.quantize.recordings import DataSet, outputs_of
from export.scoreboard.board import Player

TICKS = 100  # that each is calibrated on: the rivals keep every intermediate tensor
COMPARED_TICKS = 384
LAUNCHES = 100
SCENES = 2  # in closed loop, for each group of them

Make = Callable[[Path], onnx.ModelProto]  # from the path of the float graph


class Reader:
    """The set as ONNX Runtime's CalibrationDataReader: whole input tables, rings included, from the float graph's own run."""

    def __init__(self, model: onnx.ModelProto, data: DataSet) -> None:
        self._engine, self._data = ProbeEngine(model, data.config), data
        self.rewind()

    def rewind(self) -> None:
        self._ticks = self._tables()

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._ticks, None)

    def get_first(self) -> dict[str, np.ndarray]:
        return next(self._tables())

    def _tables(self) -> Iterator[dict[str, np.ndarray]]:
        kept: dict[str, np.ndarray] = {}
        # The table as it was at the launch, before the rings took what came out: one tick behind is as good for ranges.
        for _ in self._data.play(self._engine, TICKS):
            kept = {name: values.copy() for name, values in self._engine.inputs.items()}
            yield kept


def own(data: DataSet, method: str) -> Make:
    def make(path: Path) -> onnx.ModelProto:
        model = onnx.load(path)
        layers = find_layers(model)
        ranges = {name: choose(histogram, method) for name, histogram in measure(model, layers, data).items()}
        return place(model, int8_precisions(layers, ranges), {name: found.scale for name, found in ranges.items()})

    return make


def onnx_runtime(data: DataSet, method: str) -> Make:
    def make(path: Path) -> onnx.ModelProto:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        model = onnx.load(path)
        wanted = [node for layer in find_layers(model) for node in layer.nodes]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "graph.onnx"
            quantize_static(
                *(path, out, Reader(model, data)),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=wanted,
                op_types_to_quantize=["MatMul"],
                calibrate_method=CalibrationMethod[method],
                extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
            )
            return onnx.load(out)

    return make


def modelopt(data: DataSet, method: str, ours: bool) -> Make:
    """`ours`: only the nodes that our own placement quantizes; otherwise those that it chooses itself."""

    def make(path: Path) -> onnx.ModelProto:
        from modelopt.onnx.quantization import quantize

        model = onnx.load(path)
        wanted = {node for layer in find_layers(model) for node in layer.nodes}
        others = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.name not in wanted]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "graph.onnx"
            quantize(
                str(path),
                quantize_mode="int8",
                calibration_data_reader=Reader(model, data),
                calibration_method=method,
                calibration_eps=["cpu"],
                op_types_to_quantize=["MatMul"] if ours else None,
                nodes_to_exclude=others if ours else None,
                high_precision_dtype="fp32",
                output_path=str(out),
            )
            return onnx.load(out)

    return make


class Reference:
    """The float graph, and all that the others are held against."""

    def __init__(self, bundle: Bundle, data: DataSet, people: Path) -> None:
        self.path, self.data = bundle.graph, data
        self.model = onnx.load(bundle.graph)
        self.ticks = outputs_of(self.model, data, COMPARED_TICKS, "float")
        self._player = Player(bundle.path, people, "test", 0, ())
        self._tasks = tasks([], SCENES)
        self.lives = self.live(bundle.graph)

    def live(self, graph: Path) -> list[Life]:
        """`graph` in every scene."""
        config = self.data.config
        engine = OnnxRuntimeEngine(graph, config)
        return [live(self._player.scene(task), config, engine, task.number) for task in self._tasks]

    def pairs(self, graph: Path) -> list[Pair]:
        found = zip(self._tasks, zip(self.lives, self.live(graph), strict=True), strict=True)
        return [Pair(task, lives) for task, lives in found]


def ways(data: DataSet) -> dict[str, Make]:
    """Every way that this environment has."""
    makers: dict[str, Make] = {f"own placement, {method}": own(data, method) for method in ("auto", *METHODS)}
    makers |= {f"ONNX Runtime, {method}": onnx_runtime(data, method) for method in ("MinMax", "Entropy", "Percentile")}
    if importlib.util.find_spec("modelopt"):
        makers |= {f"ModelOpt, its own nodes, {method}": modelopt(data, method, False) for method in ("max", "entropy")}
        makers |= {f"ModelOpt, our nodes, {method}": modelopt(data, method, True) for method in ("max", "entropy")}
    return makers


HEAD = (
    "| int8 by | Q/DQ nodes | points lost | say alike, % | act alike, % | probability moved, % | speech, dB | engine, × float |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|"
)


def main(source: Path, calibration: Path, people: Path, *names: str) -> None:
    """Print the table; engine times are ratios to the float graph, launched by turns with it."""
    bundle = Bundle.open(source)
    data = DataSet.open(calibration, bundle.config)
    every = ways(data)
    if unknown := set(names) - set(every):
        sys.exit(f"no such row: {'; '.join(sorted(unknown))}; this environment has {'; '.join(every)}")
    reference = Reference(bundle, data, people)
    print(HEAD)
    for name in names or every:
        print(row(name, every[name], reference), flush=True)


def row(name: str, make: Make, reference: Reference) -> str:
    """One way's row of the table."""
    data = reference.data
    try:
        with tempfile.TemporaryDirectory() as folder:  # ModelOpt has been seen to change the file that it was given
            made = make(Path(shutil.copy(reference.path, folder)))
            d = compare(reference.ticks, outputs_of(made, data, COMPARED_TICKS, name), data.config)
            graph = Path(folder) / "made.onnx"
            onnx.save(made, graph)
            loss, low, high = Board(reference.pairs(graph)).loss()
    except Exception as error:  # noqa: BLE001 - a rival that cannot is a row of the table
        return f"| {name} | {type(error).__name__}: {str(error).splitlines()[0][:120]} | | | | | | |"
    nodes = sum(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in made.graph.node)
    return (
        f"| {name} | {nodes} | {loss:+.1f} ({low:+.1f} … {high:+.1f}) | {100 * d.say_agreement:.2f} | {100 * d.act_agreement:.2f} "
        f"| {100 * d.moved:.3f} | {d.mel_db:.2f} | {ratio(reference.model, made, data):.2f} |"
    )


def ratio(reference: onnx.ModelProto, other: onnx.ModelProto, data: DataSet) -> float:
    """Median engine time of `other` in units of `reference`'s, launched by turns."""
    engines = [ProbeEngine(model, data.config) for model in (reference, other)]
    times: list[list[float]] = [[], []]
    for _ in range(LAUNCHES):
        for engine, kept in zip(engines, times, strict=True):
            start = time.perf_counter()
            engine.run()
            kept.append(time.perf_counter() - start)
    return median(times[1]) / median(times[0])


if __name__ == "__main__":
    source, calibration, people, *rows = sys.argv[1:]
    main(Path(source), Path(calibration), Path(people), *rows)
