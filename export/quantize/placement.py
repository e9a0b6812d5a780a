"""Where Q/DQ pairs and casts go: the float graph in, the same graph with weights and activations of fewer bits out.

Only products with weights are touched. TensorRT fuses an int8 product when both of its inputs come straight from a
DequantizeLinear, and ONNX Runtime computes the same integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.errors import ExportError

Precision = Literal["int8", "int8-weights", "int4-weights", "fp16", "float"]
INT4_BLOCK = 128  # values of one column that share a scale, or the largest number below that divides the column

OPSET = 19  # the ceiling of TensorRT 10.3's parser
_OPSET_INT4, _IR_INT4 = 21, 10  # blocks in DequantizeLinear, and int4 itself, came with these

# Products that stay in float32 whatever is asked for, by node, and why.
STAYS_FLOAT = {
    "audio/dmel/*": "a transform whose levels are compared with fixed thresholds",
    "text/clock": "sixteen phases: nothing to gain, and time to lose",
    "flow/step*/leave": "the flow head's last layer",
    "vocoder/out": "the vocoder's last layer",
    "vocoder/first": "0.4 % of the weights, and by the scan half of what the speech loses",
    "vocoder/second": "the same",
    "vocoder/gains/*": "a filter bank",
    "vocoder/filter/*": "transforms of the waveform itself",
}


class QuantizeError(ExportError):
    """A graph that cannot be quantized as asked; the text ends with the remedy."""


@dataclass(frozen=True)
class Layer:
    """Products that share one weight; `inputs` are the activations they multiply, node by node."""

    name: str  # of the weight
    shape: tuple[int, int]
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]


def find_layers(model: onnx.ModelProto, everything: bool = False) -> list[Layer]:
    """What may be quantized, in the order of the graph; `everything`: also what STAYS_FLOAT, but for the transforms."""
    shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        stays = any(fnmatchcase(node.name, pattern) for pattern in STAYS_FLOAT)
        trained = node.op_type == "MatMul" and node.input[1].endswith(".weight") and len(shapes.get(node.input[1], ())) == 2
        if trained and (everything or not stays):
            found.setdefault(node.input[1], []).append(node)
    return [
        Layer(name, (shapes[name][0], shapes[name][1]), tuple(n.name for n in nodes), tuple(n.input[0] for n in nodes))
        for name, nodes in found.items()
    ]


def place(model: onnx.ModelProto, precisions: Mapping[str, Precision], scales: Mapping[str, float]) -> onnx.ModelProto:
    """A copy of `model` whose layers (by weight) have the `precisions`; `scales` are those of int8 activations, by tensor.

    Raises QuantizeError for an activation without a scale.
    """
    placed = _Placed(model, scales, _OPSET_INT4 if "int4-weights" in precisions.values() else OPSET)
    weights = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer if i.name in precisions}
    for node in model.graph.node:
        precision = precisions.get(node.input[1], "float") if node.op_type == "MatMul" else "float"
        if precision == "float":
            placed.keep(node)
        elif precision == "fp16":
            placed.halve(node, weights[node.input[1]])
        else:
            placed.quantize(node, weights[node.input[1]], precision)
    return placed.finish()


class _Placed:
    """The graph as it grows; every weight and every activation is converted once, however many products use it."""

    def __init__(self, model: onnx.ModelProto, scales: Mapping[str, float], opset: int) -> None:
        self._model, self._scales, self._opset = model, scales, opset
        self._nodes: list[onnx.NodeProto] = []
        self._widened: list[onnx.NodeProto] = []
        self._new: dict[str, onnx.TensorProto] = {}
        self._made: set[str] = set()

    def keep(self, node: onnx.NodeProto) -> None:
        kept = onnx.NodeProto()
        kept.CopyFrom(node)
        axes = next((a for a in node.attribute if a.name == "axes"), None)
        if node.op_type == "ReduceMean" and axes is not None:  # an input since opset 18
            kept.attribute.remove(axes)
            name = f"axes{list(axes.ints)}"
            self._constant(name, np.array(axes.ints, np.int64))
            kept.input.append(name)
        self._nodes.append(kept)

    def halve(self, node: onnx.NodeProto, weight: NDArray[np.float32]) -> None:
        x, name = self._cast(node.input[0], TensorProto.FLOAT16), f"{node.input[1]}/fp16"
        self._constant(name, weight.astype(np.float16))
        self._op("MatMul", [x, name], f"{node.name}/fp16", name=node.name)
        self._op("Cast", [f"{node.name}/fp16"], node.output[0], name=f"{node.name}/float", to=TensorProto.FLOAT)

    def quantize(self, node: onnx.NodeProto, weight: NDArray[np.float32], precision: Precision) -> None:
        x, name = node.input[0], node.input[1]
        if precision == "int8":
            x = self._activation(x, node.name)
        whole = f"{name}/dequantized"
        if whole not in self._made:
            if precision == "int4-weights":
                quantized, scale = quantize_int4(weight)
                attributes: dict[str, Any] = {"axis": 0, "block_size": len(weight) // len(scale)}
            else:
                quantized, scale = quantize_int8(weight)
                attributes = {"axis": 1}
            self._constant(f"{name}/{precision}", quantized)
            self._constant(f"{name}/scale", scale)
            self._op("DequantizeLinear", [f"{name}/{precision}", f"{name}/scale"], whole, **attributes)
        self._op("MatMul", [x, whole], node.output[0], name=node.name)

    def finish(self) -> onnx.ModelProto:
        graph = self._model.graph
        used = {name for node in self._nodes for name in node.input}
        kept = [self._stored(i) for i in graph.initializer if i.name in used]
        nodes = [*self._widened, *self._nodes]
        made = helper.make_graph(nodes, graph.name, graph.input, graph.output, [*kept, *self._new.values()])
        ir = max(self._model.ir_version, _IR_INT4 if self._opset == _OPSET_INT4 else 9)
        model = helper.make_model(
            made, opset_imports=[helper.make_opsetid("", self._opset)], ir_version=ir, producer_name=self._model.producer_name
        )
        onnx.checker.check_model(model, full_check=True)
        return model

    def _stored(self, weight: onnx.TensorProto) -> onnx.TensorProto:
        """Trained matrices and tables that stay float32 lie in the file as float16; whoever loads the graph folds the cast away."""
        if len(weight.dims) != 2 or not weight.name.endswith(".weight"):
            return weight
        name = f"{weight.name}/fp16"
        self._widened.append(helper.make_node("Cast", [name], [weight.name], name=f"{weight.name}/widened", to=TensorProto.FLOAT))
        return numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), name)

    def _activation(self, x: str, node: str) -> str:
        if x not in self._scales:
            raise QuantizeError(f"node '{node}': no range is known for its input '{x}'; calibrate with this bundle's own float graph")
        whole = f"{x}/dequantized"
        if whole not in self._made:
            self._constant(f"{x}/scale", np.float32(self._scales[x]))
            self._constant("zero", np.int8(0))
            self._op("QuantizeLinear", [x, f"{x}/scale", "zero"], f"{x}/int8")
            self._op("DequantizeLinear", [f"{x}/int8", f"{x}/scale", "zero"], whole)
        return whole

    def _cast(self, x: str, to: int) -> str:
        cast = f"{x}/fp16"
        if cast not in self._made:
            self._op("Cast", [x], cast, to=to)
        return cast

    def _constant(self, name: str, value: np.ndarray | np.generic) -> None:
        if name not in self._new:
            self._new[name] = numpy_helper.from_array(np.asarray(value), name)

    def _op(self, kind: str, inputs: list[str], output: str, name: str = "", **attributes: Any) -> None:
        self._made.add(output)
        self._nodes.append(helper.make_node(kind, inputs, [output], name=name or output, **attributes))


def quantize_int8(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Weights [in, out] as int8 and the scale of each output f32[out]; symmetric, so no zero point."""
    peak = np.abs(weight).max(axis=0)
    scale = (np.where(peak > 0, peak, 1.0) / 127).astype(np.float32)
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale


def quantize_int4(weight: NDArray[np.float32]) -> tuple[np.ndarray, NDArray[np.float32]]:
    """Weights [in, out] as int4 and the scale of each block f32[blocks, out]."""
    rows, columns = weight.shape
    block = next(size for size in range(min(INT4_BLOCK, rows), 0, -1) if rows % size == 0)
    blocks = weight.reshape(-1, block, columns)
    peak = np.abs(blocks).max(axis=1, keepdims=True)
    scale = (np.where(peak > 0, peak, 1.0) / 7).astype(np.float32)
    quantized = np.clip(np.rint(blocks / scale), -7, 7).reshape(rows, columns).astype(ml_dtypes.int4)
    return quantized, scale[:, 0]
