"""Calibration recordings: the inputs of every launch, as the running loop gave them, kept for the exporter's quantization.

A data set is a folder with an index and one file of fixed-size records for each recording. What follows from the tick
number and the seed (clock, positions, noise) and what the graph itself makes (the rings) is computed again on reading.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from device.config import ModelConfig
from device.engine import Buffers
from device.events import Background
from device.tensors import tensor_table

FORMAT = 1  # of a data set; raised when an older reader would misunderstand a newer one
INDEX_NAME = "calibration.json"
RECORDED = ("mic", "voice", "frames", "frame_age", "text_in", "said", "acted")


class CalibrationError(ValueError):
    """A folder that cannot take, or does not give, a calibration data set; the text ends with the remedy."""


def record_dtype(config: ModelConfig) -> np.dtype[np.void]:
    """One tick in a recording: its number, then the RECORDED rows of the tensor table."""
    rows = {row.name: row for row in tensor_table(config)}
    return np.dtype([("tick", "<i8"), *((name, np.dtype(rows[name].dtype).newbyteorder("<"), rows[name].shape) for name in RECORDED)])


def describe(dtype: np.dtype[np.void]) -> list[list[Any]]:
    """The layout of a record, JSON-ready."""
    return [[name, dtype[name].base.str, list(dtype[name].shape)] for name in dtype.names or ()]


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a data set; raises CalibrationError."""
    where = folder / INDEX_NAME
    try:
        index: dict[str, Any] = json.loads(where.read_bytes())
        version, recordings = index["format"], index["recordings"]
        if type(version) is not int or version < 1 or not isinstance(recordings, list):
            raise TypeError("'format' must be a whole number and 'recordings' a list")
    except FileNotFoundError as error:
        raise CalibrationError(f"{folder} has no {INDEX_NAME}; record one with 'copresence run --record-calibration {folder}'") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise CalibrationError(f"{where} is not the index of a calibration data set: {reason}; record into a new folder") from error
    if version > FORMAT:
        raise CalibrationError(f"{where} has format {version}, this copresence reads up to {FORMAT}; update copresence")
    return index


class CalibrationRecorder(Background):
    """Adds one recording to the data set in `folder`; it becomes part of it when it is closed, and not before.

    Raises CalibrationError when the folder holds something else, or ticks of another shape.
    """

    def __init__(self, folder: Path, config: ModelConfig, bundle_sha256: str, seed: int, patient: bool) -> None:
        self._folder, self._dtype = folder, record_dtype(config)
        self._entry: dict[str, Any] = {"bundle_sha256": bundle_sha256, "seed": seed}
        layout = describe(self._dtype)
        self._index: dict[str, Any] = {"format": FORMAT, "tick_ms": config.tick_ms, "record": layout, "recordings": []}
        if folder.is_dir() and any(folder.iterdir()):
            self._index = read_index(folder)
            if (self._index.get("record"), self._index.get("tick_ms")) != (layout, config.tick_ms):
                raise CalibrationError(f"{folder} holds ticks of another shape than this bundle's; record into a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        number = len(self._index["recordings"])
        self._path = folder / f"{number:04d}.ticks"
        self._file: IO[bytes] = open(self._path, "wb")  # noqa: SIM115 - what a killed run left there was never in the index
        self._hash, self._ticks = hashlib.sha256(), 0
        super().__init__("calibration", self._write_tick, patient)

    def record(self, tick: int, inputs: Buffers) -> None:
        """Keep a copy of the inputs with which `tick` is about to be launched."""
        record = np.zeros((), self._dtype)
        record["tick"] = tick
        for name in RECORDED:
            record[name] = inputs[name]
        self.put(record)

    def close(self) -> None:
        super().close()
        self.attempt(self._finish)

    def _write_tick(self, record: np.ndarray) -> None:
        data = record.tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._ticks += 1

    def _finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        entry = {"file": self._path.name, "ticks": self._ticks, "sha256": self._hash.hexdigest(), **self._entry}
        self._index["recordings"].append(entry)
        scratch = self._folder / f".{INDEX_NAME}"
        scratch.write_text(json.dumps(self._index, indent=1) + "\n")
        scratch.rename(self._folder / INDEX_NAME)
