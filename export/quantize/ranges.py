"""Ranges of activations: a histogram of each tensor, and the range that loses least of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BINS = 2048  # as TensorRT's calibrators; 16 of them in one step of int8
STEPS = 127  # of int8 on either side of zero
PERCENTILE = 99.99
_ENTROPY_STRIDE = 16  # bins between the ranges that are tried


class Histogram:
    """Counts of |x| in BINS bins from 0 to `top`, which doubles when something larger comes."""

    def __init__(self) -> None:
        self.counts, self.top, self.peak = np.zeros(BINS, np.int64), 0.0, 0.0

    def add(self, values: NDArray[np.float32]) -> None:
        size = np.abs(values).ravel()
        peak = float(size.max(initial=0.0))
        if peak == 0.0 and self.top == 0.0:
            return  # nothing yet that has a scale
        self.peak = max(self.peak, peak)
        self.top = self.top or peak
        while peak > self.top:
            self.counts = np.concatenate((self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)))
            self.top *= 2
        self.counts += np.bincount(np.minimum(size * (BINS / self.top), BINS - 1).astype(np.int64), minlength=BINS)

    @property
    def centres(self) -> NDArray[np.float64]:
        return (np.arange(BINS, dtype=np.float64) + 0.5) * (self.top / BINS)

    def error(self, limit: float) -> float:
        """Mean squared error of int8 with the range ±`limit`, relative to the mean square."""
        step, x = limit / STEPS, self.centres
        lost = np.square(x - np.minimum(np.rint(x / step), STEPS) * step)
        return float((self.counts @ lost) / max(float(self.counts @ np.square(x)), 1e-30))


def _max(h: Histogram) -> float:
    return h.peak


def _percentile(h: Histogram) -> float:
    """The range that holds PERCENTILE of the values."""
    filled = np.cumsum(h.counts)
    return min(float((np.searchsorted(filled, filled[-1] * PERCENTILE / 100) + 1) * h.top / BINS), h.peak)


def _entropy(h: Histogram) -> float:
    """The range whose int8 histogram diverges least from the clipped one (Migacz, 8-bit inference with TensorRT, GTC 2017)."""
    counts, best, chosen = h.counts.astype(np.float64), np.inf, h.peak
    last = int(np.flatnonzero(counts)[-1]) + 1
    for end in [*range(STEPS + 1, last, _ENTROPY_STRIDE), max(last, STEPS + 1)]:
        kept = counts[:end].copy()
        clipped = kept.copy()
        clipped[-1] += counts[end:].sum()
        level = np.minimum(np.arange(end) * (STEPS + 1) // end, STEPS)
        filled = (kept > 0).astype(np.float64)
        mean = np.bincount(level, kept, STEPS + 1) / np.maximum(np.bincount(level, filled, STEPS + 1), 1)
        candidate = mean[level] * filled
        p, q = clipped / clipped.sum(), candidate / max(candidate.sum(), 1e-30)
        there = p > 0
        divergence = float((p[there] * np.log(p[there] / np.maximum(q[there], 1e-12))).sum())
        if divergence < best:
            best, chosen = divergence, min(end * h.top / BINS, h.peak)
    return chosen


METHODS: dict[str, Callable[[Histogram], float]] = {"max": _max, "percentile": _percentile, "entropy": _entropy}


class Range(NamedTuple):
    """The range of one tensor: symmetric, so that the zero point is 0."""

    method: str
    limit: float
    tried: dict[str, dict[str, float]]  # by method: its limit and its relative error

    @property
    def scale(self) -> float:
        return self.limit / STEPS

    @property
    def error(self) -> float:
        """Mean squared error relative to the mean square; 0 for a tensor that is always zero."""
        return self.tried[self.method]["error"] if self.tried else 0.0


def choose(h: Histogram, method: str = "auto") -> Range:
    """The range by `method`; 'auto' takes the one of METHODS that loses least."""
    if h.top == 0.0:
        return Range("max", 1.0, {})  # always zero: any range is exact
    limits = {name: find(h) for name, find in METHODS.items()}
    tried = {name: {"limit": limit, "error": h.error(limit)} for name, limit in limits.items()}
    chosen = min(tried, key=lambda name: tried[name]["error"]) if method == "auto" else method
    return Range(chosen, limits[chosen], tried)


def picture(h: Histogram, bins: int = 64) -> dict[str, Any]:
    """The histogram, coarse enough to travel with a bundle."""
    return {"top": h.top, "counts": h.counts.reshape(bins, -1).sum(axis=1).tolist()}
