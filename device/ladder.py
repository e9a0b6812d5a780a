"""The ladder: what a companion that is too slow for too long gives up, and when it dares more again.

A tick costs the same whatever is in it, so there is nothing to leave out of a launch, and a launch left out now and then is what the
loop does anyway when it skips to the current edge. What can be given up is the work beside the engine, which on a board shares its
memory bandwidth and its heat: that is `audio only`. Where the engine alone is too slow, what comes out is speech with holes and acts
that are late; a quiet companion with a live body is better: that is `heartbeat only`.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rung:
    """One row. Lags are from a tick's edge to the end of its work, as parts of a tick."""

    name: str
    camera: bool  # whether anybody looks; if not, the model is shown black, and the age of the last frame it saw
    engine: bool  # whether every tick is launched; if not, nothing is said or done, and the ticks are lost ones
    cut_is_slow: bool  # whether a tick whose speech came late counts as slow
    slow_lag: float  # from here on a tick is slow, and SLOW_TICKS of the last WINDOW_TICKS launched step down
    calm_lag: float  # below it a launched tick is calm, if its speech was in time
    calm_ticks: int  # so many in a row step up


WINDOW_TICKS, SLOW_TICKS = 25, 15  # of 200 ms: three of five seconds; the longest stall is one slow tick and moves nothing
PROBE_TICKS = 25  # a companion that does not launch tries one tick so often, and half as often after each that was not calm,
SLOWEST_PROBE_TICKS = 400  # … down to this
RELAPSE_TICKS = 1500  # who steps down so soon after stepping up (five minutes) needs twice the calm next time,
MOST_DOUBLINGS = 5  # … but no more than 32 times: a quarter of an hour

LADDER = (
    #    name              camera  engine  cut    slow   calm  ticks
    Rung("full", True, True, True, 1.0, 0.0, 0),
    Rung("audio only", False, True, False, 1.0, 0.8, 150),  # 30 s without cut speech
    Rung("heartbeat only", False, False, False, math.inf, 0.8, 3),  # probes
)


class Ladder:
    """Which rung a run stands on; it moves by one at a time."""

    def __init__(self) -> None:
        self._at = 0
        self._slow: deque[bool] = deque(maxlen=WINDOW_TICKS)
        self._calm = self._since_probe = self._doublings = 0
        self._probe_ticks = PROBE_TICKS
        self._since_up: int | None = None  # launched ticks since the last step, if that was up and has not proven itself
        self.steps = 0

    @property
    def rung(self) -> Rung:
        return LADDER[self._at]

    def probes(self) -> bool:
        """Whether the tick that begins is launched only to see how long it takes. To be asked once in each tick."""
        if self.rung.engine:
            return False
        self._since_probe += 1
        if self._since_probe < self._probe_ticks:
            return False
        self._since_probe = 0
        return True

    def launched(self, lag: float, cut: bool) -> dict[str, Any] | None:
        """A tick was launched and its work was done `lag` ticks after its edge; `cut`: its speech came too late.

        Returns the event if this was a step.
        """
        rung = self.rung
        calm = lag < rung.calm_lag and not cut
        self._calm = self._calm + 1 if calm else 0
        self._slow.append(lag >= rung.slow_lag or (cut and rung.cut_is_slow))
        self._probe_ticks = PROBE_TICKS if calm else min(2 * self._probe_ticks, SLOWEST_PROBE_TICKS)
        if self._since_up is not None:
            self._since_up += 1
            if self._since_up == RELAPSE_TICKS:
                self._since_up, self._doublings = None, 0
        if sum(self._slow) >= SLOW_TICKS:
            if self._since_up is not None:
                self._since_up, self._doublings = None, min(self._doublings + 1, MOST_DOUBLINGS)
            return self._step(1, lag)
        if self._at and self._calm >= rung.calm_ticks << self._doublings:
            self._since_up = 0
            return self._step(-1, lag)
        return None

    def _step(self, by: int, lag: float) -> dict[str, Any]:
        before = self.rung
        self._at += by
        self._slow.clear()
        self._calm = self._since_probe = 0
        self._probe_ticks = PROBE_TICKS
        self.steps += 1
        return {"event": "ladder", "from": before.name, "to": self.rung.name, "lag": round(lag, 2)}
