"""The loop: wait, gather, step, play, act, record; and what it leaves out where the board is too slow (device/ladder.py)."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from device.audio import Line, Samples
from device.camera import Frames, FrameSource
from device.config import ModelConfig
from device.engine import Memory
from device.events import Recording
from device.ladder import LADDER, Ladder
from device.playout_offset import OffsetGuard
from device.reach.context import Tick
from device.realtime import SlackCollector
from device.recorder import NoRecorder
from device.session import Decision, Session
from device.statistics import Statistics, TickTimes, Times
from device.steering import Steering
from device.thermal import Thermometer
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


class Events(Protocol):
    """Where the loop tells what happens; `dropped` counts what got lost there."""

    @property
    def dropped(self) -> int: ...

    def put(self, event: dict[str, Any], /) -> None:
        """Never waits in real time."""


class Watcher(Protocol):
    """Who wants to know of every tick. None of its calls waits."""

    def ticked(self, edge: Edge, decision: Decision, frames: Frames, late_samples: int) -> None:
        """A tick has been completed. Called by the loop alone: when it stalls, the watcher gets to know."""


class NoActuator:
    """Nothing that could move is connected: acts are dropped and counted."""

    dropped = 0

    def act(self, name: str) -> None:
        self.dropped += 1

    def heartbeat(self) -> None:
        """Nobody listens."""

    def take_events(self) -> list[dict[str, Any]]:
        return []


class Thinker(Protocol):
    """A background model. None of its calls waits, but in simulated time."""

    def text(self, edge_s: float) -> list[int]:
        """Word ids that it wants delivered in the tick that ends at `edge_s`, as many as a tick takes at most."""

    def tick(self, tick: Tick, frame: Frames, heard: Samples) -> list[str]:
        """What a tick brought; `frame` u8[H, W, 3] and `heard` f32[tick_samples] are good during the call. Returns acts for the body."""

    def take_events(self) -> list[dict[str, Any]]: ...

    def summary(self) -> dict[str, int]: ...


class NoThinker:
    """Nobody thinks beside the model."""

    def text(self, edge_s: float) -> list[int]:
        return []

    def tick(self, tick: Tick, frame: Frames, heard: Samples) -> list[str]:
        return []

    def take_events(self) -> list[dict[str, Any]]:
        return []

    def summary(self) -> dict[str, int]:
        return {}


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


class Recorder(Protocol):
    """Who is shown every tick and every event of a run. None of its calls waits."""

    def tick(self, times: TickTimes, decision: Decision, memory: Memory, launched: bool) -> None:
        """A tick is done; it was launched or, on the ladder's lowest rung, not."""

    def event(self, at_ns: int, event: dict[str, Any]) -> None:
        """At `at_ns` of CLOCK_MONOTONIC this was logged."""

    def request(self, reason: str) -> object:
        """Something went wrong: now is the time to keep what is known."""

    def take_events(self) -> list[dict[str, Any]]:
        """What happened to the recorder since the last call."""

    def close(self) -> None:
        """The run is over, and there is time."""


