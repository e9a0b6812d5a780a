"""What the companion tells systemd and the journal: ready and alive, a line of statistics a second, events folded, never a tick held up."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_loop import write_bundle

from device.audio import Line, Silence, VirtualPlayout
from device.cli import main
from device.config import ModelConfig, TextConfig
from device.engine import OnnxRuntimeEngine
from device.events import QUEUE_ITEMS
from device.field.journal import FOLD_S, VERSIONS_S, Folding, Journal, priority
from device.field.statistics import ON_TIME, STATISTICS, Senses, Statistics, bridge_state, calls_back, metrics
from device.field.watch import ALERT_TICKS, Watch
from device.loop import NoActuator
from device.notify import Notifier
from device.session import Decision
from device.steering import Stamp
from device.ticker import Edge
from export.cli import main as export_main

CONFIG = ModelConfig(text=TextConfig(words=("", "one", "two"), acts=("none", "nod", "shake")))
HEADER = {"event": "header", "copresence": "1.2", "bundle_sha256": "ab" * 32, "config": {"tick_ms": 200}, "text": []}
TICKS_A_SECOND = 5


def decision(word: float = 0.0, act: float = 0.0) -> Decision:
    say_prob, act_prob = np.zeros((2, 3), np.float32), np.array([1 - act, act, 0], np.float32)
    say_prob[0] = (1 - word, 0, word)
    return Decision(np.zeros(2, np.int32), 0, say_prob, act_prob, np.zeros(CONFIG.tick_samples, np.float32), 10_000_000)


def tick(number: int, **changes: Any) -> dict[str, Any]:
    values = {
        "event": "tick",
        "tick": number,
        "t_s": round((number + 1) * 0.2, 3),
        "say": [],
        "act": "none",
        "speaking": False,
        "engine_ms": 10.0,
        "late_ms": 0.1,
        "gap_ticks": 0,
        "frame_age_s": 0.05,
    }
    return {**values, **changes}


class Marked(Journal):
    """A journal that says when all that came before a marker is written."""

    def _take(self, event: dict[str, Any]) -> None:
        if event["event"] == "marker":
            event["set"]()
        else:
            super()._take(event)


class Tail:
    """A journal with all that it asks, and what it wrote: (priority, line)."""

    def __init__(self, folder: Path, **files: Path) -> None:
        self.lines: list[str] = []
        line = Line(CONFIG, Silence(), VirtualPlayout(16000, lambda: 0), 0)
        self.senses, self.counts, self.alive = Senses(CONFIG, line), {"input_xruns": 0, "output_xruns": 0}, {"microphone": True}
        self.bridge: Mapping[str, Any] = {"state": "ARMED", "round_trip_ms": 0.31, "faults": 2}
        self.firmware = {"firmware": "0badcafe"}
        self.statistics = Statistics(
            CONFIG.tick_ms,
            self.senses,
            lambda: self.counts,
            lambda: {"state": "locked", "ppm": 12.3},
            lambda: self.bridge,
            lambda: self.alive,
            lambda: {
                "zones_c": {"cpu": 41.5, "gpu": 47.25},
                "rails_w": {"VDD_IN": 11.34, "VDD_CPU_GPU_CV": 4.2},
                "held_back": {"cpufreq-cpu0 0": [2, 9]},
            },
        )
        self.status = folder / "status.json"
        self.journal = Marked(self.statistics, HEADER, lambda: self.firmware, status_file=self.status, write=self.lines.append, **files)

    def put(self, *events: dict[str, Any]) -> None:
        """Hand over, and wait until all of it is written."""
        for event in events:
            while self.journal._items.qsize() > QUEUE_ITEMS // 2:
                threading.Event().wait(0.001)
            self.journal.put(event)
        written = threading.Event()
        self.journal.put({"event": "marker", "set": written.set})
        assert written.wait(60)

    def told(self, name: str) -> list[dict[str, Any]]:
        return [event for _, event in self.all() if event["event"] == name]

    def all(self) -> list[tuple[int, dict[str, Any]]]:
        return [(int(line[1]), json.loads(line[3:])) for line in self.lines]


@pytest.fixture
def tail(tmp_path: Path) -> Iterator[Tail]:
    made = Tail(tmp_path)
    yield made
    made.journal.close()


def test_a_second_of_ticks_is_one_line(tail: Tail) -> None:
    tail.put(*(tick(number) for number in range(3 * TICKS_A_SECOND)))
    lines = tail.told("stats")
    assert [line["ticks"] for line in lines] == [5, 10, 15]
    assert {name for name in lines[0] if name != "event"} == {row.name for row in STATISTICS}, "everything the table promises"
    expected = {"engine_ms": [10.0, 10.0], "edge_ms": [0.1, 0.1], "clock": "locked", "bridge": "ARMED", "bridge_ms": 0.31}
    hot = {"celsius": 47.2, "watts": 11.3, "held_back": "cpufreq-cpu0 0"}
    assert (expected | hot).items() <= lines[0].items()


def test_a_stall_is_a_line_too(tail: Tail) -> None:
    tail.put(tick(0), tick(1), tick(30, gap_ticks=28), tick(31))
    (line,) = tail.told("stats")
    assert (line["ticks"], line["missed"]) == (3, 28)


def test_what_there_is_none_of_is_left_out(tail: Tail) -> None:
    tail.bridge = {}
    tail.put(*(tick(number) for number in range(5)))
    (line,) = tail.told("stats")
    assert line["bridge"] == "none" and not {"bridge_ms", "bridge_faults"} & line.keys()


def test_ticks_leave_no_line_but_what_was_chosen_does(tail: Tail) -> None:
    tail.put(tick(0), tick(1, say=["one"]), tick(2, act="nod"))
    assert tail.all() == [
        (6, {"event": "chose", "t_s": 0.4, "say": ["one"]}),
        (6, {"event": "chose", "t_s": 0.6, "act": "nod"}),
    ]


def test_versions_come_at_the_start_and_every_hour(tail: Tail) -> None:
    tail.put(HEADER)
    (first,) = tail.told("versions")
    assert (first["copresence"], first["firmware"]) == ("1.2", "0badcafe") and "config" not in first
    tail.firmware["firmware"] = "1badcafe"
    tail.put(tick(0), *(tick(round(at_s * 5), gap_ticks=1) for at_s in (VERSIONS_S - 5, VERSIONS_S + 1, VERSIONS_S + 3)))
    assert [line["firmware"] for line in tail.told("versions")] == ["0badcafe", "1badcafe"], "flashed meanwhile"


def test_repeated_faults_are_one_line_and_a_count(tail: Tail) -> None:
    for second in range(150):
        loss = {"event": "loss", "tick": 5 * second, "of": ["late_speech_ticks"]}
        tail.put(*(tick(5 * second + i) for i in range(5)), loss)
    told = tail.told("loss")
    assert len(told) == 3 and "repeated" not in told[0]
    assert 1 + sum(line["repeated"] for line in told[1:]) <= 150
    tail.journal.close()
    assert 1 + sum(line.get("repeated", 0) for line in tail.told("loss")) == 150, "none is lost in the count"


def test_different_faults_are_told_apart() -> None:
    folding = Folding()
    assert folding.take({"event": "loss", "of": ["a"], "tick": 1}, 0.0) == [{"event": "loss", "of": ["a"], "tick": 1}]
    assert folding.take({"event": "loss", "of": ["b"], "tick": 1}, 0.0) != []
    assert folding.take({"event": "loss", "of": ["a"], "tick": 2}, 1.0) == []
    assert folding.due(FOLD_S) == [{"event": "loss", "of": ["a"], "tick": 2, "repeated": 1}]
    assert folding.due(2 * FOLD_S) == [] and folding.take({"event": "loss", "of": ["a"], "tick": 9}, 2 * FOLD_S) != []


def test_severities() -> None:
    levels = [
        ({"event": "fault"}, 2),
        ({"event": "bridge_down"}, 3),
        ({"event": "loss"}, 4),
        ({"event": "clock", "state": "holdover"}, 4),
        ({"event": "clock", "state": "locked"}, 6),
        ({"event": "bridge_act", "failed": "STALE"}, 4),
        ({"event": "bridge_act"}, 7),
        ({"event": "stats"}, 7),
        ({"event": "anything"}, 6),
    ]
    assert [priority(event) for event, _ in levels] == [level for _, level in levels]


def test_a_tick_never_waits_for_the_journal(tmp_path: Path) -> None:
    go, tail = threading.Event(), Tail(tmp_path)
    tail.journal._write_line = lambda line: go.wait(20)
    for number in range(4 * QUEUE_ITEMS):
        tail.journal.put(tick(number, say=["one"]))
    assert tail.journal.dropped >= 2 * QUEUE_ITEMS, "counted, and the queue has an end"
    go.set()
    tail.journal._write_line = tail.lines.append
    tail.journal.close()
    assert tail.told("stats")[-1]["dropped"] >= 2 * QUEUE_ITEMS


def test_a_journal_that_breaks_off_is_written_to_again(tail: Tail) -> None:
    def broken(line: str) -> None:
        tail.journal._write_line = tail.lines.append
        raise BrokenPipeError

    tail.journal._write_line = broken
    tail.put(tick(0, say=["one"]), tick(1, say=["two"]))
    assert [line["say"] for line in tail.told("chose")] == [["two"]]
    assert "BrokenPipeError" in str(tail.journal.fault)


def test_an_hour_of_steady_state_is_less_than_2_mb(tail: Tail) -> None:
    """Once a second statistics, versions, and a companion that says or does something every two seconds."""
    ran = [tick(n, say=["one"] if n % 20 == 0 else [], act="nod" if n % 20 == 10 else "none") for n in range(3600 * TICKS_A_SECOND)]
    tail.put(HEADER, *ran)
    size = sum(len(line.encode()) for line in tail.lines)
    assert len(tail.told("stats")) == 3600 and len(tail.told("chose")) == 1800
    assert size <= 2_000_000
    print(f"{size / 1e6:.2f} MB an hour")


# --- what the running companion says of itself --------------------------------------------------------------------


def test_the_status_is_that_of_the_running_process(tail: Tail) -> None:
    tail.senses.ticked(decision(word=0.4, act=0.7), np.zeros((2, 120, 160, 3), np.uint8), late=False)
    tail.put(HEADER, tick(0, say=["one", "two"]), *(tick(number) for number in range(1, 6)), tick(6, act="nod"))
    status = json.loads(tail.status.read_text())
    assert tail.status.stat().st_mode & 0o777 == 0o644
    assert (status["versions"]["bundle_sha256"], status["versions"]["firmware"]) == ("ab" * 32, "0badcafe")
    assert status["stats"]["ticks"] == 5 and status["said"] == [[0.2, "one two"]]
    assert status["senses"]["word"] == ["two", 0.4] and status["senses"]["act"] == ["nod", 0.7]
    tail.journal.close()
    assert not tail.status.exists(), "it does not outlive who wrote it"


def second(tail: Tail, number: int, missed: int = 0, late: int = 0) -> dict[str, bool]:
    tail.senses.late += late
    ticks = [tick(5 * number + i, gap_ticks=missed if i == 0 else 0) for i in range(5)]
    for event in ticks:
        if tail.statistics.add(event):
            tail.statistics.line(0)
    return tail.statistics.health()


def test_who_misses_more_than_one_tick_in_a_hundred_is_not_well(tail: Tail) -> None:
    assert tail.statistics.health()["ticks"] is False, "before the first second nobody knows"
    assert all(second(tail, number)["ticks"] for number in range(100))
    allowed = round((1 - ON_TIME) * 300)
    for number in range(allowed):
        assert second(tail, 100 + number, late=1)["ticks"]
    assert not second(tail, 120, late=1)["ticks"]
    assert not any(second(tail, 121 + number)["ticks"] for number in range(30))
    assert [second(tail, 151 + number)["ticks"] for number in range(60)][-1], "a minute later it is forgotten"
    assert not second(tail, 320, missed=10)["ticks"], "lost ticks count as well as late ones"


def test_a_silent_device_is_not_well(tail: Tail) -> None:
    tail.alive = {"microphone": False, "speaker": True}
    assert second(tail, 0) == {"ticks": True, "microphone": False, "speaker": True}


def test_a_device_is_alive_as_long_as_it_calls_back() -> None:
    now_ns = time.monotonic_ns()
    assert calls_back(SimpleNamespace(stamp=lambda: Stamp(now_ns, 0)))
    assert not calls_back(SimpleNamespace(stamp=lambda: Stamp(now_ns - 10_000_000_000, 0)))
    assert not calls_back(SimpleNamespace(stamp=lambda: None))
    assert calls_back(Silence())


def test_a_full_disk_is_told_and_survived(tail: Tail) -> None:
    tail.journal._status_file = tail.status.parent / "absent" / "status.json"
    tail.put(*(tick(number) for number in range(10)))
    (fault,) = tail.told("status_fault")
    assert "absent" in fault["file"] and fault["reason"] == "No such file or directory"
    assert len(tail.told("stats")) == 2


def test_what_it_hears_and_sees_is_a_few_numbers(tail: Tail) -> None:
    tail.senses._line.mic[:] = 0.1
    frames = np.zeros((2, 120, 160, 3), np.uint8)
    frames[1] = 51
    tail.senses.ticked(decision(), frames, late=True)
    summary = tail.senses.summary()
    assert (summary["mic_dbfs"], summary["brightness"], summary["movement"]) == (-20.0, 0.2, 0.2)
    assert tail.senses.late == 1
    tail.senses._line.mic[:] = 0
    tail.senses.ticked(decision(), frames, late=False)
    tail.senses._line.mic[:] = 0.1
    tail.senses.ticked(decision(), frames, late=True)
    assert tail.senses.summary()["mic_dbfs"] == -99.0, "the first tick after a summary is noted, and costs what no other one does"
    assert tail.senses.late == 2


def test_metrics_have_the_form_that_prometheus_reads(tmp_path: Path) -> None:
    tail = Tail(tmp_path, metrics_file=tmp_path / "copresence.prom")
    for number in range(5):
        tail.journal.put(tick(number, engine_ms=12.5))
    tail.journal.close()
    text = (tmp_path / "copresence.prom").read_text()
    form = r"# HELP \w+ .+|# TYPE \w+ (counter|gauge|summary)|\w+(\{quantile=\"0\.\d+\"\})? [-+.e\d]+"
    assert all(re.fullmatch(form, line) for line in text.splitlines())
    assert 'copresence_engine_seconds{quantile="0.99"} 0.0125' in text and "copresence_ticks_total 5" in text
    assert re.search(r"copresence_memory_bytes \d{8,}", text)
    assert set(re.findall(r"# TYPE (\w+)", text)) == {row.metric for row in STATISTICS if row.metric}


def test_metrics_leave_out_what_there_is_none_of() -> None:
    assert metrics({"ticks": 3, "clock": "free"}) == (
        "# HELP copresence_ticks_total ticks completed since the start\n# TYPE copresence_ticks_total counter\ncopresence_ticks_total 3\n"
    )


def test_a_body_that_is_not_there_has_no_state() -> None:
    assert bridge_state(NoActuator()) == {}


# --- systemd ------------------------------------------------------------------------------------------------------


class Systemd:
    """Its end of $NOTIFY_SOCKET."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))

    def heard(self) -> list[str]:
        found = []
        while select.select([self._socket], [], [], 0)[0]:
            found.append(self._socket.recv(4096).decode())
        return found


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemd:
    return Systemd(tmp_path, monkeypatch)


