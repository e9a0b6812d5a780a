"""TensorRT's builder: an ONNX graph in, a serialised engine with its timing cache and its layers out; one code path for 10.3 to 11."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from device.engine.tensorrt import import_tensorrt, make_log
from export.errors import ExportError


class CompileError(ExportError):
    """An engine that could not be built or did not prove itself; the text ends with the remedy."""


class Level(NamedTuple):
    """What differs between the versions of TensorRT that are supported."""

    since: tuple[int, int]
    strong_types_by_flag: bool  # from 11 on every network is strongly typed, and the flag is ignored
    lacks: tuple[str, ...]  # precisions whose types it does not have


LEVELS = (
    Level((10, 3), True, ("nvfp4",)),  # JetPack 6
    Level((10, 13), True, ()),  # JetPack 7.0 and 7.1
    Level((10, 16), True, ()),  # JetPack 7.2
    Level((11, 0), False, ()),  # JetPack 7.2.2
)


class Built(NamedTuple):
    plan: bytes
    timing_cache: bytes
    layers: list[dict[str, Any]]  # as the engine inspector gives them


def find_level(version: str) -> Level:
    """The newest level that is not newer than `version`; raises CompileError."""
    known = tuple(int(part) for part in version.split(".")[:2])
    fitting = [level for level in LEVELS if level.since <= known]
    if not fitting or known[0] > LEVELS[-1].since[0]:
        raise CompileError(f"TensorRT {version} is not supported; install one from 10.3 on, before 12")
    return fitting[-1]


def build_plan(graph: bytes, precision: str, timing_cache: bytes, show: Callable[[str, int, int], None]) -> Built:
    """Build for the GPU of this machine; `show` gets phase, steps done and steps of the phase. Raises CompileError, NoAccelerator."""
    trt = import_tensorrt()
    level = find_level(str(trt.__version__))
    if precision in level.lacks:
        raise CompileError(f"TensorRT {trt.__version__} has no {precision}; quantize to another precision or update JetPack")
    log = make_log(trt)
    builder = trt.Builder(log)
    if builder is None:
        raise CompileError(f"TensorRT cannot make a builder{log.words()}; check the GPU with nvidia-smi")
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if level.strong_types_by_flag else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph):
        raise CompileError("; ".join(_complaints(parser)) + "; export a graph without them, or update JetPack")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32: lower precision comes from the graph alone
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the inspector to tell the precisions
    config.progress_monitor = monitor = _make_monitor(trt, show)
    cache = config.create_timing_cache(timing_cache)
    config.set_timing_cache(cache, False)  # one of another version or board is not taken
    serialized = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if serialized is None:
        raise CompileError(f"TensorRT could not build the engine{log.words()}; stop other programs on the board and compile again")
    plan = bytes(serialized)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise CompileError(f"TensorRT cannot read the engine that it built{log.words()}; compile again")
    inspector = engine.create_engine_inspector()
    information = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    finished = config.get_timing_cache()
    return Built(plan, bytes(finished.serialize()), information["Layers"])


def _complaints(parser: Any) -> list[str]:
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        found.append(f"TensorRT's parser does not take {error.node_operator()} '{error.node_name()}': {error.desc()}")
    return found or ["TensorRT's parser does not take the graph"]


def _make_monitor(trt: Any, show: Callable[[str, int, int], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Called from the builder's threads; an exception must not leave it, so an interrupt becomes a polite stop."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                show(phase_name, step + 1, self._steps.get(phase_name, step + 1))
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def show_bar(phase: str, done: int, steps: int) -> None:
    """A bar on one line of standard error."""
    filled = 30 * done // max(steps, 1)
    print(f"\r[{'#' * filled:30}] {done}/{steps} {phase[:60]:60}", end="", file=sys.stderr, flush=True)
