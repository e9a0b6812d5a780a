"""The slots of releases: a good one is kept, a bad one given up, whatever a board does meanwhile; and systemd's units around them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from device.boot import slots
from device.realtime import PRIORITY

UNITS = ("copresence-engine.service", "copresence.service", "copresence-confirm.service", "copresence-rollback.service")


class Board:
    """A board's folders, and a systemctl that writes down what it is told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch, self.calls = folder, monkeypatch, folder / "calls"
        for name in ("opt", "state", "run", "bin"):
            (folder / name).mkdir()
        for name, path in (("ROOT", "opt"), ("STATE", "state"), ("STATUS", "run/status.json"), ("BOOT_ID", "boot_id")):
            monkeypatch.setattr(slots, name, folder / path)
        (folder / "bin" / "systemctl").write_text(f'#!/bin/sh\necho "$@" >> {self.calls}\n')
        (folder / "bin" / "systemctl").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        self.boot("first")

    def release(self, name: str, bundle_version: int = 1) -> str:
        bundle = self.folder / "opt" / "releases" / name / "bundle"
        bundle.mkdir(parents=True)
        (bundle / "manifest.json").write_text(json.dumps({"version": bundle_version}))
        return name

    def link(self, **links: str) -> None:
        for link, name in links.items():
            slots.point(link, slots.ROOT / "releases" / name)

    def boot(self, identifier: str) -> None:
        (self.folder / "boot_id").write_text(f"{identifier}\n")

    def status(self, release: str, **health: bool) -> None:
        values = {"at_ns": time.monotonic_ns(), "release": release, "health": health or {"ticks": True, "engine": True}}
        slots.STATUS.write_text(json.dumps(values))


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    return Board(tmp_path, monkeypatch)


class Seconds:
    """A clock that runs when somebody sleeps; `story` says what happens at which second."""

    def __init__(self, story: dict[int, Callable[[], None]], always: Callable[[], None] = lambda: None) -> None:
        self.now_s, self._story, self._always = 0.0, story, always

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self._story.get(round(self.now_s), self._always)()


def events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(re.sub(r"^<\d>", "", line)) for line in capsys.readouterr().out.splitlines()]


