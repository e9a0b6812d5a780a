"""Scenes in WebDataset shards, ours or anybody's: recordings beside a table of what was done and what should have been (SCENES.md)."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import webdataset

from device.config import ModelConfig
from export.distill.clips import COMMANDS, RATE_HZ
from export.distill.corpus import Corpus, load_corpus
from export.distill.pictures import IGNORE
from export.distill.recipe import Recipe
from export.distill.scenes import make_scene, remembered
from export.errors import ExportError
from export.spoken_words import render_words

FORMAT = 1
SCENES_PER_SHARD = 32
MIC, VOICE, FRAMES, TABLE, SOFT = "mic.flac", "voice.flac", "frames.mkv", "json", "soft.npz"
HEARD = ("", *COMMANDS, "other")  # names of the word labels; those of the hands are 0 … 9

# Arrays of labels and the fields of the table that give them; what an "unsure" entry does to which array.
_LABELS = {"word_label": "heard", "hand_label": "shown"}
_UNSURE = {"say": ("say_weight", 0), "act": ("act_weight", 0), "heard": ("word_label", IGNORE), "shown": ("hand_label", IGNORE)}

# Fields of the table that are lists of entries, and what an entry holds.
_ENTRIES: dict[str, tuple[type, ...]] = {
    "did": (int, str, str),
    "wanted": (int, str, str),
    "unsure": (int, int, str),
    "heard": (int, str),
    "shown": (int, int, int),
}
_FIELDS = {"format", "ticks", "lost", "frame_age_s", "text", "cut", *_ENTRIES}

Arrays = dict[str, np.ndarray]


class ShardError(ExportError):
    """A scene that cannot be read; the text names shard, scene, field and remedy."""


# --- writing --------------------------------------------------------------------------------------------------------------


def write_scenes(
    out: Path, data: Path, recipe: Recipe, count: int, seed: int, jobs: int, progress: Callable[[int, int], None] = lambda done, of: None
) -> list[Path]:
    """Make `count` scenes of the training people as shards in `out`; returns their paths.

    The same seed gives the same bytes, however many processes work on it. Shards that are there already are kept, but for one that
    an earlier, smaller `count` left short.
    """
    out.mkdir(parents=True, exist_ok=True)
    global _corpus
    _corpus = load_corpus(data, "train", out / "voices", recipe.people)
    shards = [out / f"scenes-{seed}-{number:05d}.tar" for number in range(-(-count // SCENES_PER_SHARD))]
    sizes = [min(SCENES_PER_SHARD, count - i * SCENES_PER_SHARD) for i in range(len(shards))]
    todo = [(number, path, size) for number, (path, size) in enumerate(zip(shards, sizes, strict=True)) if _holds(path) != size]
    done = len(shards) - len(todo)
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:  # the recordings are shared, not read again
        running = [pool.submit(_write_shard, path, recipe, [seed, number], size) for number, path, size in todo]
        for future in as_completed(running):
            future.result()
            done += 1
            progress(done, len(shards))
    return shards


_corpus: Corpus | None = None


def _holds(path: Path) -> int:
    """How many scenes are in a shard; 0 when there is none, or one that cannot be read."""
    try:
        with tarfile.open(path) as tar:
            return sum(name.endswith("." + TABLE) for name in tar.getnames())
    except (FileNotFoundError, tarfile.TarError):
        return 0


def _write_shard(path: Path, recipe: Recipe, seed: list[int], size: int) -> None:
    assert _corpus is not None
    words = render_words(recipe.model.text.words)
    part = path.with_suffix(".part")
    with webdataset.TarWriter(str(part), mtime=0, user="", group="") as tar:
        for i in range(size):
            scene = make_scene(_corpus, words, np.random.default_rng([*seed, i]), recipe.model, recipe.ticks)
            tar.write(sample(scene.arrays, recipe.model, f"{path.stem}-{i:03d}"))
    os.replace(part, path)


def sample(arrays: Arrays, c: ModelConfig, key: str) -> dict[str, Any]:
    """A scene's arrays (`Scene.arrays`; with soft_say and soft_act also a teacher's probabilities) as the members of one sample."""
    words, acts = c.text.words, c.text.acts

    def events(say: np.ndarray, act: np.ndarray) -> list[list[Any]]:
        said = [[int(tick), "say", words[say[tick]]] for tick in np.flatnonzero(say)]
        return sorted(said + [[int(tick), "act", acts[act[tick]]] for tick in np.flatnonzero(act)])

    lost = arrays["lost"]
    table = {
        "format": FORMAT,
        "ticks": arrays["tick"].tolist(),
        "lost": np.flatnonzero(lost).tolist(),
        "frame_age_s": np.round(arrays["frame_age"][:, 0].astype(float), 4).tolist(),
        "text": [[int(tick), *(words[token] for token in arrays["text_in"][tick] if token)] for tick in _rows(arrays["text_in"])],
        "did": events(arrays["say_now"][:, 0], arrays["act_now"][:, 0]),
        "wanted": events(arrays["say_target"], arrays["act_target"]),
        "unsure": [
            [int(tick), int(tick), what]
            for what, nobody_knows in (
                ("say", arrays["say_weight"] == 0),
                ("act", arrays["act_weight"] == 0),
                ("heard", arrays["word_label"] == IGNORE),
                ("shown", arrays["hand_label"] == IGNORE),
            )
            for tick in np.flatnonzero(nobody_knows & ~lost)
        ],
        "cut": np.flatnonzero(arrays["cut"]).tolist(),
        "heard": [[int(tick), HEARD[arrays["word_label"][tick]]] for tick in np.flatnonzero(arrays["word_label"] > 0)],
        "shown": [[int(tick), int(tick), int(arrays["hand_label"][tick]) - 1] for tick in np.flatnonzero(arrays["hand_label"] > 0)],
    }
    members: dict[str, Any] = {"__key__": key, TABLE: json.dumps(table, separators=(",", ":")).encode()}
    for member in (MIC, VOICE):
        members[member] = flac(arrays[member.split(".")[0]][c.context_samples :])
    if arrays["frames"].any():
        members[FRAMES] = matroska(arrays["frames"].reshape(-1, *arrays["frames"].shape[2:]), 1000 * c.video.frames // c.tick_ms)
    if "soft_say" in arrays:
        soft = io.BytesIO()
        np.savez(soft, say=arrays["soft_say"].astype(np.float16), act=arrays["soft_act"].astype(np.float16))
        members[SOFT] = soft.getvalue()
    return members


def flac(samples: np.ndarray) -> bytes:
    """f32[n], ±1 at 16 kHz, as a 16-bit FLAC file."""
    file = io.BytesIO()
    soundfile.write(file, np.clip(samples, -1, 32767 / 32768), RATE_HZ, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def matroska(frames: np.ndarray, rate_hz: int) -> bytes:
    """u8[n, H, W, 3] as motion JPEG in Matroska."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mjpeg", rate=rate_hz)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuvj420p"
        stream.time_base, stream.options = Fraction(1, rate_hz), {"q:v": "2", "threads": "1", "flags": "+bitexact"}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def _rows(array: np.ndarray) -> np.ndarray:
    return np.flatnonzero(array.any(1))


