"""Calibration data sets: read back, checked for what they must hold, and played to an engine tick by tick."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from tqdm import tqdm

from device.calibration import INDEX_NAME, RECORDED, CalibrationError, describe, read_index, record_dtype
from device.config import ModelConfig
from device.engine import Engine
from device.positions import clock_features, rope_table, tick_noise
from device.session import Rings
from export.quantize.compare import ProbeEngine, Ticks, collect
from export.scoreboard.play import AUDIBLE

ABOVE_ROOM = 3.0  # times the recording's quiet ticks (their lowest tenth): a voice in a noisy room
NEAR_ROOM = 1.5
PICTURE_CHANGE = 8.0  # mean grey levels within one patch, from tick to tick; camera noise stays below 4


class Need(NamedTuple):
    """What a calibration set must hold."""

    ticks: int
    meaning: str
    remedy: str


NEEDS = {
    "length": Need(200, "ticks in all", "record for longer"),
    "speech of others": Need(20, "ticks in which somebody else speaks", "speak to the companion while it records"),
    "own speech": Need(20, "ticks in which it speaks itself", "give it reasons to speak while it records"),
    "hands": Need(8, "ticks in which something enters or leaves the picture", "show hands to the camera while it records"),
    "silence": Need(20, "ticks in which nobody speaks", "leave pauses while it records"),
}


@dataclass(frozen=True)
class Recording:
    """One run: records as in `record_dtype`, and the seed of its noise."""

    ticks: np.ndarray
    seed: int


@dataclass(frozen=True)
class DataSet:
    """A checked calibration set; `digest` covers every byte of it."""

    path: Path
    config: ModelConfig
    recordings: list[Recording]
    found: dict[str, int]  # by the names of NEEDS
    digest: str

    @classmethod
    def open(cls, path: Path, config: ModelConfig) -> DataSet:
        """Read and check `path` for a model of `config`; raises CalibrationError, naming what is lacking and the remedy."""
        index = read_index(path)
        dtype = record_dtype(config)
        if (index.get("record"), index.get("tick_ms")) != (describe(dtype), config.tick_ms):
            raise CalibrationError(f"{path} holds ticks of another shape than this bundle's; record a set with this bundle")
        recordings = [_read_recording(path, entry, dtype) for entry in index["recordings"]]
        found = {name: sum(_count(r.ticks, config)[name] for r in recordings) for name in NEEDS}
        for name, need in NEEDS.items():
            if found[name] < need.ticks:
                raise CalibrationError(
                    f"{path} lacks {name}: {found[name]} {need.meaning}, at least {need.ticks} are needed; {need.remedy}"
                )
        return cls(path, config, recordings, found, hashlib.sha256((path / INDEX_NAME).read_bytes()).hexdigest())

    def __len__(self) -> int:
        return sum(len(recording.ticks) for recording in self.recordings)

    def play(self, engine: Engine, limit: int | None = None) -> Iterator[int]:
        """Launch `engine` on every tick, rings and all, and yield a number after each; `limit` takes its share of each recording."""
        number = 0
        for recording in self.recordings:
            count = len(recording.ticks) if limit is None else max(1, limit * len(recording.ticks) // len(self))
            rings = Rings(self.config, engine)
            following: int | None = None
            for record in recording.ticks[:count]:
                tick = int(record["tick"])
                for lost in range(tick if following is None else max(following, tick - rings.longest), tick):
                    rings.lose(lost)
                for name in RECORDED:
                    engine.inputs[name][...] = record[name]
                engine.inputs["clock"][...] = clock_features(self.config, tick)
                engine.inputs["rope"][...] = rope_table(self.config, tick)
                engine.inputs["noise"][...] = tick_noise(self.config, recording.seed, tick)
                engine.run()
                rings.absorb(tick)
                yield number
                number, following = number + 1, tick + 1


def _read_recording(folder: Path, entry: Any, dtype: np.dtype[np.void]) -> Recording:
    try:
        name, sha256, seed = str(entry["file"]), str(entry["sha256"]), int(entry["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise CalibrationError(f"{folder / INDEX_NAME}: an entry of 'recordings' lacks {error}; record into a new folder") from error
    if Path(name).name != name:
        raise CalibrationError(f"{folder / INDEX_NAME}: file name '{name}' leads out of the folder; record into a new folder")
    file = folder / name
    if not file.is_file():
        raise CalibrationError(f"{file} is missing; record into a new folder")
    if _sha256(file) != sha256:
        raise CalibrationError(f"{file} is not what was recorded (SHA-256 differs); record into a new folder")
    if file.stat().st_size == 0:
        return Recording(np.zeros(0, dtype), seed)
    return Recording(np.memmap(file, dtype, "r"), seed)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _count(ticks: np.ndarray, c: ModelConfig) -> dict[str, int]:
    """How many ticks of one recording count for each of NEEDS."""
    if len(ticks) == 0:
        return dict.fromkeys(NEEDS, 0)
    mic, voice = (_rms(ticks[name][:, c.context_samples :]) for name in ("mic", "voice"))
    room = float(np.quantile(mic, 0.1))
    speaking = voice > AUDIBLE
    # The echo of its own voice is not somebody else, nor does the room fall silent with its last sample.
    after = speaking | np.concatenate(([False], speaking[:-1]))
    return {
        "length": len(ticks),
        "speech of others": int((~after & (mic > max(ABOVE_ROOM * room, AUDIBLE))).sum()),
        "own speech": int(speaking.sum()),
        "hands": sum(_changed(a, b, c.video.patch) for a, b in zip(ticks["frames"][:-1, -1], ticks["frames"][1:, -1], strict=True)),
        "silence": int((~after & (mic <= max(NEAR_ROOM * room, AUDIBLE))).sum()),
    }


def _rms(samples: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(samples, dtype=np.float32).mean(axis=1))


def _changed(before: np.ndarray, after: np.ndarray, patch: int) -> bool:
    """Whether one patch of a picture u8[H, W, 3] became another."""
    height, width, _ = after.shape
    difference = np.abs(after.astype(np.int16) - before).reshape(height // patch, patch, width // patch, patch, 3)
    return bool(difference.mean(axis=(1, 3, 4)).max() > PICTURE_CHANGE)


def progress(ticks: Iterable[int], total: int, what: str) -> Iterable[int]:
    """`ticks` behind a progress bar with the time left; none where nobody watches."""
    return tqdm(ticks, what, total, unit="tick", leave=False, disable=not sys.stderr.isatty())


def outputs_of(model: onnx.ModelProto, data: DataSet, limit: int, what: str) -> Ticks:
    """What a graph puts out over the first `limit` ticks of the set."""
    engine = ProbeEngine(model, data.config)
    return collect(engine, progress(data.play(engine, limit), min(limit, len(data)), what))
