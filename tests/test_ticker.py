"""Tickers keep time, not work."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from device.ticker import RealtimeTicker, SimulatedTicker

TICK_NS = 20_000_000


@pytest.fixture
def ticker() -> Iterator[RealtimeTicker]:
    ticker = RealtimeTicker(TICK_NS)
    ticker.start()
    yield ticker
    ticker.close()


def test_edges_are_absolute(ticker: RealtimeTicker) -> None:
    late_ns = []
    tick = 0
    while tick < 20:
        edge = ticker.wait(tick)
        assert edge.edge_ns == (edge.tick + 1) * TICK_NS
        assert edge.late_ns >= 0, "an edge never comes early"
        late_ns.append(edge.late_ns)
        time.sleep(0.004)  # work does not shift the edges that follow
        tick = edge.tick + 1
    assert min(late_ns) < 1_000_000, "what the machine is capable of; 'make bench' measures how it does"


@pytest.mark.parametrize("stall_ticks", [0.5, 1.5, 3.5, 20.5])
def test_stall_goes_to_the_current_edge_without_a_burst(ticker: RealtimeTicker, stall_ticks: float) -> None:
    tick = ticker.wait(0).tick + 1
    time.sleep(stall_ticks * TICK_NS / 1e9)
    before_ns = ticker.now_ns()
    edge = ticker.wait(tick)
    after_ns = ticker.now_ns()
    # The newest edge there was; a stall that ends within the tick after the next loses nothing.
    assert max(tick, before_ns // TICK_NS - 1) <= edge.tick <= max(tick, after_ns // TICK_NS - 1)
    assert edge.missed == edge.tick - tick
    assert edge.edge_ns == (edge.tick + 1) * TICK_NS
    assert 0 <= edge.late_ns < TICK_NS
    following = ticker.wait(edge.tick + 1)
    assert ticker.now_ns() >= following.edge_ns > edge.edge_ns, "it waits again at once"


def test_steering_moves_every_edge_to_come(ticker: RealtimeTicker) -> None:
    start_ns = time.monotonic_ns() - ticker.now_ns()
    ticker.steer(3_000_000)
    edge = ticker.wait(0)
    assert edge.edge_ns == (edge.tick + 1) * TICK_NS, "in session time they stay where they are"
    assert time.monotonic_ns() >= start_ns + edge.edge_ns + 3_000_000
    assert time.monotonic_ns() - ticker.now_ns() - start_ns == pytest.approx(3_000_000, abs=200_000)


def test_the_kernel_counts_the_expirations_that_nobody_took(ticker: RealtimeTicker) -> None:
    ticker.wait(0)
    ticker.origin_ns -= 7 * TICK_NS  # as if it had slept
    edge = ticker.wait(1)
    assert edge.missed >= 6 and edge.tick == 1 + edge.missed


def test_simulated_time_stands_still_between_edges() -> None:
    ticker = SimulatedTicker(TICK_NS)
    ticker.start()
    for tick in (0, 1, 1000):
        edge = ticker.wait(tick)
        assert edge == (tick, (tick + 1) * TICK_NS, 0, 0)
        time.sleep(0.001)
        assert ticker.now_ns() == edge.edge_ns
