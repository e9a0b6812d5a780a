"""Quantization: ranges, placement, the bundle that comes out, and the proof that the board asks for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper
from quantized import float_bundle, float_model, lively, write_set
from ticks import SMALL

from device import cli as device_cli
from device.bundle import GRAPH_NAME, MANIFEST_NAME, Bundle, Unproven, require_proof
from device.engine import OnnxRuntimeEngine, onnx_runtime
from export import cli
from export.quantize import PRECISIONS
from export.quantize.compare import Difference, ProbeEngine, mel_distortion
from export.quantize.gates import GATES, judge, spent
from export.quantize.placement import OPSET, STAYS_FLOAT, Layer, QuantizeError, find_layers, place, quantize_int4, quantize_int8
from export.quantize.quantize import INPUT_ERROR, int8_precisions, measure
from export.quantize.ranges import BINS, METHODS, Histogram, choose
from export.quantize.recordings import DataSet, outputs_of
from export.quantize.sensitivity import keep_under_budget, scan

# Whole numbers over 10: ONNX Runtime turns denormal numbers off in this process, which hypothesis' floats need.
WEIGHTS = hnp.arrays(np.int16, (24, 3), elements=st.integers(-1000, 1000)).map(lambda whole: (whole / 10).astype(np.float32))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return DataSet.open(write_set(tmp_path_factory.mktemp("calibration") / "set", [lively()]), SMALL)


@pytest.fixture(scope="module")
def scales(data: DataSet) -> dict[str, float]:
    model = float_model()
    return {name: choose(histogram).scale for name, histogram in measure(model, find_layers(model), data).items()}


# --- ranges -----------------------------------------------------------------------------------------------------------------


def test_a_histogram_keeps_every_count_when_its_range_grows() -> None:
    histogram = Histogram()
    for values in (np.array([0.5, -1.0]), np.array([7.0, 0.0]), np.array([-100.0])):
        histogram.add(values.astype(np.float32))
    assert histogram.counts.sum() == 5 and histogram.peak == 100.0 and histogram.top >= 100.0
    assert histogram.counts[: BINS // 64].sum() == 3 and histogram.counts[-BINS // 4 :].sum() == 1


def test_an_outlier_is_clipped_by_percentile_and_kept_by_max() -> None:
    histogram = Histogram()
    histogram.add(np.append(np.random.default_rng(0).standard_normal(200_000), 60.0).astype(np.float32))
    limits = {name: choose(histogram, name).limit for name in METHODS}
    assert limits["max"] == 60.0 and 3.5 < limits["percentile"] < 6.0 and limits["entropy"] < 60.0


def test_auto_takes_the_range_that_loses_least() -> None:
    histogram = Histogram()
    histogram.add(np.append(np.random.default_rng(0).standard_normal(200_000), 60.0).astype(np.float32))
    found = choose(histogram)
    assert found.tried[found.method]["error"] == min(each["error"] for each in found.tried.values()) < found.tried["max"]["error"]
    uniform = Histogram()
    uniform.add(np.random.default_rng(0).uniform(-1, 1, 200_000).astype(np.float32))
    assert choose(uniform).limit > 0.99


def test_the_error_of_a_histogram_is_that_of_int8() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    histogram = Histogram()
    histogram.add(values)
    step = 3.0 / 127
    true = np.square(values - np.clip(np.rint(values / step), -127, 127) * step).mean() / np.square(values).mean()
    assert histogram.error(3.0) == pytest.approx(true, rel=0.02)


def test_a_tensor_that_is_always_zero_has_a_range() -> None:
    histogram = Histogram()
    histogram.add(np.zeros(5, np.float32))
    assert choose(histogram).scale > 0 and choose(histogram).error == 0.0


def test_what_loses_too_much_in_int8_stays_float() -> None:
    rng, ranges = np.random.default_rng(0), {}
    for name, values in {"even": rng.uniform(-1, 1, 200_000), "tailed": rng.standard_normal(200_000) ** 7, "none": np.zeros(9)}.items():
        histogram = Histogram()
        histogram.add(values.astype(np.float32))
        ranges[name] = choose(histogram)
    assert ranges["even"].error < INPUT_ERROR < ranges["tailed"].error
    inputs = {"a": ("even", "none"), "b": ("tailed",), "c": ("even", "tailed")}
    chosen = int8_precisions([Layer(name, (1, 1), names, names) for name, names in inputs.items()], ranges)
    assert chosen == {"a": "int8", "b": "int8-weights", "c": "int8-weights"}


# --- weights ----------------------------------------------------------------------------------------------------------------


@given(WEIGHTS)
def test_int8_weights_are_within_half_a_step_of_each_output(weight: np.ndarray) -> None:
    quantized, scale = quantize_int8(weight)
    assert quantized.dtype == np.int8 and quantized.min() >= -127 and scale.shape == (3,)
    assert (np.abs(quantized * scale - weight) <= 0.501 * scale + 1e-30).all()


@given(WEIGHTS)
def test_int4_weights_are_within_half_a_step_of_each_block(weight: np.ndarray) -> None:
    quantized, scale = quantize_int4(weight)
    block = np.repeat(scale, len(weight) // len(scale), axis=0)
    assert np.abs(quantized.astype(np.float32)).max() <= 7
    assert (np.abs(quantized.astype(np.float32) * block - weight) <= 0.501 * block + 1e-30).all()


@pytest.mark.parametrize(("rows", "block"), [(256, 128), (768, 128), (320, 80), (75, 75), (240, 120), (16, 16)])
def test_an_int4_block_is_128_or_the_largest_that_divides(rows: int, block: int) -> None:
    assert len(quantize_int4(np.ones((rows, 2), np.float32))[1]) == rows // block


# --- placement ----------------------------------------------------------------------------------------------------------------


def test_every_int8_product_has_both_inputs_from_a_dequantizer_and_nothing_else_is_touched(scales: dict[str, float]) -> None:
    model = float_model()
    layers = find_layers(model)
    placed = place(model, dict.fromkeys((y.name for y in layers), "int8"), scales)
    makers = {output: node for node in placed.graph.node for output in node.output}
    wanted = {node for y in layers for node in y.nodes}
    products = {node.name: node for node in placed.graph.node if node.op_type == "MatMul"}
    for name, node in products.items():
        kinds = [makers[x].op_type if x in makers else "" for x in node.input]
        assert kinds == ["DequantizeLinear"] * 2 if name in wanted else "DequantizeLinear" not in kinds, name
    constants = {i.name: numpy_helper.to_array(i) for i in placed.graph.initializer}
    for node in placed.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            weight = node.input[0] in constants
            assert constants[node.input[1]].ndim == weight  # per output channel, or per tensor
            assert len(node.input) == 2 or not constants[node.input[2]].any()  # zero point 0
    assert placed.opset_import[0].version == OPSET
    assert not any(y.name in constants for y in layers)  # the float weights are gone


@pytest.mark.parametrize("pattern", STAYS_FLOAT)
def test_what_stays_in_float_is_there_and_is_no_layer(pattern: str) -> None:
    from fnmatch import fnmatchcase

    model = float_model()
    nodes = {node for y in find_layers(model) for node in y.nodes}
    matching = [n.name for n in model.graph.node if n.op_type == "MatMul" and fnmatchcase(n.name, pattern)]
    assert matching and not nodes & set(matching)


def test_what_stays_in_float_lies_in_the_file_as_float16(scales: dict[str, float]) -> None:
    model = float_model()
    placed = place(model, dict.fromkeys((y.name for y in find_layers(model)), "int8"), scales)
    constants = {i.name: numpy_helper.to_array(i) for i in placed.graph.initializer}
    before = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    for name in ("audio.heard.weight", "audio.played.weight", "flow.leave.weight", "text.said.weight"):
        assert name not in constants and constants[f"{name}/fp16"].dtype == np.float16
        assert np.abs(constants[f"{name}/fp16"] - before[name]).max() <= 1e-3 * np.abs(before[name]).max()
    assert constants["audio.mel_filters"].dtype == np.float32, "fixed matrices are exact"


def test_attention_between_activations_stays_in_float(scales: dict[str, float]) -> None:
    nodes = {node for y in find_layers(float_model()) for node in y.nodes}
    assert nodes and not any("attention" in node for node in nodes)


def test_an_int8_product_is_the_integer_product(scales: dict[str, float]) -> None:
    """ONNX Runtime computes what the integers say, so that another engine can compute the same."""
    model = float_model()
    layer = next(y for y in find_layers(model) if y.name == "perceive.0.qkv.weight")
    placed = place(model, {layer.name: "int8"}, scales)
    engine = ProbeEngine(placed, SMALL, [layer.inputs[0], layer.nodes[0]])
    engine.inputs["frames"][...] = np.random.default_rng(0).integers(0, 256, engine.inputs["frames"].shape)
    engine.run()
    weight = next(numpy_helper.to_array(i) for i in model.graph.initializer if i.name == layer.name)
    quantized, scale = quantize_int8(weight)
    step = np.float32(scales[layer.inputs[0]])
    x = np.clip(np.rint(engine.probes[layer.inputs[0]] / step), -128, 127).astype(np.int64)
    expected = (x @ quantized.astype(np.int64)) * (step * scale)
    np.testing.assert_allclose(engine.probes[layer.nodes[0]], expected, rtol=1e-5, atol=1e-6)


def test_the_largest_int8_products_do_not_overflow(scales: dict[str, float]) -> None:
    """Nor do two of them added up, which x86-64 without VNNI does in 16 bits; of weights that serve several products."""
    model = float_model()
    layer = next(y for y in find_layers(model) if y.name == "flow.enter.weight")
    assert len(layer.nodes) > 1
    weight = next(i for i in model.graph.initializer if i.name == layer.name)
    size, outputs = weight.dims
    weight.CopyFrom(numpy_helper.from_array(np.ones((size, outputs), np.float32), layer.name))
    noise = layer.inputs[0]
    engine = ProbeEngine(place(model, {layer.name: "int8"}, scales | {noise: 0.01}), SMALL, [noise, layer.nodes[0]])
    engine.inputs["noise"][...] = 9.0  # far beyond the range: 127 everywhere
    engine.run()
    np.testing.assert_allclose(engine.probes[layer.nodes[0]], size * 1.27, rtol=1e-5)


@pytest.mark.parametrize(
    ("machine", "flags", "saturate"),
    [
        ("x86_64", "fma avx2", True),
        ("x86_64", "avx2 avx_vnni", False),
        ("x86_64", "avx512_vnni", False),
        ("x86_64", None, True),
        ("aarch64", "", False),
    ],
)
def test_integers_are_kept_where_they_do_not_overflow(
    machine: str, flags: str | None, saturate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setattr(onnx_runtime, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(onnx_runtime.platform, "machine", lambda: machine)
    assert onnx_runtime.integers_saturate() is saturate


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_quantized_graph_runs_and_is_close_to_the_float_one(precision: str, data: DataSet, scales: dict[str, float]) -> None:
    model = float_model()
    placed = place(model, dict.fromkeys((y.name for y in find_layers(model)), precision), scales)  # type: ignore[arg-type]
    reference, other = (outputs_of(graph, data, 20, "") for graph in (model, placed))
    distance = np.abs(reference["say_prob"] - other["say_prob"]).max()
    assert 0 < distance < {"fp16": 1e-3, "int8-weights": 0.01, "int8": 0.05, "int4-weights": 0.2}[precision]


def test_an_activation_without_a_range_is_named() -> None:
    model = float_model()
    with pytest.raises(QuantizeError, match=r"node 'perceive\.0/qkv': no range is known for its input"):
        place(model, {"perceive.0.qkv.weight": "int8"}, {})


# --- sensitivity --------------------------------------------------------------------------------------------------------------


def test_a_budget_keeps_the_dearest_layers_in_fp16(data: DataSet, scales: dict[str, float], tmp_path: Path) -> None:
    model = float_model()
    names = [y.name for y in find_layers(model)]
    spoilt = scales | {"perceive.1/mlp/norm2/Mul": 10.0}  # one range that is far too wide
    chosen = dict.fromkeys(names, "int8")
    found = scan(model, data, chosen, spoilt, "int8")  # type: ignore[arg-type]
    assert next(iter(found.alone)) == "perceive.1.up.weight"
    together = spent(found.together, "int8")
    kept = keep_under_budget(model, data, chosen, spoilt, found, 0.8 * together)  # type: ignore[arg-type]
    halves = [name for name, precision in kept.items() if precision == "fp16"]
    assert set(halves) == set(list(found.alone)[: len(halves)]) and 0 < len(halves) < len(names)
    assert keep_under_budget(model, data, chosen, spoilt, found, 2 * together) == chosen  # type: ignore[arg-type]
    with pytest.raises(QuantizeError, match="with every layer in FP16"):
        keep_under_budget(model, data, chosen, spoilt, found, 0.0)  # type: ignore[arg-type]


# --- bundles ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, data: DataSet) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    source, out = float_bundle(folder / "float"), folder / "int8"
    arguments = ["quantize", str(source), "--calibration", str(data.path), "--out", str(out), "--sensitivity", str(folder / "scan")]
    assert cli.main(arguments) == 0
    assert (folder / "scan" / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert "perceive.0.qkv.weight" in (folder / "scan" / "sensitivity.md").read_text()
    return out


def test_a_quantized_bundle_says_what_it_was_made_of(quantized: Path, data: DataSet, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, source = Bundle.open(quantized, unproven=True), Bundle.open(quantized.parent / "float")
    made = bundle.manifest["quantized"]
    assert made["calibration"]["sha256"] == data.digest and made["of"]["digest"] == source.digest
    report = json.loads((quantized / "quantization.json").read_text())
    assert {each["method"] for each in report["activations"].values()} <= set(METHODS)
    assert all(sum(each["histogram"]["counts"]) > 0 for each in report["activations"].values())
    assert len(report["sensitivity"]["alone"]) == len(report["layers"])
    errors = {name: each["tried"][each["method"]]["error"] for name, each in report["activations"].items()}
    assert all(
        (layer["precision"] == "int8") == (max(errors[name] for name in layer["inputs"]) <= INPUT_ERROR) for layer in report["layers"]
    )
    OnnxRuntimeEngine(bundle.graph, bundle.config).run()
    assert cli.main(["show", str(quantized)]) == 0
    assert "quantized int8 from small" in capsys.readouterr().out


def test_a_quantized_bundle_is_not_quantized_again_nor_its_float_one_overwritten(
    quantized: Path, data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(source: Path, out: Path) -> str:
        assert cli.main(["quantize", str(source), "--calibration", str(data.path), "--out", str(out)]) == 2
        return capsys.readouterr().err

    source = quantized.parent / "float"
    before = Bundle.open(source).digest
    assert "quantized" in refused(quantized, tmp_path / "twice")
    assert "float bundle itself" in refused(source, source)
    (tmp_path / "mine").mkdir()
    assert "not a bundle" in refused(source, tmp_path / "mine")
    assert Bundle.open(source).digest == before and not (tmp_path / "twice").exists()


def _with_proof(quantized: Path, out: Path, **changes: object) -> Path:
    out.mkdir()
    for file in quantized.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    gates = [{"gate": "say agreement", "value": 99.5, "limit": 99.0, "passed": True}]
    proof = {"graph_sha256": manifest["files"][GRAPH_NAME]["sha256"], "gates": gates}
    (out / MANIFEST_NAME).write_text(json.dumps(manifest | {"proof": proof | changes}))
    return out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gates": []}, "carries no proof"),
        ({"gates": "all of them"}, "carries no proof"),
        ({"gates": [{"gate": "say agreement", "passed": False}]}, "did not pass: say agreement"),
        ({"gates": [{"gate": "say agreement", "passed": "true"}]}, "did not pass: say agreement"),
        ({"gates": [7]}, "did not pass"),
        ({"graph_sha256": "0" * 64}, "proof is that of another graph"),
    ],
)
def test_a_proof_that_proves_nothing_is_refused(quantized: Path, tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    path = _with_proof(quantized, tmp_path / "bundle", **changes)
    with pytest.raises(Unproven, match=reason):
        Bundle.open(path)
    with pytest.raises(Unproven):
        require_proof(Bundle.open(path, unproven=True).manifest, path)


def test_a_proven_bundle_opens(quantized: Path, tmp_path: Path) -> None:
    assert Bundle.open(_with_proof(quantized, tmp_path / "bundle")).unproven == ""


def test_the_board_runs_an_unproven_bundle_only_when_told_so_and_logs_it(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = tmp_path / "events.jsonl"
    arguments = ["run", "--bundle", str(quantized), "--mic", "none", "--speaker", "none", "--clock", "simulated", "--seconds", "1"]
    assert device_cli.main([*arguments, "--events", str(events)]) == 2
    assert "copresence-export verify" in capsys.readouterr().err and not events.exists()
    assert device_cli.main([*arguments, "--events", str(events), "--unproven"]) == 0
    written = [json.loads(line) for line in events.read_text().splitlines()]
    assert [event["event"] for event in written[:2]] == ["header", "unproven"] and "no proof" in written[1]["reason"]


# --- gates --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_gate_stops_what_is_just_beyond_its_limit(name: str, precision: str) -> None:
    values = {each: gate.limits[precision] for each, gate in GATES.items()}
    assert all(row["passed"] for row in judge(values, precision))
    values[name] += 0.01 if GATES[name].at_most else -0.01
    assert [row["gate"] for row in judge(values, precision) if not row["passed"]] == [name]
    values[name] = float("nan")
    assert [row["gate"] for row in judge(values, precision) if not row["passed"]] == [name]


def test_int8_may_lose_a_point_and_a_tick_in_a_hundred() -> None:
    assert GATES["scoreboard loss"].limits["int8"] == 1.0
    assert GATES["say agreement"].limits["int8"] == GATES["act agreement"].limits["int8"] == 99.0


def test_what_is_spent_is_the_worse_of_choice_and_sound() -> None:
    nothing = Difference(100, 1.0, 1.0, 0.0, 0.0, 10)
    assert spent(nothing, "int8") == 0
    assert spent(replace(nothing, moved=0.01), "int8") == pytest.approx(1.0)
    assert spent(replace(nothing, moved=0.001, mel_db=0.5), "int8") == pytest.approx(0.5)


def test_mel_distortion_is_the_gain_between_two_waveforms_in_db() -> None:
    speech = 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    speech[8000:] = 0
    distance, frames = mel_distortion(speech, 2 * speech, SMALL)
    assert distance == pytest.approx(6.02, abs=0.3) and 30 < frames < 50
    assert mel_distortion(speech, speech, SMALL)[0] == 0
    assert mel_distortion(np.zeros_like(speech), speech, SMALL) == (0.0, 0)
