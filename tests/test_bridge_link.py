"""The host's half without a microcontroller: the window on a line that loses, the clock on uneven round trips, the flasher's tools."""

from __future__ import annotations

import json
import os
import random
import stat
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.distill.behaviours import ACTS as MODEL_ACTS
from firmware_bridge import flash as flasher
from firmware_bridge.bridge import Bridge, Identity
from firmware_bridge.cli import UsageError, main, parse_command
from firmware_bridge.clock import ClockSync
from firmware_bridge.dictionary import MOTIONS, Unreadable, dictionary_hash, pack, unpack
from firmware_bridge.flash import WAYS, FlashError, flash
from firmware_bridge.framing import SEQUENCES, Decoder, Frame, encode
from firmware_bridge.link import TIMEOUT_MAX_NS, TIMEOUT_MIN_NS, WAITING_MAX, LinkHealth, Window
from firmware_bridge.outputs import ACTS, SIGNALS
from firmware_bridge.port import PortError, find_port, open_port

MS = 1_000_000


# --- the window ---------------------------------------------------------------------------------------------------


class Receiver:
    """What PROTOCOL.md asks of the other side."""

    def __init__(self, expected: int = 0) -> None:
        self.expected, self.taken, self._decoder = expected, [], Decoder()

    def hear(self, frame: bytes) -> int:
        for found in self._decoder.feed(frame):
            if found.sequence == self.expected:
                self.expected = (self.expected + 1) % SEQUENCES
                self.taken.append(found.payload)
        return self.expected


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.floats(0, 0.5, allow_subnormal=False), st.integers(1, 12))
def test_every_payload_arrives_once_and_in_order_over_a_line_that_loses(seed: int, loss: float, limit: int) -> None:
    rng, window, receiver = random.Random(seed), Window(LinkHealth()), Receiver()
    window.adopting, window.limit = False, limit
    payloads = [bytes([i]) for i in range(40)]
    for payload in payloads:
        assert window.put(payload)
    for now_ms in count(0, 5):
        out = window.due(now_ms * MS)
        assert window.in_flight <= limit
        answers = [receiver.hear(frame) for frame in out if rng.random() >= loss]
        for answer in answers:
            if rng.random() >= loss:
                for frame in window.heard(answer, True, (now_ms + 2) * MS):
                    receiver.hear(frame)  # whose answers are lost
        if window.idle:
            break
        assert now_ms < 120_000
    assert receiver.taken == payloads


def test_the_sequence_of_the_other_side_is_taken_over_at_the_beginning_only() -> None:
    window, receiver = Window(LinkHealth()), Receiver(expected=11)
    window.put(b"who")
    (frame,) = window.due(0)
    (again,) = window.heard(receiver.hear(frame), True, MS)
    window.heard(receiver.hear(again), True, 2 * MS)
    assert receiver.taken == [b"who"] and window.idle
    window.adopting = False
    window.put(b"x")
    window.due(3 * MS)
    assert window.heard(5, True, 4 * MS) == [] and window.in_flight == 1


def test_the_time_out_follows_the_round_trips_and_doubles_when_nothing_comes() -> None:
    window = Window(LinkHealth())
    now = 0
    for i in range(30):
        window.put(b"x")
        window.due(now)
        now += 60 * MS
        window.heard((i + 1) % SEQUENCES, True, now)
    assert 60 * MS < window.timeout_ns < 100 * MS
    window.put(b"lost")
    window.due(now)
    waits = []
    for _ in range(4):
        waits.append(window.timeout_ns)
        now = window.deadline_ns()
        assert window.due(now - 1) == [] and len(window.due(now)) == 1
    assert waits[1] == 2 * waits[0] and max(waits) <= TIMEOUT_MAX_NS and min(waits) >= TIMEOUT_MIN_NS


def test_a_full_queue_drops_and_counts() -> None:
    health = LinkHealth()
    window = Window(health)
    assert [window.put(b"x") for _ in range(WAITING_MAX + 2)].count(False) == health.dropped == 2


def test_a_message_that_carries_an_old_number_causes_no_repetition() -> None:
    window = Window(LinkHealth())
    window.put(b"x")
    window.due(0)
    assert window.heard(0, False, 50 * MS) == [], "a tick that was under way says nothing about the frame"
    assert window.heard(0, True, 50 * MS) == [encode(0, b"x")], "an empty frame does"


