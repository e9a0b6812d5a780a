"""Planning: the table of boards, work counted from the graph, the estimates, and the prediction beside a measurement."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from ticks import FULL, SMALL

from device.config import ConfigError, ModelConfig
from export import cost, validate
from export.checkpoint import CheckpointError, weight_table
from export.cli import main
from export.cost import KEPT_FLOAT, MOSHI, codec_estimate, count, estimate, largest, largest_codec, of_size, scaled
from export.distill.torch_machine import TorchMachine
from export.graph import build_graph
from export.plan import PlanError, draw, make_plan, read_model
from export.targets import TargetError, find_target, precisions, targets

ORIN_BOARDS = [t.name for t in targets().values() if t.sm == "8.7"]


def random_weights(c: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in weight_table(c).items()}


def write_config(folder: Path, c: ModelConfig = SMALL) -> Path:
    file = folder / "model.json"
    file.write_text(json.dumps(c.to_dict()))
    return file


# --- boards -----------------------------------------------------------------------------------------------------------


def test_the_five_boards_are_in_the_table_with_rates_for_all_that_they_may_run() -> None:
    assert set(targets()) == {"orin-nano-8gb", "orin-nano-super", "orin-nx-16gb", "agx-orin-64gb", "thor-t5000"}
    for target in targets().values():
        assert target.jetpack and all(j.tensorrt and j.cuda and j.python for j in target.jetpack)
        for precision in target.precisions:
            assert target.gpu_tops[precision.products] > 0
            assert 0.67 <= precision.bandwidth_share <= 0.79  # what decoders were measured to reach
    assert [find_target(name).bandwidth_gb_s for name in targets()] == [68, 102, 102, 205, 273]


@pytest.mark.parametrize("board", ORIN_BOARDS)
@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
def test_an_orin_refuses_fp8_and_fp4_and_says_what_it_has(board: str, precision: str) -> None:
    with pytest.raises(TargetError, match=rf"has no {precision}; give it one of fp32, fp16, int8, int8-weights, int4-weights"):
        find_target(board).require(precision)


def test_thor_runs_every_precision() -> None:
    assert [find_target("thor-t5000").require(name).name for name in precisions()] == list(precisions())


def test_unknown_boards_and_precisions_are_named_with_what_is_known() -> None:
    with pytest.raises(TargetError, match=r"no target 'xavier'; known are orin-nano-8gb, "):
        find_target("xavier")
    with pytest.raises(TargetError, match=r"no precision 'int3'; known are fp32, "):
        find_target("thor-t5000").require("int3")


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, FULL], ids=["small", "full"])
def test_the_outline_has_the_nodes_and_shapes_of_the_real_graph(config: ModelConfig) -> None:
    real = onnx.shape_inference.infer_shapes(build_graph(config, random_weights(config)), strict_mode=True).graph
    outline = onnx.shape_inference.infer_shapes(cost.OutlineGraph(config).build(), strict_mode=True).graph
    assert [(n.op_type, n.name) for n in outline.node] == [(n.op_type, n.name) for n in real.node]

    def shapes(graph: onnx.GraphProto) -> dict[str, list[int]]:
        return {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info}

    assert shapes(outline) == shapes(real)


def test_the_count_is_that_of_the_real_graphs_products() -> None:
    real = onnx.shape_inference.infer_shapes(build_graph(SMALL, random_weights(SMALL)), strict_mode=True).graph
    shapes = {t.name: list(t.dims) for t in real.initializer}
    shapes |= {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*real.input, *real.output, *real.value_info)}
    products = [n for n in real.node if n.op_type in ("MatMul", "Gemm", "Conv")]
    flops = sum(2 * math.prod(shapes[n.output[0]]) * shapes[n.input[0]][-1] for n in products)
    assert count(SMALL).flops == flops > 0
    assert len(count(SMALL).products) == len(products)


def test_parameters_and_rings_are_those_of_the_tables() -> None:
    c, work = SMALL, count(SMALL)
    assert work.parameters == sum(math.prod(shape) for shape in weight_table(c).values())
    k = c.trunk
    slots = k.perceive_layers * k.perceive_window * c.tokens + k.present_layers * k.present_window * k.summary_tokens
    assert work.ring_bytes == 2 * slots * k.width * 4
    assert sum(node.ring for node in work.products) * 4 == work.ring_bytes  # every slot is read once in a tick


def test_a_block_costs_what_its_formula_says() -> None:
    c = SMALL
    by_name = {node.name: node for node in count(c).products}
    d, mlp, n, past = c.trunk.width, c.trunk.mlp, c.tokens, c.trunk.perceive_window * c.tokens
    assert by_name["perceive.0/qkv"].flops == 2 * n * d * 3 * d and by_name["perceive.0/qkv"].rows == n
    assert by_name["perceive.0/mlp/up"].weight_size == d * mlp
    assert by_name["perceive.0/attention/past_scores"].flops == 2 * n * past * d
    assert by_name["perceive.0/attention/past_scores"].ring == past * d and not by_name["perceive.0/attention/past_scores"].weight
    flow = [node for node in by_name.values() if node.weight == "flow.leave.weight"]
    assert len(flow) == c.voice.flow_steps  # one read for every Euler step


def test_scaling_keeps_the_shape_and_the_size_asked_for_is_met() -> None:
    wide = scaled(FULL, 512)
    assert wide.head_dim == FULL.head_dim and wide.tokens == FULL.tokens and wide.trunk.mlp == 2 * FULL.trunk.mlp
    assert wide.voice.flow_width == 2 * FULL.voice.flow_width
    for size in validate.SIZES:
        assert count(of_size(FULL, size)).parameters == pytest.approx(size, rel=0.25)


def test_a_model_of_billions_is_counted_without_its_weights() -> None:
    work = count(scaled(FULL, 8192))
    assert work.parameters > 5e9 and work.flops > 100e9


# --- estimates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("board", list(targets()))
def test_fewer_bits_move_fewer_bytes_and_need_less_memory(board: str) -> None:
    target, work = find_target(board), count(FULL)
    made = [estimate(work, target, target.require(name)) for name in ("fp32", "fp16", "int8", "int4-weights")]
    for wide, narrow in itertools.pairwise(made):
        assert narrow.weight_bytes < wide.weight_bytes and narrow.memory_bytes < wide.memory_bytes
        assert narrow.bandwidth_ms < wide.bandwidth_ms
    for e in made:
        assert e.floor_ms == max(e.bandwidth_ms, e.compute_ms) and e.left_ms == pytest.approx(200 - e.floor_ms - e.launch_ms)
        assert e.ring_bytes == work.ring_bytes  # the tensor table's, whatever the weights are


def test_bandwidth_time_is_bytes_over_the_share_of_the_boards_bandwidth() -> None:
    target = find_target("agx-orin-64gb")
    e = estimate(count(FULL), target, target.require("fp16"))
    assert e.bandwidth_ms == pytest.approx((e.weight_bytes + e.ring_bytes + e.activation_bytes) / (205e9 * 0.79) * 1e3)


def test_the_flow_heads_weights_are_read_once_only_if_the_cache_holds_them() -> None:
    target = find_target("agx-orin-64gb")
    work, fp16 = count(FULL), target.require("fp16")
    uses = Counter(n.weight for n in work.products if n.weight)
    again = sum((uses[n.weight] - 1) / uses[n.weight] * n.weight_size * (2 if n.learned else 4) for n in work.products if n.weight)
    assert uses["flow.enter.weight"] == uses["flow.ups.0.weight"] == FULL.voice.flow_steps
    roomy, tight = (estimate(work, dataclasses.replace(target, l2_mb=mb), fp16) for mb in (64, 0.001))
    assert tight.weight_bytes - roomy.weight_bytes == pytest.approx(again)


def test_last_layers_of_flow_and_vocoder_stay_in_floating_point() -> None:
    target, work = find_target("agx-orin-64gb"), count(FULL)
    kept = sum({n.weight: n.weight_size for n in work.products if n.weight in KEPT_FLOAT}.values())
    assert kept > 0
    fp16, int8 = (estimate(work, target, target.require(name)) for name in ("fp16", "int8"))
    learned = sum({n.weight: n.weight_size for n in work.products if n.learned}.values())
    assert fp16.memory_bytes - int8.memory_bytes == pytest.approx(learned - kept)


@pytest.mark.parametrize("board", list(targets()))
def test_the_largest_model_fits_and_a_wider_one_does_not(board: str) -> None:
    target = find_target(board)
    for precision in target.precisions:
        found = largest(SMALL, target, precision)
        assert found is not None and estimate(count(found), target, precision).fits(target)
        wider = scaled(SMALL, found.trunk.width + max(SMALL.head_dim, found.trunk.width // 32 // SMALL.head_dim * SMALL.head_dim))
        assert not estimate(count(wider), target, precision).fits(target)


def test_no_model_fits_a_board_without_memory() -> None:
    target = dataclasses.replace(find_target("orin-nano-8gb"), memory_gb=2)
    assert largest(SMALL, target, target.require("int8")) is None


def test_moshis_size_and_reads_are_those_of_its_authors() -> None:
    assert MOSHI.parameters == pytest.approx(7.7e9, rel=0.01)
    sixteen = dataclasses.replace(MOSHI, steps=16)
    assert sixteen.products == 449  # PersonaPlex, counted by NVIDIA/personaplex pull request 103
    # the same: 101.7 ms a frame in bf16 on 273 GB/s, of which 170 to 190 are reached
    assert 2 * sixteen.read / 190e9 < 0.1017 < 2 * sixteen.read / 150e9


def test_codec_frames_read_the_weights_twelve_and_a_half_times_a_second() -> None:
    target = find_target("thor-t5000")
    e = codec_estimate(MOSHI.parameters, 60.0, 1000.0, target, target.require("fp16"))
    assert e.weight_bytes == pytest.approx(12.5 * 2 * MOSHI.read)
    found = largest_codec(60.0, 200.0, target, target.require("fp16"))
    assert codec_estimate(found, 60.0, 200.0, target, target.require("fp16")).fits(target)
    assert not codec_estimate(1.01 * found + 2e5, 60.0, 200.0, target, target.require("fp16")).fits(target)


# --- the command ------------------------------------------------------------------------------------------------------


def test_plan_prints_a_row_for_every_board_and_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(write_config(tmp_path)), "--target", "all"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + sum(len(t.precisions) for t in targets().values())
    assert len({line.count("|") for line in table}) == 1


def test_plan_as_json_holds_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(write_config(tmp_path)), "--target", "thor-t5000", "--precision", "fp8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    target = find_target("thor-t5000")
    expected = estimate(count(SMALL), target, target.require("fp8"))
    (row,) = found["rows"]
    assert row["ours"]["weight_bytes"] == expected.weight_bytes and row["ours"]["left_ms"] == pytest.approx(expected.left_ms)
    assert row["codec_frame"]["parameters"] == found["parameters"] == count(SMALL).parameters


def test_fp8_on_an_orin_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.png"
    command = ["plan", str(write_config(tmp_path)), "--target", "orin-nx-16gb", "--precision", "fp8", "--out", str(picture)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Orin NX 16GB (SM 8.7) has no fp8" in error and not picture.exists()


def test_validate_does_not_swallow_options_that_it_has_no_use_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(write_config(tmp_path)), "--validate", "--json"]) == 2
    assert "leave out --precision, --out and --json" in capsys.readouterr().err


def test_with_all_boards_those_that_lack_the_precision_are_left_out(tmp_path: Path) -> None:
    plan = make_plan(write_config(tmp_path), "all", "nvfp4")
    assert [row.target.name for row in plan.rows] == ["thor-t5000"]
    with pytest.raises(TargetError, match="no precision 'int3'"):
        make_plan(write_config(tmp_path), "all", "int3")


def test_a_recipe_and_its_checkpoint_give_the_same_plan(repository: Path) -> None:
    recipe = read_model(repository / "export/recipes/companion-nano.json")
    checkpoint = read_model(repository / "export/checkpoints/companion-nano")
    assert recipe[0] == checkpoint[0] == "companion-nano"
    assert count(recipe[1]).flops == count(checkpoint[1]).flops


@pytest.mark.parametrize(("text", "error"), [("{", PlanError), ('{"trunk": {"widht": 3}}', ConfigError), ("[]", ConfigError)])
def test_what_is_no_model_is_named_with_its_file(tmp_path: Path, text: str, error: type[Exception]) -> None:
    file = tmp_path / "broken.json"
    file.write_text(text)
    with pytest.raises(error, match=r"broken\.json"):
        read_model(file)
    with pytest.raises(PlanError, match="no such file"):
        read_model(tmp_path / "absent.json")


def test_a_size_that_the_vocoder_cannot_have_is_named_before_anything_is_counted(tmp_path: Path) -> None:
    c = dataclasses.replace(SMALL, voice=dataclasses.replace(SMALL.voice, mel_channels=40))
    with pytest.raises(CheckpointError, match=r"model\.json: config field 'voice\.mel_channels' is 40 and must be 80"):
        make_plan(write_config(tmp_path, c), "all")


def test_the_picture_is_drawn_and_a_failure_leaves_the_old_one(tmp_path: Path) -> None:
    plan = make_plan(write_config(tmp_path), "all", "int8")
    picture = tmp_path / "plan.png"
    draw(plan, picture)
    before = picture.read_bytes()
    assert before.startswith(b"\x89PNG") and len(before) > 20_000
    with pytest.raises(PlanError, match=r"nonsense; name it as one of .*png"):
        draw(plan, tmp_path / "plan.nonsense")
    assert {path.name for path in tmp_path.iterdir()} == {"model.json", "plan.png"}


# --- validation -------------------------------------------------------------------------------------------------------


class Steady:
    """A machine with known rates, so that predictions can be computed by hand."""

    name = "steady"
    overlaps = False

    def read_gb_s(self, size: int) -> float:
        return 10.0

    def product_gflops(self, rows: int) -> float:
        return 50.0

    def chain_ms(self, rows: int, width: int) -> float:
        return 0.2 + validate._chain_moved(rows, width) / 1e6

    def tick_ms(self, c: ModelConfig) -> float:
        return 4.0


def test_the_prediction_is_the_sum_of_memory_arithmetic_values_and_nodes() -> None:
    work, rates = count(SMALL), validate.Rates(Steady())
    products = sum(4 * (n.weight_size + n.ring + n.moved) / 10e6 + n.flops / 50e6 for n in work.products)
    others = sum(n.moved for n in work.nodes if not n.is_product) / 1e6
    nodes = len(work.nodes) * 0.2 / len(validate._chain(*validate.CHAIN_SHAPES[0]).nodes)
    assert rates.predict_ms(work, 10.0) == pytest.approx(products + others + nodes, rel=0.01)


def test_the_table_has_prediction_measurement_and_ratio_for_every_size() -> None:
    lines = validate.table(Steady(), FULL, (0.5e6, 2e6)).splitlines()[-2:]
    for line in lines:
        predicted, measured, ratio = (float(cell) for cell in line.strip("| ").split(" | ")[-3:])
        assert measured == 4.0 and ratio == pytest.approx(predicted / 4.0, abs=0.01)


@pytest.mark.parametrize("machine", [validate.CpuMachine, lambda: TorchMachine("cpu")], ids=["onnxruntime", "torch"])
def test_a_real_machine_measures_and_is_predicted(machine: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "MEASURED_S", 0.0)
    monkeypatch.setattr(validate, "ROWS", (1, 32))
    measured = machine()
    rates = validate.Rates(measured)
    assert all(g > 0 for g in rates.gflops) and rates.moved_per_ms > 0 and measured.read_gb_s(1 << 20) > 0
    assert measured.tick_ms(SMALL) > 0 and rates.predict_ms(count(SMALL), 10.0) > 0


def test_the_random_graph_runs_with_its_weights_beside_it_and_they_are_not_zero(tmp_path: Path) -> None:
    with (tmp_path / validate.RandomGraph.WEIGHTS_NAME).open("wb") as file:
        model = validate.RandomGraph(SMALL, file).build()
    stored = np.fromfile(tmp_path / validate.RandomGraph.WEIGHTS_NAME, np.float32)
    steps = math.prod(weight_table(SMALL)["flow.step.weight"])  # constants of the graph, not read as one tensor
    assert stored.size == count(SMALL).parameters - steps and stored.std() > 0.01
    assert len(model.SerializeToString()) < 10e6
    onnx.save(model, tmp_path / "graph.onnx")
    onnx.checker.check_model(str(tmp_path / "graph.onnx"), full_check=True)


@pytest.mark.skipif(len(validate.machines()) < 2, reason="no NVIDIA GPU that PyTorch can use")
def test_a_gpu_gets_its_own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "MEASURED_S", 0.01)
    assert "predicted / measured" in validate.table(validate.machines()[1], FULL, (2e6,))
