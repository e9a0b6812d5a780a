"""What a field engineer asks a board: logs, top, doctor, pull; on a journal, a status and a file system that are made here."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_loop import write_bundle

from device.bundle import Bundle
from device.cli import main
from device.field import board, doctor, pull, top
from device.field.doctor import CHECKS, Finding, Place, examine

AT_S = 1_764_043_200


def entry(message: str, priority: int = 6, unit: str = "copresence.service", **more: Any) -> dict[str, Any]:
    values = {"__REALTIME_TIMESTAMP": str(AT_S * 1_000_000), "PRIORITY": str(priority), "_SYSTEMD_UNIT": unit, "MESSAGE": message}
    return {**values, **more}


JOURNAL = [
    entry('{"event":"versions","copresence":"0.1.0"}', 5),
    entry('{"event":"stats","ticks":5,"engine_ms":[9.5,9.8]}', 7),
    entry('{"event":"chose","t_s":1.2,"say":["one","two"],"act":"nod"}'),
    entry('{"event":"loss","tick":7,"of":["late_speech_ticks"],"repeated":3}', 4),
    entry('{"event":"bridge_down","reason":"nothing heard for 1.2 s"}', 3),
    entry("Traceback (most recent call last):", 6),
    entry("copresence.service: Watchdog timeout", 4, "init.scope", UNIT="copresence.service"),
    entry('{"event":"rolled_back","release":"2","to":"1"}', 2, "copresence-rollback.service"),
]


class Journal:
    """A journalctl that plays what it is given: whole with --priority, then waits if it is to follow."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.entries = folder, folder / "entries"
        self.asked, self.ended = folder / "asked", folder / "ended"
        program = folder / "bin" / "journalctl"
        program.parent.mkdir()
        program.write_text(f"#!{sys.executable}\n" + _JOURNALCTL.replace("FOLDER", repr(str(folder))))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        self.fill(JOURNAL)

    def fill(self, entries: list[dict[str, Any]]) -> None:
        self.entries.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


_JOURNALCTL = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(FOLDER)
(folder / "asked").write_text(" ".join(sys.argv[1:]))
names = ["emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"]
most = next(names.index(a.split("=")[1]) for a in sys.argv if a.startswith("--priority="))
signal.signal(signal.SIGTERM, lambda *_: ((folder / "ended").write_text("terminated"), sys.exit(0)))
for line in (folder / "entries").read_text().splitlines():
    if int(json.loads(line)["PRIORITY"]) <= most:
        print(line, flush=True)
while "--follow" in sys.argv:
    time.sleep(0.05)