@dataclass
class Loop:
    """A run from its first tick to its end; the fields are what it is put together from."""

    config: ModelConfig
    session: Session
    ticker: Ticker
    steering: Steering
    line: Line
    camera: FrameSource
    text: TextQueue
    actuator: Actuator
    events: Events
    recording: Recording | None
    seconds: float | None  # the run ends after so long
    stop: threading.Event  # set by a signal
    recorder: Recorder = field(default_factory=NoRecorder)
    ladder: Ladder = field(default_factory=Ladder)
    thermometer: Thermometer | None = None
    watcher: Watcher | None = None
    thinker: Thinker = field(default_factory=NoThinker)
    offset: OffsetGuard | None = None  # None: the playout offset stays as it is

    def __post_init__(self) -> None:
        self._rate_hz, self._tick_samples = self.config.audio.sample_rate_hz, self.config.tick_samples
        self._limit = None if self.seconds is None else round(self.seconds * self._rate_hz)
        self._ended_by = ""
        self._ticks = self._gap_ticks = self._recorded = self._woke_ns = self._at_tick = 0
        self._first_tick_s = 0.0
        self._counts = {"late_speech_ticks": 0, "late_speech_samples": 0}
        self._counted: dict[str, int] = {}  # losses up to the tick before
        self._losing: dict[str, int] = {}  # those under way: what had been lost before they began
        self._engine, self._late, self._overhead = Times(), Times(), Times()
        self._statistics = Statistics(self.config.tick_ms)
        self._tick_ns = self.config.tick_ms * 1_000_000
        video, text = self.config.video, self.config.text
        self._black = np.zeros((video.frames, video.height, video.width, 3), np.uint8)
        self._seen_s = 0.0  # when the newest frame that was looked at was exposed
        self._nothing = Decision(
            say=np.zeros(text.say, np.int32),
            act=0,
            say_prob=np.zeros((text.say, len(text.words)), np.float32),
            act_prob=np.zeros(len(text.acts), np.float32),
            speech=np.zeros(self._tick_samples, np.float32),
            engine_ns=0,
        )

    def run(self, header: dict[str, Any], *notices: dict[str, Any]) -> dict[str, Any]:
        """Until microphone file, camera, time or a signal ends it; returns the summary, which is also the last event.

        `header` is the first event, and what else is to be known of the run follows it.
        """
        try:
            with SlackCollector() as garbage:
                for edge in self._wait(header, notices):
                    self._tick(edge)
                    garbage.after_tick((edge.tick + 2) * self._tick_ns - self.ticker.now_ns())
        except Exception as error:
            self._log({"event": "fault", "tick": self._at_tick, "fault": f"{type(error).__name__}: {error}"})
            self.recorder.request("fault")
            raise
        return self._summary()

    def _tick(self, edge: Edge) -> None:
        self._at_tick = edge.tick
        edge_ns = self.ticker.origin_ns + edge.edge_ns  # before steering moves the origin
        rung, probing = self.ladder.rung, self.ladder.probes()
        launched = rung.engine
        start_ns = time.perf_counter_ns()
        frames, frame_age_s = self._gather(edge)
        gather_ns = time.perf_counter_ns() - start_ns
        decision, late_samples, play_ns = self._nothing, 0, 0
        if launched:
            text = self.text.due(self._edge_s(edge.tick)) or self.thinker.text(self._edge_s(edge.tick))
            decision = self.session.step(edge.tick, self.line.mic, self.line.voice, frames, frame_age_s, text)
            start_ns = time.perf_counter_ns()
            late_samples = self.line.play(edge.tick, decision.speech)
            self._act(decision)
            self._think(edge, decision, frames, frame_age_s, text, late_samples)
            play_ns = time.perf_counter_ns() - start_ns
        elif probing:
            decision = decision._replace(engine_ns=self.session.probe(edge.tick, self.line.mic, self.line.voice, frames, frame_age_s))
        else:
            self.session.skip(edge.tick)
        lag = (self.ticker.now_ns() - edge.edge_ns) / self._tick_ns
        times = TickTimes(
            tick=edge.tick,
            edge_ns=edge_ns,
            late_ns=edge.late_ns,
            gather_ns=gather_ns,
            engine_ns=decision.engine_ns,
            play_ns=play_ns,
            missed=edge.missed,
            rung=LADDER.index(rung),
            late_samples=late_samples,
            frame_age_s=frame_age_s,
        )
        self.recorder.tick(times, decision, self.session.memory, launched)
        self._record(edge, decision, times)
        if launched or probing:
            self._climb(times, lag)
        self.actuator.heartbeat()
        if self.watcher is not None:
            self.watcher.ticked(edge, decision, frames, late_samples)

    def _wait(self, header: dict[str, Any], notices: tuple[dict[str, Any], ...]) -> Iterator[Edge]:
        latency_samples = self.line.start()
        self.ticker.start()
        for event in ({**header, "speaker_latency_ms": self._ms(latency_samples)}, *notices):
            self._log(event)
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

    def _gather(self, edge: Edge) -> tuple[Frames, float]:
        self.line.gather(edge.tick, self.ticker.origin_ns + edge.edge_ns)
        self.ticker.steer(self.steering.shift_ns(self.ticker.origin_ns, edge.edge_ns))
        edge_s = self._edge_s(edge.tick)
        if not self.ladder.rung.camera:
            return self._black, edge_s - self._seen_s
        frames, frame_age_s = self.camera.frames_at(edge_s)
        self._seen_s = edge_s - frame_age_s
        return frames, frame_age_s

    def _climb(self, times: TickTimes, lag: float) -> None:
        """Down the ladder, or up, after a launched tick whose work was done `lag` ticks after its edge."""
        if event := self.ladder.launched(lag, cut=times.late_samples > 0):
            self._log({**event, "tick": times.tick})
            self.camera.resting = not self.ladder.rung.camera
            if LADDER.index(self.ladder.rung) > times.rung:
                self.recorder.request("overload")

    def _act(self, decision: Decision) -> None:
        if decision.act:
            self.actuator.act(self.config.text.acts[decision.act])

    def _record(self, edge: Edge, decision: Decision, times: TickTimes) -> None:
        if self.recording is not None:
            self._record_played((edge.tick + 1) * self._tick_samples, self.recording)
        if times.late_samples:
            self._counts["late_speech_ticks"] += 1
            self._counts["late_speech_samples"] += times.late_samples
        self._log(
            {
                "event": "tick",
                "tick": edge.tick,
                "t_s": round(self._edge_s(edge.tick), 3),
                "say": [self.config.text.words[word] for word in decision.say if word],
                "act": self.config.text.acts[decision.act],
                "speaking": bool(decision.speech.any()),
                "gather_ms": round(times.gather_ns / 1e6, 3),
                "engine_ms": round(decision.engine_ns / 1e6, 3),
                "play_ms": round(times.play_ns / 1e6, 3),
                "late_ms": round(edge.late_ns / 1e6, 3),
                "gap_ticks": edge.missed,
                "frame_age_s": round(times.frame_age_s, 3),
            }
        )
        if self.offset is not None and (raised := self.offset.raised(edge.tick, times.late_samples)):
            self.line.playout_offset_samples = self.offset.offset_ms * self._rate_hz // 1000
            self._log({**raised, "tick": edge.tick})
        self._report_losses(edge.tick)
        self._report_body(edge.tick)
        for event in (*self.steering.take_events(), *self.recorder.take_events()):
            self._log({**event, "tick": edge.tick})
        self._ticks += 1
        self._statistics.add(times)
        if statistics := self._statistics.due(edge.tick):
            hot = {} if self.thermometer is None else self.thermometer.newest()
            self._log({**statistics, "rung": self.ladder.rung.name, **hot})
        if decision.engine_ns:
            self._engine.add(decision.engine_ns)
        self._late.add(edge.late_ns)
        self._overhead.add(time.perf_counter_ns() - self._woke_ns - decision.engine_ns)
        if self._ticks == 1:
            self._first_tick_s = _process_age_s()

    def _think(self, edge: Edge, decision: Decision, frames: Frames, frame_age_s: float, text: list[int], late_samples: int) -> None:
        words = self.config.text.words
        tick = Tick(
            tick=edge.tick,
            t_s=round(self._edge_s(edge.tick), 3),
            text=tuple(words[token] for token in text),
            said=tuple(words[word] for word in decision.say if word),
            act=self.config.text.acts[decision.act],
            speaking=bool(decision.speech.any()),
            frame_age_s=round(frame_age_s, 3),
            engine_ms=round(decision.engine_ns / 1e6, 3),
            missed=edge.missed,
            late_samples=late_samples,
        )
        for act in self.thinker.tick(tick, frames[-1], self.line.mic[-self._tick_samples :]):
            self.actuator.act(act)
        for event in self.thinker.take_events():
            self._log({**event, "tick": edge.tick})

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
            self._log({**event, "tick": tick})

    def _report_losses(self, tick: int) -> None:
        """One event when a count begins to grow, and one when it has stopped, with what was lost in between."""
        counts = self._all_counts()
        growing = {name for name, count in counts.items() if count > self._counted.get(name, 0)}
        begun, ended = sorted(growing - self._losing.keys()), sorted(self._losing.keys() - growing)
        if begun:
            blind = self.camera.fault is not None and not self.camera.counts.keys().isdisjoint(begun)
            self._log({"event": "loss", "tick": tick, "of": begun, **({"camera_fault": self.camera.fault} if blind else {})})
        if ended:
            self._log({"event": "recovery", "tick": tick, **{name: counts[name] - self._losing[name] for name in ended}})
        self._losing = {name: self._losing.get(name, self._counted.get(name, 0)) for name in growing}
        self._counted = counts

    def _all_counts(self) -> dict[str, int]:
        return {**self._counts, **self.camera.counts, **self.line.counts()}

    def _summary(self) -> dict[str, Any]:
        if self.recording is not None:
            whole = {"microphone": self.line.source.length, "seconds": self._limit}
            self.recording.finish(whole.get(self._ended_by) or self._recorded)
        self.recorder.close()
        for event in self.recorder.take_events():
            self._log(event)
        summary = {
            "event": "summary",
            "ended_by": self._ended_by,
            "ticks": self._ticks,
            "gap_ticks": self._gap_ticks,
            "engine_ms": self._engine.summary(),
            "late_ms": self._late.summary(),
            "clock": self.steering.summary(),
            "overhead_ms": self._overhead.summary(),
            "ladder_steps": self.ladder.steps,
            "first_tick_s": round(self._first_tick_s, 3),
            "memory_mb": round(_peak_memory_mb(), 1),
            **self._all_counts(),
            "camera_fault": self.camera.fault,
            "acts_dropped": self.actuator.dropped,
            "think": self.thinker.summary(),
            "events_dropped": self.events.dropped,
            "recording_dropped": 0 if self.recording is None else self.recording.dropped,
        }
        self._log(summary)
        return summary

    def _log(self, event: dict[str, Any]) -> None:
        self.events.put(event)
        self.recorder.event(self.ticker.origin_ns + self.ticker.now_ns(), event)

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
