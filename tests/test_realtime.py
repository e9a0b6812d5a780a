"""The real-time set-up: what it says took effect did, what is missing is named once, and afterwards all is as before."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_loop import write_bundle

from device.realtime import COLLECT_SLACK_NS, COLLECT_TICKS, GRANTS, RealTime, SlackCollector, cpu_list

SET_UP = """
import json, os, sys
from device.realtime import RealTime

def state():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return os.sched_getscheduler(0), os.sched_getparam(0).sched_priority, sorted(os.sched_getaffinity(0)), int(status["VmLck"].split()[0])

if len(sys.argv) > 1:
    os.setuid(int(sys.argv[1]))
before = state()
with RealTime() as privileges:
    during = state()
print(json.dumps([before, during, state(), privileges.event, privileges.advice()]))
"""


def set_up(repository: Path, user: int | None) -> tuple[list[list[object]], dict[str, object], str]:
    become = [] if user is None else [str(user)]
    done = subprocess.run([sys.executable, "-c", SET_UP, *become], cwd=repository, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *states, event, advice = json.loads(done.stdout)
    return states, event, advice


def check(states: list[list[object]], event: dict[str, object], advice: str) -> None:
    before, (policy, priority, cpus, locked_kb), after = states
    assert after == before, "everything is as it was"
    missing = event.get("missing", {})
    assert isinstance(missing, dict) and set(missing) <= set(GRANTS)
    assert (event["scheduler"] == f"SCHED_FIFO {priority}") == ("scheduler" not in missing)
    assert (policy == os.SCHED_FIFO | os.SCHED_RESET_ON_FORK) == ("scheduler" not in missing)
    assert event["cpus"] == cpus
    assert (locked_kb != 0) == ("memory" not in missing)
    assert (event["cpu_dma_latency"] is None) == ("cpu_dma_latency" in missing)
    for name, grant in GRANTS.items():
        assert advice.count(grant) == (name in missing), "what is missing is named, with how to grant it, once"


def test_what_it_says_took_effect_did(repository: Path) -> None:
    check(*set_up(repository, None))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_is_told_what_is_missing(repository: Path) -> None:
    states, event, advice = set_up(repository, 65534)
    check(states, event, advice)
    assert "cpu_dma_latency" in event["missing"], "its device belongs to root"  # type: ignore[operator]


def test_a_run_logs_it_as_one_event_and_only_where_time_is_real(tmp_path: Path, repository: Path) -> None:
    bundle = write_bundle(tmp_path / "echo")
    for options, expected in (
        (["--clock", "realtime"], 1),
        (["--clock", "realtime", "--no-priority"], 0),
        (["--clock", "simulated"], 0),
    ):
        command = [sys.executable, "-m", "device.cli", "run", "--bundle", str(bundle), "--mic", "none", "--speaker", "none"]
        done = subprocess.run([*command, "--seconds", "0.3", "--events", "-", *options], cwd=repository, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        told = [event for event in events if event["event"] == "realtime"]
        assert len(told) == expected
        assert done.stderr.count("without privileges") == sum("missing" in event for event in told)


def test_garbage_is_collected_in_slack_only() -> None:
    class Knot:
        alive = 0

        def __init__(self) -> None:
            self.me = self
            Knot.alive += 1

        def __del__(self) -> None:
            Knot.alive -= 1

    with SlackCollector() as collector:
        assert not gc.isenabled()
        Knot()
        for _ in range(3 * COLLECT_TICKS):
            collector.after_tick(COLLECT_SLACK_NS - 1)
        assert (collector.collections, Knot.alive) == (0, 1), "there was no time"
        collector.after_tick(COLLECT_SLACK_NS)
        assert (collector.collections, Knot.alive) == (1, 0)
        for _ in range(COLLECT_TICKS - 1):
            collector.after_tick(COLLECT_SLACK_NS)
        assert collector.collections == 1, "and not at every tick"
    assert gc.isenabled() and gc.get_freeze_count() == 0


@pytest.mark.parametrize(("text", "cpus"), [("", set()), ("\n", set()), ("3", {3}), ("2-4,7\n", {2, 3, 4, 7})])
def test_cpu_list(text: str, cpus: set[int]) -> None:
    assert cpu_list(text) == cpus


def test_nothing_raises_where_there_is_no_such_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("device.realtime.DMA_LATENCY", tmp_path / "absent")
    monkeypatch.setattr("os.sched_setscheduler", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    before = os.sched_getaffinity(0)
    with RealTime() as privileges:
        assert os.sched_getaffinity(0) == before, "a thread without priority is not pinned"
        assert {"scheduler", "cpu_dma_latency"} <= set(privileges.missing)
    assert "No such file or directory" in privileges.advice()


def test_what_somebody_gave_less_priority_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getpriority", lambda *_: 19)
    monkeypatch.setattr("os.sched_setscheduler", lambda *_: pytest.fail("it must not be raised"))
    with RealTime() as privileges:
        assert "somebody meant" in privileges.missing["scheduler"]
