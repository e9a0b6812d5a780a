"""Replay: the loop again on what a dump holds, and whether every output is what it was, bit for bit."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from device.audio import Line, Playout, Samples, Source
from device.bundle import Bundle
from device.camera import Frames, NoCamera
from device.config import ModelConfig
from device.dump import Dump, DumpError
from device.engine import Buffers, Engine, Memory
from device.events import EventLog
from device.ladder import LADDER, Ladder, Rung
from device.loop import Loop, NoActuator, TextQueue
from device.session import CHOSEN, Decision, Session
from device.statistics import TickTimes
from device.steering import Steering
from device.tensors import tensor_table
from device.ticker import Edge


@dataclass(frozen=True)
class Difference:
    """The first place where a replay is not what was recorded."""

    tick: int
    tensor: str
    index: tuple[int, ...]  # of the first value that differs
    recorded: float
    found: float

    def __str__(self) -> str:
        place = f"[{', '.join(map(str, self.index))}]"
        return f"tick {self.tick}: '{self.tensor}' differs, first at {place}: {self.recorded!r} was recorded, {self.found!r} came now"


@dataclass(frozen=True)
class Outcome:
    """`ticks` were launched again, and all were equal unless there is a `difference`; `lost` were lost ones then and now."""

    ticks: int
    lost: int
    difference: Difference | None


def require_replayable(dump: Dump) -> None:
    """Raise DumpError for a dump without what a replay begins with."""
    if not dump.raw:
        raise DumpError(f"{dump.path}: holds no sound and no pictures, so it cannot be replayed; record with 'copresence run --record-raw'")
    if not dump.ticks:
        raise DumpError(f"{dump.path}: holds no tick; ask for a dump once the companion runs")


def require_bundle(dump: Dump, bundle: Bundle) -> None:
    """Raise DumpError if the dump is of another bundle."""
    recorded = dump.header.get("bundle_sha256")
    if recorded != bundle.digest or dump.config != bundle.config:
        raise DumpError(
            f"{dump.path}: was recorded with the bundle {dump.header.get('bundle')!r} ({str(recorded)[:12]}…), "
            f"and {bundle.path} is another ({bundle.digest[:12]}…); give that one with --bundle"
        )


def replay(dump: Dump, engine: Engine) -> Outcome:
    """Run the loop on `dump`, of the engine's bundle, until its end or the first difference; raises DumpError."""
    require_replayable(dump)
    config, tape = dump.config, _Tape(dump)
    comparison = _Comparison(tape)
    session = Session(config, engine, int(dump.header.get("seed", 0)), comparison.launch)
    try:
        session.past.restore(dump.state, dump.next)
    except (KeyError, ValueError) as error:
        raise DumpError(f"{dump.path}: does not hold the state that a replay begins with ({error}); ask for another dump") from error
    log = EventLog(None, patient=True)
    last = dump.ticks[-1].times.tick
    Loop(
        config=config,
        session=session,
        ticker=tape,
        steering=Steering(config.tick_ms * 1_000_000),
        line=Line(config, _Microphone(tape), _Speaker(config, tape), 0),
        camera=_Camera(tape),
        text=_Text(tape),
        actuator=NoActuator(),
        events=log,
        recording=None,
        seconds=(last + 1) * config.tick_ms / 1000,
        stop=comparison.stop,
        recorder=comparison,
        ladder=_Rungs(tape),
    ).run({**dump.header, "event": "header", "replay": str(dump.path)})
    log.close()
    return Outcome(comparison.launched, comparison.lost, comparison.difference)


class _Tape:
    """The ticker of a replay, and what it has come to: the dump's ticks, one after the other."""

    origin_ns = 0

    def __init__(self, dump: Dump) -> None:
        self._rest = iter(dump.ticks)
        self.config: ModelConfig = dump.config
        self.times = dump.ticks[0].times
        self.launched = self.whole = False
        self.tensors: Buffers = {}
        self.rung: Rung = LADDER[0]
        self._now_ns = 0

    def start(self) -> None:
        """Nothing runs."""

    def wait(self, tick: int) -> Edge:
        self.times, self.launched, self.whole, self.tensors = next(self._rest)
        self.rung = LADDER[self.times.rung]
        self._now_ns = (self.times.tick + 1) * self.config.tick_ms * 1_000_000
        return Edge(self.times.tick, self._now_ns, self.times.late_ns, self.times.missed)

    def now_ns(self) -> int:
        return self._now_ns

    def steer(self, shift_ns: int) -> None:
        """The edges are where they were."""

    def close(self) -> None:
        """Nothing to close."""