# --- reading --------------------------------------------------------------------------------------------------------------


def shard_paths(pattern: str) -> list[str]:
    """The shards that a glob pattern names; raises ShardError when there are none."""
    path = Path(pattern)
    found = sorted(str(match) for match in path.parent.glob(path.name))
    if not found:
        raise ShardError(f"{pattern}: no such shards; give a pattern in quotes such as 'scenes/*.tar', made by copresence-export scenes")
    return found


def read_shard(path: str, c: ModelConfig) -> Iterator[Arrays]:
    """The arrays of every scene in a shard, named and shaped as `Scene.arrays`."""
    try:
        # All of it, in every worker and process: who reads which shards is shared out by `endless_scenes`.
        whole = webdataset.WebDataset([path], shardshuffle=False, empty_check=False, nodesplitter=None, workersplitter=None)
        for members in whole:
            yield _Reader(path, members, c).arrays()
    except tarfile.TarError as error:
        raise ShardError(f"{path}: not a whole tar archive ({error.args[0]}); delete it and write it again") from error


def endless_scenes(pattern: str, c: ModelConfig, rng: np.random.Generator, part: int = 0, parts: int = 1) -> Iterator[Arrays]:
    """Scenes over and over in an order drawn by `rng`; of several processes each reads a part of the shards, if there are enough.

    Raises ShardError when they cannot be in one batch: all must be of one length, and all or none have a teacher's probabilities.
    """
    paths = shard_paths(pattern)
    mine = paths[part::parts] or paths
    first: tuple[int, int] | None = None
    while True:
        for place in rng.permutation(len(mine)):
            scenes = list(read_shard(mine[place], c))
            kinds = {(len(scene["tick"]), len(scene)) for scene in scenes}
            first = first or next(iter(kinds), None)
            if kinds != {first}:
                raise ShardError(f"{mine[place]}: scenes of other numbers of ticks, or some without {SOFT}; train on those of one kind")
            for number in rng.permutation(len(scenes)):
                yield scenes[number]