def test_five_healthy_minutes_make_a_release_good(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    board.link(current=board.release("2"), good=board.release("1"))
    slots.write(slots.ROOT / "rolled-back.json", {"from": "0", "to": "1"})
    clock = Seconds({}, lambda: board.status("2"))
    assert slots.confirm(clock, clock.sleep) == 0
    assert slots.name_of("good") == "2" and not (slots.ROOT / "rolled-back.json").exists()
    assert 300 <= clock.now_s <= 302
    assert [event["event"] for event in events(capsys)] == ["good"]


@pytest.mark.parametrize("sick", ["ticks", "microphone", "speaker", "engine"])
def test_what_is_not_well_breaks_the_five_minutes(board: Board, capsys: pytest.CaptureFixture[str], sick: str) -> None:
    board.link(current=board.release("2"), good=board.release("1"))
    clock = Seconds({299: lambda: board.status("2", other=True, **{sick: False})}, lambda: board.status("2"))
    assert slots.confirm(clock, clock.sleep) == 0
    assert 599 <= clock.now_s <= 602
    told = events(capsys)
    assert [event["event"] for event in told] == ["unhealthy", "good"] and sick in told[0]["reason"]


def test_who_is_never_healthy_for_long_enough_is_given_up(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    board.link(current=board.release("2"), good=board.release("1"))
    ill = {at: lambda: board.status("2", ticks=False) for at in range(0, 2000, 200)}
    clock = Seconds(ill, lambda: board.status("2"))
    assert slots.confirm(clock, clock.sleep) == 1
    assert slots.name_of("good") == "1" and clock.now_s == slots.PATIENCE_S
    last = events(capsys)[-1]
    assert (last["event"], last["reason"]) == ("not_confirmed", "not well: ticks")


def test_neither_a_stale_status_nor_that_of_another_release_counts(board: Board) -> None:
    assert slots.ailment("2") == "it does not run"
    board.status("1")
    assert "another release" in slots.ailment("2")
    board.status("2")
    assert slots.ailment("2") == ""
    old = json.loads(slots.STATUS.read_text())
    slots.STATUS.write_text(json.dumps({**old, "at_ns": old["at_ns"] - 6_000_000_000}))
    assert slots.ailment("2") == "it does not tick"
    slots.STATUS.write_text(json.dumps({**old, "health": {}}))
    assert slots.ailment("2") != "", "who says nothing of its health is not healthy"


def test_a_release_that_is_flashed_meanwhile_begins_its_own_five_minutes(board: Board) -> None:
    board.link(current=board.release("2"), good=board.release("1"))
    board.release("3")
    clock = Seconds({200: lambda: board.link(current="3")}, lambda: board.status(slots.name_of("current")))
    assert slots.confirm(clock, clock.sleep) == 0
    assert slots.name_of("good") == "3" and clock.now_s >= 500


def test_a_good_release_needs_no_confirmation(board: Board) -> None:
    board.link(current=board.release("1"), good="1")
    assert slots.confirm(Seconds({}), lambda seconds: pytest.fail("nothing to wait for")) == 0


def test_rollback_goes_back_and_starts(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    board.link(current=board.release("2"), good=board.release("1"))
    assert slots.rollback(lambda seconds: pytest.fail("it must not wait")) == 0
    assert (slots.name_of("current"), slots.name_of("good")) == ("1", "1")
    assert board.calls.read_text().splitlines() == [
        "reset-failed copresence-engine.service copresence.service",
        "restart --no-block copresence.service",
    ]
    note = json.loads((slots.ROOT / "rolled-back.json").read_text())
    assert (note["from"], note["to"]) == ("2", "1") and note["reason"]
    assert events(capsys)[0]["event"] == "rolled_back"


def test_the_way_back_to_an_older_bundle_is_open(board: Board) -> None:
    """Otherwise the good release would be refused as a downgrade, and the board would have none that runs."""
    board.link(current=board.release("2", bundle_version=7), good=board.release("1", bundle_version=5))
    memory = slots.STATE / "bundle-version"
    memory.write_text("7\n")
    slots.rollback(lambda seconds: None)
    assert memory.read_text() == "5\n"
    board.link(current=board.release("3", bundle_version=9))
    slots.rollback(lambda seconds: None)
    assert memory.read_text() == "5\n", "and it never rises by that"


@pytest.mark.parametrize("good", [None, "1", "gone"])
def test_with_nothing_to_go_back_to_it_tries_again_later(board: Board, capsys: pytest.CaptureFixture[str], good: str | None) -> None:
    board.link(current=board.release("1"))
    if good:
        board.link(good=good)
    waited: list[float] = []
    slots.rollback(waited.append)
    assert waited == [slots.RETRY_S] and slots.name_of("current") == "1"
    assert "restart --no-block copresence.service" in board.calls.read_text()
    assert events(capsys)[0]["event"] == "nothing_to_go_back_to"


def test_a_release_that_takes_the_board_down_is_given_up_after_three_boots(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    board.link(current=board.release("2"), good=board.release("1"))
    for number in range(3):
        board.boot(f"boot {number}")
        for _ in range(4):  # restarts within a boot count once
            assert slots.trial() == 0
        assert slots.name_of("current") == "2"
    board.boot("boot 3")
    assert slots.trial() == 0
    assert slots.name_of("current") == "1"
    assert [event["event"] for event in events(capsys)] == ["trial"] * 3 + ["rolled_back"]
    board.link(current=board.release("4"))
    slots.trial()
    assert slots.name_of("current") == "4", "the next one has three boots of its own"


def test_a_trial_with_nothing_to_go_back_to_goes_on(board: Board) -> None:
    board.link(current=board.release("1"))
    for number in range(9):
        board.boot(f"boot {number}")
        assert slots.trial() == 0
    assert slots.name_of("current") == "1"


def test_slots_that_cannot_be_written_stop_nobody(
    board: Board, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    board.link(current=board.release("2"), good=board.release("1"))

    def read_only(link: str, target: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(slots, "point", read_only)
    clock = Seconds({}, lambda: board.status("2"))
    assert slots.confirm(clock, clock.sleep) == 0, "a healthy companion goes on, unconfirmed"
    assert slots.rollback(lambda seconds: None) == 0
    assert "restart --no-block copresence.service" in board.calls.read_text()
    assert [event["event"] for event in events(capsys)] == ["not_kept", "rollback_failed", "nothing_to_go_back_to"]
    for number in range(9):
        board.boot(f"boot {number}")
        slots.main(["trial"])


def test_a_file_is_replaced_whole_or_not_at_all(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    path = slots.ROOT / "trial.json"
    slots.write(path, {"boots": 1})
    assert path.stat().st_mode & 0o777 == 0o644

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slots.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        slots.write(path, {"boots": 2})
    assert json.loads(path.read_text()) == {"boots": 1}
    assert [found.name for found in slots.ROOT.iterdir()] == ["trial.json"]


def test_slots_run_on_the_systems_own_python(repository: Path) -> None:
    """Whatever becomes of a release: no package of ours, none but the standard library."""
    python = shutil.which("python3", path="/usr/bin") or pytest.skip("no /usr/bin/python3 here")
    script = repository / "device" / "boot" / "slots.py"
    done = subprocess.run([python, "-I", script, "--help"], check=True, capture_output=True, text=True, cwd="/")
    assert "rollback" in done.stdout


# --- systemd's units ----------------------------------------------------------------------------------------------


def unit(repository: Path, name: str) -> dict[str, str]:
    lines = (repository / "device" / "boot" / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def test_the_main_unit_asks_for_what_the_loop_needs(repository: Path) -> None:
    found = unit(repository, "copresence.service")
    assert (found["Type"], found["User"], found["NotifyAccess"]) == ("notify", "copresence", "main")
    assert (found["LimitRTPRIO"], found["LimitMEMLOCK"]) == (str(PRIORITY), "infinity")
    assert "RestrictRealtime" not in found and "MemoryDenyWriteExecute" not in found
    assert found["RestrictAddressFamilies"] == "AF_UNIX AF_NETLINK", "no port can be opened"
    assert int(found["WatchdogSec"]) > 1 and int(found["StartLimitBurst"]) > 1


def test_nothing_but_the_units_own_chain_is_needed_at_boot(repository: Path) -> None:
    """Headless: no login, no display, no network."""
    for name in UNITS:
        text = (repository / "device" / "boot" / name).read_text()
        assert not re.search(r"network|graphical|display|user@|getty", re.sub(r"PrivateNetwork|NETLINK", "", text)), name
    assert unit(repository, "copresence.service")["WantedBy"] == "multi-user.target"


def test_who_fails_leads_to_the_rollback(repository: Path) -> None:
    for name in UNITS[:3]:
        assert unit(repository, name)["OnFailure"] == "copresence-rollback.service"
    assert unit(repository, "copresence-rollback.service")["StartLimitIntervalSec"] == "0"


needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@needs_systemd
def test_the_main_units_exposure_is_at_most_4(repository: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(repository / "device" / "boot" / "copresence.service")]
    done = subprocess.run(command, capture_output=True, text=True)
    exposure = re.search(r"exposure level for copresence.service: ([\d.]+)", done.stdout)
    assert exposure, done.stdout + done.stderr
    assert float(exposure[1]) <= 4.0


@needs_systemd
def test_the_page_says_of_everything_that_is_open_why_it_is(repository: Path) -> None:
    boot = repository / "device" / "boot"
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(boot / "copresence.service")]
    listing = subprocess.run(command, capture_output=True, text=True).stdout
    still_open = set(re.findall(r"^✗ (\w+)=", listing, re.MULTILINE))
    table = (boot / "README.md").read_text().partition("## What is not tightened")[2]
    assert still_open
    assert {option for option in still_open if f"`{option}" not in table} == set()


@needs_systemd
def test_systemd_finds_no_fault_in_the_units(repository: Path) -> None:
    command = ["systemd-analyze", "verify", *(str(repository / "device" / "boot" / name) for name in UNITS)]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    # The release is not installed here, and systemd before 254 knows no steps of back-off.
    allowed = r"Command /opt/copresence/.* is not executable|Unknown key '(RestartSteps|RestartMaxDelaySec|RestartMode)'"
    assert [line for line in said.splitlines() if "copresence" in line and not re.search(allowed, line)] == []
