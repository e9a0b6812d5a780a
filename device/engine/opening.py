"""The engine that was chosen: TensorRT's where there is a folder of it, otherwise ONNX Runtime."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from device.bundle import Bundle
from device.engine.interface import Engine
from device.engine.onnx_runtime import OnnxRuntimeEngine
from device.signature import Trust


def open_engine(folder: Path | None, bundle: Bundle, trust: Trust | None, stack: ExitStack) -> Engine:
    """The TensorRT engine in `folder`, or without one ONNX Runtime on the bundle's graph."""
    if folder is None:
        return OnnxRuntimeEngine(bundle.graph, bundle.config)
    from device.engine.tensorrt import TensorRtEngine

    return stack.enter_context(TensorRtEngine(folder, bundle.config, bundle.digest, trust))
