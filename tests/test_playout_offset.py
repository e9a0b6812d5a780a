"""The playout offset that a machine chooses for itself, and raises when it was too short."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_loop import OFFSET, RATE, TICK, FakeEngine, Run, write_bundle

from device import playout_offset
from device.cli import main
from device.playout_offset import LONGEST_MS, STEP_MS, OffsetGuard, choose, rounded


@pytest.mark.parametrize(("engine_ms", "offset_ms"), [(0.5, 20), (10.0, 20), (10.1, 30), (12.0, 30), (80.0, 90), (5000.0, LONGEST_MS)])
def test_an_engine_and_a_margin_are_rounded_up_to_the_audio_period(engine_ms: float, offset_ms: int) -> None:
    assert rounded(engine_ms) == offset_ms


def test_the_slowest_of_a_thousand_counts_and_the_first_launch_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playout_offset, "REST_S", 0.0)
    times_ms = iter([900.0, *[12.0] * 60, 47.0, *[12.0] * 100])
    assert choose(lambda: round(next(times_ms) * 1e6)) == 60


def raised(late: set[int], ticks: int, offset_ms: int = 60) -> tuple[list[int], int]:
    guard = OffsetGuard(offset_ms, 200)
    at = [tick for tick in range(ticks) if guard.raised(tick, 10 if tick in late else 0)]
    return at, guard.offset_ms


def test_more_than_one_late_tick_in_a_thousand_within_a_minute_raises_it_by_a_step() -> None:
    assert raised(set(), 10_000) == ([], 60)
    assert raised({500}, 1000) == ([500], 60 + STEP_MS), "a minute has 300 ticks: one of them is more than one in a thousand"
    assert raised({500, 900}, 1000) == ([500, 900], 60 + 2 * STEP_MS)
    assert raised({1, 2}, 10, LONGEST_MS)[0] == [], "there is an end to it"


def test_where_a_minute_has_thousands_of_ticks_one_late_one_is_let_pass() -> None:
    guard = OffsetGuard(60, 20)  # 3000 ticks a minute
    late = [100, 1200, 2300, 2400, 2500, 9000]
    assert [tick for tick in range(10_000) if guard.raised(tick, int(tick in late))] == [2400], "the fourth within 3000"


def test_the_loop_plays_later_from_the_next_tick_on_and_logs_it_once(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeEngine(), seconds=1.6, realtime=False, late=lambda tick: 50 if tick == 2 else 0, offset=OffsetGuard(60, 200))
    events = [event for event in run.events if event["event"] == "playout_offset"]
    assert events == [{"event": "playout_offset", "tick": 2, "ms": 60 + STEP_MS, "late_ticks": 1, "within_s": 60}]


def test_speech_of_a_raised_offset_begins_a_step_later(tmp_path: Path) -> None:
    guard = OffsetGuard(60, 200)
    guard.raised(0, 1)
    from test_loop import CONFIG

    from device.audio import Line, Silence, VirtualPlayout

    clock = [0]
    line = Line(CONFIG, Silence(), VirtualPlayout(RATE, lambda: clock[0] * 1_000_000_000 // RATE), OFFSET)
    line.playout_offset_samples = guard.offset_ms * RATE // 1000
    line.play(0, np.ones(TICK, np.float32))
    clock[0] = 3 * TICK
    line.gather(2, 0)
    played = line.played(0, 3 * TICK)
    assert int(np.argmax(played)) == TICK + OFFSET + STEP_MS * RATE // 1000


def header(bundle: Path, tmp_path: Path, *options: str) -> dict[str, object]:
    events = tmp_path / "events.jsonl"
    arguments = ["run", "--bundle", str(bundle), "--mic", "none", "--speaker", "none", "--seconds", "0.6", "--events", str(events)]
    assert main([*arguments, "--clock", "simulated", *options]) == 0
    return json.loads(events.read_text().splitlines()[0])


def test_files_keep_a_fixed_offset_and_auto_is_measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path / "echo")
    monkeypatch.setattr(playout_offset, "REST_S", 0.0)
    assert header(bundle, tmp_path)["playout_offset_ms"] == 60
    assert header(bundle, tmp_path, "--playout-offset-ms", "80")["playout_offset_ms"] == 80
    measured = header(bundle, tmp_path, "--playout-offset-ms", "auto")["playout_offset_ms"]
    assert isinstance(measured, int) and measured % 10 == 0 and 20 <= measured <= LONGEST_MS
