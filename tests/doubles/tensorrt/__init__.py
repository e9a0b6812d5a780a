"""A double of the used part of tensorrt: a plan is an ONNX graph, executed by ONNX Runtime on the double of pycuda's memory.

Names with an underscore are for the tests.
"""

from __future__ import annotations

import enum
import json
import time
from typing import Any

import numpy as np
from pycuda import driver as _cuda

from device.engine.onnx_runtime import open_session as _open_session

__version__ = "10.3.0"

_MAGIC = b"double of a TensorRT engine\n"
_fail_launch_from: int | None = None  # the number of the first launch that fails
_launches = 0
_refused: ParserError | None = None  # by the parser
_build_error: str | None = None
_stall = False  # in the middle of a build
_layers: list[dict[str, Any]] = [{"Name": "all", "LayerType": "kgen", "Inputs": [{"Format/Datatype": "Row major linear FP32"}]}]
_layer_ms = 0.25  # what the profiler is told of each
_creation_flags: list[int] = []
_given_caches: list[bytes] = []


class DataType(enum.Enum):
    FLOAT = "float32"
    INT32 = "int32"
    UINT8 = "uint8"


_ONNX_RUNTIME = {"tensor(float)": DataType.FLOAT, "tensor(int32)": DataType.INT32, "tensor(uint8)": DataType.UINT8}


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


def nptype(trt_type: DataType) -> type:
    return np.dtype(trt_type.value).type


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1

    def __init__(self) -> None:
        pass

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        raise NotImplementedError


class IProfiler:
    def __init__(self) -> None:
        pass

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        _cuda._need_context()
        if not serialized_engine.startswith(_MAGIC):
            self._logger.log(ILogger.Severity.ERROR, "deserializeCudaEngine: magic tag does not match")
            return None
        return ICudaEngine(serialized_engine[len(_MAGIC) :], self._logger)


class ICudaEngine:
    def __init__(self, graph: bytes, logger: ILogger) -> None:
        import onnxruntime  # here, and first: no module of ours may ask for it where TensorRT runs

        self._session: onnxruntime.InferenceSession = _open_session(graph)  # as OnnxRuntimeEngine's, so that every bit can be equal
        inputs = [(value, TensorIOMode.INPUT) for value in self._session.get_inputs()]
        outputs = [(value, TensorIOMode.OUTPUT) for value in self._session.get_outputs()]
        self._io = {value.name: (value, mode) for value, mode in (*inputs, *outputs)}
        self._logger = logger

    @property
    def num_io_tensors(self) -> int:
        return len(self._io)

    def get_tensor_name(self, index: int) -> str:
        return list(self._io)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self._io[name][1]

    def get_tensor_dtype(self, name: str) -> DataType:
        return _ONNX_RUNTIME[self._io[name][0].type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._io[name][0].shape)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()

    def create_execution_context(self) -> IExecutionContext | None:
        if _cuda._device_bytes_left < 1 << 16:  # activations
            self._logger.log(ILogger.Severity.ERROR, "createExecutionContext: out of memory")
            return None
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._binding = engine, engine._session.io_binding()
        self.profiler: IProfiler | None = None
        self._addressed: set[str] = set()

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._io or memory % 256:
            return False
        shape, kind = self._engine.get_tensor_shape(name), np.dtype(nptype(self._engine.get_tensor_dtype(name)))
        _cuda._device(memory, int(np.prod(shape)) * kind.itemsize)
        bind = self._binding.bind_input if self._engine.get_tensor_mode(name) == TensorIOMode.INPUT else self._binding.bind_output
        bind(name, "cpu", 0, kind, shape, memory)
        self._addressed.add(name)
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        global _launches
        _launches += 1
        if self._addressed != set(self._engine._io) or (_fail_launch_from is not None and _launches >= _fail_launch_from):
            self._engine._logger.log(ILogger.Severity.ERROR, "enqueueV3: launch failed")
            return False
        run: Any = self._engine._session.run_with_iobinding
        _cuda._streams[stream_handle]._put(lambda: run(self._binding))
        if self.profiler is not None:
            for layer in _layers:
                self.profiler.report_layer_time(layer["Name"], _layer_ms)
        return True


class LayerInformationFormat(enum.Enum):
    JSON = 1


class EngineInspector:
    def get_engine_information(self, format: LayerInformationFormat) -> str:
        return json.dumps({"Layers": _layers, "Bindings": []})


class BuilderFlag(enum.Enum):
    TF32 = 7


class ProfilingVerbosity(enum.Enum):
    DETAILED = 2


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class IHostMemory:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def __bytes__(self) -> bytes:
        return self._data


class ITimingCache:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> IHostMemory:
        return IHostMemory(self._data + b"timed;")


class IProgressMonitor:
    def __init__(self) -> None:
        pass

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
        raise NotImplementedError

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError


class IBuilderConfig:
    def __init__(self) -> None:
        self.progress_monitor: IProgressMonitor | None = None
        self.profiling_verbosity: ProfilingVerbosity | None = None
        self._cache: ITimingCache | None = None

    def clear_flag(self, flag: BuilderFlag) -> None:
        pass

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        _given_caches.append(serialized_timing_cache)
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class INetworkDefinition:
    def __init__(self) -> None:
        self._graph = b""


class ParserError:
    def __init__(self, operator: str, node: str, words: str) -> None:
        self._told = (operator, node, words)

    def node_operator(self) -> str:
        return self._told[0]

    def node_name(self) -> str:
        return self._told[1]

    def desc(self) -> str:
        return self._told[2]


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network

    def parse(self, model: bytes) -> bool:
        self._network._graph = model
        return _refused is None

    @property
    def num_errors(self) -> int:
        return int(_refused is not None)

    def get_error(self, index: int) -> ParserError:
        assert _refused is not None
        return _refused


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        _creation_flags.append(flags)
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        monitor = config.progress_monitor
        assert monitor is not None and config.profiling_verbosity == ProfilingVerbosity.DETAILED
        monitor.phase_start("Building", "", 4)
        for step in range(4):
            if not monitor.step_complete("Building", step):
                return None
            while _stall and step == 1:
                time.sleep(0.01)
        monitor.phase_finish("Building")
        if _build_error:
            self._logger.log(ILogger.Severity.ERROR, _build_error)
            return None
        return IHostMemory(_MAGIC + network._graph)
