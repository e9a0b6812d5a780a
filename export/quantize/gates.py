"""The gates: what a quantized bundle may lose against its float graph before it is refused, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from export.quantize.compare import Difference


class Gate(NamedTuple):
    """One line of the proof: `limit` by precision, and whether the value must stay under or over it."""

    unit: str
    at_most: bool
    limits: Mapping[str, float]
    meaning: str


def _limits(fp16: float, int8_weights: float, int8: float, int4_weights: float) -> dict[str, float]:
    return {"fp16": fp16, "int8-weights": int8_weights, "int8": int8, "int4-weights": int4_weights}


GATES = {
    "scenes": Gate("", False, _limits(100, 100, 100, 100), "scenes in closed loop: fewer prove nothing"),
    "scoreboard loss": Gate("points", True, _limits(0.5, 0.5, 1.0, 2.0), "mean hit rate over the behaviours, float minus quantized"),
    "say agreement": Gate("% of ticks", False, _limits(99.5, 99.0, 99.0, 98.0), "closed loop, the same words in the same tick"),
    "act agreement": Gate("% of ticks", False, _limits(99.5, 99.0, 99.0, 98.0), "closed loop, the same act in the same tick"),
    "long run": Gate("ticks", False, _limits(3000, 3000, 3000, 3000), "on the same inputs, each graph with its own memory"),
    "mel distortion": Gate("dB", True, _limits(0.2, 1.0, 1.0, 2.0), "of the speech on the same inputs, where the float graph speaks"),
    "memory error": Gate("%", True, _limits(1.0, 10.0, 10.0, 20.0), "of keys and values in the last tenth of the long run, relative RMS"),
    "memory drift": Gate("×", True, _limits(1.5, 1.5, 1.5, 1.5), "that error against the one in the first tenth"),
}
# Probability that may go elsewhere in a tick, on average: what a sensitivity scan measures in place of hit rates.
MOVED = _limits(0.002, 0.01, 0.01, 0.02)


def judge(values: Mapping[str, float], precision: str) -> list[dict[str, Any]]:
    """The gates with what was measured, JSON-ready."""
    rows = []
    for name, gate in GATES.items():
        limit, value = gate.limits[precision], values[name]
        passed = value <= limit if gate.at_most else value >= limit
        rows.append({"gate": name, "value": value, "limit": limit, "at_most": gate.at_most, "unit": gate.unit, "passed": bool(passed)})
    return rows


def spent(difference: Difference, precision: str) -> float:
    """How much of what the gates allow a difference uses up: 1.0 is all of it."""
    mel = GATES["mel distortion"].limits[precision]
    return max(difference.moved / MOVED[precision], difference.mel_db / mel)
