"""The ladder: by itself under any load, and in the loop with an engine that is slowed down in session time."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loop import CONFIG, OFFSET, RATE, FakeEngine

from device.audio import Line, Silence, VirtualPlayout
from device.ladder import LADDER, MOST_DOUBLINGS, PROBE_TICKS, SLOW_TICKS, SLOWEST_PROBE_TICKS, Ladder
from device.loop import Loop, NoActuator, TextQueue
from device.session import Session
from device.steering import Steering
from device.ticker import Edge

NAMES = [rung.name for rung in LADDER]
FULL, AUDIO, HEARTBEAT = range(3)
HOLD = LADDER[AUDIO].calm_ticks
TICK_NS = CONFIG.tick_ms * 1_000_000


def climb(ladder: Ladder, ticks: int, lag: Callable[[int, int], float], due: float = 0.3) -> list[tuple[int, int]]:
    """(edge, rung) of each step in so many edges; `lag` is of (edge, rung), speech is due `due` ticks after the edge."""
    steps, edge = [], 0
    while edge < ticks:
        rung = LADDER.index(ladder.rung)
        if ladder.rung.engine or ladder.probes():
            spent = lag(edge, rung)
            if ladder.launched(spent, ladder.rung.engine and spent > due):
                steps.append((edge, LADDER.index(ladder.rung)))
            edge += int(spent)  # what a long tick costs beside itself
        edge += 1
    return steps


def test_the_ladder_is_that_of_the_design() -> None:
    assert NAMES == ["full", "audio only", "heartbeat only"]
    assert [(rung.camera, rung.engine) for rung in LADDER] == [(True, True), (False, True), (False, False)]
    assert all(rung.calm_lag < rung.slow_lag for rung in LADDER), "hysteresis"


def test_too_slow_for_too_long_walks_down_and_calm_walks_up_again() -> None:
    steps = climb(Ladder(), 2000, lambda edge, rung: 1.4 if edge < 200 else 0.1)
    assert [rung for _, rung in steps] == [AUDIO, HEARTBEAT, AUDIO, FULL]
    down, further = steps[0][0], steps[1][0]
    assert (down, further) == (2 * (SLOW_TICKS - 1), 2 * SLOW_TICKS * 2 - 2), "each launched tick costs two edges"


def test_a_stall_moves_nothing() -> None:
    assert climb(Ladder(), 500, lambda edge, rung: 60.0 if edge == 100 else 0.1) == []


def test_cut_speech_gives_up_the_eyes_but_not_the_voice() -> None:
    steps = climb(Ladder(), 1000, lambda edge, rung: 0.5, due=0.4)
    assert [rung for _, rung in steps] == [AUDIO], "below, only lost ticks count; and it is not calm enough to go up"


def hundredths(low: int, high: int) -> st.SearchStrategy[float]:
    """Not st.floats: ONNX Runtime has denormal numbers count as zero in this process, and hypothesis minds."""
    return st.integers(low, high).map(lambda n: n / 100)


@given(engine=hundredths(1, 300), camera=hundredths(0, 100), due=hundredths(5, 100))
@settings(max_examples=60, deadline=None)
def test_under_any_constant_load_it_does_not_oscillate(engine: float, camera: float, due: float) -> None:
    ticks = 12_000  # forty minutes
    steps = climb(Ladder(), ticks, lambda edge, rung: engine + camera * (rung == FULL), due)
    assert all(abs(b - a) == 1 for a, b in itertools.pairwise([FULL, *(rung for _, rung in steps)]))
    # Each climb that fails doubles the calm that the next one needs, so they become rare.
    patience = [HOLD << min(n, MOST_DOUBLINGS) for n in range(200)]
    climbs = sum(b < a for a, b in itertools.pairwise([FULL, *(rung for _, rung in steps)]))
    assert climbs <= next(n for n in range(1, 200) if sum(patience[:n]) > ticks) + 1


@given(bad=st.lists(st.tuples(st.integers(1, 600), hundredths(1, 400)), max_size=8))
@settings(max_examples=40, deadline=None)
def test_after_any_load_it_is_full_again_in_bounded_time(bad: list[tuple[int, float]]) -> None:
    ladder = Ladder()
    for ticks, lag in bad:
        climb(ladder, ticks, lambda edge, rung, lag=lag: lag)  # type: ignore[misc]
    longest = SLOWEST_PROBE_TICKS + ((3 * PROBE_TICKS + HOLD) << MOST_DOUBLINGS) + PROBE_TICKS
    steps = climb(ladder, longest, lambda edge, rung: 0.05)
    assert ladder.rung is LADDER[FULL]
    assert [rung for _, rung in steps] == sorted((rung for _, rung in steps), reverse=True), "only up"


# --- in the loop --------------------------------------------------------------------------------------------------


class StretchedTicker:
    """Time moves only when somebody spends it, so that a slow engine is slow however fast this machine is."""

    origin_ns = 0

    def __init__(self) -> None:
        self._now_ns = 0

    def spend(self, ticks: float) -> None:
        self._now_ns += round(ticks * TICK_NS)

    def start(self) -> None:
        self._now_ns = 0

    def wait(self, tick: int) -> Edge:
        newest = max(tick, self._now_ns // TICK_NS - 1)
        edge_ns = (newest + 1) * TICK_NS
        self._now_ns = max(self._now_ns, edge_ns)
        return Edge(newest, edge_ns, self._now_ns - edge_ns, newest - tick)

    def now_ns(self) -> int:
        return self._now_ns

    def steer(self, shift_ns: int) -> None:
        """Edges stay."""

    def close(self) -> None:
        """Nothing to close."""


class WhiteCamera:
    """White, exposed at the edge; remembers when it was asked, and costs time."""

    end_s: float | None = None
    fault: str | None = None
    resting = False

    def __init__(self, ticker: StretchedTicker, cost: float) -> None:
        self._ticker, self._cost = ticker, cost
        self.asked: list[tuple[float, bool]] = []
        self.counts: dict[str, int] = {}

    def frames_at(self, edge_s: float) -> tuple[np.ndarray, float]:
        self.asked.append((edge_s, self.resting))
        self._ticker.spend(self._cost)
        video = CONFIG.video
        return np.full((2, video.height, video.width, 3), 255, np.uint8), 0.0

    def close(self) -> None:
        """Nothing to close."""


class Body(NoActuator):
    beats = 0

    def heartbeat(self) -> None:
        self.beats += 1


class Watcher:
    """A recorder that keeps what it is shown."""

    def __init__(self) -> None:
        self.ticks: list[tuple[int, int, bool]] = []  # tick, rung, launched
        self.reasons: list[str] = []

    def tick(self, times: Any, decision: Any, memory: Any, launched: bool) -> None:
        self.ticks.append((times.tick, times.rung, launched))

    def event(self, at_ns: int, event: dict[str, Any]) -> None:
        """They are in the log."""

    def request(self, reason: str) -> None:
        self.reasons.append(reason)

    def take_events(self) -> list[dict[str, Any]]:
        return []

    def close(self) -> None:
        """Nothing to close."""


class Log:
    dropped = 0

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        self.events.append(event)


class Slowed:
    """A run of so many ticks with an engine that takes `engine(tick)` of a tick."""

    def __init__(self, ticks: int, engine: Callable[[int], float], camera: float = 0.0, text: tuple[float, list[int]] = (0.0, [])) -> None:
        self.ticker = StretchedTicker()

        def stall(run: int) -> float:
            self.ticker.spend(engine(self.ticker.now_ns() // TICK_NS - 1))
            return 0.0

        self.engine = FakeEngine(stall)
        self.camera, self.body, self.recorder, log = WhiteCamera(self.ticker, camera), Body(), Watcher(), Log()
        self.playout = VirtualPlayout(RATE, self.ticker.now_ns)
        loop = Loop(
            config=CONFIG,
            session=Session(CONFIG, self.engine),
            ticker=self.ticker,
            steering=Steering(TICK_NS),
            line=Line(CONFIG, Silence(), self.playout, OFFSET),
            camera=self.camera,
            text=TextQueue([text], CONFIG.text.text_in),
            actuator=self.body,
            events=log,  # type: ignore[arg-type]
            recording=None,
            seconds=ticks * CONFIG.tick_ms / 1000,
            stop=threading.Event(),
            recorder=self.recorder,
        )
        self.summary = loop.run({"event": "header"})
        self.events = log.events
        self.steps = [event for event in log.events if event["event"] == "ladder"]
        self.ticks = {event["tick"]: event for event in log.events if event["event"] == "tick"}


def test_an_engine_that_is_slowed_walks_down_and_up_again() -> None:
    run = Slowed(700, lambda tick: 1.5 if 50 <= tick < 200 else 0.1, text=(12.0, [3]))
    assert [(event["from"], event["to"]) for event in run.steps] == [
        ("full", "audio only"),
        ("audio only", "heartbeat only"),
        ("heartbeat only", "audio only"),
        ("audio only", "full"),
    ], "each step is one event, and there are no others"
    assert run.summary["ladder_steps"] == 4
    assert run.recorder.reasons == ["overload", "overload"], "the last minute is kept at each step down"
    no_eyes, silent, voice, eyes = (event["tick"] for event in run.steps)
    assert not [s for s, _ in run.camera.asked if no_eyes < s * 10 - 1 <= eyes], "nobody looks while there is only sound"
    assert not any(resting for _, resting in run.camera.asked)
    ages = [event["frame_age_s"] for tick, event in run.ticks.items() if no_eyes < tick <= eyes]
    assert ages == sorted(ages) and ages[-1] > 30, "the age is that of the last frame seen"
    quiet = [event for tick, event in run.ticks.items() if silent < tick <= voice]
    assert all((event["say"], event["act"], event["speaking"]) == ([], "none", False) for event in quiet)
    probes = [event["tick"] for event in quiet if event["engine_ms"]]
    assert probes[-1] == voice and 3 <= len(probes) < len(quiet) / 10
    assert np.diff(probes).max() >= 2 * np.diff(probes)[-1] == 2 * PROBE_TICKS, "rarer after a probe that was slow"
    assert run.body.beats == len(run.ticks) == run.summary["ticks"], "the body hears of every tick"
    assert [launched for tick, _, launched in run.recorder.ticks if silent < tick <= voice] == [False] * len(quiet)
    delivered = [inputs["text_in"].tolist() for inputs in run.engine.given if inputs["text_in"].any()]
    assert delivered == [[3, 0, 0]], "text waits for a tick that can read it"


def test_what_is_black_is_black_and_the_model_forgets_what_it_did_not_compute() -> None:
    run = Slowed(400, lambda tick: 1.5 if 20 <= tick < 90 else 0.1)
    launches = [(tick, rung) for tick, rung, launched in run.recorder.ticks if launched]
    silent, voice = run.steps[1]["tick"], run.steps[2]["tick"]
    probes = [event["tick"] for tick, event in run.ticks.items() if silent < tick <= voice and event["engine_ms"]]
    runs = sorted([*launches, *((tick, HEARTBEAT) for tick in probes)])
    assert len(runs) == len(run.engine.given)
    for (_, rung), inputs in zip(runs, run.engine.given, strict=True):
        assert inputs["frames"].max() == (255 if rung == FULL else 0)
    first = next(i for i, (tick, _) in enumerate(runs) if tick > voice)
    assert not run.engine.given[first]["perceive_valid"].any(), "probes leave nothing behind"
    assert run.engine.given[first]["said"].tolist() == [1, 0], "but what was said last is known"


def test_where_the_camera_is_what_costs_audio_only_is_enough() -> None:
    run = Slowed(300, lambda tick: 0.3, camera=0.9)
    assert [event["to"] for event in run.steps] == ["audio only", "full", "audio only"]
    assert run.steps[-1]["tick"] - run.steps[-2]["tick"] <= 3 * SLOW_TICKS


def test_silence_is_played_at_the_lowest_rung() -> None:
    run = Slowed(200, lambda tick: 1.5 if tick >= 20 else 0.1)
    assert run.steps[-1]["to"] == "heartbeat only"
    heard = np.zeros(50 * CONFIG.tick_samples, np.float32)
    run.playout.heard(140 * CONFIG.tick_samples, heard)
    assert not heard.any()
    run.playout.heard(5 * CONFIG.tick_samples, heard[: 5 * CONFIG.tick_samples])
    assert heard[: 5 * CONFIG.tick_samples].any(), "before, it spoke"
