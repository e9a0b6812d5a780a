"""How a master clock runs beside our own: phase, rate and its uncertainty, from pairs of times of which one comes late."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

BLOCK_NS = 1_000_000_000  # of each so long, the pair that came least late is kept
BLOCKS = 64  # a minute: long enough for a few ppm under 5 ms of jitter, and so short that a crystal that warms up is straight over it
LOCK_BLOCKS = 8  # over less, lateness of some ms would look like hundreds of ppm
RATE_MAX = 500e-6  # what two crystals can differ by: 250 ppm was seen, with a wide margin
GATE_NS = 2_000_000  # a pair is believed up to so much, and …
GATE_LATENESS = 4  # … so many times the usual lateness off the line
EARLY = 1 / 4  # of the gate: no pair comes early, so this is what the line itself can be wrong by
FIRST_LATENESS_NS = 5_000_000  # before any has been seen
STEP_PAIRS = 10  # so many unbelievable pairs in a row are no outliers: the master has made a step


class ClockEstimator:
    """Offset (own − master) as a straight line of own time, in ns; a positive rate is a master that runs fast.

    A pair says when the master's time was *seen*, and a callback or a frame can be seen late, never early. So the offset
    is not the middle of the pairs but the line under all of them whose distances have the least sum: the edge of their
    lower convex hull that spans their mean time (Moon, Skelly and Towsley, "Estimation and removal of clock skew from
    network delay measurements", 1999). It does not depend on how lateness is distributed. The cost of a pair is constant.
    """

    def __init__(self) -> None:
        self.rejected = self.steps = 0
        self._slope = 0.0  # of the offset; what is known of the rate outlives a step
        self._lateness_ns = float(FIRST_LATENESS_NS)  # usual one of a pair
        self._forget()

    def _forget(self) -> None:
        self._empty = True
        self._origin_ns = self._origin_offset_ns = 0
        self._height = 0.0  # of the line at the origin
        self._blocks: deque[tuple[float, float]] = deque(maxlen=BLOCKS)
        self._least: tuple[float, float] | None = None  # of the block under way
        self._block_end = 0.0
        self._suspects: list[tuple[int, int]] = []

    @property
    def locked(self) -> bool:
        """Whether phase and rate are both known."""
        return len(self._blocks) >= LOCK_BLOCKS

    @property
    def ppm(self) -> float:
        """How much faster than ours the master runs."""
        return -self._slope * 1e6

    @property
    def ppm_sigma(self) -> float:
        """Standard deviation of `ppm`: that of a regression over the same pairs, which the hull stays below."""
        if not self.locked:
            return RATE_MAX * 1e6
        span_ns, count = self._blocks[-1][0] - self._blocks[0][0], len(self._blocks)
        mean_ns = sum(y - self._at(x) for x, y in self._blocks) / count
        return max(1e-3, mean_ns / span_ns * (12 / count) ** 0.5 * 1e6)

    def offset_ns(self, own_ns: int) -> int:
        """Own minus master time, when ours is `own_ns`; of use once there has been a pair."""
        return self._origin_offset_ns + round(self._at(own_ns - self._origin_ns))

    def add(self, own_ns: int, master_ns: int) -> bool:
        """At own time `own_ns` the master's was seen to be `master_ns`; False if that is not believed. Own time only goes forward."""
        if self._empty:
            self._empty = False
            self._origin_ns, self._origin_offset_ns = own_ns, own_ns - master_ns
        x, y = float(own_ns - self._origin_ns), float(own_ns - master_ns - self._origin_offset_ns)
        late_ns = y - self._at(x)
        gate_ns = GATE_NS + GATE_LATENESS * self._lateness_ns
        if not -gate_ns * (EARLY if self.locked else 1) <= late_ns <= gate_ns:
            self.rejected += 1
            self._suspects.append((own_ns, master_ns))
            if len(self._suspects) == STEP_PAIRS:
                suspects = self._suspects
                self.step()
                for pair in suspects:
                    self.add(*pair)
            return False
        self._suspects.clear()
        self._lateness_ns += (max(0.0, late_ns) - self._lateness_ns) / 64
        self._keep(x, y)
        return True

    def step(self) -> None:
        """The master's time made a step: begin again with its phase, and keep what is known of its rate."""
        self.steps += 1
        self._forget()

    def _at(self, x: float) -> float:
        return self._height + self._slope * x

    def _keep(self, x: float, y: float) -> None:
        if self._least is None or x >= self._block_end:
            if self._least is not None:
                self._blocks.append(self._least)
                while self._blocks and x - self._blocks[0][0] > 2 * BLOCKS * BLOCK_NS:  # from before the master was away
                    self._blocks.popleft()
                self._fit()
            self._least, self._block_end = (x, y), x + BLOCK_NS
        elif y - self._slope * x < self._least[1] - self._slope * self._least[0]:
            self._least = (x, y)
        if not self.locked:  # the phase is known at once, as well as the rate is
            self._height = min(y - self._slope * x for x, y in (*self._blocks, self._least))

    def _fit(self) -> None:
        if not self.locked:
            return
        hull = _lower_hull(self._blocks)
        mean = sum(x for x, _ in self._blocks) / len(self._blocks)
        (x0, y0), (x1, y1) = next((a, b) for a, b in pairwise(hull) if b[0] >= mean)
        self._slope = max(-RATE_MAX, min((y1 - y0) / (x1 - x0), RATE_MAX))
        self._height = min(y - self._slope * x for x, y in self._blocks)


def _lower_hull(points: deque[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points in order of x, by Andrew's monotone chain."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (x1 - x0) * (y - y0) > (x - x0) * (y1 - y0):
                break
            hull.pop()
        hull.append((x, y))
    return hull
