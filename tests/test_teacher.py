"""Distillation: a teacher's probabilities are what a student can learn from, and training runs in several processes at once."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from ticks import SMALL

from device.config import ModelConfig, TextConfig
from export.checkpoint import CheckpointError
from export.distill import finish as finish_module
from export.distill import train as train_module
from export.distill.batches import Batches
from export.distill.behaviours import ACTS, WORDS
from export.distill.corpus import Corpus
from export.distill.finish import distill_checkpoint, finish, train_checkpoint
from export.distill.losses import Auxiliary, SpeechTarget, perception_loss, scene_loss
from export.distill.model import TickModel
from export.distill.recipe import Recipe, RecipeError, Stage, TeacherRecipe
from export.distill.teacher import HEADS_NAME, Teacher
from export.distill.voice import Vocoder

CONFIG = dataclasses.replace(SMALL, text=TextConfig(WORDS, ACTS))
STAGES = PERCEPTION, _ = tuple(Stage(learns, steps=2, batch=2, muon_lr=0.01, adam_lr=0.001) for learns in ("perception", "scenes"))
RECIPE = Recipe("tiny", 1, 12, CONFIG, STAGES, vocoder_minutes=0.01, practice=2, replays=0.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained teacher of twice the student's width."""
    folder = tmp_path_factory.mktemp("teacher")
    config = dataclasses.replace(CONFIG, trunk=dataclasses.replace(CONFIG.trunk, width=64, heads=4))
    torch.manual_seed(0)
    save_file(Vocoder(config.voice.vocoder_width).state_dict(), folder / "vocoder.safetensors")
    recipe = dataclasses.replace(RECIPE, model=config)
    finish(TickModel(config), Auxiliary(config), recipe, folder / "vocoder.safetensors", folder / "teacher")
    return folder / "teacher"


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.learns)
def test_a_student_can_learn_what_only_the_teacher_says(stage: Stage, checkpoint: Path, corpus: Corpus) -> None:
    teacher = Teacher.read(checkpoint, CONFIG)
    batch = teacher.teaches(next(iter(Batches(corpus, RECIPE, stage, [0]))))
    soft = {name: batch[name] for name in batch if name.startswith("soft_")}
    assert set(soft) == ({"soft_word", "soft_hand"} if stage is PERCEPTION else {"soft_say", "soft_act"})
    if stage is not PERCEPTION:
        assert {"soft_word", "soft_hand"} <= batch["practice"].keys()
        own = teacher.teaches(batch | {"soft_say": soft["soft_say"] * 0})  # as shards may bring them
        assert not own["soft_say"].any() and own["soft_act"] is soft["soft_act"]
    for name, value in soft.items():
        assert torch.allclose(value.sum(-1), torch.ones(()), atol=1e-4)
        batch[name] = torch.zeros_like(value)
        batch[name][..., 2] = 1.0  # a teacher that is sure of something no oracle says
    torch.manual_seed(0)
    model, heads = TickModel(CONFIG), Auxiliary(CONFIG)
    target = SpeechTarget(CONFIG)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=3e-3)

    def share() -> list[float]:
        with torch.no_grad():
            student = Teacher(model, heads)
            now = student.perceives(batch) if stage is PERCEPTION else student.decides(batch)
            return [value[..., 2].mean().item() for value in now.values()]

    before = share()
    model.train()
    for _ in range(30):
        values = perception_loss(model, heads, batch) if stage is PERCEPTION else scene_loss(model, heads, target, batch)
        values["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(now > was + 0.1 for was, now in zip(before, share(), strict=True))


def test_a_teacher_that_hears_otherwise_or_has_no_heads_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = ModelConfig.from_dict(CONFIG.to_dict() | {"audio": {"level_low": -6.0, "level_high": 1.2}})
    with pytest.raises(CheckpointError, match="field 'audio' differs"):
        Teacher.read(checkpoint, other)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=f"{HEADS_NAME}: no such file"):
        Teacher.read(bare, CONFIG)


