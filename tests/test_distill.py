"""Training: what the stages learn from is right, they run, stop and go on, and end in a checkpoint that can be built."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from ticks import SMALL, make_model, make_scene

from device.bundle import Bundle
from export.build import build
from export.distill import train as train_module
from export.distill.batches import Batches
from export.distill.behaviours import WORDS
from export.distill.corpus import Corpus
from export.distill.finish import finish
from export.distill.losses import SpeechTarget, drift, past_frames, perceive_kind, scene_loss, voice_loss
from export.distill.model import Block, FlowHead, TickModel, attend_windowed, mixed_precision
from export.distill.muon import Muon, orthogonal
from export.distill.recipe import Recipe, RecipeError, Stage
from export.distill.train import Optimizer, Source, train
from export.distill.voice import Vocoder, word_mels
from export.voice_tables import SILENCE


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    model = SMALL.to_dict()
    del model["text"]
    recipe = {
        "name": "tiny",
        "seed": 1,
        "ticks": 12,
        "model": model,
        "stages": [
            {"learns": "perception", "steps": 2, "batch": 4, "muon_lr": 0.01, "adam_lr": 0.001},
            {"learns": "scenes", "steps": 2, "batch": 2, "muon_lr": 0.01, "adam_lr": 0.001},
            {"learns": "scenes", "ticks": 16, "steps": 1, "batch": 1, "muon_lr": 0.01, "adam_lr": 0.001},
        ],
        "vocoder_minutes": 0.01,
        "practice": 2,
        "replays": 0.5,
        "act_margin": 1.5,
    }
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(recipe))
    return path


def test_the_recipes_of_other_ticks_differ_in_nothing_else(repository: Path) -> None:
    def recipe(tick_ms: int) -> Recipe:
        found = Recipe.read(repository / "export" / "recipes" / f"tick-{tick_ms}.json")
        assert (found.name, found.model.tick_ms) == (f"tick-{tick_ms}", tick_ms)
        return found

    def at_200(found: Recipe) -> Recipe:
        """The same in seconds; the shortest wavelength stays two ticks."""
        ratio, trunk = found.model.tick_ms / 200, found.model.trunk
        shortest, longest = trunk.rope_wavelengths_ticks
        windows = {name: round(ratio * getattr(trunk, name)) for name in ("perceive_window", "present_window")}
        trunk = dataclasses.replace(trunk, **windows, rope_wavelengths_ticks=(shortest, ratio * longest))
        model = dataclasses.replace(found.model, tick_ms=200, trunk=trunk)
        return dataclasses.replace(found, name="tick-200", ticks=round(ratio * found.ticks), model=model)

    assert at_200(recipe(100)) == recipe(200) == at_200(recipe(400))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": {"width": 3}}, "unknown config key 'width'"),
        ({"seed": None}, "seed"),
        ({"speed": 1}, "speed"),
        ({"people": 0}, "the field people is a share"),
        ({"people": 1.5}, "the field people is a share"),
        ({"stages": [{"learns": "manners", "steps": 1, "batch": 1, "muon_lr": 0.1, "adam_lr": 0.1}]}, "stages.learns"),
        ({"stages": [{"learns": "scenes", "steps": 1, "batch": 1, "muon_lr": 0.1, "adam_lr": 0.1, "joins": 1}]}, "stages.joins"),
        ({"stages": [{"learns": "perception", "steps": 1, "batch": 1, "muon_lr": 0.1, "adam_lr": 0.1, "keeps": "all"}]}, "stages.keeps"),
        ({"stages": [{"learns": "voice", "steps": 1, "batch": 1, "muon_lr": 0.0, "adam_lr": 0.1, "keeps": "present"}]}, "stages.keeps"),
        ({"stages": [{"learns": "scenes", "steps": 1, "batch": 1, "muon_lr": 0.1, "adam_lr": 0.1, "keeps": True}]}, "stages.keeps"),
        ({"stages": [{"learns": "scenes", "steps": 1, "batch": 1, "muon_lr": 0.1, "adam_lr": 0.1, "chatter": 1.5}]}, "stages.chatter"),
        ({"stages": [{"learns": "scenes", "steps": 1, "batch": 1, "muon_lr": 0.1, "adam_lr": 0.1, "hands": 8}]}, "stages.hands"),
        ({"stages": [{"learns": "perception", "steps": 1, "batch": 1, "muon_lr": 0.1, "adam_lr": 0.1, "hands": 0}]}, "stages.hands"),
        ({"teachers": [{"after": 3, "present_layers": 4, "seed": 1, "stages": []}]}, "teachers.after"),
        ({"teachers": 2 * [{"after": 1, "present_layers": 4, "seed": 1, "stages": []}]}, "teachers.after"),
        ({"teachers": [{"after": 0, "present_layers": 0, "seed": 1, "stages": []}]}, "teachers.present_layers"),
        ({"teachers": [{"after": 0, "present_layers": 4, "seed": 1}]}, "lacks the field 'stages'"),
        (None, "not a training recipe"),
    ],
)
def test_an_unfit_recipe_is_refused(change: dict[str, object] | None, named: str, recipe_path: Path) -> None:
    recipe = json.loads(recipe_path.read_text())
    if change == {"seed": None}:
        del recipe["seed"]
    elif change is not None:
        recipe |= change
    recipe_path.write_text("[" if change is None else json.dumps(recipe))
    with pytest.raises(RecipeError, match=named) as error:
        Recipe.read(recipe_path)
    assert str(recipe_path) in str(error.value)


def test_perception_alone_is_perception_in_a_scene() -> None:
    model, scene = make_model(SMALL), make_scene(SMALL, 8)
    batch = {name: torch.from_numpy(values)[None] for name, values in scene.items()}
    probe: list[torch.Tensor] = []
    with torch.no_grad():
        tokens = model.embed(batch)
        model.perceive_scene(tokens, batch, probe)
        a = SMALL.audio_tokens
        for span in (slice(0, a), slice(a, a + SMALL.video_tokens)):
            alone = perceive_kind(model, tokens[:, :, span], batch["rope"][:, :, span])
            assert torch.allclose(alone, probe[0][:, :, span], atol=1e-5)


def test_perception_is_blind_to_text_and_history() -> None:
    model, scene = make_model(SMALL), make_scene(SMALL, 8)
    batch = {name: torch.from_numpy(values)[None] for name, values in scene.items()}
    other = batch | {name: torch.zeros_like(batch[name]) for name in ("said", "acted", "text_in")}
    probes: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        for inputs, probe in zip((batch, other), probes, strict=True):
            model.perceive_scene(model.embed(inputs), inputs, probe)
    perception = SMALL.audio_tokens + SMALL.video_tokens
    assert torch.equal(probes[0][0][:, :, :perception], probes[1][0][:, :, :perception])
    assert not torch.equal(probes[0][0][:, :, perception:], probes[1][0][:, :, perception:])


def test_speech_follows_the_word_that_was_begun() -> None:
    config = dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, words=("", "one", "two", "ok")))
    mels = word_mels(("one", "two", "ok"))
    ticks = {word: len(mel) // config.mel_frames for word, mel in mels.items()}
    say = torch.zeros(1, 12, dtype=torch.long)
    cut = torch.zeros(1, 12, dtype=torch.bool)
    say[0, 2], say[0, 6], say[0, 7], cut[0, 9] = 1, 2, 3, True  # "one"; then "two", cut off by "ok", which is broken off
    mel, sounds = SpeechTarget(config)(say, cut)
    frames = mel[0].reshape(12, config.mel_frames, -1).numpy()
    assert np.array_equal(np.concatenate(frames[2 : 2 + ticks["one"]]), mels["one"])
    assert np.array_equal(frames[6], mels["two"][: config.mel_frames])
    assert np.array_equal(frames[7], mels["ok"][: config.mel_frames])
    assert ticks["ok"] > 2
    expected = [2 <= t < 2 + ticks["one"] or t == 6 or 7 <= t < 9 for t in range(12)]
    assert sounds[0].tolist() == expected
    assert (frames[np.logical_not(expected)] == np.float32(SILENCE)).all()


def test_speech_goes_on_from_the_end_of_the_tick_before_that_was_not_lost() -> None:
    heights = torch.arange(1.0, 5.0).reshape(1, 4, 1, 1)  # of the last two frames of each tick; all others are silent
    mel = torch.full((1, 4, SMALL.mel_frames, SMALL.voice.mel_channels), SILENCE)
    mel[:, :, -2:] += heights
    valid = torch.tensor([[1, 1, 0, 1]])
    past = past_frames(mel.reshape(1, 4, SMALL.trunk.summary_tokens, -1), valid)
    assert past.shape == (1, 4, 2, SMALL.voice.mel_channels)
    assert torch.allclose(past[0].mean((1, 2)), torch.tensor([0.0, 1.0, 2.0, 2.0]), atol=1e-5)
    assert past[0].std((1, 2)).max() < 1e-5


def test_the_flow_head_learns_to_go_on_from_what_was_spoken() -> None:
    """States that tell nothing, and two things that sounded: only these say how it goes on."""
    torch.manual_seed(0)
    flow, channels = FlowHead(SMALL), SMALL.voice.mel_channels
    past = torch.tensor([0.0, 2.0])[:, None, None].expand(2, 2, channels)
    mel = torch.tensor([-1.0, 1.0])[:, None, None].expand(2, SMALL.trunk.summary_tokens, SMALL.flow_dim)
    top = torch.zeros(2, SMALL.trunk.summary_tokens, SMALL.trunk.width)
    nothing = torch.zeros(2, SMALL.text.say, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)
    optimizer = torch.optim.AdamW(flow.parameters(), 0.003)
    for _ in range(100):
        optimizer.zero_grad()
        flow.loss(flow.conditions(top, *nothing, past), mel).mean().backward()
        optimizer.step()
    with torch.no_grad():
        made = flow(flow.conditions(top, *nothing, past), torch.randn_like(mel))
    assert (made - mel).square().mean() < 0.1, "1 without it"


def test_the_recipe_runs_stops_goes_on_and_ends_in_a_bundle(
    recipe_path: Path, tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "load_corpus", lambda *arguments: corpus)
    monkeypatch.setattr(train_module, "LOG_EVERY", 1)
    recipe, work = Recipe.read(recipe_path), tmp_path / "work"
    assert recipe.model.text.words == WORDS
    words, scenes, _ = recipe.stages
    shorter = dataclasses.replace(recipe, stages=(words, dataclasses.replace(scenes, steps=1)))
    train(shorter, Source(tmp_path), work, compiled=False)
    assert [(row["stage"], row["step"]) for row in _progress(work)] == [("perception", "1"), ("perception", "2"), ("scenes", "1")]

    state = torch.load(work / "resume.pt")  # as if stopped in the second stage
    state["stage"] = 1
    torch.save(state, work / "resume.pt")
    model, heads = train(recipe, Source(tmp_path), work, compiled=False)
    assert [row["stage"] for row in _progress(work)[3:]] == ["scenes"] * 3
    assert all(float(row["loss"]) > 0 for row in _progress(work))

    vocoder = tmp_path / "vocoder.safetensors"
    save_file(Vocoder(recipe.model.voice.vocoder_width).state_dict(), vocoder)
    before = model.act.bias[0].item()
    finish(model, heads, recipe, vocoder, tmp_path / "checkpoint")
    assert model.act.bias[0].item() == pytest.approx(before + 1.5)
    build(tmp_path / "checkpoint", tmp_path / "bundle")
    assert Bundle.open(tmp_path / "bundle").config == recipe.model


Trained = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture
def trained(recipe_path: Path, tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """The weights after some stages, trained in a folder of that name in which others may have ended before."""
    monkeypatch.setattr(train_module, "load_corpus", lambda *arguments: corpus)
    recipe = Recipe.read(recipe_path)

    def train_stages(work: str, *stages: Stage) -> dict[str, torch.Tensor]:
        model, _ = train(dataclasses.replace(recipe, stages=stages), Source(tmp_path), tmp_path / work, compiled=False)
        return {name: value.clone() for name, value in model.state_dict().items()}

    return train_stages


WORDS_STAGE = Stage("perception", steps=2, batch=4, muon_lr=0.01, adam_lr=0.001)
SCENES_STAGE = Stage("scenes", steps=2, batch=2, muon_lr=0.01, adam_lr=0.001)


def test_a_stage_that_keeps_what_perceives_changes_only_what_is_above(trained: Trained) -> None:
    before = trained("work", WORDS_STAGE)
    after = trained("work", WORDS_STAGE, dataclasses.replace(SCENES_STAGE, keeps="perceiving"))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    last = f"perceive.{SMALL.trunk.perceive_layers - 1}."
    perceiving = {name for name in before if name.startswith(("audio.", "video.", "text.", "perceive.")) and not name.startswith(last)}
    assert not changed & perceiving
    assert {"say.weight", "act.weight", f"{last}qkv.weight", "present.0.qkv.weight", "flow.leave.weight"} <= changed


PRACTICE_STAGE = dataclasses.replace(WORDS_STAGE, keeps="present")


def test_a_stage_that_keeps_what_is_present_changes_only_what_perceives(trained: Trained) -> None:
    before, after = trained("alone", WORDS_STAGE), trained("both", WORDS_STAGE, PRACTICE_STAGE)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"audio", "video", "perceive"}
    assert {f"perceive.{layer}.qkv.weight" for layer in range(SMALL.trunk.perceive_layers)} <= changed


def test_a_stage_that_keeps_what_is_present_is_held_to_where_it_began(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "LOG_EVERY", 1)
    trained("work", WORDS_STAGE, PRACTICE_STAGE)
    work = tmp_path / "work"
    weights = torch.load(work / "resume.pt")["modules"]
    elsewhere = {name: value + 0.1 if name.startswith("model.perceive.") else value for name, value in weights.items()}
    torch.save({"stage": 1, "modules": elsewhere}, work / "resume.pt")  # as if stopped on its way
    trained("work", WORDS_STAGE, PRACTICE_STAGE)
    first, _, again, _ = (float(row["drift"]) for row in _progress(work) if row["drift"])
    assert first < 0.01, "what it begins with; where nothing is heard in training, it moves a little"
    assert again > 0.1, "from where it goes on it would be as little"


def test_what_practice_moves_counts_most_where_text_arrives() -> None:
    old = torch.ones(1, 42, SMALL.trunk.summary_tokens, SMALL.trunk.width)
    batch = {"valid": torch.ones(1, 42, dtype=torch.long), "text_in": torch.zeros(1, 42, SMALL.text.text_in, dtype=torch.int32)}
    batch["valid"][0, 41] = 0
    batch["text_in"][0, 7, 1] = 3
    read, heard, lost = (old.clone() for _ in range(3))
    read[:, 7] += 0.1
    heard[:, :7] += 0.1
    heard[:, 8:41] += 0.1
    lost[:, 41] += 0.1
    assert drift(old, heard, batch) == pytest.approx(0.01 * 40 / 60, rel=1e-4)
    assert drift(old, read, batch) == pytest.approx(0.01 * 20 / 60, rel=1e-4), "as much as twenty others"
    assert drift(old, lost, batch) == 0


def test_practice_comes_with_one_scene_and_what_keeps_perception_without_practice(recipe_path: Path, corpus: Corpus) -> None:
    recipe = Recipe.read(recipe_path)
    kept, practised = (
        next(iter(Batches(corpus, recipe, stage, [1]))) for stage in (dataclasses.replace(SCENES_STAGE, keeps="perceiving"), PRACTICE_STAGE)
    )
    assert "practice" not in kept
    assert len(practised["practice"]["word"]) == len(practised["practice"]["hand"]) == WORDS_STAGE.batch
    assert practised["say_target"].shape == (1, recipe.ticks)


def test_a_stage_can_show_more_hands_than_it_has_windows(trained: Trained, recipe_path: Path, corpus: Corpus) -> None:
    stage = dataclasses.replace(WORDS_STAGE, hands=3 * WORDS_STAGE.batch)
    batch = next(iter(Batches(corpus, Recipe.read(recipe_path), stage, [1])))
    assert (len(batch["word"]), len(batch["hand"])) == (WORDS_STAGE.batch, 3 * WORDS_STAGE.batch)
    assert len(batch["frames"]) == 3 * WORDS_STAGE.batch
    trained("work", stage)


def test_a_stage_of_the_voice_changes_only_how_words_are_said(trained: Trained) -> None:
    before = trained("work", WORDS_STAGE)
    after = trained("work", WORDS_STAGE, Stage("voice", steps=2, batch=2, muon_lr=0.0, adam_lr=0.001))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("flow.")}


def test_an_optimizer_goes_on_where_it_stopped(recipe_path: Path) -> None:
    """Also that of a stage of the voice, in which Muon has nothing to do."""
    for learning, optimizers in (("", {"adam", "muon"}), ("flow", {"adam"})):
        torch.manual_seed(0)
        model = TickModel(Recipe.read(recipe_path).model)
        for name, weight in model.named_parameters():
            weight.requires_grad_(name.startswith(learning))
        again = copy.deepcopy(model)
        first, second = Optimizer(model, SCENES_STAGE), Optimizer(again, SCENES_STAGE)
        _step(first)
        assert first.state().keys() == optimizers | {"step", "average"}
        again.load_state_dict(model.state_dict())
        second.load(copy.deepcopy(first.state()))
        _step(first)
        _step(second)
        torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(second.average, first.average, rtol=0, atol=0)


def _step(optimizer: Optimizer) -> None:
    for weight in optimizer.weights:
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    optimizer.update()


def test_a_stage_of_the_voice_brings_speech_nearer_to_its_words(recipe_path: Path, corpus: Corpus) -> None:
    recipe = Recipe.read(recipe_path)
    torch.manual_seed(0)
    model, target = TickModel(recipe.model), SpeechTarget(recipe.model)
    batch = next(iter(Batches(corpus, recipe, Stage("voice", steps=1, batch=2, muon_lr=0.0, adam_lr=0.003, chatter=1.0), [0])))
    assert (batch["say_now"][..., 0] > 0).float().mean() > 0.1
    optimizer = torch.optim.AdamW(model.flow.parameters(), 0.003)
    losses = []
    for _ in range(20):
        loss = voice_loss(model, target, batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_stage_that_joins_another_ends_in_the_mean_of_both(trained: Trained) -> None:
    first, second = trained("first", WORDS_STAGE), trained("second", WORDS_STAGE, SCENES_STAGE)
    joins = dataclasses.replace(SCENES_STAGE, joins=1)
    joined = trained("joined", WORDS_STAGE, joins)
    name = "present.0.qkv.weight"
    assert not torch.equal(first[name], second[name])
    torch.testing.assert_close(joined, {name: (first[name] + second[name]) / 2 for name in first})
    with pytest.raises(RecipeError, match=r"stage-1\.pt: .* were not kept"):  # said before anything is trained
        trained("first", WORDS_STAGE, joins)


def test_practice_can_end_in_the_mean_with_the_weights_of_any_stage(trained: Trained) -> None:
    first = trained("first", WORDS_STAGE)
    practised = trained("practised", WORDS_STAGE, SCENES_STAGE, PRACTICE_STAGE)
    joined = trained("joined", WORDS_STAGE, SCENES_STAGE, dataclasses.replace(PRACTICE_STAGE, joins=1))
    torch.testing.assert_close(joined, {name: (first[name] + practised[name]) / 2 for name in first})


def test_a_step_that_would_ruin_the_weights_is_not_taken(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained("work", WORDS_STAGE)
    before = (tmp_path / "work" / "resume.pt").read_bytes()
    monkeypatch.setattr(train_module, "RESUME_EVERY_S", 0.0)

    def overflowing(*arguments: Any) -> dict[str, torch.Tensor]:
        values = scene_loss(*arguments)
        return values | {"loss": values["loss"] * 1e30 * 1e30}

    monkeypatch.setattr(train_module, "scene_loss", overflowing)
    with pytest.raises(RecipeError, match=r"tiny: step 1 of stage 2 has gradients that are no numbers; lower .*muon_lr.*resume\.pt"):
        trained("work", WORDS_STAGE, SCENES_STAGE)
    assert (tmp_path / "work" / "resume.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("device", "able", "mixed"),
    [
        ("cpu", {"cpu_name": "Intel Xeon", "amx_bf16": True, "avx512_bf16": True}, True),
        ("cpu", {"cpu_name": "Intel Xeon", "amx_bf16": False, "avx512_bf16": True}, False),
        ("cpu", {"cpu_name": "AMD EPYC", "amx_bf16": False, "avx512_bf16": True}, True),
        ("cpu", {"cpu_name": "AMD EPYC", "amx_bf16": False, "avx512_bf16": False}, False),
        ("cpu", {}, False),
        ("cuda", {}, True),
    ],
)
def test_products_are_in_bf16_where_that_is_faster(device: str, able: dict[str, Any], mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(torch, "autocast", lambda *arguments, enabled: asked.append((*arguments, enabled)))
    mixed_precision(device)
    assert asked == [(device, torch.bfloat16, mixed)]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_muon_goes_the_way_of_torch_from_its_states(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start, *gradients = torch.randn(4, *shape)
    theirs, ours = (torch.nn.Parameter(start.clone()) for _ in range(2))
    torchs, own = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.01), Muon([ours], lr=0.02, momentum=0.95, weight_decay=0.01)
    for number, gradient in enumerate(gradients):
        before = ours.detach().clone()
        theirs.grad, ours.grad = gradient, gradient.clone()
        torchs.step()
        own.step()
        assert (ours - theirs).norm() < 0.05 * (ours - before).norm(), number  # theirs is of bf16 products
        own.load_state_dict(copy.deepcopy(torchs.state_dict()))
        torchs.load_state_dict(copy.deepcopy(own.state_dict()))
        with torch.no_grad():
            ours.copy_(theirs)


@pytest.mark.parametrize(("able", "error"), [({}, (0, 1e-4)), ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, (1e-3, 1e-1))])
def test_muon_takes_products_in_bf16_only_where_that_is_faster(
    able: dict[str, Any], error: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    torch.manual_seed(0)
    matrix, coefficients = torch.randn(24, 40), (3.4445, -4.7750, 2.0315)
    exact = orthogonal(matrix.double(), coefficients, 5)  # double is left alone
    low, high = error
    assert low <= (orthogonal(matrix, coefficients, 5) - exact).norm() / exact.norm() < high


@pytest.mark.parametrize("ticks", [3, 9, 16, 17, 40])
def test_attention_in_chunks_or_in_one_piece_sees_the_window(ticks: int) -> None:
    torch.manual_seed(0)
    window, (q, k, v) = 8, torch.randn(3, 1, ticks, 4, 2, 16)
    tick = (torch.arange(ticks) + 3 * (torch.arange(ticks) > ticks // 2))[None]  # a jump in the numbers
    valid = (torch.rand(1, ticks) > 0.3).long()
    together = attend_windowed(q, k, v, tick, valid, window)
    for t in range(ticks):
        lag = tick[0, t] - tick[0]
        seen = (lag == 0) | ((lag > 0) & (lag <= window) & (valid[0] > 0))
        keys, values = (x[0, seen].flatten(0, 1).transpose(0, 1) for x in (k, v))
        alone = F.scaled_dot_product_attention(q[0, t].transpose(0, 1), keys, values)
        torch.testing.assert_close(together[0, t], alone.transpose(0, 1))


GUARDED = """
import ctypes, mmap, sys
import numpy as np
import torch
from export.distill.model import attend_windowed

