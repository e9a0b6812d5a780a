"""Traces: the ticks of an event log or a dump as a file for a browser's tracing page (ui.perfetto.dev, chrome://tracing).

The format is the Trace Event Format: complete events (ph X) in µs, counters (C), instants (i), names of tracks (M).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from device.dump import Dump
from device.ladder import LADDER
from device.statistics import TickTimes

PROCESS = 1
TRACKS = {"microphone": 1, "loop": 2, "speaker": 3}  # thread ids, in the order in which they are shown
MCAP_MAGIC = b"\x89MCAP"
_DULL = ("header", "tick", "statistics", "summary")  # events that are no marks on the time line


class TraceError(ValueError):
    """A file that no trace can be made of; the text ends with the remedy."""


def trace(path: Path) -> list[dict[str, Any]]:
    """The trace events of an event log or a dump, in order of time; raises TraceError or DumpError."""
    try:
        with path.open("rb") as file:
            is_dump = file.read(len(MCAP_MAGIC)) == MCAP_MAGIC
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror}); give a file of --events or a dump") from error
    header, ticks, marks = _of_dump(Dump.read(path)) if is_dump else _of_events(path)
    try:
        tick_us = header["config"]["tick_ms"] * 1000
        offset_us = header["playout_offset_ms"] * 1000
        rate_hz = header["config"]["audio"]["sample_rate_hz"]
    except (KeyError, TypeError) as error:
        raise TraceError(f"{path}: has no whole header ({error}); give a file of --events, or a dump of 'copresence run'") from error
    named = [{"name": "process_name", "ph": "M", "pid": PROCESS, "args": {"name": f"copresence {header.get('bundle', '')}".strip()}}]
    for name, thread in TRACKS.items():
        named.append({"name": "thread_name", "ph": "M", "pid": PROCESS, "tid": thread, "args": {"name": name}})
        named.append({"name": "thread_sort_index", "ph": "M", "pid": PROCESS, "tid": thread, "args": {"sort_index": thread}})
    timeline = _Timeline(tick_us, offset_us, rate_hz)
    events = [event for times, words in ticks for event in timeline.tick(times, words)]
    events += [
        {"name": event["event"], "ph": "i", "s": "p", "ts": at_us, "pid": PROCESS, "tid": TRACKS["loop"], "args": event}
        for at_us, event in marks
    ]
    # Of two that begin together the longer one holds the other.
    return named + sorted(events, key=lambda event: (event["ts"], -event.get("dur", 0)))


def write(path: Path, events: list[dict[str, Any]]) -> None:
    """As a file, replaced in one step."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":")) + "\n", encoding="utf-8")
        scratch.rename(path)
    finally:
        scratch.unlink(missing_ok=True)


class _Timeline:
    """Makes spans of ticks. On one track they follow each other or lie within each other, as a tracing page wants it.

    Steering moves an edge by a little, and a simulated tick may take longer than it lasts: what would overlap begins later.
    """

    def __init__(self, tick_us: float, offset_us: float, rate_hz: int) -> None:
        self._tick_us, self._offset_us, self._rate_hz = tick_us, offset_us, rate_hz
        self._free_us: dict[str, float] = {}

    def tick(self, times: TickTimes, words: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Captured until the edge, waited for, gathered, launched, handed to the speaker, and heard from its due time on."""
        edge_us, end_us = times.edge_ns / 1000, (times.edge_ns + times.late_ns) / 1000
        yield self._span("capture", "microphone", edge_us - self._tick_us, edge_us, tick=times.tick)
        waited = self._span("wait", "loop", self._free_us.get("loop", edge_us), end_us, late_us=times.late_ns / 1000)
        yield waited
        parts = []
        for name, ns in (("gather", times.gather_ns), ("engine", times.engine_ns), ("play", times.play_ns)):
            if ns:
                parts.append(self._span(name, "loop", end_us, end_us + ns / 1000))
                end_us = parts[-1]["ts"] + parts[-1]["dur"]
        begin_us = parts[0]["ts"] if parts else waited["ts"] + waited["dur"]
        self._free_us["loop"] = begin_us  # the whole holds its parts
        yield self._span(f"tick {times.tick}", "loop", begin_us, end_us, rung=LADDER[times.rung].name, lost_before=times.missed, **words)
        yield from parts
        if times.engine_ns and times.play_ns:
            due_us = edge_us + self._offset_us
            cut_us = times.late_samples * 1e6 / self._rate_hz
            yield self._span("speech", "speaker", due_us + cut_us, due_us + self._tick_us, tick=times.tick, late_samples=times.late_samples)
        yield {"name": "camera age", "ph": "C", "ts": edge_us, "pid": PROCESS, "args": {"s": round(times.frame_age_s, 3)}}
        yield {"name": "ladder", "ph": "C", "ts": edge_us, "pid": PROCESS, "args": {"rung": times.rung}}

    def _span(self, name: str, track: str, start_us: float, end_us: float, **arguments: Any) -> dict[str, Any]:
        start_us = round(max(start_us, self._free_us.get(track, 0.0)), 3)
        length_us = round(max(0.0, end_us - start_us), 3)
        self._free_us[track] = round(start_us + length_us, 3)
        where = {"pid": PROCESS, "tid": TRACKS[track]}
        return {"name": name, "cat": track, "ph": "X", "ts": start_us, "dur": length_us, **where, "args": arguments}


Ticks = list[tuple[TickTimes, dict[str, Any]]]
Marks = list[tuple[float, dict[str, Any]]]


def _of_dump(dump: Dump) -> tuple[dict[str, Any], Ticks, Marks]:
    text = dump.config.text
    ticks: Ticks = []
    for times, launched, whole, tensors in dump.ticks:
        if whole:
            said = [text.words[word] for word in tensors["say"] if word] if launched else []
            ticks.append((times, {"say": said, "act": text.acts[int(tensors["act"][0])] if launched else "none"}))
    marks = [(at_ns / 1000, event) for at_ns, event in dump.events if event.get("event") not in _DULL]
    return dump.header, ticks, marks


def _of_events(path: Path) -> tuple[dict[str, Any], Ticks, Marks]:
    header: dict[str, Any] = {}
    ticks: Ticks = []
    marks: Marks = []
    now_us = 0.0
    rung = 0
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            event = json.loads(line)
            kind = event["event"]
            if kind == "header":
                header = event
            elif kind == "tick":
                now_us = event["t_s"] * 1e6
                ticks.append((_times(event, rung), {"say": event["say"], "act": event["act"]}))
            elif kind == "ladder":
                rung = [row.name for row in LADDER].index(event["to"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TraceError(f"{path}, line {number}: is not an event ({error!r}); give a file of --events or a dump") from error
        if kind not in _DULL:
            marks.append((now_us, event))
    return header, ticks, marks


def _times(event: dict[str, Any], rung: int) -> TickTimes:
    """An event has milliseconds to three places; how much speech was cut is in the event of its end."""
    spent_ns = {name: round(event[name] * 1e6) for name in ("late_ms", "gather_ms", "engine_ms", "play_ms")}
    return TickTimes(
        event["tick"],
        round(event["t_s"] * 1e9),
        spent_ns["late_ms"],
        spent_ns["gather_ms"],
        spent_ns["engine_ms"],
        spent_ns["play_ms"],
        event["gap_ticks"],
        rung,
        0,
        event["frame_age_s"],
    )
