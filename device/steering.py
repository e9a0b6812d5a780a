"""The phase-locked loop: which master the edges follow, and by how much the ones to come must move for that."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from device.estimator import ClockEstimator

MASTERS = {
    "audio": "the converter's sample clock: a tick is so many samples",
    "mcu": "the hardware timer of the microcontroller, over the bridge",
    "soc": "this machine's own timer, and nothing else",
}
GAIN = 1 / 8  # of the phase error is corrected per tick: settles in a few seconds, and smooths what the estimate jumps
SLEW = 0.005  # of a tick is the most that an edge moves: ten times what crystals need, and no speech is audibly cut by it
AWAY_TICKS = 5  # so long without a stamp: the master is away


class Stamp(NamedTuple):
    """At `own_ns` of CLOCK_MONOTONIC the master's clock was seen to say that session time is `master_ns`."""

    own_ns: int
    master_ns: int
    epoch: int = 0  # another one: the master's count was moved on purpose, so that a step is no surprise


class Master(Protocol):
    def stamp(self) -> Stamp | None:
        """The newest one, again and again until there is a newer one; None before the first. Never waits."""


class Follower(Protocol):
    """A clock that goes along with the session's, whatever that follows; McuFollower."""

    def follow(self, edge_ns: int, ppm: float) -> None: ...

    def take_events(self) -> list[dict[str, Any]]: ...

    def summary(self) -> dict[str, Any]: ...


class Steering:
    """Moves the edges so that they come when the master's time is a whole number of ticks.

    An edge never moves by more than `SLEW` of a tick, so whatever the master does there is neither a burst nor a gap. A master
    that goes away leaves its last known rate behind. Each change of state is one event.
    """

    def __init__(self, tick_ns: int, master: Master | None = None, name: str = "soc", follower: Follower | None = None) -> None:
        """Without a master the edges are this machine's own."""
        self.name = name
        self.state = "free" if master is None else "locking"  # then locked, or holdover: it is away
        self.phase_ns = 0  # by how much the edges came too early for the master's, as far as is known
        self._tick_ns, self._master, self._follower = tick_ns, master, follower
        self._estimator = ClockEstimator()
        self._newest: Stamp | None = None
        self._heard_ns = 0
        self._steps = 0
        self._fraction_ns = 0.0
        self._events: list[dict[str, Any]] = []

    def shift_ns(self, origin_ns: int, edge_ns: int) -> int:
        """At an edge (session time), with session time 0 at `origin_ns` of CLOCK_MONOTONIC: by how much to delay the ones to come."""
        own_ns = origin_ns + edge_ns
        shift_ns = 0 if self._master is None else self._towards(self._master, origin_ns, own_ns)
        if self._follower is not None:
            self._follower.follow(own_ns, self._estimator.ppm)
        return shift_ns

    def _towards(self, master: Master, origin_ns: int, own_ns: int) -> int:
        self._hear(master.stamp(), own_ns)
        self._judge(own_ns)
        wanted_ns = self._fraction_ns - self._estimator.ppm * 1e-6 * self._tick_ns
        if self.state in ("locking", "locked") and self._newest is not None:
            self.phase_ns = self._estimator.offset_ns(own_ns) - origin_ns
            wanted_ns += GAIN * self.phase_ns
        limit_ns = SLEW * self._tick_ns
        wanted_ns = max(-limit_ns, min(wanted_ns, limit_ns))
        shift_ns = round(wanted_ns)
        self._fraction_ns = wanted_ns - shift_ns
        return shift_ns

    def take_events(self) -> list[dict[str, Any]]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events if self._follower is None else [*events, *self._follower.take_events()]

    def summary(self) -> dict[str, Any]:
        estimator = self._estimator
        known = {} if self._master is None else {"ppm": round(estimator.ppm, 2), "ppm_sigma": round(estimator.ppm_sigma, 2)}
        body = {} if self._follower is None else {"body": self._follower.summary()}
        return {"master": self.name, "state": self.state, **known, "steps": self._steps, "rejected": estimator.rejected, **body}

    def _hear(self, stamp: Stamp | None, own_ns: int) -> None:
        before = self._newest
        if stamp is None or (before is not None and stamp.own_ns <= before.own_ns):
            return
        if before is not None and stamp.epoch != before.epoch:
            self._estimator.step()
        steps = self._estimator.steps
        if self._estimator.add(stamp.own_ns, stamp.master_ns) or self._estimator.steps > steps:
            self._heard_ns = own_ns
        self._newest = stamp

    def _judge(self, own_ns: int) -> None:
        estimator = self._estimator
        if not self._heard_ns:
            self._heard_ns = own_ns  # it has not been away yet
        stepped, self._steps = estimator.steps > self._steps, estimator.steps
        if own_ns - self._heard_ns > AWAY_TICKS * self._tick_ns:
            state = "holdover"
        elif estimator.locked:
            state = "locked"
        else:
            state = "locking"
        if state != self.state or stepped:
            self.state = state
            rate = {"ppm": round(estimator.ppm, 2), "ppm_sigma": round(estimator.ppm_sigma, 2)}
            self._events.append({"event": "clock", "master": self.name, "state": state, **rate})