"""


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journal:
    return Journal(tmp_path, monkeypatch)


def shown(capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    assert main(["logs", *options]) == 0
    return capsys.readouterr().out.splitlines()


# --- logs ---------------------------------------------------------------------------------------------------------


def test_lines_are_sentences_with_time_and_level(journal: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys)
    assert all(re.match(r"\d\d\.\d\d\. \d\d:\d\d:\d\d (crit|err|warning|notice|info) ", line) for line in lines)
    assert [line[16:] for line in lines] == [
        "notice  versions: copresence 0.1.0",
        "info    says one two, does nod",
        "warning loss: of late_speech_ticks repeated 3",
        "err     bridge down: reason nothing heard for 1.2 s",
        "info    Traceback (most recent call last):",
        "warning copresence.service: Watchdog timeout",
        "crit    rollback rolled back: release 2 to 1",
    ]
    assert "--unit=copresence*" in journal.asked.read_text() and "--lines=200" in journal.asked.read_text()


def test_level_grep_and_since(journal: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(shown(capsys, "--level", "warning")) == 4
    assert ["stats: ticks 5 engine_ms 9.5/9.8" in line for line in shown(capsys, "--level", "debug", "--grep", "STATS")] == [True]
    assert "--lines" not in journal.asked.read_text(), "what is looked for may be older than the newest lines"
    shown(capsys, "--since", "-5min")
    assert "--since=-5min" in journal.asked.read_text() and "--lines" not in journal.asked.read_text()
    assert main(["logs", "--grep", "("]) == 2
    assert "not a regular expression" in capsys.readouterr().err


def test_json_is_one_record_a_line(journal: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    records = [json.loads(line) for line in shown(capsys, "--json", "--level", "debug")]
    assert len(records) == len(JOURNAL)
    assert records[3] == {
        "time_s": AT_S,
        "level": "warning",
        "unit": "copresence",
        "event": {"event": "loss", "tick": 7, "of": ["late_speech_ticks"], "repeated": 3},
    }


def test_colour_tells_how_bad_it_is(journal: Journal, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("\033" in line for line in shown(capsys)), "not into a file or a pipe"
    monkeypatch.setenv("COPRESENCE_COLOUR", "1")
    colours = {line[16:].split("m")[1].split()[0]: line[16:].split("m")[0] for line in shown(capsys) if "\033" in line}
    assert colours == {"notice": "\033[1", "warning": "\033[33", "err": "\033[31", "crit": "\033[1;31"}


def test_odd_messages_are_shown_as_they_are(journal: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    journal.fill([entry("{broken"), entry('{"no":"event"}'), entry("", MESSAGE=[104, 105, 255]), entry('["list"]')])
    assert [line[24:] for line in shown(capsys)] == ["{broken", '{"no":"event"}', "hi\ufffd", '["list"]']


def test_a_journal_that_cannot_be_read_is_one_line(
    journal: Journal, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = journal.folder / "bin" / "journalctl"
    program.write_text("#!/bin/sh\necho 'No journal files were opened due to insufficient permissions.' >&2\nexit 1\n")
    assert main(["logs"]) == 2
    assert "insufficient permissions" in (said := capsys.readouterr().err) and "systemd-journal" in said and said.count("\n") == 1
    monkeypatch.setenv("PATH", str(journal.folder))
    assert main(["logs"]) == 2
    assert "make logs HOST=user@board" in capsys.readouterr().err


def heed_interrupts() -> None:
    """In a child, as from a terminal: what runs in a shell's background ignores SIGINT, and so would the child."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def follow(journal: Journal) -> subprocess.Popen[str]:
    """`copresence logs --follow`, once it has shown all that there is."""
    command = [sys.executable, "-m", "device.cli", "logs", "--follow"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)
    assert child.stdout is not None
    for _ in range(7):
        assert child.stdout.readline()
    return child


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_following_ends_with_the_connection_and_leaves_nothing_behind(journal: Journal, number: int) -> None:
    child = follow(journal)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (0, "")
    wait_for(journal.ended)


def test_following_a_quiet_journal_ends_when_nobody_reads_any_more(journal: Journal) -> None:
    child = follow(journal)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.wait(timeout=60) == 0 and child.stderr.read() == ""
    wait_for(journal.ended)
    child.stderr.close()


# --- top ----------------------------------------------------------------------------------------------------------


def status(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "at_ns": time.monotonic_ns(),
        "pid": os.getpid(),
        "t_s": 3725.4,
        "release": "0.1.0-abc",
        "versions": {
            "copresence": "0.1.0",
            "bundle": "companion-nano",
            "bundle_sha256": "0123456789abcdef",
            "playout_offset_ms": 60,
            "mic": "live",
            "speaker": "live",
            "camera": "v4l2",
            "firmware": "0badcafe",
        },
        "health": {"ticks": True, "microphone": True, "speaker": True, "engine": True},
        "stats": {
            "event": "stats",
            "ticks": 18627,
            "missed": 2,
            "late": 1,
            "engine_ms": [9.5, 11.2],
            "edge_ms": [0.1, 0.2],
            "underruns": 0,
            "overruns": 4,
            "camera_s": 0.08,
            "clock": "locked",
            "ladder": "audio only",
            "bridge": "ARMED",
            "memory_mb": 150.0,
            "dropped": 0,
        },
        "engine_ms": [9.0, 30.0, 75.0],
        "senses": {"mic_dbfs": -40.0, "brightness": 0.5, "movement": 0.02, "word": ["two", 0.31], "act": ["nod", 0.62]},
        "speaking": True,
        "said": [[3700.0, "one two"], [3720.4, "three"]],
        "did": [[3600.4, "nod"]],
        "clock": {"master": "audio", "state": "locked", "ppm": 12.34},
        "bridge": {"state": "ARMED", "round_trip_ms": 0.31, "faults": 2},
        "celsius": {"cpu": 51.2, "gpu": 55.8},
    }
    return {**values, **changes}


