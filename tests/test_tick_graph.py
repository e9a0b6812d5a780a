"""The tick: training forward, streaming step and ONNX graph give the same numbers, and positions lose no precision."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ticks import FULL, SMALL, make_engine, make_model, make_scene, run_engine, run_forward, run_steps, tick_inputs

from device import session as session_module
from device.config import ModelConfig
from device.engine import OnnxRuntimeEngine
from device.session import Session
from device.tensors import tensor_table
from export.checkpoint import weight_table
from export.distill.model import HMLP, TickModel
from export.graph import OPSET, build_graph

TICKS = 300  # the longest ring, 64 ticks, wraps four times
LIMIT = 1e-4


@pytest.fixture(scope="module")
def model() -> TickModel:
    return make_model(FULL)


@pytest.fixture(scope="module")
def engine(model: TickModel, tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntimeEngine:
    return make_engine(model, tmp_path_factory.mktemp("graph"))


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-9))


def test_forward_step_and_graph_agree_on_every_output(model: TickModel, engine: OnnxRuntimeEngine) -> None:
    scene = make_scene(FULL, TICKS)
    forward, steps, graph = run_forward(model, scene), run_steps(model, scene), run_engine(engine, FULL, scene)
    outputs = [row.name for row in tensor_table(FULL) if not row.enters]
    assert set(outputs) == set(steps) == set(graph)
    for name in outputs:
        assert relative_error(graph[name], steps[name]) <= LIMIT, name
        if name in forward:  # the whole scene keeps no vocoder state
            assert relative_error(forward[name], steps[name]) <= LIMIT, name
    assert np.abs(steps["speech"]).max() > 0.01  # the comparison is of sound, not of silence


@pytest.mark.parametrize("tick_ms", [100, 200, 400])
def test_they_agree_at_another_size_and_tick_length(tick_ms: int, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, tick_ms=tick_ms)
    model, scene = make_model(config), make_scene(config, 23)
    forward, steps, graph = run_forward(model, scene), run_steps(model, scene), run_engine(make_engine(model, tmp_path), config, scene)
    for name, values in steps.items():
        assert relative_error(graph[name], values) <= LIMIT, name
        assert name not in forward or relative_error(forward[name], values) <= LIMIT, name


def test_a_lost_tick_is_seen_by_nobody_later() -> None:
    model, scene = make_model(SMALL), make_scene(SMALL, 12)
    batch = {name: torch.from_numpy(values)[None] for name, values in scene.items()}
    batch["valid"] = torch.ones(1, 12, dtype=torch.long)
    batch["valid"][0, 4] = 0
    changed = batch | {name: batch[name].clone() for name in ("frames", "said")}
    changed["frames"][0, 4], changed["said"][0, 4] = 0, 0
    with torch.no_grad():
        one, other = model(batch), model(changed)
    assert torch.equal(one["say_prob"][0, 5:], other["say_prob"][0, 5:])
    assert not torch.equal(one["say_prob"][0, 4], other["say_prob"][0, 4])


def run_session(engine: OnnxRuntimeEngine, config: ModelConfig, seed: int, first: int, ticks: int) -> dict[str, np.ndarray]:
    session, scene = Session(config, engine, seed), make_scene(config, ticks)
    kept: dict[str, list[np.ndarray]] = {}
    for i in range(ticks):
        inputs = tick_inputs(config, scene, i)
        session.step(first + i, inputs["mic"], inputs["voice"], inputs["frames"], float(inputs["frame_age"][0]), inputs["text_in"])
        for name, value in engine.outputs.items():
            kept.setdefault(name, []).append(value.copy())
    return {name: np.stack(values) for name, values in kept.items()}


def test_the_same_seed_gives_equal_bits_and_another_seed_another_voice(engine: OnnxRuntimeEngine) -> None:
    once, again, other = (run_session(engine, FULL, seed, 0, 20) for seed in (3, 3, 4))
    for name, values in once.items():
        assert np.array_equal(values, again[name]), name
    assert not np.array_equal(once["speech"], other["speech"])


def test_positions_lose_no_precision_in_ten_million_ticks(engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same relative history with the same clock and noise, at tick 100 and at tick 10,000,000 (23 days).
    clock, noise = session_module.clock_features, session_module.tick_noise
    runs = []
    for first in (100, 10_000_000):
        monkeypatch.setattr(session_module, "clock_features", lambda c, tick, first=first: clock(c, tick - first))
        monkeypatch.setattr(session_module, "tick_noise", lambda c, seed, tick, first=first: noise(c, seed, tick - first))
        runs.append(run_session(engine, FULL, 0, first, 80))
    early, late = runs
    for row in tensor_table(FULL):
        if row.role == "output":  # keys are kept at absolute positions and differ
            assert relative_error(late[row.name], early[row.name]) <= LIMIT, row.name


def test_the_graph_has_static_shapes_and_a_name_for_every_node(model: TickModel) -> None:
    graph = build_graph(FULL, {name: value.numpy() for name, value in model.state_dict().items()})
    assert graph.opset_import[0].version == OPSET <= 19
    assert all(d.HasField("dim_value") for v in (*graph.graph.input, *graph.graph.output) for d in v.type.tensor_type.shape.dim)
    names = [node.name for node in graph.graph.node]
    assert len(set(names)) == len(names)
    assert {"perceive.0/attention/scores", "present.1/mlp/up", "audio/dmel/mel", "flow/step3/leave"} <= set(names)
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True)
    assert all(d.HasField("dim_value") for v in inferred.graph.value_info for d in v.type.tensor_type.shape.dim)


@pytest.mark.parametrize("config", [FULL, SMALL])
def test_the_weight_table_is_the_models(config: ModelConfig) -> None:
    state = TickModel(config).state_dict()
    assert weight_table(config) == {name: tuple(value.shape) for name, value in state.items()}


def test_the_patch_embedding_is_inklings() -> None:
    from transformers.models.inkling.configuration_inkling import InklingVisionConfig
    from transformers.models.inkling.modeling_inkling import InklingVisionModel

    width = 96
    torch.manual_seed(0)
    theirs = InklingVisionModel(InklingVisionConfig(text_hidden_size=width, n_layers=4)).eval()
    widths = tuple(layer.projection.out_features for layer in theirs.encoder_layers)
    video = ModelConfig(text=SMALL.text).video
    ours = HMLP(type(video)(hmlp_widths=widths[:3]), width).eval()
    with torch.no_grad():
        for i, layer in enumerate(theirs.encoder_layers):
            ours.projections[i].weight.copy_(layer.projection.weight)
            if layer.add_norm:
                layer.layer_norm.weight.uniform_(0.5, 1.5)
                ours.norms[i].weight.copy_(layer.layer_norm.weight)
        theirs.final_norm.weight.uniform_(0.5, 1.5)
        ours.final_norm.weight.copy_(theirs.final_norm.weight)
        patches = torch.randn(7, 2, 40, 40, 3)
        difference = (ours(patches) - theirs(patches).last_hidden_state[:, 0]).abs().max()
    assert difference <= 1e-5