ticks, window = 24, 8
pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
valid = np.frombuffer(pages, sys.argv[1], ticks, mmap.PAGESIZE).reshape(1, ticks)
valid[:] = True
first = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(pages)))
assert ctypes.CDLL(None).mprotect(first, mmap.PAGESIZE, 0) == 0  # whoever reads it is ended
q, k, v = torch.randn(3, 1, ticks, 4, 2, 8)
arguments = q, k, v, torch.arange(ticks)[None], torch.from_numpy(valid), window
torch.testing.assert_close(torch.compile(attend_windowed, dynamic=False)(*arguments), attend_windowed(*arguments))
"""


def test_compiled_attention_reads_nothing_in_front_of_a_batch(recipe_path: Path, corpus: Corpus) -> None:
    recipe = Recipe.read(recipe_path)
    batch = next(iter(Batches(corpus, recipe, recipe.stages[1], [0])))
    subprocess.run([sys.executable, "-c", GUARDED, batch["valid"].numpy().dtype.name], check=True, timeout=300)


def test_compiled_attention_has_gradients_that_are_numbers() -> None:
    """Where there is AMX, PyTorch 2.13 compiled the keys' rotation, written as chunk and cat, to gradients that are none."""
    torch.manual_seed(0)
    block, ticks, tokens = Block(256, 4, 768, 8), 64, 24
    tick, valid = torch.arange(ticks).expand(2, -1), torch.ones(2, ticks, dtype=torch.long)
    x, rope = torch.randn(2, ticks, tokens, 256), torch.randn(2, ticks, tokens, 2, 32)
    spans = slice(0, 4), slice(4, 16)

    def layer(x: torch.Tensor) -> torch.Tensor:
        q, k, v = block.keys_values(x, rope)
        parts = [attend_windowed(q[:, :, s], k[:, :, s], v[:, :, s], tick, valid, 8) for s in spans]
        return block.finish(x, torch.cat([*parts, attend_windowed(q[:, :, 16:], k, v, tick, valid, 8)], dim=2))

    def gradient(layer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        block.zero_grad()
        with mixed_precision("cpu"):
            y = layer(x)
        y.float().square().mean().backward()
        assert block.qkv.weight.grad is not None
        return block.qkv.weight.grad.clone()

    eager, compiled = gradient(layer), gradient(torch.compile(layer, dynamic=False))
    assert (compiled - eager).norm() < 0.1 * eager.norm()


def _progress(work: Path) -> list[dict[str, str]]:
    with (work / "progress.csv").open() as file:
        return list(csv.DictReader(file))
