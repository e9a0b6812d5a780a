"""Dumps: the flight recorder's minute as an MCAP file that Foxglove opens, and the reader that a replay and a trace begin with.

Every channel is JSON with a schema. A message's log time is its tick's edge in CLOCK_MONOTONIC ns (in a simulated run: session time).
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np

from device.config import ConfigError, ModelConfig
from device.engine import Buffers
from device.ladder import LADDER
from device.statistics import TickTimes
from device.streams import STREAMS
from device.tensors import tensor_table

FORMAT = 1  # of the channels; raised when an older reader would misunderstand a newer dump
METADATA = "copresence"

RECORDED = tuple(name for stream in STREAMS.values() for name in stream.tensors)  # rows of the tensor table
PRIVATE = tuple(name for stream in STREAMS.values() if stream.private for name in stream.tensors)

_BASE64 = {"type": "string", "contentEncoding": "base64"}
_TIME = {"type": "object", "title": "time", "properties": {"sec": {"type": "integer"}, "nsec": {"type": "integer"}}}


def _schema(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def _integers(*names: str) -> dict[str, Any]:
    return {name: {"type": "integer"} for name in names}


# topic: (schema's name, its properties); those called foxglove.* are published by Foxglove, which shows them as picture and sound.
CHANNELS: dict[str, tuple[str, dict[str, Any]]] = {
    "/tick": (
        "copresence.Tick",
        _schema(
            **_integers("tick", "late_ns", "gather_ns", "engine_ns", "play_ns", "missed", "late_samples"),
            frame_age_s={"type": "number"},
            rung={"type": "string", "description": "of the ladder, device/ladder.py"},
            launched={"type": "boolean"},
            whole={"type": "boolean", "description": "false: the run ended or hung before this tick was done"},
            say={"type": "array", "items": {"type": "string"}},
            act={"type": "string"},
        ),
    ),
    "/event": ("copresence.Event", _schema(event={"type": "string"}, tick={"type": "integer"})),
    "/tensors": (
        "copresence.Tensors",
        {"type": "object", "additionalProperties": {**_BASE64, "description": "little-endian; shapes are the tensor table's"}},
    ),
    "/state": ("copresence.State", _schema(name={"type": "string"}, data=_BASE64)),
    "/camera": (
        "foxglove.RawImage",
        _schema(
            timestamp=_TIME, frame_id={"type": "string"}, **_integers("width", "height", "step"), encoding={"type": "string"}, data=_BASE64
        ),
    ),
    **{
        f"/{name}": (
            "foxglove.RawAudio",
            _schema(timestamp=_TIME, data=_BASE64, format={"type": "string"}, **_integers("sample_rate", "number_of_channels")),
        )
        for name in ("mic", "voice", "speech")
    },
}


class DumpError(ValueError):
    """A file that is no dump, or not one for what is asked; the text ends with the remedy."""


def tick_dtype(config: ModelConfig, raw: bool) -> np.dtype[np.void]:
    """One tick in the ring: TickTimes, how far it got, and the tensors that are kept; with `raw` also the private ones and the updates."""
    rows = {row.name: row for row in tensor_table(config)}
    names = [name for name in RECORDED if raw or name not in PRIVATE]
    if raw:
        names += [row.name for row in rows.values() if row.role == "update"]
    times = [(name, "<f8" if name == "frame_age_s" else "<i8") for name in TickTimes._fields]
    tensors = [(name, np.dtype(rows[name].dtype).newbyteorder("<"), rows[name].shape) for name in names]
    return np.dtype([*times, ("launched", "?"), ("whole", "?"), *tensors], align=True)


class DumpWriter:
    """Writes one dump beside its place and moves it there when it is whole; leaving by an exception leaves nothing."""

    def __init__(self, path: Path, config: ModelConfig, raw: bool) -> None:
        from mcap.writer import Writer

        self._path, self._scratch = path, path.with_name(f".{path.name}")
        self._config, self._raw = config, raw
        self._names = [name for name in tick_dtype(config, raw).names or () if name not in (*TickTimes._fields, "launched", "whole")]
        self._at_ns = 0
        self._file: IO[bytes] = open(self._scratch, "wb", opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115
        self._mcap = Writer(self._file)

    def __enter__(self) -> DumpWriter:
        return self

    def begin(self, reason: str, head: list[tuple[int, dict[str, Any]]], state: tuple[Buffers, int | None] | None) -> None:
        """`head`: the run's header and what else was logged before its first tick; `state`: what was known, and which tick came next."""
        self._mcap.start(profile="", library="copresence")
        self._channels = {}
        for topic, (name, schema) in CHANNELS.items():
            number = self._mcap.register_schema(name, "jsonschema", json.dumps({"title": name, **schema}).encode())
            self._channels[topic] = self._mcap.register_channel(topic, "json", number)
        description = {"format": FORMAT, "reason": reason, "raw": self._raw, "config": self._config.to_dict()}
        if state is not None:
            description["next"] = state[1]
        self._mcap.add_metadata(METADATA, {name: json.dumps(value) for name, value in description.items()})
        for at_ns, event in head:
            self.event(at_ns, event)
        for name, array in ({} if state is None else state[0]).items():
            self._put("/state", 0, {"name": name, "data": _encoded(array)})

    def tick(self, slot: np.ndarray) -> None:
        """A record of `tick_dtype`."""
        whole, launched = bool(slot["whole"]), bool(slot["launched"])
        tick = int(slot["tick"])
        if not whole:  # its times were not written
            self._at_ns += self._config.tick_ms * 1_000_000
            message: dict[str, Any] = {"tick": tick}
        else:
            self._at_ns = int(slot["edge_ns"])
            message = {name: slot[name].item() for name in TickTimes._fields if name != "edge_ns"}
            message["rung"] = LADDER[message["rung"]].name
        message |= {"launched": launched, "whole": whole}
        if whole and launched:
            text = self._config.text
            message |= {"say": [text.words[word] for word in slot["say"] if word], "act": text.acts[int(slot["act"][0])]}
        self._put("/tick", self._at_ns, message)
        if launched:
            kept = self._names if whole else [name for name in self._names if name in _entering(self._config)]
            self._put("/tensors", self._at_ns, {name: _encoded(slot[name]) for name in kept})
            if self._raw:
                self._show(slot, whole)

    def event(self, at_ns: int, event: dict[str, Any]) -> None:
        self._put("/event", max(0, at_ns), event)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._mcap.finish()  # type: ignore[no-untyped-call]
                self._file.flush()
                os.fsync(self._file.fileno())
        except BaseException:
            kind = OSError
            raise
        finally:
            self._file.close()
            if kind is not None:
                self._scratch.unlink(missing_ok=True)
        if kind is None:
            self._scratch.rename(self._path)

    def _show(self, slot: np.ndarray, whole: bool) -> None:
        """The tick's own samples and its newest picture, as Foxglove takes them."""
        c, tick_ns = self._config, self._config.tick_ms * 1_000_000
        for name in ("mic", "voice", "speech") if whole else ("mic", "voice"):
            samples = np.clip(np.rint(slot[name][-c.tick_samples :] * 32768), -32768, 32767).astype("<i2")
            start_ns = self._at_ns - (0 if name == "speech" else tick_ns)
            sound = {"data": _encoded(samples), "format": "pcm-s16", "sample_rate": c.audio.sample_rate_hz, "number_of_channels": 1}
            self._put(f"/{name}", self._at_ns, {"timestamp": _time(start_ns), **sound})
        picture = slot["frames"][-1]
        exposed_ns = self._at_ns - round(float(slot["frame_age"][0]) * 1e9)
        size = {"width": c.video.width, "height": c.video.height, "step": 3 * c.video.width}
        self._put(
            "/camera",
            self._at_ns,
            {"timestamp": _time(exposed_ns), "frame_id": "camera", **size, "encoding": "rgb8", "data": _encoded(picture)},
        )

    def _put(self, topic: str, at_ns: int, message: dict[str, Any]) -> None:
        data = json.dumps(message, ensure_ascii=False, separators=(",", ":"), default=str).encode()
        self._mcap.add_message(self._channels[topic], at_ns, data, at_ns)


