"""Scenes in shards: they come back as they were, the same seed gives the same bytes, and somebody else's train a model as well as ours."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from ticks import SMALL

from device.config import TextConfig
from export.distill import shards
from export.distill import train as train_module
from export.distill.batches import scene_batch
from export.distill.behaviours import ACTS, WORDS
from export.distill.corpus import Corpus
from export.distill.recipe import Recipe, RecipeError, Stage
from export.distill.scenes import Scene, make_scene
from export.distill.shards import MIC, TABLE, ShardError, endless_scenes, read_shard, sample, shard_paths, write_scenes
from export.distill.train import Source, train
from export.spoken_words import render_words

CONFIG = dataclasses.replace(SMALL, text=TextConfig(WORDS, ACTS))
SCENES = Stage("scenes", steps=2, batch=2, muon_lr=0.01, adam_lr=0.001)
RECIPE = Recipe("tiny", 1, 24, CONFIG, (SCENES,), 0.01, practice=0, replays=0.0)


def grain(frames: np.ndarray) -> float:
    """Mean difference between neighbouring pixels, in grey levels."""
    return float(np.abs(np.diff(half(frames), axis=-2)).mean())


@pytest.fixture(scope="module")
def scene(corpus: Corpus) -> Scene:
    """One with a lost tick, a hand and text in it, by a camera that has light enough: what is grain in the dark, JPEG does not keep."""
    words = render_words(WORDS)
    scenes = (make_scene(corpus, words, np.random.default_rng(seed), CONFIG, 48) for seed in range(500))
    rich = (s for s in scenes if s.lost.any() and s.frames.any() and s.text_in.any() and s.voice.any() and (s.hand_label > 0).any())
    return next(s for s in rich if grain(s.frames) < 4)


def write(path: Path, members: dict[str, Any]) -> str:
    with webdataset.TarWriter(str(path)) as tar:
        tar.write(members)
    return str(path)


def half(frames: np.ndarray) -> np.ndarray:
    """u8[..., H, W, 3] at half size, f64."""
    *most, height, width, _ = frames.shape
    return frames.reshape(*most, height // 2, 2, width // 2, 2, 3).mean((-4, -2))


def test_a_scene_comes_back_as_it_was(scene: Scene, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    soft = {"soft_say": rng.random((48, len(WORDS))).astype(np.float32), "soft_act": rng.random((48, len(ACTS))).astype(np.float32)}
    (found,) = read_shard(write(tmp_path / "a.tar", sample(scene.arrays | soft, CONFIG, "one")), CONFIG)
    assert set(found) == set(scene.arrays | soft)
    c = CONFIG.context_samples
    for name, value in (scene.arrays | soft).items():
        assert found[name].shape == value.shape, name
        if name in ("mic", "voice"):
            assert np.abs(found[name][c:] - value[c:]).max() <= 2 / 32768 and not found[name][:c].any()
        elif name == "frames":
            # JPEG keeps colour at half size, and grain of the sensor hardly at all.
            ours, theirs = (half(frames) for frames in (value, found[name]))
            error = np.abs(theirs - ours).mean()
            assert error < 4 and error < 0.8 * np.abs(theirs - np.roll(ours, 1, axis=0)).mean()
        elif name.startswith(("soft", "frame_age")):
            assert np.allclose(found[name], value, atol=1e-3)
        else:
            assert np.array_equal(found[name], value), name


def test_the_same_seed_gives_the_same_bytes_and_what_is_there_is_kept(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "load_corpus", lambda *arguments: corpus)
    monkeypatch.setattr(shards, "SCENES_PER_SHARD", 2)
    one, two = (write_scenes(tmp_path / f"{jobs}", tmp_path, RECIPE, 5, 7, jobs) for jobs in (1, 2))
    assert [path.name for path in one] == [f"scenes-7-{i:05d}.tar" for i in range(3)]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    other = write_scenes(tmp_path / "other", tmp_path, RECIPE, 2, 8, 1)
    assert other[0].read_bytes() != one[0].read_bytes()
    whole = one[1].read_bytes()
    one[1].unlink()
    kept = one[0].stat().st_mtime_ns
    reported: list[tuple[int, int]] = []
    write_scenes(tmp_path / "1", tmp_path, RECIPE, 5, 7, 1, lambda done, of: reported.append((done, of)))
    assert one[0].stat().st_mtime_ns == kept and one[1].read_bytes() == whole and reported == [(3, 3)]
    write_scenes(tmp_path / "1", tmp_path, RECIPE, 6, 7, 1)  # the last shard had one scene and is now to have two
    assert [len(list(read_shard(str(path), CONFIG))) for path in one] == [2, 2, 2] and one[0].stat().st_mtime_ns == kept
    assert not list(tmp_path.rglob("*.part"))


def test_every_process_reads_its_own_shards(scene: Scene, tmp_path: Path) -> None:
    for number in range(4):
        arrays = scene.arrays | {"tick": scene.tick - scene.tick[0] + 1000 * number}
        write(tmp_path / f"s-{number}.tar", sample(arrays, CONFIG, f"{number}"))
    pattern = str(tmp_path / "s-*.tar")
    seen = []
    for part in range(2):
        stream = endless_scenes(pattern, CONFIG, np.random.default_rng(part), part, 2)
        seen.append({int(next(stream)["tick"][0]) // 1000 for _ in range(6)})
    assert seen == [{0, 2}, {1, 3}]
    with pytest.raises(ShardError, match="no such shards"):
        shard_paths(str(tmp_path / "nothing-*.tar"))


def test_a_shard_is_read_whole_by_whoever_it_falls_to(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library would share it out once more, among workers and processes."""
    path = write(tmp_path / "a.tar", sample(scene.arrays, CONFIG, "a"))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "WORKER": "1", "NUM_WORKERS": "2"}.items():
        monkeypatch.setenv(name, value)
    assert len(list(read_shard(path, CONFIG))) == 1