# --- the clock ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ppm", [0.0, 43.0, -180.0])
def test_the_clock_is_found_through_round_trips_that_vary(ppm: float) -> None:
    rng, clock = random.Random(5), ClockSync()
    start_us = (1 << 32) - 20_000_000  # comes round soon

    def mcu(ns: float) -> int:
        return round(start_us + ns / 1000 * (1 + ppm / 1e6)) % (1 << 32)

    errors_us = []
    for i in range(200):
        sent = round(i * 983.9 * MS)
        there, back = (0.15 * MS + rng.expovariate(1 / (0.2 * MS)) for _ in range(2))
        if rng.random() < 0.1:
            back += rng.uniform(5, 80) * MS  # a scheduler's hiccup
        clock.add(sent, round(sent + there + back), mcu(sent + there))
        if i >= 60:
            probe = sent + 500 * MS
            errors_us.append(abs(clock.to_ns(mcu(probe)) - probe) / 1000)
            assert abs(clock.to_us(probe) - mcu(probe)) <= 500
    assert sorted(errors_us)[int(0.99 * len(errors_us))] < 200
    assert clock.ppm == pytest.approx(ppm, abs=8)
    assert clock.rejected > 5


# --- dictionary, acts, words of the command line ------------------------------------------------------------------


def test_every_act_of_the_model_has_its_row() -> None:
    assert set(ACTS) == set(MODEL_ACTS) - {"none"}
    assert {motion for motion in ACTS.values() if motion} <= set(MOTIONS)


def test_what_the_host_signals_by_itself_is_no_act_of_the_model() -> None:
    assert not set(SIGNALS) & set(ACTS)
    assert set(SIGNALS.values()) <= set(MOTIONS)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.binary(max_size=59))
def test_a_payload_is_a_message_or_unreadable(payload: bytes) -> None:
    try:
        name, values = unpack(payload)
    except Unreadable:
        return
    if name != "identity":  # which only the firmware makes
        assert pack(name, **values) == payload


def test_commands_are_written_with_names() -> None:
    name, values = parse_command(["act", "motion=nod", "at=50"])
    assert (name, values) == ("act", {"id": 0, "motion": list(MOTIONS).index("NOD"), "at": 50, "deadline": 230})
    for words, text in (
        (["dance"], "no command 'dance'; there are: identify,"),
        (["act"], "needs motion="),
        (["act", "motion=polka"], "nor one of REST, NOD"),
        (["trim", "hz=3"], "give: ppm="),
    ):
        with pytest.raises(UsageError, match=text):
            parse_command(words)


def test_a_port_that_is_not_there_is_named_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["identify", "--port", str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "none") in error and "connect the microcontroller" in error
    (tmp_path / "file").write_text("")
    with pytest.raises(PortError, match="check cable and name"):
        open_port(str(tmp_path / "file"))


def test_the_port_is_found_by_its_stable_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firmware_bridge.port.BY_ID", tmp_path)
    with pytest.raises(PortError, match="no serial port"):
        find_port()
    (tmp_path / "usb-FTDI_1").touch()
    assert find_port().endswith("usb-FTDI_1")
    (tmp_path / "usb-FTDI_2").touch()
    with pytest.raises(PortError, match=r"several .* name one"):
        find_port()
    (tmp_path / "usb-copresence_body").touch()
    assert find_port().endswith("copresence_body")


def test_nobody_at_the_other_end_is_one_clear_error(tmp_path: Path) -> None:
    ends = os.openpty()
    bridge = Bridge(os.ttyname(ends[1]))
    with pytest.raises(Exception, match=r"nobody answers .* powered"):
        bridge.start(patience_s=0.3)
    bridge.act("nod")
    bridge.heartbeat()
    assert bridge.dropped == 1, "counted, and nobody waited"
    for end in ends:
        os.close(end)


# --- the flasher, with tools that only pretend --------------------------------------------------------------------


def a_build(folder: Path, build: int = 7, dictionary: int | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "bridge.bin").write_bytes(b"\0" * 64)
    values = {"version": "0.1.0", "build": build, "dictionary": dictionary_hash() if dictionary is None else dictionary}
    (folder / "build.json").write_text(json.dumps(values))
    return folder