def picture(values: dict[str, Any], later_s: float = 0.0) -> str:
    from rich.console import Console

    console = Console(width=150, file=io.StringIO(), record=True)
    console.print(top.view(values, values.get("at_ns", 0) + int(later_s * 1e9)))
    return console.export_text()


def test_top_shows_what_it_hears_sees_says_and_does() -> None:
    text = picture(status())
    for part in (
        "ticking   ladder audio only   clock audio locked +12.3 ppm   up 1:02:05",
        "companion-nano 0123456789ab   copresence 0.1.0 0.1.0-abc",
        "▂▅█  9.5 ms, p99 11.2, of 60",
        "██████████░░░░░░░░░░ -40 dBFS",
        "brightness 50%, movement 2.0%, 80 ms old",
        "two 31%   nod 62%",
        "three (5 s ago), one two (25 s ago)   speaking",
        "nod (125 s ago)",
        "ARMED   0.31 ms   2 faults   firmware 0badcafe",
        "cpu 51 °C   gpu 56 °C",
    ):
        assert part in text, part
    assert re.search(r"overruns +4 +times that the microphone ran over", text)


def test_top_says_what_is_wrong() -> None:
    assert "not well: ticks, microphone" in picture(status(health={"ticks": False, "microphone": False, "speaker": True}))
    assert "silent for 9 s" in picture(status(), later_s=9)
    assert "does not run" in picture({})
    assert "nothing: no camera" in picture(status(versions={**status()["versions"], "camera": "none"}))


def test_the_sparklines_full_height_is_the_budget() -> None:
    assert top.sparkline([0, 7.4, 7.6, 59, 60, 600], 60) == "▁▁▂███"


def test_top_once_prints_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board.write_json(tmp_path / "status.json", status())
    assert main(["top", "--once", "--status", str(tmp_path / "status.json")]) == 0
    assert "ticking" in capsys.readouterr().out


# --- doctor -------------------------------------------------------------------------------------------------------