def test_ready_is_the_first_tick_in_time_and_no_other(systemd: Systemd, tail: Tail) -> None:
    watch = Watch(Notifier(), tail.senses)
    frames = np.zeros((2, 120, 160, 3), np.uint8)
    watch.ticked(Edge(0, 0, 0, 0), decision(), frames, late_samples=7)
    watch.ticked(Edge(2, 0, 0, 1), decision(), frames, late_samples=0)
    assert systemd.heard() == [], "neither a late tick nor one after a gap, and no sign of life before"
    watch.ticked(Edge(3, 0, 0, 0), decision(), frames, late_samples=0)
    assert [text.split("\n")[0] for text in systemd.heard()] == ["READY=1", "WATCHDOG=1"]


def test_signs_of_life_come_once_a_second_and_from_ticks_alone(systemd: Systemd) -> None:
    notifier = Notifier()
    for number in range(1, 26):
        notifier.ticked(number * 200_000_000, in_time=number < 10)
    assert systemd.heard().count("WATCHDOG=1") == 5, "late ticks are a sign of life too"
    assert systemd.heard() == []
    notifier.close()
    assert systemd.heard() == ["STOPPING=1"]
    notifier.ticked(99_000_000_000, in_time=True)


def test_a_deaf_systemd_holds_nothing_up(systemd: Systemd) -> None:
    notifier = Notifier()
    for number in range(1000):  # far more than a socket holds
        notifier.ticked(number * 1_000_000_000, in_time=False)
        notifier.ticked(number * 1_000_000_000, in_time=True)
    assert systemd.heard()[0].startswith("READY=1")