def identity(build: int) -> Identity:
    return Identity(dictionary_hash(), build, 0, "POWER", 8, 0)


class Chip:
    """Stands for what answers on the port: before, then after the flash."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, *answers: Identity | None) -> None:
        self.log, self.said, self._answers = folder / "log", [], list(answers)
        monkeypatch.setattr(flasher, "_running", lambda name: self._answers.pop(0))
        monkeypatch.setattr(flasher, "_enter_loader", lambda name: None)
        monkeypatch.setattr(flasher, "_usb_ids", lambda prefix: [])
        monkeypatch.setattr("time.sleep", lambda s: None)
        monkeypatch.setenv("PATH", str(folder / "bin"))
        (folder / "bin").mkdir()
        self._folder = folder

    def tool(self, program: str, status: int = 0) -> None:
        path = self._folder / "bin" / program
        path.write_text(f'#!/bin/sh\necho "$0 $*" >> {self.log}\necho no device\nexit {status}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def flash(self, folder: Path, by: str | None = None) -> None:
        flash(folder, "/dev/fake", by, self.said.append)


@pytest.mark.parametrize(
    ("by", "arguments"),
    [
        ("uart", "-v -g 0x08000000 -S 0x08000000 -b 115200 /dev/fake"),
        ("dfu", "-s 0x08000000:leave -D"),
        ("swd", "0x08000000 verify reset exit"),
    ],
)
def test_flash_writes_verifies_and_sees_the_new_build(by: str, arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chip = Chip(monkeypatch, tmp_path, identity(6), identity(7))
    chip.tool(WAYS[by].program)
    chip.flash(a_build(tmp_path / "fw"), by)
    called = chip.log.read_text()
    assert arguments in called and "bridge.bin" in called
    assert chip.said[-1] == "build 00000007 answers"


def test_flash_stops_when_the_same_build_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chip = Chip(monkeypatch, tmp_path, identity(7))
    chip.flash(a_build(tmp_path / "fw"))
    assert chip.said[-1] == "the same build: nothing to do"


@pytest.mark.parametrize("by", WAYS)
def test_a_tool_that_fails_names_the_likely_causes(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chip = Chip(monkeypatch, tmp_path, None)
    with pytest.raises(FlashError, match=f"install the package {WAYS[by].package}"):
        chip.flash(a_build(tmp_path / "fw"), by)
    chip._answers = [None]
    chip.tool(WAYS[by].program, status=1)
    with pytest.raises(FlashError, match=r"failed \(no device\); likely, in this order: .* Then: make flash-mcu"):
        chip.flash(tmp_path / "fw", by)


@pytest.mark.parametrize(
    ("after", "text"), [(None, "nobody answers.*BOOT0 is still held"), (identity(5), "build 00000005 answers and not")]
)
def test_flash_is_not_done_until_the_new_build_answers(
    after: Identity | None, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = Chip(monkeypatch, tmp_path, None, after)
    chip.tool("stm32flash")
    with pytest.raises(FlashError, match=text):
        chip.flash(a_build(tmp_path / "fw"))


def test_flash_refuses_what_it_would_not_talk_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chip = Chip(monkeypatch, tmp_path)
    with pytest.raises(FlashError, match=r"holds no firmware.*make firmware"):
        chip.flash(tmp_path)
    with pytest.raises(FlashError, match="another dictionary"):
        chip.flash(a_build(tmp_path / "fw", dictionary=1))


def test_flash_finds_what_is_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[str] = []
    monkeypatch.setattr(flasher, "_usb_ids", lambda prefix: [found for found in there if found.startswith(prefix)])
    assert flasher._detect("/dev/ttyUSB0") == "uart"
    with pytest.raises(FlashError, match="no microcontroller found"):
        flasher._detect(None)
    there.append("0483:374b")
    assert flasher._detect("/dev/ttyUSB0") == "swd"
    there.append("0483:df11")
    assert flasher._detect("/dev/ttyUSB0") == "dfu"


def test_a_frame_is_what_the_window_sends() -> None:
    window = Window(LinkHealth())
    window.put(b"\x01\x02")
    assert Decoder().feed(b"".join(window.due(0))) == [Frame(0, b"\x01\x02")]
