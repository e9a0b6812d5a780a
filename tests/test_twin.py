"""A board's life on its twin: flashed, booted, hurt, updated, flashed badly. COPRESENCE_TWIN=all runs it in full (`make twin-test`).

Durations are printed, never asserted: the machine is shared. Without a twin (no root, no Debian mirror, no index) all of it is skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from twin import FOLDER, REPOSITORY, NoTwin, Twin, running, ssh_wrapper, until

from export.build import build
from export.release import ReleaseError, find_flash_target, make_release, wheelhouse
from export.sign import keygen

WORKSHOP = FOLDER / "workshop"
ALL = os.environ.get("COPRESENCE_TWIN") == "all"
at_length = pytest.mark.skipif(not ALL, reason="takes long: make twin-test")
TOOL = "python3 -I /opt/copresence/flash/releases.py"
PRESENT_S = 240.0  # until it is there again; a stuck start is given up after 60 s
SOURCES = ("device", "export", "firmware_bridge", "tests", "pyproject.toml", "README.md", "LICENSE", "Makefile")

# A release that can be hurt from outside, by making a file.
HURT = """
        fault = __import__("pathlib").Path("/var/lib/copresence/fault")
        if fault.exists():
            what = fault.read_text().strip()
            if what == "raise":
                fault.unlink()
                raise RuntimeError("somebody wanted this")
            self.hoard = [*getattr(self, "hoard", []), bytearray(os.urandom(1 << 20) * 100)]
"""
STEP = """    def _tick(self, edge: Edge) -> None:
"""


def say(text: str) -> None:
    """A measurement, for the log of the run."""
    print(f"\n    {text}", flush=True)


class Workshop:
    """What a workstation has: a key, a bundle, sources, and variants of these sources that are released as they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = folder / "release.key"
        if not self.key.exists():
            folder.mkdir(parents=True, exist_ok=True)
            keygen(self.key)
        self.bundle = folder / "bundle"
        if not self.bundle.exists():
            build(REPOSITORY / "export/checkpoints/companion-nano", self.bundle)

    def flash(self, sources: Path = REPOSITORY, *options: str, key: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        """`make flash` from a copy of the sources, begun."""
        assumed = [flag for stamp in (".flash", ".demo", ".setup") for flag in ("-o", f"{sys.prefix}/{stamp}")]
        command = ["make", "--no-print-directory", "-C", str(REPOSITORY), "flash", *assumed, f"VENV={sys.prefix}"]
        # A variant's wheel is another, so that each needs a folder of its own.
        values = {"KEY": str(key or self.key), "BUNDLE": str(self.bundle), "SOURCES": str(sources)} | variables
        values |= {"WHEELS": str(self.folder / "wheels" / sources.name), "RELEASES": str(self.folder / "releases" / sources.name)}
        command += [f"{name}={value}" for name, value in values.items()] + list(options)
        path = f"{ssh_wrapper().parent}:{os.environ['PATH']}"
        return subprocess.Popen(
            command, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL
        )

    def flashed(self, sources: Path = REPOSITORY, **variables: Any) -> str:
        """`make flash` to its good end; what it said."""
        status, said = finished(self.flash(sources, **variables))
        assert status == 0, said
        return said

    def variant(self, name: str, changes: dict[str, tuple[str, str]]) -> Path:
        """The sources with `changes`: file → what is replaced by what."""
        folder = self.folder / "sources" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for part in SOURCES:
            source = REPOSITORY / part
            if source.is_dir():
                shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / part)
        for file, (old, new) in changes.items():
            text = (folder / file).read_text(encoding="utf-8")
            assert old in text, f"{file} has changed; adapt the test"
            (folder / file).write_text(text.replace(old, new, 1), encoding="utf-8")
        wheels = self.folder / "wheels" / name
        shutil.rmtree(wheels, ignore_errors=True)
        shutil.copytree(self.folder / "wheels" / REPOSITORY.name, wheels, copy_function=os.link)  # all but its own are the same
        return folder

    def release(self, sources: Path, **changes: str) -> Path:
        """A release of these sources, not flashed; `changes` are to the twin's row of the targets."""
        target = dataclasses.replace(find_flash_target("twin"), **changes)
        wheels = self.folder / "wheels" / sources.name / "twin"
        command = [sys.executable, "-m", "export.cli", "wheelhouse", "--target", "twin", "--out", str(wheels)]
        subprocess.run(command, cwd=sources, check=True)
        return make_release(target, wheels, self.bundle, None, self.key, self.folder / "releases" / sources.name)


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=1800)
    return process.returncode, said


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    if shutil.which("ansible-playbook", path=f"{sys.prefix}/bin") is None:
        pytest.skip("ansible-core is not installed (extra 'flash')")
    try:
        wheelhouse(find_flash_target("twin"), WORKSHOP / "wheels" / REPOSITORY.name / "twin")
    except ReleaseError as error:
        pytest.skip(f"no wheels for a twin: {error}")
    return Workshop(WORKSHOP)


