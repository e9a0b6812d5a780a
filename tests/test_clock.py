"""The clock: the estimator, the loop that follows a master, and what becomes of the samples in a day."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from device import live_audio
from device.estimator import RATE_MAX, ClockEstimator
from device.live_audio import LiveMicrophone, LiveSpeaker
from device.mcu_clock import LOCKED_NS, TRIM_PPM_MAX, McuFollower, McuMaster
from device.steering import AWAY_TICKS, SLEW, Stamp, Steering
from export import clock_bench
from export.drift import RATE_HZ, TICK_NS, Crystal, SimulatedCard, SimulatedEdges, SimulatedStream, phase_errors_ms
from firmware_bridge.bridge import McuTick

TICK = RATE_HZ * TICK_NS // 1_000_000_000
OFFSET = RATE_HZ * 60 // 1000  # playout
SETTLED = 150  # ticks: 30 s
HOUR = 18_000
MASTER_0 = 5_000_000_000_000  # what the master's clock says at our 0

# --- the estimator ------------------------------------------------------------------------------------------------


def feed(estimator: ClockEstimator, ppm: float, seconds: range, jitter_ns: float, seed: int = 0, step_ns: int = 0) -> list[bool]:
    """Five pairs a second, late by up to `jitter_ns`; whether each was believed."""
    random = np.random.default_rng(seed)
    believed = []
    for i in range(5 * seconds.start, 5 * seconds.stop):
        own_ns = i * TICK_NS
        master_ns = MASTER_0 + round(own_ns * (1 + ppm * 1e-6)) + step_ns
        believed.append(estimator.add(own_ns + round(random.uniform(0, jitter_ns)), master_ns))
    return believed


def error_ns(estimator: ClockEstimator, ppm: float, second: int, step_ns: int = 0) -> float:
    own_ns = second * 1_000_000_000
    return own_ns - estimator.offset_ns(own_ns) - (MASTER_0 + round(own_ns * (1 + ppm * 1e-6)) + step_ns)


@pytest.mark.parametrize("ppm", [-250, -50, 0, 250])
@pytest.mark.parametrize("jitter_ns", [0, 100_000, 5_000_000])
def test_phase_and_rate_are_found_under_lateness(ppm: float, jitter_ns: float) -> None:
    off_ns, off_ppm, sigma_ppm = [], [], []
    for seed in range(20):
        estimator = ClockEstimator()
        assert all(feed(estimator, ppm, range(60), jitter_ns, seed))
        assert estimator.locked
        off_ns.append(abs(error_ns(estimator, ppm, 60)))
        off_ppm.append(abs(estimator.ppm - ppm))
        sigma_ppm.append(estimator.ppm_sigma)
    assert max(off_ns) <= 2 + 0.15 * jitter_ns, "a mean of the pairs would be off by half of the jitter"
    assert np.mean(np.array(off_ppm) <= np.array(sigma_ppm)) >= 0.68, "the uncertainty is no understatement …"
    assert max(sigma_ppm) <= 0.01 + 6e-6 * jitter_ns, "… and worth something"


def test_uncertainty_falls_with_time_and_is_the_prior_before_the_lock() -> None:
    estimator = ClockEstimator()
    feed(estimator, 100, range(4), 1e6)
    assert not estimator.locked and estimator.ppm_sigma == RATE_MAX * 1e6
    sigmas = []
    for until in (15, 30, 64):
        estimator = ClockEstimator()
        feed(estimator, 100, range(until), 1e6)
        sigmas.append(estimator.ppm_sigma)
    assert sigmas[0] > sigmas[1] > sigmas[2]


@pytest.mark.parametrize("off_ns", [-80_000_000, -8_000_000, 60_000_000, 10_000_000_000])
def test_outliers_change_nothing(off_ns: int) -> None:
    with_one, without = ClockEstimator(), ClockEstimator()
    for estimator in (with_one, without):
        feed(estimator, 100, range(40), 1e6)
    at_ns = 40_000_000_000
    for i in range(4):
        assert not with_one.add(at_ns + off_ns + i, MASTER_0 + round(at_ns * 1.0001))
    for estimator in (with_one, without):
        feed(estimator, 100, range(41, 60), 1e6, 1)
    assert (with_one.rejected, with_one.steps) == (4, 0)
    assert (with_one.ppm, with_one.offset_ns(at_ns)) == (without.ppm, without.offset_ns(at_ns))


@pytest.mark.parametrize("step_ns", [-3_000_000_000, -40_000_000, 40_000_000, 3_000_000_000])
def test_a_step_is_learnt_and_the_rate_outlives_it(step_ns: int) -> None:
    estimator = ClockEstimator()
    feed(estimator, 200, range(60), 2e6)
    ppm = estimator.ppm
    believed = feed(estimator, 200, range(60, 62), 2e6, 1, step_ns)
    assert estimator.steps == 1 and not any(believed)
    assert not estimator.locked and estimator.ppm == ppm
    assert abs(error_ns(estimator, 200, 62, step_ns)) < 2e6, "the phase is known again at once"
    assert all(feed(estimator, 200, range(62, 100), 2e6, 2, step_ns))
    assert abs(error_ns(estimator, 200, 100, step_ns)) < 0.3e6


# --- the loop that follows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "crystal",
    [
        *(Crystal(ppm, jitter_ns=jitter_ns) for ppm in (-250, 250) for jitter_ns in (0, 5_000_000)),
        *(Crystal(ppm, silences=0.03, seed=1) for ppm in (-250, 250)),
        *(Crystal(ppm, ramp_ppm=ramp_ppm, silences=0.01, seed=2) for ppm, ramp_ppm in ((-250, -60), (250, 60), (0, 250))),
    ],
    ids=str,
)
def test_edges_are_within_a_millisecond_of_the_masters(crystal: Crystal) -> None:
    off_ms = np.abs(phase_errors_ms(crystal, 1200))[SETTLED:]
    assert np.percentile(off_ms, 99) < 1


class Script:
    """A master that says what it is told to."""

    def __init__(self) -> None:
        self.newest: Stamp | None = None

    def stamp(self) -> Stamp | None:
        return self.newest


class Follower:
    """A steering beside a perfect master whose rate, phase and presence a test changes."""

    def __init__(self) -> None:
        self.master, self.origin_ns, self.tick = Script(), 7_000_000_000, 0
        self.steering = Steering(TICK_NS, self.master, "mcu")
        self.start_ns = self.origin_ns
        self.edges_ns: list[int] = []
        self.events: list[dict[str, object]] = []

    def run(self, ticks: int, ppm: float = 0, step_ns: int = 0, there: bool = True, epoch: int = 0) -> None:
        for _ in range(ticks):
            self.tick += 1
            edge_ns = self.origin_ns + self.tick * TICK_NS
            self.edges_ns.append(edge_ns)
            if there:
                self.master.newest = Stamp(edge_ns, round((edge_ns - self.start_ns) * (1 + ppm * 1e-6)) + step_ns, epoch)
            self.origin_ns += self.steering.shift_ns(self.origin_ns, self.tick * TICK_NS)
            self.events += self.steering.take_events()

    def states(self) -> list[object]:
        states = [event["state"] for event in self.events]
        self.events.clear()
        return states

    def off_ns(self, ppm: float = 0, step_ns: int = 0) -> float:
        return (self.edges_ns[-1] - self.start_ns) * (1 + ppm * 1e-6) + step_ns - self.tick * TICK_NS


def test_a_master_that_goes_away_leaves_its_rate_behind() -> None:
    follower = Follower()
    follower.run(500, 200)
    assert follower.states() == ["locked"] and abs(follower.off_ns(200)) < 1000
    follower.run(9000, there=False)
    assert follower.states() == ["holdover"], "one event, however long it stays away"
    assert abs(follower.off_ns(200)) < 1e6, "half an hour later the edges are still its"
    follower.run(300, 200)
    assert follower.states()[-1] == "locked"
    assert abs(follower.off_ns(200)) < 1000
    assert follower.steering.summary()["state"] == "locked"


@pytest.mark.parametrize("epoch", [0, 1], ids=["found out", "announced"])
@pytest.mark.parametrize("step_ns", [-90_000_000, -30_000_000, 30_000_000, 90_000_000])
def test_a_reopened_device_is_locked_on_again_without_a_burst(step_ns: int, epoch: int) -> None:
    follower = Follower()
    follower.run(500, 100)
    follower.run(AWAY_TICKS + 20, there=False)
    follower.run(200, 100, step_ns, epoch=epoch)
    assert np.abs(np.diff(follower.edges_ns) - TICK_NS).max() <= SLEW * TICK_NS + 1, "neither a burst nor a gap"
    assert abs(follower.off_ns(100, step_ns)) < 10_000
    assert follower.states()[-2:] == ["locking", "locked"]


def test_without_a_master_nothing_moves() -> None:
    steering = Steering(TICK_NS)
    assert [steering.shift_ns(0, k * TICK_NS) for k in range(50)] == [0] * 50
    assert steering.take_events() == [] and steering.summary()["state"] == "free"


def test_edges_come_to_lie_on_the_microcontrollers_and_do_so_again_after_its_reset() -> None:
    ppm, begin_ns, first = 150, 1_000_000_000, 4000
    newest: list[McuTick | None] = [None]
    origin_ns = begin_ns + 70_000_000
    master = McuMaster(lambda: newest[0], lambda ns: ns - origin_ns)
    steering = Steering(TICK_NS, master, "mcu")
    period_ns = TICK_NS / (1 + ppm * 1e-6)
    for reset_at, numbers in ((0, first), (1000, 0)):
        phase_ns = begin_ns + (33_000_000 if reset_at else 0)
        edges = []
        for k in range(reset_at, reset_at + 1000):
            edge_ns = origin_ns + (k + 1) * TICK_NS
            count = int((edge_ns - phase_ns) // period_ns)
            passed = count - (reset_at + 10 if reset_at else 0)  # it needs ten ticks to come back
            newest[0] = McuTick(numbers + passed, 0, round(phase_ns + count * period_ns)) if passed >= 0 else None
            origin_ns += steering.shift_ns(origin_ns, (k + 1) * TICK_NS)
            edges.append(edge_ns)
        off_ns = (edges[-1] - phase_ns + period_ns / 2) % period_ns - period_ns / 2
        assert abs(off_ns) < 50_000
        assert np.abs(np.diff(edges) - TICK_NS).max() <= SLEW * TICK_NS + 1


class Body:
    """A microcontroller whose crystal is off by so much; its tick is as it was told, from the one after the next on."""

    def __init__(self, ppm: float, phase_ns: int, jitter_ns: float) -> None:
        self.clock, self.tick, self.connected = self, None, True
        self.ppm, self.true_ns = ppm, float(phase_ns)
        self.trims: list[int] = []
        self._told = self._number = 0
        self._random, self._jitter_ns = np.random.default_rng(3), jitter_ns

    def trim(self, ppm: int) -> None:
        self.trims.append(ppm)
        self._told = ppm

    def advance(self, until_ns: int) -> None:
        while self.true_ns + 2_000_000 <= until_ns:  # its report is 2 ms under way
            self.tick = McuTick(self._number, 0, round(self.true_ns + self._random.uniform(-self._jitter_ns, self._jitter_ns)))
            self._number += 1
            self.true_ns += TICK_NS * (1 + self._told * 1e-6) * (1 - self.ppm * 1e-6)


@pytest.mark.parametrize("phase_ns", [3_000_000, -60_000_000, 95_000_000])
@pytest.mark.parametrize(("own_ppm", "master_ppm"), [(0, 250), (-200, 100), (150, 0), (40, None)])
def test_the_microcontrollers_edges_come_to_lie_on_the_sessions(own_ppm: float, master_ppm: float | None, phase_ns: int) -> None:
    body, master, origin_ns = Body(own_ppm, 10_000_000_000 + phase_ns, 100_000), Script(), 10_000_000_000
    follower = McuFollower(body, TICK_NS)
    steering = Steering(TICK_NS, None if master_ppm is None else master, "audio", follower)
    start_ns, off_ns = origin_ns, []
    for k in range(1, 1200):
        edge_ns = origin_ns + k * TICK_NS
        body.advance(edge_ns)
        master.newest = Stamp(edge_ns, round((edge_ns - start_ns) * (1 + (master_ppm or 0) * 1e-6)))
        origin_ns += steering.shift_ns(origin_ns, k * TICK_NS)
        off_ns.append((body.true_ns - origin_ns + TICK_NS / 2) % TICK_NS - TICK_NS / 2)
    assert max(map(abs, off_ns[-200:])) < 60_000, "the edges themselves, whatever the stamps of them say"
    assert max(map(abs, body.trims)) <= TRIM_PPM_MAX
    events = steering.take_events()
    assert [event["state"] for event in events if event["event"] == "body_clock"] == ["locking", "locked"] or abs(phase_ns) < 4 * LOCKED_NS
    assert steering.summary()["body"]["state"] == "locked"


def test_one_that_comes_back_is_told_its_trim_again() -> None:
    body = Body(80, 10_000_000_000, 0)
    follower = McuFollower(body, TICK_NS)
    for k in range(1, 200):
        body.advance(10_000_000_000 + k * TICK_NS)
        follower.follow(10_000_000_000, 0.0)
    told = len(body.trims)
    body.connected = False
    follower.follow(10_000_000_000, 0.0)
    assert follower.state == "away" and len(body.trims) == told, "nobody is told anything"
    body.connected = True
    follower.follow(10_000_000_000, 0.0)
    assert len(body.trims) == told + 1 and body.trims[-1] == pytest.approx(80, abs=2)
    assert [event["state"] for event in follower.take_events()][-2:] == ["away", "locking"]


def test_a_session_with_another_tick_is_followed_in_rate_alone() -> None:
    body = Body(-120, 10_050_000_000, 0)
    follower = McuFollower(body, TICK_NS // 2)
    for k in range(1, 40):
        body.advance(10_000_000_000 + k * TICK_NS)
        follower.follow(10_000_000_000, 30.0)
    assert set(body.trims) == {-150}


# --- samples ------------------------------------------------------------------------------------------------------


class Devices:
    """The product's own microphone and speaker, as the loop uses them, on simulated cards without the sound itself."""

    def __init__(self, crystal: Crystal, speakers: Crystal | None = None) -> None:
        """One card for both, or with `speakers` another one for the speaker."""
        self.card = SimulatedCard(crystal)
        self.other = self.card if speakers is None else SimulatedCard(speakers)
        self.mic = LiveMicrophone(RATE_HZ, TICK)
        self.speaker = LiveSpeaker(RATE_HZ, self.mic)
        self.capture = SimulatedStream(self.card, "input")
        self.play = SimulatedStream(self.other, "output", lambda seen_ns, frames: self.speaker.advance(0, frames, seen_ns))
        self.mic.track, self.speaker.track = self.capture, self.play
        self._advance(1_000_000_000)
        self.mic.start()
        self.speaker.start()
        self.edges = SimulatedEdges(self.card, self.mic)

    def _advance(self, own_ns: int) -> None:
        for card in {id(card): card for card in (self.card, self.other)}.values():
            card.advance(own_ns)

    def tick(self) -> None:
        edge_ns = self.edges.wait()
        if self.other is not self.card:
            self.other.advance(edge_ns)
        self.mic.sync(self.edges.end)
        self.speaker.sync(self.edges.end, edge_ns)

    def counts(self) -> dict[str, int]:
        return {**self.mic.counts, **self.speaker.counts}


