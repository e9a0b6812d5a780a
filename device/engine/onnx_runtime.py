"""The engine that runs anywhere: ONNX Runtime on the CPU."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from device.bundle import Signature, require_tensors
from device.config import ModelConfig
from device.engine.interface import HostMemory, Memory, allocate
from device.tensors import TensorMismatch, tensor_table

CPU_INFO = Path("/proc/cpuinfo")
_DTYPES = {"tensor(float)": "float32", "tensor(int32)": "int32", "tensor(uint8)": "uint8"}  # ONNX Runtime's names


class OnnxRuntimeEngine:
    """The tick graph on ONNX Runtime's CPU provider. Raises TensorMismatch if the graph is not that of the tensor table."""

    def __init__(self, graph: str | Path, config: ModelConfig, threads: int = 1) -> None:
        try:
            session = open_session(str(graph), threads)
            inputs, outputs = _signatures(session.get_inputs()), _signatures(session.get_outputs())  # whose names may not be UTF-8
        except Exception as error:  # ONNX Runtime's own types are private
            raise TensorMismatch(f"{graph} is not a graph that ONNX Runtime can load: {error}; export the bundle again") from error
        rows = tensor_table(config)
        require_tensors(inputs, (r for r in rows if r.enters), f"{graph}, inputs")
        require_tensors(outputs, (r for r in rows if not r.enters), f"{graph}, outputs")
        self.inputs, self.outputs = allocate(config)
        self.memory: Memory = HostMemory(config, self.inputs, self.outputs)
        self._session, self._binding = session, session.io_binding()
        for name, array in self.inputs.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in self.outputs.items():
            self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        try:
            self.run()  # the first run allocates; the first tick must not
        except Exception as error:  # such as a node that asks for more memory than there is
            raise TensorMismatch(f"{graph} is not a graph that ONNX Runtime can run: {error}; export the bundle again") from error

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)


def open_session(graph: str | bytes, threads: int = 1) -> Any:
    """An onnxruntime.InferenceSession on the CPU for a tick graph, a file's path or its content, float or quantized."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only; they also raise
    # A spinning thread burns a core between ticks for microseconds within one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Decaying states reach denormal numbers, which cost a hundred times the time of normal ones.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    # Where only the weights have few bits, activations must not be rounded behind our back.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    if integers_saturate():
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # the same products of the same rounded values, in float32
    # A MatMul and its bias fused into a Gemm would keep a quantized product from running on integers: 16.9 ms a tick, not 4.4.
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"])


def integers_saturate() -> bool:
    """Whether int8 products are added up in pairs of 16 bits, which overflow: on x86-64 without VNNI.

    Source: onnxruntime.ai, Quantize ONNX models, "When and why do I need to try U8U8?". Its own remedy, the option
    session.x64quantprecision, refuses weights that serve several products, as the flow head's do (ONNX Runtime 1.32).
    Where the processor cannot be asked, it is taken to have none.
    """
    if platform.machine() != "x86_64":
        return False
    try:
        return "vnni" not in CPU_INFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return True


def _signatures(values: list[Any]) -> dict[str, Signature]:
    return {v.name: (_DTYPES.get(v.type, v.type), tuple(v.shape)) for v in values}