@pytest.fixture(scope="module")
def empty(workshop: Workshop) -> Iterator[Twin]:
    """A board as it comes: nothing of ours on it."""
    with contextlib.ExitStack() as stack:
        try:
            twin = stack.enter_context(running())
        except NoTwin as error:
            pytest.skip(f"no twin here: {error}")
        yield twin


@pytest.fixture(scope="module")
def board(empty: Twin, workshop: Workshop) -> Twin:
    """A board that was flashed, whose release counts as good: it runs, and its confirmation is taken as given."""
    begun_s = time.monotonic()
    said = workshop.flashed(HOST=empty.name)
    say(f"first flash: {time.monotonic() - begun_s:.0f} s")
    assert f"{empty.name}: runs" in said
    good(empty)
    return empty


@pytest.fixture(scope="module")
def hurtable(board: Twin, workshop: Workshop) -> Twin:
    """A board with an update on it that can be hurt; its update, too, counts as good."""
    sources = workshop.variant("hurtable", {"device/loop.py": (STEP, STEP + HURT.strip("\n").rstrip() + "\n")})
    begun_s = time.monotonic()
    workshop.flashed(sources, HOST=board.name)
    say(f"update: {time.monotonic() - begun_s:.0f} s")
    good(board)
    return board


def good(twin: Twin) -> None:
    """What confirmation does after five healthy minutes."""
    twin.sudo("ln -sfn $(readlink /opt/copresence/current) /opt/copresence/good; rm -f /opt/copresence/trial.json")


def present(twin: Twin, but_pid: int | None = None) -> dict[str, Any]:
    """Its status once it is ready and ticking, in a process other than `but_pid`."""

    def ready() -> dict[str, Any]:
        unit = twin.ssh("systemctl show --property=MainPID,ActiveState copresence", check=False).stdout
        status = twin.status()
        there = "ActiveState=active" in unit and status and f"MainPID={status['pid']}\n" in unit and status["pid"] != but_pid
        return status if there else {}

    return until(ready, f"the companion on {twin.name}", PRESENT_S)


def journal(twin: Twin, since: str) -> str:
    return twin.sudo(f"journalctl --no-pager -o cat --since '{since}' -u copresence -u copresence-rollback -u copresence-engine")


def now(twin: Twin) -> str:
    return twin.ssh("date '+%F %T'").stdout.strip()


def test_a_first_flash_brings_an_empty_board_to_life(board: Twin, workshop: Workshop) -> None:
    status = present(board)
    assert status["release"] == board.link("current") != ""
    assert (
        status["versions"]["bundle_sha256"] == json.loads((board.root / "opt/copresence/current/release.json").read_text())["bundle_sha256"]
    )
    assert status["versions"]["signature"] == "valid"
    assert (status["versions"]["mic"], status["versions"]["speaker"]) == ("live", "live")
    later = until(lambda: (s := board.status()) and s["stats"]["ticks"] > status["stats"]["ticks"] + 5 and s, "it to tick")
    assert later["stats"]["camera_s"] < 1, "it sees the camera's newest frame"
    parts = ("microphone", "speaker", "engine")
    until(lambda: (s := board.status()) and all(s["health"][part] for part in parts), "all of it to be alive")


def test_a_field_engineer_asks_it_over_ssh(board: Twin, tmp_path: Path) -> None:
    present(board)
    asked = {"HOST": board.name, "PATH": f"{ssh_wrapper().parent}:{os.environ['PATH']}"}

    def make(target: str, *variables: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "--no-print-directory", "-C", str(REPOSITORY), target, f"HOST={board.name}", *variables]
        return subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)

    findings = make("doctor", "ARGS=--json").stdout
    found = {finding["check"]: finding["level"] for finding in json.loads(findings)}
    assert found["companion"] == found["release"] == found["bundle"] == found["speaker"] == found["camera"] == "ok", findings
    assert found["microphone"] == "warning", "nobody is in the twin's room"
    top = board.sudo("/opt/copresence/current/venv/bin/copresence top --once")
    assert board.link("current") in top or "engine" in top, top
    told = board.sudo("/opt/copresence/current/venv/bin/copresence logs --json --level debug --since=-5min")
    assert {json.loads(line)["event"]["event"] for line in told.splitlines() if '"stats"' in line} == {"stats"}
    made = make("pull")
    assert made.returncode == 0, made.stderr
    archive = REPOSITORY / made.stdout.split()[-1]
    with tarfile.open(archive) as opened:
        names = opened.getnames()
    archive.unlink()
    assert any("journal" in name for name in names) and any("doctor" in name for name in names), names


