"""Every node of every graph we ship is one that the ONNX parser of each supported TensorRT takes: operator, types, opset and limits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from export.checkpoint import read_checkpoint
from export.graph import build_front_end, build_graph

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE: dict[str, Any] = tomllib.loads(Path(__file__).with_name("parser_operators.toml").read_text(encoding="utf-8"))
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def refused(model: onnx.ModelProto, version: str) -> list[str]:
    """What that TensorRT's parser would not take, by node."""
    table = TABLE["versions"][version]
    takes = {name: set(TABLE["types"][kind]) for kind, names in TABLE["operators"][table].items() for name in names.split()}
    found = []
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    if not 9 <= opset <= TABLE["opset"][table]:
        found.append(f"opset {opset}")
    graph = shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    types |= {i.name: i.data_type for i in graph.initializer}
    edge = {v.name for v in (*graph.input, *graph.output)}
    for node in graph.node:
        where, fixed = f"{node.op_type} '{node.name}'", TABLE["constant_inputs"].get(node.op_type, [])
        if node.domain or node.op_type not in takes:
            found.append(f"{where}: no such operator")
            continue
        for place, name in enumerate(node.input):
            kind = TensorProto.DataType.Name(types[name]) if name else ""
            if place in fixed and name not in constants:
                found.append(f"{where}: input {place} must be an initializer")
            checked = kind and place not in fixed and not (node.op_type in QUANTIZERS and place > 0)
            if checked and kind not in takes[node.op_type]:
                found.append(f"{where}: input {place} is {kind}")
            if kind == "UINT8" and name not in edge:
                found.append(f"{where}: {kind} within the graph")
        if node.op_type in QUANTIZERS and len(node.input) > 2 and np.any(constants.get(node.input[2], 1)):
            found.append(f"{where}: the zero point must be 0")
        made = (name for name in node.output if types[name] == TensorProto.UINT8 and name not in edge)
        found += [f"{where}: UINT8 within the graph" for _ in made]
    return found


@pytest.fixture(scope="module")
def shipped(repository: Path) -> dict[str, onnx.ModelProto]:
    checkpoint = read_checkpoint(repository / "export" / "checkpoints" / "companion-nano")
    return {"tick": build_graph(checkpoint.config, checkpoint.weights), "front end": build_front_end(checkpoint.config)}


@pytest.mark.parametrize("version", TABLE["versions"])
@pytest.mark.parametrize("name", ["tick", "front end"])
def test_every_supported_parser_takes_the_graph(name: str, version: str, shipped: dict[str, onnx.ModelProto]) -> None:
    assert refused(shipped[name], version) == []


def test_the_table_is_of_the_versions_that_the_contract_is_tested_with() -> None:
    from test_api_contract import TENSORRT

    assert list(TABLE["versions"]) == list(TENSORRT)


def one_node(
    kind: str, inputs: dict[str, int], output: int, opset: int = 17, zero: int | None = None, **attributes: Any
) -> onnx.ModelProto:
    """A graph of a Relu-like single node between inputs and one output."""
    names = [*inputs, "zero"] if zero is not None else list(inputs)
    graph = helper.make_graph(
        [helper.make_node(kind, names, ["y"], name="it")],
        "g",
        [helper.make_tensor_value_info(name, kind, (4,)) for name, kind in inputs.items()],
        [helper.make_tensor_value_info("y", output, (4,))],
        [] if zero is None else [numpy_helper.from_array(np.array(zero, np.int8), "zero")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


F, U = TensorProto.FLOAT, TensorProto.UINT8


@pytest.mark.parametrize(("model", "said"), [
    (lambda: one_node("Hardmax", {"x": F}, F), "no such operator"),
    (lambda: one_node("Relu", {"x": F}, F, opset=25), "opset 25"),
    (lambda: one_node("Sqrt", {"x": TensorProto.DOUBLE}, TensorProto.DOUBLE), "input 0 is DOUBLE"),
    (lambda: one_node("CumSum", {"x": F, "axis": TensorProto.INT64}, F), "input 1 must be an initializer"),
    (lambda: one_node("QuantizeLinear", {"x": F, "scale": F}, TensorProto.INT8, zero=3), "zero point"),
])  # fmt: skip
def test_what_a_parser_refuses_is_found(model: Callable[[], onnx.ModelProto], said: str) -> None:
    assert any(said in line for line in refused(model(), "10.3")), refused(model(), "10.3")


def test_uint8_inside_is_found() -> None:
    nodes = [helper.make_node("Cast", ["x"], ["u"], name="to", to=U), helper.make_node("Cast", ["u"], ["y"], name="from", to=F)]
    ends = [helper.make_tensor_value_info(name, F, (4,)) for name in ("x", "y")]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 17)])
    assert any("UINT8 within" in line for line in refused(model, "11.4"))
