"""The loop: wait, gather, step, play, act, record."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from device.audio import Line
from device.camera import Camera, Frames
from device.config import ModelConfig
from device.events import EventLog, Recording
from device.playout_offset import OffsetGuard
from device.realtime import SlackCollector
from device.session import Decision, Session
from device.steering import Steering
from device.ticker import Edge, Ticker


class Actuator(Protocol):
    """The body: where acts go. None of its calls waits."""

    @property
    def dropped(self) -> int: ...

    def act(self, name: str) -> None: ...

    def heartbeat(self) -> None:
        """A tick has been completed. Called by the loop alone: when it stalls, the body must get to know."""

    def take_events(self) -> list[dict[str, Any]]:
        """What happened since the last call; `at_ns`, where there is one, is CLOCK_MONOTONIC."""


class NoActuator:
    """Nothing that could move is connected: acts are dropped and counted."""

    dropped = 0

    def act(self, name: str) -> None:
        self.dropped += 1

    def heartbeat(self) -> None:
        """Nobody listens."""

    def take_events(self) -> list[dict[str, Any]]:
        return []


class TextQueue:
    """Text for the model, by the session time from which it is delivered; a tick takes as many tokens as it has room for."""

    def __init__(self, timed: list[tuple[float, list[int]]], per_tick: int) -> None:
        tokens = [(at_s, token) for at_s, ids in sorted(timed, key=lambda entry: entry[0]) for token in ids]
        self._waiting, self._per_tick = deque(tokens), per_tick

    def due(self, edge_s: float) -> list[int]:
        ids: list[int] = []
        while self._waiting and self._waiting[0][0] < edge_s and len(ids) < self._per_tick:
            ids.append(self._waiting.popleft()[1])
        return ids


class Times:
    """Durations of the newest ticks, in constant memory."""

    def __init__(self, newest: int = 65536) -> None:  # 3.6 hours of ticks
        self._ms, self._count = np.zeros(newest, np.float32), 0

    def add(self, duration_ns: int) -> None:
        self._ms[self._count % self._ms.size] = duration_ns / 1e6
        self._count += 1

    def summary(self) -> dict[str, float]:
        """Median, 99th percentile and maximum in ms."""
        known = self._ms[: self._count]
        values = np.percentile(known, (50, 99, 100)) if known.size else np.zeros(3)
        return {name: round(float(value), 3) for name, value in zip(("p50", "p99", "max"), values, strict=True)}


@dataclass
class Loop:
    """A run from its first tick to its end; the fields are what it is put together from."""

    config: ModelConfig
    session: Session
    ticker: Ticker
    steering: Steering
    line: Line
    camera: Camera
    text: TextQueue
    actuator: Actuator
    events: EventLog
    recording: Recording | None
    seconds: float | None  # the run ends after so long
    stop: threading.Event  # set by a signal
    offset: OffsetGuard | None = None  # None: the playout offset stays as it is

    def __post_init__(self) -> None:
        self._rate_hz, self._tick_samples = self.config.audio.sample_rate_hz, self.config.tick_samples
        self._limit = None if self.seconds is None else round(self.seconds * self._rate_hz)
        self._ended_by = ""
        self._ticks = self._gap_ticks = self._recorded = self._woke_ns = 0
        self._first_tick_s = 0.0
        self._counts = {"late_speech_ticks": 0, "late_speech_samples": 0}
        self._counted: dict[str, int] = {}  # losses up to the tick before
        self._losing: dict[str, int] = {}  # those under way: what had been lost before they began
        self._engine, self._late, self._overhead = Times(), Times(), Times()

    def run(self, header: dict[str, Any], *notices: dict[str, Any]) -> dict[str, Any]:
        """Until microphone file, camera, time or a signal ends it; returns the summary, which is also the last event.

        `header` is the first event, and what else is to be known of the run follows it.
        """
        with SlackCollector() as garbage:
            for edge in self._wait(header, notices):
                frames, frame_age_s, text = self._gather(edge)
                decision = self.session.step(edge.tick, self.line.mic, self.line.voice, frames, frame_age_s, text)
                late_samples = self.line.play(edge.tick, decision.speech)
                self._act(decision)
                self._record(edge, decision, frame_age_s, late_samples)
                self.actuator.heartbeat()
                garbage.after_tick((edge.tick + 2) * self.config.tick_ms * 1_000_000 - self.ticker.now_ns())
        return self._summary()

    def _wait(self, header: dict[str, Any], notices: tuple[dict[str, Any], ...]) -> Iterator[Edge]:
        latency_samples = self.line.start()
        self.ticker.start()
        for event in ({**header, "speaker_latency_ms": self._ms(latency_samples)}, *notices):
            self.events.put(event)
        tick = 0
        while not self._over(tick):
            edge = self.ticker.wait(tick)
            if self._over(edge.tick):
                return
            self._woke_ns = time.perf_counter_ns()
            self._gap_ticks += edge.missed
            yield edge
            tick = edge.tick + 1

    def _over(self, tick: int) -> bool:
        start, source, camera_end_s = tick * self._tick_samples, self.line.source, self.camera.end_s
        if self.stop.is_set():
            self._ended_by = "signal"
        elif self._limit is not None and start >= self._limit:
            self._ended_by = "seconds"
        elif source.length is not None and start >= source.length:
            self._ended_by = "microphone"
        elif not source.ends and camera_end_s is not None and start >= round(camera_end_s * self._rate_hz):
            self._ended_by = "camera"
        return bool(self._ended_by)

    def _gather(self, edge: Edge) -> tuple[Frames, float, list[int]]:
        self.line.gather(edge.tick, self.ticker.origin_ns + edge.edge_ns)
        self.ticker.steer(self.steering.shift_ns(self.ticker.origin_ns, edge.edge_ns))
        edge_s = self._edge_s(edge.tick)
        return *self.camera.frames_at(edge_s), self.text.due(edge_s)

    def _act(self, decision: Decision) -> None:
        if decision.act:
            self.actuator.act(self.config.text.acts[decision.act])

    def _record(self, edge: Edge, decision: Decision, frame_age_s: float, late_samples: int) -> None:
        if self.recording is not None:
            self._record_played((edge.tick + 1) * self._tick_samples, self.recording)
        if late_samples:
            self._counts["late_speech_ticks"] += 1
            self._counts["late_speech_samples"] += late_samples
        self.events.put(
            {
                "event": "tick",
                "tick": edge.tick,
                "t_s": round(self._edge_s(edge.tick), 3),
                "say": [self.config.text.words[word] for word in decision.say if word],
                "act": self.config.text.acts[decision.act],
                "speaking": bool(decision.speech.any()),
                "engine_ms": round(decision.engine_ns / 1e6, 3),
                "late_ms": round(edge.late_ns / 1e6, 3),
                "gap_ticks": edge.missed,
                "frame_age_s": round(frame_age_s, 3),
            }
        )
        if self.offset is not None and (raised := self.offset.raised(edge.tick, late_samples)):
            self.line.playout_offset_samples = self.offset.offset_ms * self._rate_hz // 1000
            self.events.put({**raised, "tick": edge.tick})
        self._report_losses(edge.tick)
        self._report_body(edge.tick)
        for event in self.steering.take_events():
            self.events.put({**event, "tick": edge.tick})
        self._ticks += 1
        self._engine.add(decision.engine_ns)
        self._late.add(edge.late_ns)
        self._overhead.add(time.perf_counter_ns() - self._woke_ns - decision.engine_ns)
        if self._ticks == 1:
            self._first_tick_s = _process_age_s()

    def _record_played(self, end: int, recording: Recording) -> None:
        end = min([end, *(length for length in (self._limit, self.line.source.length) if length is not None)])
        if end > self._recorded:
            played = self.line.played(self._recorded, end)
            recording.put(end - played.size, played)
            self._recorded = end

    def _report_body(self, tick: int) -> None:
        for event in self.actuator.take_events():
            if "at_ns" in event:
                ago_ns = time.monotonic_ns() - event.pop("at_ns")
                event["t_s"] = round((self.ticker.now_ns() - ago_ns) / 1e9, 4)
            self.events.put({**event, "tick": tick})

    def _report_losses(self, tick: int) -> None:
        """One event when a count begins to grow, and one when it has stopped, with what was lost in between."""
        counts = self._all_counts()
        growing = {name for name, count in counts.items() if count > self._counted.get(name, 0)}
        begun, ended = sorted(growing - self._losing.keys()), sorted(self._losing.keys() - growing)
        if begun:
            self.events.put({"event": "loss", "tick": tick, "of": begun})
        if ended:
            self.events.put({"event": "recovery", "tick": tick, **{name: counts[name] - self._losing[name] for name in ended}})
        self._losing = {name: self._losing.get(name, self._counted.get(name, 0)) for name in growing}
        self._counted = counts

    def _all_counts(self) -> dict[str, int]:
        return {**self._counts, **self.camera.counts, **self.line.counts()}

    def _summary(self) -> dict[str, Any]:
        if self.recording is not None:
            whole = {"microphone": self.line.source.length, "seconds": self._limit}
            self.recording.finish(whole.get(self._ended_by) or self._recorded)
        summary = {
            "event": "summary",
            "ended_by": self._ended_by,
            "ticks": self._ticks,
            "gap_ticks": self._gap_ticks,
            "engine_ms": self._engine.summary(),
            "late_ms": self._late.summary(),
            "clock": self.steering.summary(),
            "overhead_ms": self._overhead.summary(),
            "first_tick_s": round(self._first_tick_s, 3),
            "memory_mb": round(_peak_memory_mb(), 1),
            **self._all_counts(),
            "camera_fault": self.camera.fault,
            "acts_dropped": self.actuator.dropped,
            "events_dropped": self.events.dropped,
            "recording_dropped": 0 if self.recording is None else self.recording.dropped,
        }
        self.events.put(summary)
        return summary

    def _edge_s(self, tick: int) -> float:
        return (tick + 1) * self.config.tick_ms / 1000

    def _ms(self, samples: int) -> float:
        return round(samples * 1000 / self._rate_hz, 1)


def _process_age_s() -> float:
    """Since the process was started; steps of 10 ms."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _peak_memory_mb() -> float:
    """Peak resident size since exec (getrusage's would count the parent's)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
