"""Engines: one launch computes one tick, on buffers that are allocated once and never move."""

from device.engine.interface import (
    Buffers,
    Engine,
    EngineError,
    EngineFailure,
    HostMemory,
    Memory,
    NoAccelerator,
    OutOfDeviceMemory,
    StaleEngine,
    allocate,
)
from device.engine.onnx_runtime import OnnxRuntimeEngine

# TensorRT's engine is not here: device.engine.tensorrt is imported where that backend is chosen.
__all__ = [
    "Buffers",
    "Engine",
    "EngineError",
    "EngineFailure",
    "HostMemory",
    "Memory",
    "NoAccelerator",
    "OnnxRuntimeEngine",
    "OutOfDeviceMemory",
    "StaleEngine",
    "allocate",
]