class RecordedTick(NamedTuple):
    """`launched`: it was not a lost one; `whole`: it came to its end, and has outputs if it was launched."""

    times: TickTimes
    launched: bool
    whole: bool
    tensors: Buffers


@dataclass
class Dump:
    """What a dump holds, oldest first."""

    path: Path
    config: ModelConfig
    raw: bool
    reason: str
    next: int | None = None  # the tick that was due before the first of `ticks`
    state: Buffers = field(default_factory=dict)
    ticks: list[RecordedTick] = field(default_factory=list)
    events: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    @property
    def header(self) -> dict[str, Any]:
        """The run's first event."""
        return next((event for _, event in self.events if event.get("event") == "header"), {})

    @classmethod
    def read(cls, path: Path) -> Dump:
        """All of it; raises DumpError."""
        from mcap.exceptions import McapError

        try:
            with path.open("rb") as file:
                return cls._read(path, file)
        except OSError as error:
            raise DumpError(f"{path}: cannot be read ({error.strerror}); give a dump of 'copresence dump'") from error
        except (McapError, ConfigError, ValueError, KeyError, TypeError, IndexError, StopIteration, RuntimeError) as error:
            if isinstance(error, DumpError):
                raise
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise DumpError(f"{path}: is not a whole dump ({reason}); give a file of 'copresence dump'") from error

    @classmethod
    def _read(cls, path: Path, file: IO[bytes]) -> Dump:
        from mcap.reader import make_reader

        reader = make_reader(file, validate_crcs=True)
        described = next((entry.metadata for entry in reader.iter_metadata() if entry.name == METADATA), None)
        if described is None:
            raise DumpError(f"{path}: was not written by copresence; give a file of 'copresence dump'")
        values = {name: json.loads(value) for name, value in described.items()}
        if values["format"] > FORMAT:
            raise DumpError(f"{path}: has format {values['format']}, this copresence reads up to {FORMAT}; update copresence")
        config = ModelConfig.from_dict(values["config"])
        dump = cls(path, config, bool(values["raw"]), str(values["reason"]), values.get("next"))
        rows = {row.name: row for row in tensor_table(config)}

        def decoded(name: str, data: str) -> np.ndarray:
            return np.frombuffer(base64.b64decode(data, validate=True), np.dtype(rows[name].dtype).newbyteorder("<")).reshape(
                rows[name].shape
            )

        for topic, at_ns, message in _messages(reader):
            if topic == "/event":
                dump.events.append((at_ns, message))
            elif topic == "/state":
                dump.state[message["name"]] = decoded(message["name"], message["data"])
            elif topic == "/tick":
                dump.ticks.append(RecordedTick(_times(at_ns, message), bool(message["launched"]), bool(message["whole"]), {}))
            elif topic == "/tensors":
                dump.ticks[-1].tensors.update({name: decoded(name, data) for name, data in message.items()})
        return dump


def _messages(reader: Any) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """In the file's order, which is the writer's."""
    for _, channel, message in reader.iter_messages(topics=["/event", "/state", "/tick", "/tensors"], log_time_order=False):
        yield channel.topic, message.log_time, json.loads(message.data)


def _times(at_ns: int, message: dict[str, Any]) -> TickTimes:
    rungs = [rung.name for rung in LADDER]
    known = {name: message.get(name, 0) for name in TickTimes._fields}
    return TickTimes(**{**known, "edge_ns": at_ns, "rung": rungs.index(message.get("rung", rungs[0]))})


def _entering(config: ModelConfig) -> set[str]:
    return {row.name for row in tensor_table(config) if row.enters}


def _encoded(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def _time(at_ns: int) -> dict[str, int]:
    sec, nsec = divmod(max(0, at_ns), 1_000_000_000)
    return {"sec": sec, "nsec": nsec}