def table_with(**fields: Any) -> Any:
    def change(members: dict[str, Any]) -> None:
        members[TABLE] = json.dumps({k: v for k, v in (json.loads(members[TABLE]) | fields).items() if v is not None}).encode()

    return change


@pytest.mark.parametrize(("change", "named"), [
    (table_with(format=2), "format is 2"),
    (table_with(ticks=None), "json is not the table"),
    (table_with(ticks=[3, 2]), "ticks must be rising"),
    (table_with(wanted=[[1, "sing", "la"]]), "wanted names 'sing'"),
    (table_with(wanted=[[1, "act", "jump"]]), "wanted has 'jump', which the recipe's vocabulary has not; it knows look_up"),
    (table_with(did=[[99, "act", "nod"]]), "did names tick 99; the scene has ticks 0 to 47"),
    (table_with(text=[[1, *(["tell"] * 9)]]), "text has 9 words"),
    (table_with(unsure=[[1, 2, "all"]]), "unsure names 'all'"),
    (table_with(heard=[[1, "xylophone"]]), "heard has 'xylophone'"),
    (table_with(wanted=[[1, "act"]]), r'wanted has the entry \[1, "act"\]; it must be \[int, str, str\]'),
    (table_with(did=[["1", "act", "nod"]]), "did has the entry"),
    (table_with(text=[7]), "text has the entry 7"),
    (table_with(wnated=[]), "wnated is no field of the table"),
    (table_with(lost=["a"]), "lost must be a list of the scene's ticks"),
    (table_with(shown=[[1, 2, 12]]), "shown has 12; it is a digit"),
    (table_with(shown=[[2, 1, 3]]), "shown ends with tick 1 before it begins with 2"),
    (table_with(ticks=48), "ticks must be rising"),
    (table_with(frame_age_s="old"), "frame_age_s must be seconds"),
    (table_with(frame_age_s=[1.0]), "frame_age_s has 1 ages for 48 ticks"),
    (lambda members: members.pop(MIC), "mic.flac is missing"),
    (lambda members: members.update({MIC: members[MIC] and shards.flac(np.zeros(100))}), r"mic.flac has shape \(100,\)"),
    (lambda members: members.update({MIC: b"?"}), "mic.flac is no sound file"),
    (lambda members: members.update({shards.FRAMES: b"?"}), "frames.mkv is no film"),
    (lambda members: members.update({shards.SOFT: b"?"}), "soft.npz is not an archive of arrays"),
    (lambda members: members.update({shards.FRAMES: shards.matroska(np.zeros((4, 120, 160, 3), np.uint8), 10)}), "frames.mkv has 4 frames"),
])  # fmt: skip
def test_what_does_not_fit_is_named(change: Any, named: str, scene: Scene, tmp_path: Path) -> None:
    members = sample(scene.arrays, CONFIG, "bad")
    change(members)
    path = write(tmp_path / "b.tar", members)
    with pytest.raises(ShardError, match=named) as error:
        list(read_shard(path, CONFIG))
    assert str(error.value).startswith(f"{path}, scene bad: ")


def test_scenes_that_fit_in_no_batch_and_broken_shards_are_named(scene: Scene, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", sample(scene.arrays, CONFIG, "a"))
    shorter = {name: value[:24] for name, value in scene.arrays.items() if name not in ("mic", "voice")}
    sounds = {name: scene.arrays[name][: CONFIG.context_samples + 24 * CONFIG.tick_samples] for name in ("mic", "voice")}
    write(tmp_path / "b.tar", sample(shorter | sounds, CONFIG, "b"))
    stream = endless_scenes(str(tmp_path / "*.tar"), CONFIG, np.random.default_rng(0))
    with pytest.raises(ShardError, match="other numbers of ticks"):
        [next(stream) for _ in range(2)]
    Path(path).write_bytes(b"?")
    with pytest.raises(ShardError, match=r"a\.tar: not a whole tar archive"):
        list(read_shard(path, CONFIG))


def test_somebody_elses_recordings_train_a_model(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of SCENES.md, run as it stands, is a second corpus: tones and noise, and nods of its own."""
    text = (repository / "export" / "distill" / "SCENES.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(text.split("```python\n")[1].split("```")[0], {})
    with tarfile.open(tmp_path / "beeps-0.tar") as tar:
        assert len(tar.getmembers()) == 8 * 4
    (first, *_) = read_shard("beeps-0.tar", CONFIG)
    assert (first["act_target"] == ACTS.index("nod")).sum() == 3 and (first["word_label"] == -1).all()
    scene_batch([first, first], CONFIG)
    monkeypatch.setattr(train_module, "LOG_EVERY", 1)
    train(RECIPE, Source(None, str(tmp_path / "beeps-*.tar")), tmp_path / "work", compiled=False)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "work" / "progress.csv").read_text())))
    assert [(row["stage"], row["step"]) for row in rows] == [("scenes", "1"), ("scenes", "2")]
    assert all(float(row["loss"]) > 0 for row in rows)


def test_training_without_any_recordings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="give --data"):
        train(RECIPE, Source(None), tmp_path / "work", compiled=False)
    asks = dataclasses.replace(RECIPE, practice=4)
    with pytest.raises(RecipeError, match="practice ask for recordings"):
        train(asks, Source(None, "x-*.tar"), tmp_path / "work", compiled=False)