@at_length
def test_flashing_the_same_release_again_changes_nothing(board: Twin, workshop: Workshop) -> None:
    pid = present(board)["pid"]
    said = workshop.flashed(HOST=board.name)
    assert "already ran" in said
    assert re.search(r"changed=0 .*failed=0", said), said
    assert present(board)["pid"] == pid, "it was not even restarted"


@at_length
def test_a_dry_run_says_what_would_change_and_changes_nothing(board: Twin, workshop: Workshop) -> None:
    sources = workshop.variant("dry", {"device/__init__.py": ('"""', '"""Another: ')})
    before = board.sudo("find /opt /etc -newermt 2000-01-01 -printf '%p %T@\\n' | sort | sha256sum")
    status, said = finished(workshop.flash(sources, "FLASH_OPTIONS=--check --diff", HOST=board.name))
    assert status == 0, said
    assert re.search(rf"from {board.link('current')} to 0\.", said)
    assert board.sudo("find /opt /etc -newermt 2000-01-01 -printf '%p %T@\\n' | sort | sha256sum") == before


def test_nobody_else_is_listened_to_and_nobody_else_may_write(board: Twin) -> None:
    listening = board.sudo("ss --listening --tcp --udp --raw --numeric --processes --no-header")
    assert {line.split()[4].rpartition(":")[2] for line in listening.splitlines()} == {"22"}, listening
    for place in (
        "/opt/copresence/current/bundle/graph.onnx",
        "/opt/copresence/current/venv/x",
        "/opt/copresence/good",
        "/etc/copresence/keys/x",
    ):
        assert board.ssh(f"sudo -n -u copresence sh -c 'echo > {place}'", check=False).returncode != 0, f"its own user wrote {place}"
    owned = board.sudo("find -L /opt/copresence/releases /opt/copresence/boot ! -user root -o -perm /022 ! -type l | head")
    assert owned == "", f"others can write: {owned}"


def test_a_release_signed_by_another_key_is_refused(board: Twin, workshop: Workshop, tmp_path: Path) -> None:
    before = present(board)
    keygen(tmp_path / "stranger.key")
    shutil.copytree(workshop.bundle, tmp_path / "bundle")
    command = workshop.flash(HOST=board.name, key=tmp_path / "stranger.key", BUNDLE=str(tmp_path / "bundle"))
    status, said = finished(command)
    assert status != 0
    assert "signed by the key" in said and "not among those in /etc/copresence/keys" in said, said
    assert present(board)["pid"] == before["pid"], "what ran goes on undisturbed"


def test_after_a_power_cut_it_comes_up_by_itself(board: Twin) -> None:
    release = board.link("current")
    board.reboot()
    status = present(board)
    assert status["release"] == release
    show = "systemctl show --property=UserspaceTimestampMonotonic; systemctl show --property=ActiveEnterTimestampMonotonic copresence"
    begun_us, ready_us = (int(line.partition("=")[2]) for line in board.ssh(show).stdout.splitlines())
    say(f"systemd's start to the first good tick: {(ready_us - begun_us) / 1e6:.1f} s")


@at_length
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("SIGKILL", "systemctl kill --signal=KILL --kill-whom=main copresence"),
        ("SIGSTOP, which only the watchdog sees", "systemctl kill --signal=STOP --kill-whom=main copresence"),
        ("an exception in the loop", "echo raise > /var/lib/copresence/fault"),
    ],
    ids=["SIGKILL", "SIGSTOP", "exception"],
)
def test_it_comes_back_by_itself_after(hurtable: Twin, name: str, command: str) -> None:
    hurtable.sudo("systemctl reset-failed copresence")
    before, since = present(hurtable), now(hurtable)
    begun_s = time.monotonic()
    hurtable.sudo(command)
    after = present(hurtable, before["pid"])
    say(f"{name}: present again after {time.monotonic() - begun_s:.1f} s")
    assert after["release"] == before["release"], "the release is not to blame for one fault"
    told = journal(hurtable, since)
    assert "rolled_back" not in told and "nothing_to_go_back_to" not in told, "nor is it put on trial for it"


