"""A sound card whose crystal is off and whose callbacks come late, in simulated time, and the loop's clock that follows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from device.portaudio import Direction, Track
from device.steering import Master, Stamp, Steering

RATE_HZ = 16_000
PERIOD = 160  # samples a callback
TICK_NS = 200_000_000
SILENCE_NS = 100_000_000  # no callback for so long, and then all that was held back at once
DRAWS = 1 << 16  # random numbers, used again and again


@dataclass(frozen=True)
class Crystal:
    """How a converter's clock runs beside CLOCK_MONOTONIC, and how late it is seen."""

    ppm: float = 0.0  # off by so much, for good
    ramp_ppm: float = 0.0  # and while it warms up …
    ramp_s: float = 600.0  # … in so long; an hour later it cools down, and so on
    jitter_ns: int = 5_000_000  # a callback is late by up to so much
    silences: float = 0.0  # probability that an edge falls into a silence, and that one comes right after
    seed: int = 0

    def rate_ppm(self, own_ns: float) -> float:
        if not self.ramp_ppm:
            return self.ppm
        hour, second = divmod(own_ns / 1e9, 3600.0)
        part = min(second / self.ramp_s, 1.0)
        return self.ppm + self.ramp_ppm * (1.0 - part if int(hour) % 2 else part)


class SimulatedCard:
    """The sample clock of one card. `streams` see it through their own callbacks."""

    def __init__(self, crystal: Crystal) -> None:
        self.crystal = crystal
        self.own_ns, self.samples = 0.0, 0.0  # captured up to now
        self.per_ns = RATE_HZ / 1e9
        self.streams: list[SimulatedStream] = []

    def advance(self, own_ns: int) -> None:
        elapsed_ns = own_ns - self.own_ns
        self.per_ns = RATE_HZ / 1e9 * (1 + self.crystal.rate_ppm(self.own_ns + elapsed_ns / 2) * 1e-6)
        self.samples += elapsed_ns * self.per_ns
        self.own_ns = float(own_ns)
        for stream in self.streams:
            stream.call_back()


class SimulatedStream(Track):
    """A track whose callbacks come in simulated time: of those before now the newest is seen, with all samples up to it."""

    def __init__(self, card: SimulatedCard, direction: Direction, block: Callable[[int, int], None] = lambda seen_ns, frames: None) -> None:
        """`block(seen_ns, frames)` is called for what came or went since the one before, without any sound."""
        super().__init__(direction, "", RATE_HZ, lambda *_: None)
        self.silent = False
        self.lost = 0  # samples that the device never delivered
        self._card, self._block = card, block
        random = np.random.default_rng((card.crystal.seed, len(card.streams)))
        self._late_ns = random.uniform(0, card.crystal.jitter_ns, DRAWS).tolist()
        self._luck, self._part = random.uniform(0, 1, DRAWS + 1).tolist(), random.uniform(0, 1, DRAWS + 2).tolist()  # no common period
        self._calls = 0
        card.streams.append(self)

    def call_back(self) -> None:
        card, crystal, i = self._card, self._card.crystal, self._calls
        self._calls += 1
        late_ns, luck, part = self._late_ns[i % DRAWS], self._luck[i % (DRAWS + 1)], self._part[i % (DRAWS + 2)]
        ago_ns = part * SILENCE_NS if luck < crystal.silences else 0.0
        self.silent = luck < 2 * crystal.silences
        if self.silent and not ago_ns:
            late_ns += part * SILENCE_NS
        captured = card.samples - (ago_ns + late_ns) * card.per_ns
        whole = int(captured // PERIOD) * PERIOD
        seen_ns = round(card.own_ns - (card.samples - whole) / card.per_ns + late_ns)
        self._block(seen_ns, whole - self.lost - self.position)
        self.position = whole - self.lost
        self.seen = (seen_ns, self.position)

    def elapsed_ns(self) -> int:
        return round(self._card.own_ns) - self.seen[0]


class SimulatedEdges:
    """The edges of a session that is steered to `master`, on a card's time."""

    def __init__(self, card: SimulatedCard, master: Master) -> None:
        self.steering = Steering(TICK_NS, master, "audio")
        self.origin_ns, self.tick = round(card.own_ns), -1
        self._card = card

    @property
    def end(self) -> int:
        """Session sample at which the tick ends."""
        return (self.tick + 1) * TICK_NS * RATE_HZ // 1_000_000_000

    def wait(self) -> int:
        """Go to the next edge; returns its own time."""
        self.tick += 1
        edge_ns = self.origin_ns + (self.tick + 1) * TICK_NS
        self._card.advance(edge_ns)
        return edge_ns

    def steer(self) -> int:
        shift_ns = self.steering.shift_ns(self.origin_ns, (self.tick + 1) * TICK_NS)
        self.origin_ns += shift_ns
        return shift_ns


def phase_errors_ms(crystal: Crystal, seconds: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """By how much each edge comes after the true one, which the master's own count tells."""
    card = SimulatedCard(crystal)
    stream = SimulatedStream(card, "input")
    card.advance(1_000_000_000)
    origin = stream.position

    class Whole:
        def stamp(self) -> Stamp | None:
            return stream.stamp(stream.ns(origin))

    edges = SimulatedEdges(card, Whole())
    errors = np.zeros(round(seconds * 1e9 / TICK_NS))
    for k in range(errors.size):
        edges.wait()
        errors[k] = (card.samples - origin - edges.end) * 1000 / RATE_HZ
        edges.steer()
    return errors