class _Rungs(Ladder):
    """Where the run stood on the ladder, whatever this machine would have done."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self._tape = tape

    @property
    def rung(self) -> Rung:
        return self._tape.rung

    def probes(self) -> bool:
        return False  # what a probe put out was not looked at

    def launched(self, lag: float, cut: bool) -> dict[str, Any] | None:
        return None


class _Microphone(Source):
    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self._tape = tape

    def read(self, start: int, out: Samples) -> None:
        out[...] = self._tape.tensors.get("mic", 0)


class _Speaker(Playout):
    def __init__(self, config: ModelConfig, tape: _Tape) -> None:
        super().__init__(config.audio.sample_rate_hz)
        self._tape = tape

    def start(self) -> None:
        """Nothing is played."""

    def sync(self, end: int, edge_ns: int) -> None:
        """Nothing is played."""

    def put(self, start: int, speech: Samples) -> int:
        return self._tape.times.late_samples

    def heard(self, start: int, out: Samples) -> None:
        out[...] = self._tape.tensors.get("voice", 0)


class _Camera(NoCamera):
    """What was seen, or black where the dump has no pictures."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__(tape.config)
        self._tape = tape

    def frames_at(self, edge_s: float) -> tuple[Frames, float]:
        tensors = self._tape.tensors
        if "frames" not in tensors:
            return super().frames_at(edge_s)[0], self._tape.times.frame_age_s
        return tensors["frames"], float(tensors["frame_age"][0])


class _Text(TextQueue):
    def __init__(self, tape: _Tape) -> None:
        super().__init__([], tape.config.text.text_in)
        self._tape = tape

    def due(self, edge_s: float) -> list[int]:
        return [int(word) for word in self._tape.tensors["text_in"]]


class _Comparison:
    """In a recorder's place: holds every tick against the tape, and ends the run at the first difference."""

    def __init__(self, tape: _Tape) -> None:
        self._tape = tape
        self._updates = [row for row in tensor_table(tape.config) if row.role == "update"]
        self._found = {row.name: np.zeros(row.shape, row.dtype) for row in self._updates}
        self.stop = threading.Event()
        self.difference: Difference | None = None
        self.launched = self.lost = 0

    def launch(self, tick: int, inputs: Buffers) -> None:
        self._compare(tick, {name: inputs[name] for name in CHOSEN})

    def tick(self, times: TickTimes, decision: Decision, memory: Memory, launched: bool) -> None:
        self.lost += times.missed + (not launched)
        if not launched or not self._tape.whole:
            return
        self.launched += self.difference is None
        memory.copy_updates(self._found)
        found = {
            **{name: np.atleast_1d(getattr(decision, name)) for name in ("speech", "say", "act", "say_prob", "act_prob")},
            **self._found,
        }
        self._compare(times.tick, found)

    def event(self, at_ns: int, event: dict[str, Any]) -> None:
        """They are the dump's."""

    def request(self, reason: str) -> object:
        """There is a dump."""

    def take_events(self) -> list[dict[str, Any]]:
        return []

    def close(self) -> None:
        """Nothing to close."""

    def _compare(self, tick: int, found: Buffers) -> None:
        for name, array in found.items():
            if self.difference is not None:
                return
            recorded = self._tape.tensors[name]
            now = np.ascontiguousarray(array, recorded.dtype)
            if now.tobytes() != recorded.tobytes():
                # Bit by bit: two NaN may be equal, and 0.0 is not -0.0.
                unequal = now.view(np.uint8).reshape(*now.shape, -1) != np.ascontiguousarray(recorded).view(np.uint8).reshape(
                    *now.shape, -1
                )
                index = tuple(int(i) for i in np.argwhere(unequal.any(axis=-1))[0])
                self.difference = Difference(tick, name, index, recorded[index].item(), now[index].item())
                self.stop.set()