def test_without_systemd_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier()
    notifier.ticked(1, in_time=True)
    assert notifier.ready
    notifier.close()


def test_a_run_by_its_configuration_tells_systemd_and_the_journal(
    tmp_path: Path, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command, as the unit starts it, on the wall clock; a few ticks are enough."""
    write_bundle(tmp_path / "echo")
    config, runtime = tmp_path / "copresence.toml", tmp_path / "run"
    runtime.mkdir()
    config.write_text(
        f"""[bundle]\npath = "{tmp_path}/echo"\nkeys = ""\nstate = "{tmp_path}"\n[realtime]\npriority = false\n
        [audio]\nmicrophone = "none"\nspeaker = "{tmp_path}/out.wav"\n[log]\nmetrics_file = "{tmp_path}/copresence.prom"\n"""
    )
    command = [sys.executable, "-m", "device.cli", "run", "--config", str(config), "--speaker", "none"]
    environment = {**os.environ, "RUNTIME_DIRECTORY": str(runtime)}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not (runtime / "status.json").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    status = json.loads((runtime / "status.json").read_text())
    child.send_signal(signal.SIGTERM)
    out, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (0, "")
    assert (status["pid"], status["versions"]["bundle"], status["versions"]["speaker"]) == (child.pid, "echo", "none")
    assert status["health"] == {"ticks": status["health"]["ticks"], "microphone": True, "speaker": True, "engine": False}
    lines = [re.fullmatch(r"<([2-7])>(\{.*\})", line) for line in out.splitlines()]
    assert all(lines), "nothing but lines with a priority"
    told = [json.loads(line[2])["event"] for line in lines if line]
    assert (told[0], told[-1]) == ("versions", "summary") and "stats" in told
    heard = systemd.heard()
    assert heard[0].startswith("READY=1") and "WATCHDOG=1" in heard and heard[-1] == "STOPPING=1"
    assert not (runtime / "status.json").exists() and (tmp_path / "copresence.prom").exists() and not (tmp_path / "out.wav").exists()


def test_a_defect_in_the_loop_is_told_before_the_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launches = iter(range(4))

    class Broken(OnnxRuntimeEngine):
        def run(self) -> None:
            if next(launches) == 3:
                raise RuntimeError("boom")
            super().run()

    monkeypatch.setattr("device.engine.opening.OnnxRuntimeEngine", Broken)
    options = ["--mic", "none", "--speaker", "none", "--seconds", "2", "--no-priority", "--events", "journal"]
    with pytest.raises(RuntimeError, match="boom"):
        main(["run", "--bundle", str(write_bundle(tmp_path / "echo")), *options])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if '"event":"fault"' in line)
    assert re.fullmatch(r'<2>\{"event":"fault","tick":\d,"fault":"RuntimeError: boom"\}', line)


@pytest.mark.parametrize(("program", "said"), [(main, "copresence: "), (export_main, "copresence-export prepare: ")])
def test_what_ends_a_start_is_an_error_of_the_journals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: Callable[[list[str]], int], said: str
) -> None:
    options = ["run" if program is main else "prepare", "--config", str(tmp_path / "absent.toml")]
    assert program(options) == 2
    assert capsys.readouterr().err.startswith(said)
    monkeypatch.setenv("JOURNAL_STREAM", "8:12345")
    assert program(options) == 2
    assert capsys.readouterr().err.startswith(f"<3>{said}")


def test_a_rollback_shows_on_the_light_until_the_next_start(tail: Tail) -> None:
    acts: list[str] = []
    watch = Watch(Notifier(), tail.senses, SimpleNamespace(act=acts.append))  # type: ignore[arg-type]
    for number in range(2 * ALERT_TICKS):
        watch.ticked(Edge(number, 0, 0, 0), decision(), np.zeros((2, 120, 160, 3), np.uint8), 0)
    assert acts == ["alert", "alert"]