@pytest.mark.parametrize(
    "speakers", [None, Crystal(-240, ramp_ppm=60, silences=0.005, seed=7), Crystal(249, silences=0.005, seed=8)], ids=["one card", *"fs"]
)
def test_in_a_day_no_sample_is_lost_or_invented_and_no_ring_runs_over_or_dry(speakers: Crystal | None) -> None:
    devices = Devices(Crystal(250, ramp_ppm=-60, silences=0.005), speakers)
    mic, speaker, edges = devices.mic, devices.speaker, devices.edges
    origins = mic.origin, speaker.origin
    ahead, waiting, off = [], [], []
    for _ in range(24 * HOUR):
        devices.tick()
        captured = devices.capture.position - mic.origin
        if not devices.capture.silent:
            ahead.append(captured - edges.end)  # of the ring's reader, which takes what lies before the end
        waiting.append(
            edges.end + OFFSET - (speaker.reached(devices.play.elapsed_ns()) - speaker.origin)
        )  # until the speaker takes what is put now
        off.append(devices.card.samples - mic.origin - edges.end - live_audio.MARGIN_MS * RATE_HZ // 1000)
        edges.steer()
    counts = devices.counts()
    assert (counts["inserted_samples"], counts["dropped_samples"], counts["slipped_samples"]) == (0, 0, 0)
    assert (mic.origin, speaker.origin) == origins, "a day later sample i of the session is still sample i of the card"
    assert len(edges.steering.take_events()) == 1, "it has locked, and that is all"
    settled = slice(SETTLED, None)
    assert np.percentile(np.abs(off[settled]), 99) < RATE_HZ / 1000, "the edge is within 1 ms"
    assert min(ahead[settled]) >= 0 and max(ahead) < mic._captured.capacity - 2 * TICK, "the microphone's ring"
    assert min(waiting[settled]) > OFFSET // 2 and max(waiting) + TICK < speaker._waiting.capacity, "the speaker's ring"


def test_without_steering_a_day_is_not_survived() -> None:
    devices = Devices(Crystal(250))
    for _ in range(HOUR):
        devices.tick()
    assert devices.counts()["dropped_samples"] > 0, "or the test above could not fail"


def test_lost_time_is_silence_of_the_same_length_and_late_samples_find_their_place() -> None:
    devices = Devices(Crystal(50, jitter_ns=1_000_000))
    for k in range(1000):
        if k == 500:
            devices.capture.lost = 4 * TICK  # the device was gone for 0.8 s, and counts on
        devices.tick()
        devices.edges.steer()
    counts = devices.counts()
    assert counts["inserted_samples"] == pytest.approx(4 * TICK, abs=RATE_HZ * 30 // 1000)
    assert counts["dropped_samples"] == 0
    states = [event["state"] for event in devices.edges.steering.take_events()]
    assert states[0] == "locked" and states[-1] == "locked" and len(states) > 1


# --- the bench ----------------------------------------------------------------------------------------------------


def test_the_figure_is_drawn_and_the_table_has_every_figure_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock_bench.draw_phase(tmp_path / "new" / "clock.png", 40)
    assert (tmp_path / "new" / "clock.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    table = clock_bench.lateness(0.2)
    assert all(f"| idle, {name} " in table for name in clock_bench.PERCENTILES)
    assert "stress-ng is not installed" in table