class _Reader:
    """One sample and what is asked of its fields."""

    def __init__(self, shard: str, members: dict[str, Any], c: ModelConfig) -> None:
        self._where, self._members, self._config = f"{shard}, scene {members['__key__']}", members, c

    def arrays(self) -> Arrays:
        c, table = self._config, self._table()
        ticks = len(table["ticks"])
        zeros = np.zeros(ticks, np.int32)
        out: Arrays = {"tick": np.asarray(table["ticks"], np.int64), "lost": zeros.astype(bool), "cut": zeros.astype(bool)}
        if ticks == 0 or (np.diff(out["tick"]) < 1).any():
            self._refuse("ticks", "must be rising numbers, one a tick")
        for name in ("lost", "cut"):
            out[name][self._ticks(name, table.get(name, []), ticks)] = True
        for member in (MIC, VOICE):
            out[member.split(".")[0]] = self._sound(member, ticks)
        out["frames"] = self._frames(ticks)
        ages = table.get("frame_age_s", 0.0 if FRAMES in self._members else 1e4)
        if isinstance(ages, list) and len(ages) != ticks:
            self._refuse("frame_age_s", f"has {len(ages)} ages for {ticks} ticks")
        if not all(isinstance(age, int | float) for age in (ages if isinstance(ages, list) else [ages])):
            self._refuse("frame_age_s", "must be seconds, one number or one a tick")
        out["frame_age"] = np.broadcast_to(np.asarray(ages, np.float32).reshape(-1, 1), (ticks, 1)).copy()
        out["text_in"] = np.zeros((ticks, c.text.text_in), np.int32)
        for tick, *tokens in self._entries(table, "text"):
            if len(tokens) > c.text.text_in:
                self._refuse("text", f"has {len(tokens)} words in tick {tick}; at most {c.text.text_in} arrive in one")
            out["text_in"][self._ticks("text", [tick], ticks), : len(tokens)] = [self._id("text", "say", token) for token in tokens]
        did, wanted = (self._events(name, self._entries(table, name), ticks) for name in ("did", "wanted"))
        out["say_now"] = np.zeros((ticks, c.text.say), np.int32)
        out["say_now"][:, 0], out["act_now"] = did["say"], did["act"][:, None]
        out["said"], out["acted"] = (remembered(out[name], out["lost"]) for name in ("say_now", "act_now"))
        for kind in ("say", "act"):
            out[f"{kind}_target"] = wanted[kind]
            out[f"{kind}_weight"] = (~out["lost"]).astype(np.float32)
        out |= self._labels(table, ticks)
        for first, last, what in self._entries(table, "unsure"):
            self._span("unsure", first, last, ticks)
            if what not in _UNSURE:
                self._refuse("unsure", f"names '{what}'; it is one of {', '.join(_UNSURE)}")
            name, unknown = _UNSURE[what]
            out[name][first : last + 1] = unknown
        for name in _LABELS:
            out[name][out["lost"]] = IGNORE
        return out | self._soft(ticks)

    def _table(self) -> dict[str, Any]:
        try:
            table = json.loads(self._member(TABLE))
            if table["format"] != FORMAT:
                self._refuse("format", f"is {table['format']}; this version reads {FORMAT}: write the shard again")
            if strange := sorted(set(table) - _FIELDS):
                self._refuse(strange[0], f"is no field of the table; it has {', '.join(sorted(_FIELDS))}")
            if not isinstance(table["ticks"], list) or not all(isinstance(tick, int) for tick in table["ticks"]):
                self._refuse("ticks", "must be rising numbers, one a tick")
            return dict(table)
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            return self._refuse(TABLE, f"is not the table of SCENES.md: {error!r}; write it again")

    def _member(self, name: str) -> bytes:
        return self._members[name] if name in self._members else self._refuse(name, "is missing; add the member")

    def _sound(self, member: str, ticks: int) -> np.ndarray:
        try:
            samples, rate_hz = soundfile.read(io.BytesIO(self._member(member)), dtype="float32")
        except soundfile.LibsndfileError as error:
            self._refuse(member, f"is no sound file ({error.error_string}); write it as FLAC")
        length = ticks * self._config.tick_samples
        if rate_hz != RATE_HZ or samples.ndim != 1 or len(samples) != length:
            self._refuse(member, f"has shape {samples.shape} at {rate_hz} Hz; it must be mono, {RATE_HZ} Hz, {length} samples: convert it")
        return np.concatenate((np.zeros(self._config.context_samples, np.float32), samples))

    def _frames(self, ticks: int) -> np.ndarray:
        v = self._config.video
        if FRAMES not in self._members:
            return np.zeros((ticks, v.frames, v.height, v.width, 3), np.uint8)
        try:
            with av.open(io.BytesIO(self._members[FRAMES]), "r") as container:
                pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        except av.FFmpegError as error:
            self._refuse(FRAMES, f"is no film ({error.strerror}); write it as motion JPEG in Matroska")
        if len(pictures) != ticks * v.frames or pictures[0].shape != (v.height, v.width, 3):
            size = pictures[0].shape[1::-1] if pictures else (0, 0)
            self._refuse(FRAMES, f"has {len(pictures)} frames of {size}; it needs {ticks * v.frames} of {(v.width, v.height)}: convert it")
        return np.stack(pictures).reshape(ticks, v.frames, v.height, v.width, 3)

    def _events(self, field: str, events: list[Any], ticks: int) -> dict[str, np.ndarray]:
        found = {kind: np.zeros(ticks, np.int32) for kind in ("say", "act")}
        for tick, kind, value in events:
            if kind not in found:
                self._refuse(field, f"names '{kind}'; it is 'say' or 'act'")
            found[kind][self._ticks(field, [tick], ticks)] = self._id(field, kind, value)
        return found

    def _id(self, field: str, kind: str, value: str) -> int:
        known = self._config.text.words if kind == "say" else self._config.text.acts
        if value not in known:
            self._refuse(field, f"has '{value}', which the recipe's vocabulary has not; it knows {', '.join(known[1:])}")
        return known.index(value)

    def _labels(self, table: dict[str, Any], ticks: int) -> Arrays:
        labels = {name: np.full(ticks, 0 if field in table else IGNORE, np.int32) for name, field in _LABELS.items()}
        for tick, word in self._entries(table, "heard"):
            if word not in HEARD:
                self._refuse("heard", f"has '{word}'; it is one of {', '.join(HEARD[1:])}")
            labels["word_label"][self._ticks("heard", [tick], ticks)] = HEARD.index(word)
        for first, last, digit in self._entries(table, "shown"):
            self._span("shown", first, last, ticks)
            if not 0 <= digit <= 9:
                self._refuse("shown", f"has {digit}; it is a digit, 0 to 9")
            labels["hand_label"][first : last + 1] = digit + 1
        return labels

    def _soft(self, ticks: int) -> Arrays:
        if SOFT not in self._members:
            return {}
        try:
            with np.load(io.BytesIO(self._members[SOFT])) as soft:
                found = {f"soft_{kind}": soft[kind].astype(np.float32) for kind in ("say", "act")}
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            self._refuse(SOFT, f"is not an archive of arrays 'say' and 'act' ({type(error).__name__}); write it with np.savez")
        for kind, names in (("say", self._config.text.words), ("act", self._config.text.acts)):
            if found[f"soft_{kind}"].shape != (ticks, len(names)):
                self._refuse(SOFT, f"'{kind}' has shape {found[f'soft_{kind}'].shape}; it must be {(ticks, len(names))}")
        return found

    def _entries(self, table: dict[str, Any], field: str) -> list[Any]:
        """The entries of a field, each of the form that it must have."""
        entries, form = table.get(field, []), _ENTRIES.get(field)
        if not isinstance(entries, list):
            self._refuse(field, "must be a list of entries")
        for entry in entries:
            types = form or (int, *[str] * (len(entry) - 1 if isinstance(entry, list) else 1))  # text: a tick, then words
            if not isinstance(entry, list) or [type(value) for value in entry] != list(types):
                self._refuse(field, f"has the entry {json.dumps(entry)}; it must be [{', '.join(t.__name__ for t in types)}]")
        return entries

    def _ticks(self, field: str, numbers: Any, ticks: int) -> list[int]:
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            self._refuse(field, "must be a list of the scene's ticks, counted from 0")
        for number in numbers:
            if not 0 <= number < ticks:
                self._refuse(field, f"names tick {number}; the scene has ticks 0 to {ticks - 1}")
        return numbers

    def _span(self, field: str, first: int, last: int, ticks: int) -> None:
        self._ticks(field, [first, last], ticks)
        if last < first:
            self._refuse(field, f"ends with tick {last} before it begins with {first}")

    def _refuse(self, field: str, what: str) -> Any:
        raise ShardError(f"{self._where}: {field} {what}")
