"""The microcontroller's tick and the session's, locked either way: as the master of the edges, or trimmed to follow them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from device.steering import Stamp
from firmware_bridge.bridge import McuTick
from firmware_bridge.clock import ClockSync
from firmware_bridge.dictionary import LIMITS

TICK_NS = LIMITS["TICK_US"][0] * 1000
TRIM_PPM_MAX = LIMITS["TRIM_PPM_MAX"][0]
GAIN = 1 / 32  # of the phase error is corrected per tick: stamps of its edges are off by tenths of a ms, and jitter is not to be followed
LOCKED_NS, LOCKED_TICKS = 1_000_000, 5  # so near to the session's edges, so many times in a row


class McuMaster:
    """The microcontroller's tick: the session's edges come to lie on its edges."""

    TICK_NS = TICK_NS  # a session whose tick is another length follows its rate

    def __init__(self, tick: Callable[[], McuTick | None], session_ns: Callable[[int], int]) -> None:
        """`tick` returns the newest one, and `session_ns` the session time at a time of CLOCK_MONOTONIC."""
        self._tick, self._session_ns = tick, session_ns
        self._newest: McuTick | None = None
        self._first = 0  # what the microcontroller calls the session's tick 0
        self._epoch = 0

    def stamp(self) -> Stamp | None:
        tick = self._tick()
        if tick is None:
            self._newest = None  # it starts anew, and with it its numbers
            return None
        if self._newest is None or tick.number < self._newest.number:
            self._first = tick.number - round(self._session_ns(tick.edge_ns) / self.TICK_NS)
            self._epoch += 1
        self._newest = tick
        return Stamp(tick.edge_ns, (tick.number - self._first) * self.TICK_NS, self._epoch)


class Trimmed(Protocol):
    """What McuFollower needs of a bridge."""

    clock: ClockSync
    tick: McuTick | None

    @property
    def connected(self) -> bool: ...

    def trim(self, ppm: int) -> None: ...


class McuFollower:
    """The microcontroller as the slave: its tick is trimmed until its edges lie on the session's, whatever those follow.

    The rate comes from what is known of both clocks, and only the phase is fed back: there is nothing that could wind up while the
    trim is at its limit, where 0.2 ms of phase go with every tick. Each change of state is one event.
    """

    def __init__(self, body: Trimmed, tick_ns: int) -> None:
        self.state = "away"  # then locking, or locked
        self.phase_ns = 0  # by how much its newest edge came too late
        self.trim_ppm = 0
        self._body, self._same_tick = body, tick_ns == TICK_NS  # another tick than the firmware's: it follows the rate alone
        self._newest: McuTick | None = None
        self._near = 0
        self._events: list[dict[str, Any]] = []

    def follow(self, edge_ns: int, ppm: float) -> None:
        """One of the session's edges is at `edge_ns` of CLOCK_MONOTONIC, and its clock runs `ppm` faster than that."""
        tick = self._body.tick if self._body.connected else None
        if tick is None:
            self._newest, self._near = None, 0
            self._enter("away")
            return
        if tick is self._newest:
            return
        again = self._newest is None  # whoever came back may have been told nothing yet
        self._newest = tick
        if self._same_tick:
            session_ns = round((tick.edge_ns - edge_ns) * (1 + ppm * 1e-6))
            self.phase_ns = (session_ns + TICK_NS // 2) % TICK_NS - TICK_NS // 2
        wanted = self._body.clock.ppm - ppm - GAIN * self.phase_ns / TICK_NS * 1e6
        trim_ppm = max(-TRIM_PPM_MAX, min(round(wanted), TRIM_PPM_MAX))
        if again or trim_ppm != self.trim_ppm:
            self._body.trim(trim_ppm)
        self.trim_ppm = trim_ppm
        self._near = self._near + 1 if abs(self.phase_ns) < LOCKED_NS else 0
        if self.state != "locked" or not self._near:
            self._enter("locked" if self._near >= LOCKED_TICKS else "locking")

    def take_events(self) -> list[dict[str, Any]]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def summary(self) -> dict[str, Any]:
        return {"state": self.state, **self._numbers()}

    def _numbers(self) -> dict[str, Any]:
        return {"phase_ms": round(self.phase_ns / 1e6, 3), "trim_ppm": self.trim_ppm}

    def _enter(self, state: str) -> None:
        if state != self.state:
            self.state = state
            self._events.append({"event": "body_clock", "state": state, **self._numbers()})
