"""Traces, held against the Trace Event Format: fields, order, and spans that follow each other or lie within each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_ladder import Slowed
from test_loop import CONFIG, write_bundle
from test_recorder import Recorded

from device.cli import main
from device.statistics import TickTimes
from device.trace import TRACKS, _Timeline, trace

TICK_US = CONFIG.tick_ms * 1000
HEADER = {"event": "header", "bundle": "echo", "config": CONFIG.to_dict(), "playout_offset_ms": 60}
FIELDS = {  # of the Trace Event Format, by phase; ts and dur are µs
    "M": {"name", "ph", "pid"},
    "X": {"name", "cat", "ph", "ts", "dur", "pid", "tid"},
    "C": {"name", "ph", "ts", "pid", "args"},
    "i": {"name", "ph", "ts", "pid", "s"},
}


def check(events: list[dict[str, Any]]) -> None:
    """As a tracing page reads it."""
    timed = [event for event in events if event["ph"] != "M"]
    assert events[: len(events) - len(timed)] == [event for event in events if event["ph"] == "M"], "names first"
    for event in events:
        assert FIELDS[event["ph"]] <= set(event), event
        assert isinstance(event["name"], str) and event["name"]
        for name in ("ts", "dur"):
            assert isinstance(event.get(name, 0), int | float) and (name == "ts" or event.get(name, 0) >= 0)
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
        if event["ph"] == "i":
            assert event["s"] in ("g", "p", "t")
    assert [event["ts"] for event in timed] == sorted(event["ts"] for event in timed)
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    for thread in {event["tid"] for event in events if event["ph"] == "X"}:
        assert thread in named
        open_ns: list[int] = []  # ends of the spans that are open
        for event in (event for event in timed if event["ph"] == "X" and event["tid"] == thread):
            start_ns = round(event["ts"] * 1000)
            end_ns = start_ns + round(event["dur"] * 1000)
            while open_ns and open_ns[-1] <= start_ns:
                open_ns.pop()
            assert not open_ns or end_ns <= open_ns[-1], f"{event} reaches out of the span it begins in"
            open_ns.append(end_ns)


def spans(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == "X" and event["name"] == name]


def write_events(path: Path, events: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def test_a_trace_of_an_event_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events, out = tmp_path / "events.jsonl", tmp_path / "trace.json"
    arguments = ["run", "--bundle", str(write_bundle(tmp_path / "echo")), "--clock", "simulated", "--seconds", "2.5", "--text", "1:one"]
    assert main([*arguments, "--mic", "none", "--speaker", "none", "--events", str(events)]) == 0
    assert main(["trace", str(events), "--out", str(out)]) == 0
    assert "25 ticks" in capsys.readouterr().out
    whole = json.loads(out.read_text())
    assert whole["displayTimeUnit"] == "ms"
    made = whole["traceEvents"]
    check(made)
    logged = [event for event in map(json.loads, events.read_text().splitlines()) if event["event"] == "tick"]
    for name in ("capture", "wait", "gather", "engine", "play", "speech"):
        assert len(spans(made, name)) == 25
    for event, capture, engine in zip(logged, spans(made, "capture"), spans(made, "engine"), strict=True):
        assert (capture["ts"] + capture["dur"], capture["dur"]) == (event["t_s"] * 1e6, TICK_US)
        assert engine["dur"] == pytest.approx(event["engine_ms"] * 1000, abs=0.01)
    assert [event["args"]["s"] for event in made if event["name"] == "camera age"] == [event["frame_age_s"] for event in logged]
    assert {"say": ["one"], "act": "up"}.items() <= next(event for event in made if event["name"] == "tick 10")["args"].items()


def test_a_trace_of_a_dump_is_that_of_its_log(tmp_path: Path) -> None:
    run = Recorded(tmp_path / "dumps", raw=False)
    run.recorder._head[0] = (0, HEADER)
    for tick in range(10):
        run.step(tick, 2 if tick in (4, 5) else 0)
    dump = run.dump()
    run.recorder.close()
    made = trace(dump.path)
    check(made)
    assert (len(spans(made, "capture")), len(spans(made, "engine")), len(spans(made, "speech"))) == (10, 8, 8)
    first = spans(made, "gather")[0]
    assert (first["ts"], first["dur"]) == (TICK_US + 1, 2), "after the edge and 1000 ns of lateness"
    assert [event["name"] for event in made if event["ph"] == "i"] == ["note"] * 10


def test_overload_lost_ticks_and_steps_of_the_ladder_are_seen(tmp_path: Path) -> None:
    run = Slowed(250, lambda tick: 1.5 if 20 <= tick < 100 else 0.1)
    ticks = [{**event, "engine_ms": event["engine_ms"] and 150.0} if event["event"] == "tick" else event for event in run.events]
    made = trace(write_events(tmp_path / "events.jsonl", [HEADER, *ticks[1:]]))
    check(made)
    assert [event["args"]["to"] for event in made if event["name"] == "ladder" and event["ph"] == "i"] == [
        event["to"] for event in run.steps
    ]
    assert {event["args"]["rung"] for event in made if event["ph"] == "C" and event["name"] == "ladder"} == {0, 1, 2}
    assert max(event["args"].get("lost_before", 0) for event in made if event["ph"] == "X") >= 1


def test_edges_that_are_steered_make_no_spans_that_overlap() -> None:
    timeline, made = _Timeline(TICK_US, 60_000, 16000), []
    for tick in range(50):
        edge_ns = (tick + 1) * (TICK_US * 1000 - 300_000)  # each edge comes 0.3 ms too early
        made += timeline.tick(TickTimes(tick, edge_ns, 100_000, 900_000, 130_000_000, 50_000, 0, 0, 3, 0.1), {})
    named = [{"name": "thread_name", "ph": "M", "pid": 1, "tid": thread, "args": {}} for thread in TRACKS.values()]
    check(named + sorted(made, key=lambda event: (event["ts"], -event.get("dur", 0))))


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["nonsense"], "line 1: is not an event"),
        ([json.dumps(HEADER), '{"event": "tick"}'], "line 2: is not an event"),
        (['{"event": "summary"}'], "has no whole header"),
        ([], "has no whole header"),
    ],
)
def test_what_no_trace_can_be_made_of_is_one_clear_error_and_loses_nothing(
    tmp_path: Path, lines: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    events, out = tmp_path / "events.jsonl", tmp_path / "trace.json"
    events.write_text("\n".join(lines))
    out.write_text("the trace of before")
    assert main(["trace", str(events), "--out", str(out)]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and text in errors and "give a file" in errors
    assert out.read_text() == "the trace of before"
    assert main(["trace", str(tmp_path / "absent"), "--out", str(out)]) == 2
