"""The loop's own statistics: one event a second, in the event log and the flight recorder, that says how the last minute went.

A board's journal has a line of its own in its place, which knows the devices around the loop, too: device/field/statistics.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from device.streams import STREAMS

WINDOW_S = 60


class TickTimes(NamedTuple):
    """When a tick's edge was and how long its parts took: captured, waited for, gathered, launched, played."""

    tick: int
    edge_ns: int  # CLOCK_MONOTONIC (in a simulated run: session time)
    late_ns: int  # from the edge until the loop woke
    gather_ns: int
    engine_ns: int  # 0: nothing was launched
    play_ns: int
    missed: int  # ticks lost just before
    rung: int  # row of the ladder
    late_samples: int  # of speech that were cut
    frame_age_s: float  # at the edge


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


class Statistics:
    """Counts ticks, and once a second makes an event of them."""

    def __init__(self, tick_ms: int) -> None:
        newest = max(1, WINDOW_S * 1000 // tick_ms)
        self._engine, self._late = Times(newest), Times(newest)
        self._tick_ms, self._second = tick_ms, 0
        self._ticks = self._missed = 0
        self._budgets_ns = {name: (stream.budget_ms or 0) * 1e6 for name, stream in STREAMS.items() if stream.budget_ms is not None}
        self._over = dict.fromkeys(self._budgets_ns, 0)

    def add(self, times: TickTimes) -> None:
        """Count a tick."""
        self._ticks += 1
        self._missed += times.missed
        self._late.add(times.late_ns)
        if times.engine_ns:
            self._engine.add(times.engine_ns)
        spent_ns = {"edge": times.late_ns, "microphone": times.gather_ns, "speech": times.play_ns}
        for name, budget_ns in self._budgets_ns.items():
            self._over[name] += spent_ns[name] > budget_ns

    def due(self, tick: int) -> dict[str, Any] | None:
        """The event, in the tick in which a second of session time is over; counts are since the run began, times of the last minute."""
        second = int((tick + 1) * self._tick_ms / 1000 / (STREAMS["statistics"].log_s or 1))
        if second == self._second:
            return None
        self._second = second
        return {
            "event": "statistics",
            "tick": tick,
            "ticks": self._ticks,
            "gap_ticks": self._missed,
            "engine_ms": self._engine.summary(),
            "late_ms": self._late.summary(),
            "over_budget": {name: count for name, count in self._over.items() if count},
        }