class Machine:
    """A board's file system, well in every respect, with a companion that runs; a test breaks one thing."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.root, self.monkeypatch = folder, folder / "root", monkeypatch
        self.bundle = Bundle.open(write_bundle(folder / "echo"))
        self.config = self.write("etc/copresence/copresence.toml", "")
        self.configure()
        (self.root / "var/lib/copresence").mkdir(parents=True)
        (self.root / "opt/copresence/releases/1").mkdir(parents=True)
        for link in ("current", "good"):
            (self.root / "opt/copresence" / link).symlink_to("releases/1")
        self.write("sys/class/thermal/thermal_zone0/type", "cpu")
        self.write("sys/class/thermal/thermal_zone0/temp", "45000")
        self.write(f"proc/{os.getpid()}/status", "VmLck:\t  204800 kB\n")
        verified = {"bundle_sha256": self.bundle.digest, "engine": "onnxruntime", "p50_ms": 9.5, "p99_ms": 11.0}
        self.write("run/copresence-engine/verified.json", json.dumps(verified))
        versions = {**status()["versions"], "bundle_sha256": self.bundle.digest}
        self.write("run/copresence/status.json", json.dumps(status(versions=versions)))
        monkeypatch.setattr(doctor.os, "sched_getscheduler", lambda pid: os.SCHED_FIFO | os.SCHED_RESET_ON_FORK)
        monkeypatch.setattr(doctor.os, "sched_getparam", lambda pid: os.sched_param(70))
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=4000 << 20))
        monkeypatch.setattr(Place, "ask", lambda place, *command: "NV Power Mode: MAXN\n0" if command[0] == "nvpmodel" else "yes")

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def configure(self, **changes: str) -> None:
        sections = {
            "bundle": f'path = "{self.bundle.path}"\nkeys = ""\nstate = "{self.root}/var/lib/copresence"\n',
            "camera": 'source = "v4l2"\n',
            "bridge": 'port = "auto"\n',
        }
        self.config.write_text("".join(f"[{name}]\n{changes.get(name, text)}" for name, text in sections.items()) + changes.get("more", ""))

    def running(self, change: Callable[[dict[str, Any]], None]) -> None:
        path = self.root / "run/copresence/status.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    def camera_alone(self, source: str) -> None:
        """Nothing runs, and that camera is configured."""
        (self.root / "run/copresence/status.json").unlink()
        self.configure(camera=f'source = "{source}"\n')

    def find(self, check: str) -> Finding:
        return next(finding for finding in examine(Place(self.config, self.root)) if finding.check == check)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_a_board_that_is_well(machine: Machine) -> None:
    findings = examine(Place(machine.config, machine.root))
    assert [finding.check for finding in findings] == list(CHECKS)
    wrong = {finding.check for finding in findings if finding.level != "ok"}
    assert wrong == {"bundle"}, "a board without keys runs whatever it is given"


def spoil(**values: Any) -> Callable[[dict[str, Any]], None]:
    """A change to the status, by section__name."""

    def change(found: dict[str, Any]) -> None:
        for name, value in values.items():
            section, _, key = name.partition("__")
            if key:
                found[section][key] = value
            else:
                found[section] = value

    return change


@pytest.mark.parametrize(
    ("check", "level", "words", "wrong"),
    [
        ("configuration", "bad", "no key 'bridge.prot'", lambda m: m.configure(bridge='prot = "x"\n')),
        ("companion", "bad", "does not run", lambda m: m.running(spoil(at_ns=time.monotonic_ns() - 10_000_000_000))),
        ("companion", "bad", "does not run", lambda m: (m.root / "run/copresence/status.json").unlink()),
        ("companion", "warning", "not well: ticks", lambda m: m.running(spoil(health__ticks=False))),
        ("release", "warning", "2 was given up: never ready", lambda m: m.write(
            "opt/copresence/rolled-back.json", json.dumps({"from": "2", "to": "1", "reason": "never ready"})
        )),
        ("release", "warning", "none is installed", lambda m: (m.root / "opt/copresence/current").unlink()),
        ("release", "warning", "not confirmed yet", lambda m: (m.root / "opt/copresence/good").unlink()),
        ("bundle", "bad", "not a directory", lambda m: m.configure(bundle='path = "/nowhere"\nkeys = ""\n')),
        ("bundle", "bad", "no such folder of keys", lambda m: m.configure(bundle=f'path = "{m.bundle.path}"\nkeys = "/nowhere"\n')),
        ("engine", "bad", "not verified", lambda m: (m.root / "run/copresence-engine/verified.json").unlink()),
        ("engine", "bad", "another bundle runs", lambda m: m.running(spoil(versions__bundle_sha256="ff"))),
        ("libraries", "bad", "tensorrt and pycuda cannot be imported", lambda m: m.configure(more='[engine]\nbackend = "tensorrt"\n')),
        ("power", "warning", "15W (mode 2)", lambda m: m.monkeypatch.setattr(Place, "ask", lambda p, *c: "NV Power Mode: 15W\n2")),
        ("microphone", "bad", "stopped", lambda m: m.running(spoil(health__microphone=False))),
        ("microphone", "warning", "silence", lambda m: m.running(spoil(senses__mic_dbfs=-99.0))),
        ("speaker", "bad", "stopped", lambda m: m.running(spoil(health__speaker=False))),
        ("camera", "bad", "1.7 s old", lambda m: m.running(spoil(stats__camera_s=1.7))),
        ("camera", "bad", "/nowhere/video7 does not exist", lambda m: m.camera_alone("v4l2:/nowhere/video7")),
        ("camera", "bad", "/nowhere.mkv does not exist", lambda m: m.camera_alone("/nowhere.mkv")),
        ("bridge", "bad", "no link", lambda m: m.running(spoil(bridge={"state": "gone"}))),
        ("bridge", "warning", "SAFE", lambda m: m.running(spoil(bridge__state="SAFE"))),
        ("real time", "warning", "without priority", lambda m: m.monkeypatch.setattr(doctor.os, "sched_getscheduler", lambda pid: 0)),
        ("real time", "warning", "not locked", lambda m: m.write(f"proc/{os.getpid()}/status", "VmLck:\t 0 kB\n")),
        ("disk", "warning", "300 MB free", lambda m: m.monkeypatch.setattr(
            doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=300 << 20)
        )),
        ("disk", "bad", "3 MB free", lambda m: m.monkeypatch.setattr(
            doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 << 20)
        )),
        ("time", "warning", "1970", lambda m: m.monkeypatch.setattr(doctor, "time", SimpleNamespace(
            gmtime=lambda: time.gmtime(0), strftime=lambda form: time.strftime(form, time.gmtime(0)), monotonic_ns=time.monotonic_ns
        ))),
        ("heat", "warning", "cpu 90 °C", lambda m: m.write("sys/class/thermal/thermal_zone0/temp", "90000")),
        ("heat", "bad", "cpu 97 °C", lambda m: m.write("sys/class/thermal/thermal_zone0/temp", "97000")),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_what_to_do(
    machine: Machine, check: str, level: str, words: str, wrong: Callable[[Machine], Any]
) -> None:
    wrong(machine)
    finding = machine.find(check)
    assert (finding.level, words in finding.what) == (level, True), finding
    assert finding.remedy


def test_clocks_that_are_held_down_are_named(machine: Machine) -> None:
    for name, least in (("cpu0", "1500000"), ("cpu1", "700000")):
        machine.write(f"sys/devices/system/cpu/{name}/cpufreq/scaling_min_freq", least)
        machine.write(f"sys/devices/system/cpu/{name}/cpufreq/cpuinfo_max_freq", "1500000")
    machine.write("sys/class/devfreq/17000000.gpu/min_freq", "306000000")
    machine.write("sys/class/devfreq/17000000.gpu/max_freq", "1020000000")
    finding = machine.find("clocks")
    assert finding.level == "warning" and "cpu1 at 47%, 17000000.gpu at 30%" in finding.what and "cpu0" not in finding.what


def test_a_check_that_breaks_does_not_hide_the_others(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKS, "heat", lambda place: {}["nothing"])
    finding = machine.find("heat")
    assert finding.level == "bad" and "KeyError" in finding.what
    assert len(examine(Place(machine.config, machine.root))) == len(CHECKS)


@pytest.mark.parametrize(("levels", "code"), [(["ok", "ok"], 0), (["ok", "warning"], 1), (["bad", "warning", "ok"], 2)])
def test_the_exit_status_is_that_of_the_worst(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], levels: list[str], code: int
) -> None:
    found = [Finding(f"check {number}", level, "something", "do this") for number, level in enumerate(levels)]
    monkeypatch.setattr(doctor, "examine", lambda place: found)
    assert main(["doctor"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(levels) and all(" → do this" in line for line in lines)
    assert main(["doctor", "--json"]) == code
    assert [entry["level"] for entry in json.loads(capsys.readouterr().out)] == levels


# --- pull ---------------------------------------------------------------------------------------------------------


def mcap(raw: bool) -> bytes:
    """How the flight recorder's file begins, as far as it matters here: a record of metadata."""
    values = {"format": "1", "raw": "true" if raw else "false"}
    body = b"".join(len(part).to_bytes(4, "little") + part.encode() for pair in values.items() for part in pair)
    return b"\x89MCAP0\r\n\x0c" + len(body).to_bytes(8, "little") + body + b"the rest"


