"""The engine of the board: TensorRT, on memory that pycuda allocates once."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from device.bundle import Signature, require_tensors
from device.config import ModelConfig
from device.engine.cuda import Block, DeviceMemory, Gpu, Graph, Mirror
from device.engine.interface import Buffers, EngineFailure, Memory, NoAccelerator
from device.engine.record import REMEDY, load_plan
from device.signature import Trust
from device.tensors import tensor_table


class TensorRtEngine:
    """A compiled engine; close it, or leave its `with` block, to hand the GPU's context back.

    `inputs` and `outputs` are pinned; state and update rows stay on the GPU. `device_ms` is the last launch's time there.
    With `trust`, an engine that neither a trusted key nor this machine's own `compile` vouches for is not even parsed. Raises
    NoAccelerator, StaleEngine, TensorMismatch, OutOfDeviceMemory or EngineFailure, and Unsigned, UnknownKey or BadSignature.
    """

    inputs: Buffers
    outputs: Buffers
    memory: Memory

    def __init__(self, folder: Path, config: ModelConfig, bundle_sha256: str, trust: Trust | None = None) -> None:
        trt = import_tensorrt()
        self.device_ms = 0.0
        with contextlib.ExitStack() as closing:
            self._gpu = Gpu()
            closing.callback(self._gpu.close)
            plan = load_plan(folder, bundle_sha256, config, str(trt.__version__), self._gpu.sm, trust)
            self._open(trt, plan, config, str(folder), closing)
            self._closing = closing.pop_all()

    def _open(self, trt: Any, plan: bytes, config: ModelConfig, where: str, closing: contextlib.ExitStack) -> None:
        gpu = self._gpu
        self._log = make_log(trt)
        runtime = trt.Runtime(self._log)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineFailure(f"{where}: TensorRT cannot deserialise the engine{self._log.words()}; {REMEDY}")
        require_io(trt, engine, config, where)
        rows = tensor_table(config)
        placed: list[Block] = []
        self._placed, self._where = placed, where

        def block(role: str) -> Block:
            made = Block(gpu, [row for row in rows if row.role == role])
            closing.callback(made.close)
            placed.append(made)
            return made

        def mirror(role: str) -> Mirror:
            made = Mirror(gpu, [row for row in rows if row.role == role])
            closing.callback(made.close)
            placed.append(made.block)
            return made

        self._in, self._out = mirror("input"), mirror("output")
        self.inputs, self.outputs = self._in.arrays, self._out.arrays
        self.memory = DeviceMemory(gpu, config, block("state"), block("update"))
        context = engine.create_execution_context()
        self._bind(context)
        self._runtime, self._engine, self._context = runtime, engine, context
        closing.callback(self._forget)
        self._graph: Graph | None = None
        self.run()  # TensorRT allocates in its first launch; the first tick must not, and a capture cannot
        with gpu.typed_errors("capturing the launch"):
            self._graph = Graph(gpu, self._enqueue)
        closing.callback(self._graph.close)
        self.run()

    def _bind(self, context: Any) -> None:
        """Raises EngineFailure; `context` is what create_execution_context gave."""
        if context is None:
            raise EngineFailure(
                f"{self._where}: TensorRT cannot make an execution context{self._log.words()}; "
                "stop other programs on the GPU and start again"
            )
        for made in self._placed:
            for name in made.offsets:
                if not context.set_tensor_address(name, made.address(name)):
                    raise EngineFailure(f"{self._where}: TensorRT refuses the address of '{name}'{self._log.words()}; {REMEDY}")

    @property
    def captured(self) -> bool:
        """Whether a launch is one CUDA graph."""
        return self._graph is not None and self._graph.captured

    def run(self) -> None:
        with self._gpu.typed_errors("running a tick"):
            self.device_ms = self._gpu.timed(self._enqueue if self._graph is None else self._graph.launch)

    def layer_ms(self, launches: int) -> dict[str, float]:
        """Mean ms on the GPU of each layer, by the name that the engine inspector gives it, over so many launches.

        TensorRT's profiler waits for each layer: the sum is more than a launch takes. It has a context of its own, so that the
        one that runs ticks stays as it is.
        """
        trt = import_tensorrt()
        context = self._engine.create_execution_context()
        self._bind(context)
        context.profiler = profiler = make_profiler(trt)
        with self._gpu.typed_errors("timing the layers"):
            for _ in range(launches):
                if not context.execute_async_v3(self._gpu.stream.handle):
                    raise EngineFailure(f"TensorRT did not launch the tick{self._log.words()}; start again, and {REMEDY} if it stays")
                self._gpu.stream.synchronize()
        return {name: total / launches for name, total in profiler.total_ms.items()}

    def _enqueue(self) -> None:
        self._in.upload()
        if not self._context.execute_async_v3(self._gpu.stream.handle):
            raise EngineFailure(f"TensorRT did not launch the tick{self._log.words()}; start again, and {REMEDY} if it stays")
        self._out.download()

    def _forget(self) -> None:
        """TensorRT's objects go in the order of their dependence, when the GPU is done with them and the context is still there."""
        with contextlib.suppress(self._gpu.driver.Error):
            self._gpu.stream.synchronize()
        self._context = None
        self._engine = None
        self._runtime = None

    def close(self) -> None:
        """Frees everything; `inputs` and `outputs` are empty from here on."""
        self._closing.close()

    def __enter__(self) -> TensorRtEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def import_tensorrt() -> Any:
    """The module; raises NoAccelerator."""
    try:
        import tensorrt as trt
    except ImportError as error:
        raise NoAccelerator(
            f"tensorrt cannot be imported ({error}); it comes with JetPack: make the environment with --system-site-packages"
        ) from error
    return trt


def make_log(trt: Any) -> Any:
    """A TensorRT logger that keeps the last errors for the text of ours, instead of printing them."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors = [*self.errors[-2:], msg]

        def words(self) -> str:
            return f" ({'; '.join(self.errors)})" if self.errors else ""

    return Log()


def make_profiler(trt: Any) -> Any:
    """A TensorRT profiler that adds up what each layer took."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.total_ms: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.total_ms[layer_name] = self.total_ms.get(layer_name, 0.0) + ms

    return Profiler()


def require_io(trt: Any, engine: Any, config: ModelConfig, where: str) -> None:
    """Raise TensorMismatch unless the engine's inputs and outputs are just the tensor table's."""
    inputs: dict[str, Signature] = {}
    outputs: dict[str, Signature] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
        found = inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs
        found[str(name)] = (kind, tuple(engine.get_tensor_shape(name)))
    rows = tensor_table(config)
    require_tensors(inputs, (row for row in rows if row.enters), f"{where}, inputs")
    require_tensors(outputs, (row for row in rows if not row.enters), f"{where}, outputs")