def test_training_goes_on_from_a_checkpoint(checkpoint: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "load_corpus", lambda *arguments: corpus)
    recipe = dataclasses.replace(RECIPE, model=Teacher.read(checkpoint, CONFIG).model.config, stages=())
    model, _ = train_module.train(recipe, train_module.Source(tmp_path, start=checkpoint), tmp_path / "work", compiled=False)
    assert all(torch.equal(w, v) for w, v in zip(model.parameters(), Teacher.read(checkpoint, CONFIG).model.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="size mismatch"):
        train_module.train(
            dataclasses.replace(recipe, model=CONFIG), train_module.Source(tmp_path, start=checkpoint), tmp_path / "other", compiled=False
        )


def test_a_model_grown_from_a_checkpoint_begins_by_deciding_as_that_does(
    checkpoint: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "load_corpus", lambda *arguments: corpus)
    small = Teacher.read(checkpoint, CONFIG)
    trunk = small.model.config.trunk
    deeper = dataclasses.replace(small.model.config, trunk=dataclasses.replace(trunk, present_layers=trunk.present_layers + 3))
    recipe = dataclasses.replace(RECIPE, model=deeper, stages=())
    grown, heads = train_module.train(recipe, train_module.Source(tmp_path, start=checkpoint), tmp_path / "work", compiled=False)
    assert len(grown.present) == trunk.present_layers + 3
    batch = next(iter(Batches(corpus, RECIPE, STAGES[1], [0])))
    expected, got = small.decides(batch), Teacher(grown, heads).decides(batch)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    # What was added learns: its zeros are in the last matrices of each layer only.
    grown.train()
    scene_loss(grown, heads, SpeechTarget(CONFIG), batch)["loss"].backward()
    assert all(grown.present[-1].get_submodule(name).weight.grad.abs().max() > 0 for name in ("out", "down"))


def test_the_checkpoint_of_a_training_that_goes_on_has_the_voice_of_its_start(
    checkpoint: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(RECIPE, model=Teacher.read(checkpoint, CONFIG).model.config, stages=())
    monkeypatch.setattr(train_module, "load_corpus", lambda *arguments: corpus)
    monkeypatch.setattr(Recipe, "read", lambda path: recipe)
    train_checkpoint(tmp_path / "recipe.json", train_module.Source(tmp_path, start=checkpoint), tmp_path / "work", tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "out"))
    assert any(name.startswith("vocoder.") for name in before)
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_a_recipe_with_teachers_trains_them_on_the_way_and_its_student_by_them(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = dataclasses.replace(STAGES[1], keeps="perceiving")
    layers = CONFIG.trunk.present_layers
    teachers = TeacherRecipe(1, layers + 1, 7, (scenes,)), TeacherRecipe(2, layers, 7, ())  # a deeper one, then the student of before
    recipe = dataclasses.replace(RECIPE, stages=(PERCEPTION, scenes, scenes), teachers=teachers, act_margin=1.5)
    monkeypatch.setattr(train_module, "load_corpus", lambda *arguments: corpus)
    monkeypatch.setattr(train_module, "LOG_EVERY", 1)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(Recipe, "read", lambda path: recipe)
    source, work = train_module.Source(tmp_path), tmp_path / "work"
    taught_by: list[tuple[int | None, str | None]] = []

    def train(*arguments: Any, until: int | None = None) -> Any:
        teacher = arguments[3]
        taught_by.append((until, teacher and str(teacher.relative_to(work))))
        return train_module.train(*arguments, until=until)

    monkeypatch.setattr(finish_module, "train", train)
    distill_checkpoint(tmp_path / "recipe.json", source, work, tmp_path / "taught")
    assert taught_by == [(1, None), (None, None), (2, "teacher-1/checkpoint"), (None, "teacher-2/begun")]
    (tmp_path / "other").mkdir()
    shutil.copy(work / "vocoder.safetensors", tmp_path / "other")  # the same one: making what it learns from takes most of a minute
    train_checkpoint(tmp_path / "recipe.json", source, tmp_path / "other", tmp_path / "alone")
    folders = {"untaught": work / "teacher-1/begun", "teacher": work / "teacher-1/checkpoint", "itself": work / "teacher-2/begun"}
    folders |= {name: tmp_path / name for name in ("taught", "alone")}
    weights = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}

    def same(one: str, other: str, name: str = "present.0.qkv.weight") -> bool:
        return torch.equal(weights[one][name], weights[other][name])

    # The first is grown from the weights before it, and the student goes on from there too, neither with the margin in its past.
    assert f"present.{layers}.qkv.weight" in weights["teacher"] and f"present.{layers}.qkv.weight" not in weights["taught"]
    perceiving = [name for name in weights["taught"] if name.startswith(("audio.", "video.", "text."))]
    assert perceiving and all(same("untaught", other, name) for other in weights for name in perceiving)
    assert all((weights[name]["act.bias"][0] > 1) == (name in ("taught", "alone")) for name in weights)
    # What differs then is the teachers' part.
    assert not any(same(one, other) for one, other in itertools.combinations(set(weights) - {"teacher"}, 2))

    rows = [(folder / "progress.csv").read_text() for folder in (work, work / "teacher-1")]
    assert [text.count("\n") for text in rows] == [7, 3]
    distill_checkpoint(tmp_path / "recipe.json", source, work, tmp_path / "again")  # what is done is not done again
    assert rows == [(folder / "progress.csv").read_text() for folder in (work, work / "teacher-1")]
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in weights["taught"].items())


def test_distilling_without_any_teacher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recipe, "read", lambda path: RECIPE)
    with pytest.raises(RecipeError, match=r"recipe\.json: there is no field teachers; .*--teacher"):
        distill_checkpoint(tmp_path / "recipe.json", train_module.Source(tmp_path), tmp_path / "work", tmp_path / "out")
    assert not list(tmp_path.iterdir())


PROGRAM = """
import pickle, sys
from pathlib import Path
from export.distill import train as module
folder = Path(sys.argv[1])
corpus, recipe = pickle.loads((folder / "training.pickle").read_bytes())
module.load_corpus = lambda *arguments: corpus
module.LOG_EVERY = 1
processes = module.Processes.join()
model, _ = module.train(recipe, module.Source(folder), folder / "work", compiled=False)
weights = pickle.dumps([weight.detach().numpy() for weight in model.parameters()])
(folder / f"weights-{processes.rank}-of-{processes.size}.pickle").write_bytes(weights)
"""


def test_two_processes_train_one_model(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "training.pickle").write_bytes(pickle.dumps((corpus, RECIPE)))
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, str(tmp_path / "program.py"), str(tmp_path)], check=True, timeout=300, capture_output=True)
    first, second = (pickle.loads((tmp_path / f"weights-{rank}-of-2.pickle").read_bytes()) for rank in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(RECIPE.seed)
    untrained = TickModel(CONFIG)
    assert any(not np.array_equal(a, w.detach().numpy()) for a, w in zip(first, untrained.parameters(), strict=True))
    rows = (tmp_path / "work" / "progress.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["stage", "perception", "perception", "scenes", "scenes"]  # one of them writes