def archive(machine: Machine) -> tuple[dict[str, bytes], str]:
    file = io.BytesIO()
    told = pull.write_archive(file, machine.config, machine.root)
    file.seek(0)
    with tarfile.open(fileobj=file) as found:
        read = {member.name.partition("/")[2]: found.extractfile(member) for member in found.getmembers()}
        return {name: data.read() for name, data in read.items() if data is not None}, told


def test_an_archive_holds_what_a_bug_report_needs(machine: Machine, journal: Journal) -> None:
    machine.write("var/lib/copresence/dumps/copresence-1.mcap", "").write_bytes(mcap(raw=False))
    machine.write("etc/os-release", "PRETTY_NAME=Twin\n")
    files, told = archive(machine)
    assert len(files["journal.jsonl"].splitlines()) == len(JOURNAL), "statistics too"
    assert json.loads(files["versions.json"])["running"]["firmware"] == "0badcafe"
    assert {finding["check"] for finding in json.loads(files["doctor.json"])} == set(CHECKS)
    assert files["files/copresence.toml"] == machine.config.read_bytes()
    assert files["files/etc/os-release"] == b"PRETTY_NAME=Twin\n"
    assert files["dumps/copresence-1.mcap"] == mcap(raw=False)
    assert files["CONTENTS.txt"].decode() == told and all(name in told for name in files if name != "CONTENTS.txt")