@at_length
def test_it_comes_back_when_its_memory_ran_out(hurtable: Twin) -> None:
    hurtable.sudo("systemctl reset-failed copresence")
    before = present(hurtable)
    group = Path("/sys/fs/cgroup/memory/copresence-twin")
    if not Path("/sys/fs/cgroup/memory").is_dir():
        pytest.skip("needs the memory controller of cgroup v1")
    group.mkdir(exist_ok=True)
    try:
        (group / "memory.limit_in_bytes").write_text(str(1 << 30))
        (group / "cgroup.procs").write_text(str(host_pid(before["pid"])))
        begun_s = time.monotonic()
        hurtable.sudo("echo hoard > /var/lib/copresence/fault")
        until(lambda: hurtable.status().get("pid") != before["pid"], "the kernel to kill it")
        hurtable.sudo("rm -f /var/lib/copresence/fault")
        present(hurtable, before["pid"])
        say(f"out of memory: present again after {time.monotonic() - begun_s:.1f} s")
        assert "oom_kill 1" in (group / "memory.oom_control").read_text()
    finally:
        until(lambda: not (group / "cgroup.procs").read_text(), "the group to be empty")
        group.rmdir()


@at_length
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_it_runs_with_a_state_folder_that_is(hurtable: Twin, fault: str) -> None:
    small = "mount -t tmpfs -o size=512k,mode=0755 tmpfs /var/lib/copresence; chown copresence: /var/lib/copresence"
    keep = f"mkdir -p /run/kept; cp -a /var/lib/copresence/. /run/kept; {small}; cp -a /run/kept/. /var/lib/copresence"
    spoil = {
        "full": "dd if=/dev/zero of=/var/lib/copresence/filling bs=4k 2>/dev/null || true",
        "read-only": "mount -o remount,ro /var/lib/copresence",
    }
    hurtable.sudo(f"systemctl stop copresence; {keep}")
    try:
        hurtable.sudo(spoil[fault])
        begun_s = time.monotonic()
        hurtable.sudo("systemctl reset-failed copresence; systemctl start --no-block copresence")
        status = present(hurtable)
        later = until(lambda: (s := hurtable.status()) and s["stats"]["ticks"] > status["stats"]["ticks"] + 10 and s, "it to tick on")
        say(f"state folder {fault}: present {time.monotonic() - begun_s:.1f} s after its start, {later['stats']['ticks']} ticks")
        assert later["pid"] == status["pid"]
    finally:
        hurtable.sudo("systemctl stop copresence; umount /var/lib/copresence; systemctl start --no-block copresence")


@at_length
def test_a_wall_clock_that_jumps_by_an_hour_does_not_stir_it(hurtable: Twin) -> None:
    # The twin shares its clocks with this machine, so only the companion is told another wall time.
    library, offset = hurtable.root / "usr/local/lib/wall_clock.so", hurtable.root / "etc/copresence/wall_clock"
    library.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(REPOSITORY / "tests" / "wall_clock.c")], check=True)
    offset.write_bytes(struct.pack("q", 0))
    preload = "LD_PRELOAD=/usr/local/lib/wall_clock.so\nWALL_CLOCK=/etc/copresence/wall_clock\n"
    hurtable.write("etc/copresence/twin.env", preload)
    hurtable.sudo("systemctl reset-failed copresence; systemctl restart --no-block copresence")
    try:
        before = present(hurtable)
        until(lambda: hurtable.status().get("stats", {}).get("ticks", 0) > 25, "it to settle")
        assert "wall_clock.so" in hurtable.sudo(f"cat /proc/{before['pid']}/maps")
        for step_s in (3600, -3600, 0):
            first = hurtable.status()["stats"]
            with offset.open("r+b") as file:  # in place: the process has it mapped
                file.write(struct.pack("q", step_s))
            told, real = hurtable.sudo(f"env {' '.join(preload.split())} python3 -c 'import time; print(time.time())'; date +%s").split()
            assert abs(float(told) - int(real) - step_s) < 60, "the step took place"

            def ticked(first: dict[str, Any] = first) -> dict[str, Any]:
                status = hurtable.status()
                return status if status and status["stats"]["ticks"] > first["ticks"] + 25 else {}

            later = until(ticked, "25 ticks more")
            missed = later["stats"]["missed"] - first["missed"]
            say(f"wall clock at {step_s:+} s: {missed} ticks missed, {later['stats']['ticks'] - first['ticks']} completed since")
            assert later["pid"] == before["pid"], "not even a restart"
            assert missed < 300, "an hour is 18000 ticks"
    finally:
        (hurtable.root / "etc/copresence/twin.env").unlink()
        hurtable.sudo("systemctl restart --no-block copresence")