def test_what_could_hold_a_person_is_left_out_and_named(machine: Machine, journal: Journal) -> None:
    dumps = machine.root / "var/lib/copresence/dumps"
    dumps.mkdir()
    for number in range(pull.NEWEST_DUMPS):
        (dumps / f"copresence-{number + 1}.mcap").write_bytes(mcap(raw=False))
    (dumps / "copresence-0.mcap").write_bytes(mcap(raw=False))
    (dumps / "copresence-2.mcap").write_bytes(mcap(raw=True))
    (dumps / "copresence-3.mcap").write_bytes(b"not what it seems")
    files, told = archive(machine)
    assert {name for name in files if name.startswith("dumps/")} == {f"dumps/copresence-{n}.mcap" for n in (1, 4, 5, 6, 7, 8)}
    left_out = told.partition("Left out")[2]
    for name in (
        "copresence-0.mcap: older",
        "copresence-2.mcap: may hold sound",
        "copresence-3.mcap: may hold sound",
        "sound and pictures",
        "keys",
    ):
        assert name in left_out


def test_a_board_without_a_companion_can_be_pulled_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    file = io.BytesIO()
    assert "journal.jsonl" in pull.write_archive(file, tmp_path / "absent.toml", tmp_path)


def test_pull_writes_a_whole_file_and_says_what_is_in_it(machine: Machine, journal: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    out = machine.folder / "report.tar.gz"
    assert main(["pull", "--config", str(machine.config), "--out", str(out)]) == 0
    assert "Left out, for privacy" in capsys.readouterr().err
    with tarfile.open(out) as found:
        assert any(name.endswith("/CONTENTS.txt") for name in found.getnames())


# --- make ---------------------------------------------------------------------------------------------------------


def make(repository: Path, folder: Path, target: str, ssh: str, *more: str) -> subprocess.CompletedProcess[str]:
    program = folder / "ssh"
    program.write_text(f"#!/bin/sh\n{ssh}\n")
    program.chmod(0o755)
    command = ["make", "--no-print-directory", target, "HOST=user@board", *more]
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(("target", "asked"), [("logs", "logs --follow --level err"), ("top", "top"), ("doctor", "doctor --level err")])
def test_make_asks_the_boards_own_program(repository: Path, tmp_path: Path, target: str, asked: str) -> None:
    done = make(repository, tmp_path, target, 'for last; do :; done; echo "$last"', "ARGS=--level err")
    assert done.returncode == 0 and done.stdout.rstrip().endswith(f"/opt/copresence/current/venv/bin/copresence {asked}")
    assert done.stdout.count("\n") == 1, "and nothing else is said: what comes may be JSON"


def test_a_cut_connection_is_said(repository: Path, tmp_path: Path) -> None:
    done = make(repository, tmp_path, "logs", "exit 255")
    assert done.returncode != 0 and "make logs HOST=user@board" in done.stderr
    assert "make logs" not in make(repository, tmp_path, "logs", "exit 1").stderr.replace("make: ***", "")


def test_make_pull_fetches_one_archive_and_leaves_none_of_a_failure(repository: Path, tmp_path: Path) -> None:
    done = make(repository, tmp_path, "pull", "echo archive")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    archive = repository / line
    assert archive.read_text() == "archive\n" and re.fullmatch(r"build/copresence-user@board-\d{8}T\d{6}\.tar\.gz", line)
    archive.unlink()
    assert make(repository, tmp_path, "pull", "echo half; exit 2").returncode != 0
    assert not list((repository / "build").glob("copresence-user@board-*"))