def host_pid(pid: int) -> int:
    """The number that this machine has for process `pid` of the twin."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            text = status.read_text()
            numbers = re.search(r"^NSpid:\s+(.*)$", text, flags=re.MULTILINE)
            if numbers and numbers[1].split()[1:] == [str(pid)] and text.startswith("Name:\tcopresence"):
                return int(status.parent.name)
    raise AssertionError(f"no process {pid} of the twin on this machine")


def deliver(twin: Twin, release: Path) -> str:
    """Send and install a release as the playbook does, and leave the board alone with it."""
    rsync = ["rsync", "--archive", "--delete", "--rsh", str(ssh_wrapper()), "--rsync-path=sudo -n rsync"]
    subprocess.run([*rsync, f"{release}/", f"{twin.name}:/opt/copresence/incoming/"], check=True)
    return str(json.loads(twin.sudo(f"{TOOL} install /opt/copresence/incoming", timeout=600))["name"])


@at_length
@pytest.mark.parametrize(
    ("name", "file", "old", "new"),
    [
        (
            "crashes",
            "device/commands/run.py",
            "    trust = Trust.of_machine(",
            '    raise RuntimeError("broken")\n    trust = Trust.of_machine(',
        ),
        ("dawdles", "device/loop.py", STEP, STEP + '        __import__("time").sleep(0.4)\n'),
    ],
    ids=["crashes", "dawdles"],
)
def test_a_board_goes_back_by_itself_from_a_release_that(board: Twin, workshop: Workshop, name: str, file: str, old: str, new: str) -> None:
    before = present(board)["release"]
    good(board)
    since = now(board)
    bad = deliver(board, workshop.release(workshop.variant(name, {file: (old, new)})))
    begun_s = time.monotonic()
    board.sudo(f"{TOOL} activate {bad}")
    until(lambda: board.link("current") == before, f"{board.name} to go back", 1200.0)  # confirmation gives up after 900
    say(f"a release that {name}: given up after {time.monotonic() - begun_s:.0f} s")
    assert present(board)["release"] == before
    say(f"a release that {name}: the old one ticks after {time.monotonic() - begun_s:.0f} s")
    told = json.loads((board.root / "opt/copresence/rolled-back.json").read_text())
    assert (told["from"], told["to"]) == (bad, before)
    told = journal(board, since)
    assert "rolled_back" in told
    if name == "crashes":
        assert told.count("Starting copresence.service") == 5, "four starts are its budget; the fifth is the old one's"


def test_a_release_for_another_architecture_or_with_a_spoilt_signature_is_refused(board: Twin, workshop: Workshop) -> None:
    before = present(board)
    spoilt = workshop.release(REPOSITORY)
    *kept, last = (spoilt / "release.sig").read_bytes()
    (spoilt / "release.sig").write_bytes(bytes([*kept, last ^ 1]))  # not a 0: one signature in sixteen ends in that
    changed = workshop.release(REPOSITORY, extra="loop")
    (changed / "bundle" / "ticks.npz").unlink()
    (changed / "bundle" / "ticks.npz").write_bytes(b"another")
    for release, reason in (
        (workshop.release(REPOSITORY, machine="aarch64"), "is for aarch64 with Python 3.13, and this board is x86_64"),
        (workshop.release(REPOSITORY, python="3.12"), "is for x86_64 with Python 3.12, and this board is x86_64 with Python 3.13"),
        (spoilt, "does not fit the release.json beside it"),
        (changed, "ticks.npz: is not the file that was signed"),
    ):
        with pytest.raises(AssertionError, match=re.escape(reason)):
            deliver(board, release)
    assert board.link("current") == before["release"]
    assert present(board)["pid"] == before["pid"]


@at_length
def test_a_board_that_loses_power_in_a_flash_runs_the_old_or_the_new_release(board: Twin, workshop: Workshop) -> None:
    moments = random.Random(0)
    sources = [REPOSITORY, workshop.variant("other", {"device/__init__.py": ('"""', '"""Another: ')})]
    workshop.flashed(sources[1], HOST=board.name)  # its wheels are there from now on
    begun_s = time.monotonic()
    workshop.flashed(sources[0], HOST=board.name)
    whole_s, runs = time.monotonic() - begun_s, 0
    for k in range(10):
        old = present(board)["release"]
        good(board)
        flash = workshop.flash(sources[1 - runs], HOST=board.name)
        at_s = (k + moments.random()) / 10 * whole_s  # one in each tenth
        time.sleep(at_s)
        board.kill()
        flash.kill()
        said = flash.communicate()[0]
        board.start()
        status = present(board)
        reached = re.findall(r"TASK \[(.*?)\]", said)[-1:]
        which = "old" if status["release"] == old else "new"
        runs = runs if which == "old" else 1 - runs
        say(f"power cut {k + 1} after {at_s:.1f} of {whole_s:.1f} s, in {reached}: the {which} release runs")
        names = {path.parent.name for path in (board.root / "opt/copresence/releases").glob("*/release.json")}
        assert status["release"] in names
        assert board.sudo("find /opt/copresence -maxdepth 1 -name current -type l | wc -l").strip() == "1"
    workshop.flashed(REPOSITORY, HOST=board.name)


@at_length
def test_a_fleet_stops_at_the_board_that_refuses_and_goes_on_later(workshop: Workshop, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        twins = [stack.enter_context(running(f"twin-{k}", 10 + k)) for k in (1, 2, 3)]
        public, _ = keygen(tmp_path / "stranger.key")
        twins[1].write("etc/copresence/keys/stranger.pub", public.read_text())
        inventory = tmp_path / "fleet.ini"
        inventory.write_text("[boards]\n" + "".join(f"{twin.name}\n" for twin in twins))
        options = {"INVENTORY": str(inventory), "FLASH_OPTIONS": "-e wait_good=no"}
        status, said = finished(workshop.flash(**options))
        assert status != 0
        assert re.search(r"twin-2: Check it.*signed by the key", said, flags=re.DOTALL), said
        assert present(twins[0])["release"], "the canary runs it"
        assert twins[1].link("current") == twins[2].link("current") == "", "the one that refuses and those behind it were not touched"
        twins[1].sudo("rm /etc/copresence/keys/stranger.pub")
        begun_s = time.monotonic()
        said = workshop.flashed(**options)
        say(f"the rest of a fleet of three: {time.monotonic() - begun_s:.0f} s")
        assert "twin-1: already ran" in said and "twin-2: runs" in said and "twin-3: runs" in said
        assert {present(twin)["release"] for twin in twins} == {twins[0].link("current")}


@at_length
def test_a_fleet_stops_where_a_board_is_lost_on_the_way(workshop: Workshop, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        twins = [stack.enter_context(running(f"twin-{k}", 10 + k)) for k in (1, 2, 3)]
        inventory = tmp_path / "fleet.ini"
        inventory.write_text("[boards]\n" + "".join(f"{twin.name}\n" for twin in twins))
        flash = workshop.flash(REPOSITORY, """FLASH_OPTIONS=-e wait_good=no -e '{"batches":[2,1]}'""", INVENTORY=str(inventory))
        incoming = twins[1].root / "opt/copresence/incoming"
        until(lambda: incoming.exists() or flash.poll() is not None, "the release to be on its way", 300.0)
        on_its_way = flash.poll() is None
        twins[1].kill()
        status, said = finished(flash)
        assert on_its_way, said
        assert status != 0
        assert "twin-2 answered before and does not any more" in said, said
        assert present(twins[0])["release"], "the other one of its batch is finished"
        assert twins[2].link("current") == "", "and those behind it were not touched"


@at_length
def test_five_healthy_minutes_confirm_a_release(board: Twin) -> None:
    present(board)
    board.sudo("rm -f /opt/copresence/good; systemctl restart --no-block copresence copresence-confirm")
    present(board)
    begun_s = time.monotonic()
    until(lambda: board.link("good") == board.link("current"), "the board to confirm its release", 1000.0, 5.0)
    say(f"confirmed after {time.monotonic() - begun_s:.0f} s")
    told = len(board.sudo("journalctl --no-pager -o cat --since '4 minutes ago' -u 'copresence*'").encode())
    say(f"journal: {told * 15 / 1e6:.2f} MB an hour")
    assert told * 15 <= 2_000_000
