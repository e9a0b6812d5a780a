"""The firmware's protocol core and motion in simulated time, on this machine: the same C files that the chip runs."""

from __future__ import annotations

import ctypes
import random
import re
import struct
import subprocess
from collections import deque
from itertools import pairwise
from pathlib import Path

import pytest
from bridge_tools import SOAK, Core, built
from hypothesis import given, settings
from hypothesis import strategies as st

from firmware_bridge.dictionary import (
    AXES,
    LIMITS,
    MESSAGES,
    MOTIONS,
    NUMBERS,
    SETTINGS,
    dictionary_hash,
    name_of,
    pack,
    settings_crc,
    unpack,
    unpacked,
    value_of,
    with_tables,
)
from firmware_bridge.framing import FRAME_MAX, SEQUENCES, Decoder, encode
from firmware_bridge.health import LinkHealth
from firmware_bridge.link import Window

MS, S = 1000, 1_000_000
FUZZED_FRAMES = 1_000_000 if SOAK else 100_000


@pytest.fixture
def core() -> Core:
    return Core()


def armed(core: Core) -> Core:
    core.send("arm")
    core.take()
    return core


def act(core: Core, identifier: int, in_us: int, late_us: int = 200 * MS, motion: str = "NOD") -> None:
    at = core.now_us + in_us
    core.send("act", id=identifier, motion=list(MOTIONS).index(motion), at=at, deadline=at + late_us)


def results(core: Core) -> list[tuple[int, str, int]]:
    return [(v["id"], name_of("RESULT", v["result"]), v["at"]) for _, v in core.take("acted")]


def test_the_document_shows_the_dictionary(repository: Path) -> None:
    page = (repository / "firmware_bridge" / "PROTOCOL.md").read_text(encoding="utf-8")
    assert page == with_tables(page), "renew it: python -m firmware_bridge.dictionary firmware_bridge/PROTOCOL.md"


def test_one_needless_repetition_breeds_no_other() -> None:
    """The host's window and the firmware's core on a whole line; the next question goes out as soon as the last is answered."""
    core, health = Core(), LinkHealth()
    window, answers, asked = Window(health), deque[tuple[int, bytes]](), 0
    window.adopting = False

    def write(frames: list[bytes]) -> None:
        core.raw(b"".join(frames))
        answers.extend(core.take_frames())

    window.put(pack("get_state"))
    write(window.due(0) * 2)  # as after a time-out that came too early
    while answers:
        sequence, payload = answers.popleft()
        write(window.heard(sequence, not payload, 0))
        if window.idle and asked < 100:
            window.put(pack("get_clock", token=asked))
            asked += 1
            write(window.due(0))
    assert asked == 100 and window.idle
    assert health.refusals == health.resent == 0


def test_identify_tells_everything_that_the_host_checks() -> None:
    core = Core(reset=value_of("RESET", "BROWN_OUT"))
    first = core.ask("identify", "identity", offset=0)
    assert first["dictionary"] == dictionary_hash()
    assert first["window"] == LIMITS["WINDOW"][0]
    assert name_of("RESET", first["reset"]) == "BROWN_OUT"
    assert first["settings"] == settings_crc({name: values[0] for name, values in SETTINGS.items()})
    data = first["data"]
    while len(data) < first["total"]:
        data += core.ask("identify", "identity", offset=len(data))["data"]
    carried = unpacked(data)
    assert list(carried["messages"])[:2] == ["identify", "identity"] and carried["version"]


def test_a_frame_is_taken_once_and_in_order(core: Core) -> None:
    armed(core)
    frame = encode(core.sequence, pack("amplifier", on=1))
    ahead = encode(core.sequence + 1, pack("disarm"))
    core.raw(ahead)
    assert core.take_frames() == [(core.sequence, b"")], "the one after the next is refused, and the next one named"
    core.raw(frame)
    core.raw(frame)  # as a host does that did not hear the answer
    after = (core.sequence + 1) % 16
    (first, again) = core.take_frames()
    assert first == (after, b"") and again[0] == after and unpack(again[1])[0] == "state", "acknowledged again, and nothing refused"
    core.sequence = after
    assert core.ask("get_health", "health")["out_of_order"] == 2
    assert name_of("STATE", core.ask("get_state", "state")["state"]) == "ARMED"


def test_what_is_no_command_is_refused_by_name(core: Core) -> None:
    for payload in (
        b"\xff",
        b"\x00",
        pack("act", id=0, motion=0, at=0, deadline=0)[:-1],
        pack("trim", ppm=2000),
        pack("state", at=0, state=0, cause=0),
    ):
        core.raw(encode(core.sequence, payload))
        core.sequence = (core.sequence + 1) % 16
        assert core.take("refused") == [("refused", {"message": payload[0]})]


def test_without_heartbeat_it_latches_its_safe_state(core: Core) -> None:
    armed(core)
    core.advance(10 * MS)
    act(core, 1, 5 * S, motion="LOOK_UP")
    assert core.outputs.amplifier
    core.advance(980 * MS)
    core.send("heartbeat", at=core.now_us)
    core.advance(999 * MS)
    assert not core.take("state"), "one heartbeat, one more second"
    core.advance(3 * MS)
    ((_, state),) = core.take("state")
    assert (name_of("STATE", state["state"]), name_of("CAUSE", state["cause"])) == ("SAFE", "HEARTBEAT")
    assert not core.outputs.amplifier
    core.advance(3 * S)
    assert tuple(core.outputs.servo_us) == (1500, 1500)
    core.send("heartbeat", at=core.now_us)
    act(core, 2, 0)
    assert results(core) == [(2, "REFUSED", core.now_us)], "a heartbeat does not end it"
    reds = set()
    for _ in range(40):
        core.advance(100 * MS)
        reds.add(core.outputs.light_permille[0])
    assert min(reds) < 300 and max(reds) == 1000, "amber pulse"
    core.take()
    core.send("arm")
    act(core, 3, 0)
    core.advance(2 * MS)
    assert [result for _, result, _ in results(core)] == ["STARTED"]


def test_acts_that_wait_are_refused_when_it_becomes_unsafe(core: Core) -> None:
    armed(core)
    act(core, 9, 5 * S)
    core.advance(1100 * MS)
    assert [(identifier, result) for identifier, result, _ in results(core)] == [(9, "REFUSED")]


def test_a_heartbeat_that_was_held_up_keeps_nothing_alive(core: Core) -> None:
    armed(core)
    old = core.now_us
    core.advance(900 * MS)
    core.send("heartbeat", at=old)
    core.advance(200 * MS)
    assert name_of("STATE", core.ask("get_state", "state")["state"]) == "SAFE"
    core.advance(500 * MS)
    core.send("heartbeat", at=old)
    assert core.ask("get_health", "health")["heartbeats_stale"] == 1


@pytest.mark.parametrize("start_us", [0, (1 << 32) - 700 * MS])
def test_acts_begin_at_their_time_and_in_the_order_of_their_times(start_us: int) -> None:
    core = armed(Core(start_us=start_us))
    begin = core.now_us
    for identifier, in_ms in ((1, 800), (2, 20), (3, 500), (4, 500)):
        act(core, identifier, in_ms * MS)
    assert core.ask("ask_act", "acted", id=3)["result"] == value_of("RESULT", "PENDING")
    core.advance(900 * MS)
    seen = results(core)
    assert [(identifier, result) for identifier, result, _ in seen] == [(2, "STARTED"), (3, "STARTED"), (4, "STARTED"), (1, "STARTED")]
    assert [(at - begin) % (1 << 32) // MS for _, _, at in seen] == [20, 500, 500, 800]
    assert core.ask("ask_act", "acted", id=2)["result"] == value_of("RESULT", "STARTED"), "told again to whoever asks"
    assert core.ask("ask_act", "acted", id=77)["result"] == value_of("RESULT", "UNKNOWN")


def test_an_act_past_its_deadline_is_dropped_and_counted(core: Core) -> None:
    armed(core)
    core.advance(500 * MS)
    act(core, 1, -300 * MS, late_us=200 * MS)
    act(core, 2, -100 * MS, late_us=200 * MS)  # late, but not too late
    act(core, 3, 60 * S)
    core.advance(1 * MS)
    assert [(identifier, result) for identifier, result, _ in results(core)] == [(1, "STALE"), (3, "EARLY"), (2, "STARTED")]
    act(core, 4, 10 * MS, late_us=20 * MS)
    core.advance(50 * MS, step_us=50 * MS)  # the program was held up
    assert [(identifier, result) for identifier, result, _ in results(core)] == [(4, "STALE")]
    assert core.ask("get_health", "health")["acts_stale"] == 2


def test_too_many_acts_are_refused_one_by_one(core: Core) -> None:
    armed(core)
    limit = LIMITS["ACTS_MAX"][0]
    for identifier in range(limit + 2):
        act(core, identifier, 500 * MS)
    assert [(identifier, result) for identifier, result, _ in results(core)] == [(limit, "FULL"), (limit + 1, "FULL")]


def test_the_board_is_reset_three_times_an_hour_at_most(core: Core) -> None:
    core.advance(100 * S, step_us=100 * MS)
    assert not core.outputs.board_reset, "there never was a host"
    core.send("heartbeat", at=core.now_us)
    edges, was, start = [], False, core.now_us
    for _ in range(2 * 3600 * 20):
        core.advance(50 * MS, step_us=50 * MS)
        if core.outputs.board_reset and not was:
            edges.append((core.now_us - start) / S)
        was = core.outputs.board_reset
        core.take_frames()
    assert edges[:3] == pytest.approx([30, 150, 270], abs=0.2)
    assert all(b - a >= 3600 for a, b in zip(edges, edges[3:], strict=False)) and len(edges) == 6


def test_the_board_is_left_alone_when_the_settings_say_so(core: Core) -> None:
    core.send("set", setting=list(SETTINGS).index("BOARD_RESET"), value=0)
    core.send("heartbeat", at=core.now_us)
    core.advance(60 * S, step_us=100 * MS)
    assert core.ask("get_health", "health")["board_resets"] == 0


def test_settings_are_checked_and_fixed_while_armed(core: Core) -> None:
    values = {name: default for name, (default, *_) in SETTINGS.items()} | {"TILT_ZERO_US": 1600}
    core.send("set", setting=list(SETTINGS).index("TILT_ZERO_US"), value=1600)
    assert core.ask("get_settings", "settings")["crc"] == settings_crc(values)
    core.advance(1 * MS)
    assert core.outputs.servo_us[1] == 1600
    core.take()
    core.send("set", setting=0, value=100)
    core.send("arm")
    core.send("set", setting=0, value=1400)
    assert len(core.take("refused")) == 2
    assert core.ask("get_settings", "settings")["crc"] == settings_crc(values)


def configure(core: Core, **values: int) -> None:
    for name, value in values.items():
        core.send("set", setting=list(SETTINGS).index(name), value=value)


def pan_and_tilt(core: Core, ms: int) -> list[tuple[int, int]]:
    """Set-points as they are reported while so much time passes."""
    poses = []
    for _ in range(ms // 10):
        core.advance(10 * MS)
        core.send("heartbeat", at=core.now_us)
        poses += [(values["pan"], values["tilt"]) for _, values in core.take("pose")]
    return poses


def test_a_body_has_its_own_limits_and_its_own_rest(core: Core) -> None:
    configure(core, PAN_HIGH=2000, PAN_SPEED=1000, TILT_REST=-900, TILT_LOW=-1500)
    assert pan_and_tilt(core, 1000)[-1] == (0, -900), "it goes to its rest at once"
    assert core.outputs.servo_us[1] == 1400
    armed(core)
    act(core, 1, 0, motion="LOOK_LEFT")
    poses = pan_and_tilt(core, 3000)
    assert poses[-1] == (2000, 0) and max(pan for pan, _ in poses) == 2000
    assert max(b - a for (a, _), (b, _) in pairwise(poses)) <= 1000 * 0.07, "10°/s, reported every 50 ms and a little"
    act(core, 2, 0, motion="LOOK_DOWN")
    assert pan_and_tilt(core, 3000)[-1] == (0, -1500)
    core.advance(1100 * MS)
    assert name_of("STATE", core.ask("get_state", "state")["state"]) == "SAFE"
    core.advance(1 * S)
    assert core.outputs.servo_us[1] == 1400, "and in the safe state"


def test_ends_that_are_narrowed_are_gone_back_to_without_a_jump(core: Core) -> None:
    armed(core)
    act(core, 1, 0, motion="LOOK_LEFT")
    assert pan_and_tilt(core, 1500)[-1] == (4500, 0)
    core.send("disarm")
    configure(core, PAN_HIGH=1000, PAN_REST=1999)
    poses = pan_and_tilt(core, 2000)
    assert poses[-1] == (1000, 0), "a rest beyond the end is the end"
    assert max(abs(b - a) for (a, _), (b, _) in pairwise(poses)) <= AXES["PAN"].speed * 0.07


@pytest.mark.parametrize("ppm", [0, 200, -200, 7])
def test_the_tick_follows_its_trim_without_drift(core: Core, ppm: int) -> None:
    core.send("trim", ppm=ppm)
    periods = [core.lib.core_edge(0) for _ in range(5000)]
    assert abs(sum(periods) - 5000 * 200_000 * (1 + ppm / 1e6)) <= 1
    assert max(periods) - min(periods) <= 1


def test_the_amplifier_does_not_stay_on_for_ever(core: Core) -> None:
    armed(core)
    for _ in range(650 * 2):
        core.advance(500 * MS, step_us=50 * MS)
        core.send("heartbeat", at=core.now_us)
        core.take_frames()
    assert not core.outputs.amplifier
    assert core.ask("get_health", "health")["on_time_cuts"] == 1
    core.send("amplifier", on=1)
    core.advance(1 * MS)
    assert core.outputs.amplifier


# --- motion -------------------------------------------------------------------------------------------------------


class Motion:
    """struct motion, read through its first member: hold, sway, position, speed, on_ms of every axis."""

    def __init__(self) -> None:
        self.lib, self.memory = ctypes.CDLL(str(built("core.so"))), ctypes.create_string_buffer(4096)
        self.lib.motion_init(self.memory)

    def start(self, name: str) -> None:
        self.lib.motion_start(self.memory, list(MOTIONS).index(name))

    def step(self) -> list[float]:
        """Positions after the next millisecond."""
        self.lib.motion_step(self.memory)
        return [struct.unpack_from("<4fI", self.memory.raw, 20 * axis)[2] for axis in range(len(AXES))]


def trace(motion: Motion, ms: int) -> list[list[float]]:
    return [motion.step() for _ in range(ms)]


@pytest.mark.parametrize("name", MOTIONS)
def test_every_motion_keeps_the_limits_and_comes_to_its_end(name: str) -> None:
    motion = Motion()
    path = trace(motion, 5)
    motion.start(name)
    path += trace(motion, 2500)
    for i, (axis, limit) in enumerate(AXES.items()):
        at = [positions[i] for positions in path]
        speed = [(b - a) * 1000 for a, b in pairwise(at)]
        change = [(b - a) * 1000 for a, b in pairwise(speed)]
        assert limit.low <= min(at) and max(at) <= limit.high
        assert max(map(abs, speed)) <= limit.speed * 1.01
        assert max(map(abs, change)) <= limit.acceleration * 2.1 + 1500, "twice at a turning point's last step, and rounding"
        held = [value for _, a, how, value in MOTIONS[name] if a == axis and how == "HOLD"]
        assert at[-1] == (held[-1] if held else limit.rest)
        swayed = [value for _, a, how, value in MOTIONS[name] if a == axis and how == "SWAY" and value]
        if swayed:
            assert min(at) < 0.5 * min(swayed) < 0 < 0.5 * max(swayed) < max(at), "it can be seen"


def test_a_nod_is_added_to_a_look(core: Core) -> None:
    motion = Motion()
    motion.start("LOOK_UP")
    up = trace(motion, 1000)[-1][1]
    motion.start("LIGHT_ON")
    motion.start("NOD")
    nod = [positions[1] for positions in trace(motion, 1500)]
    assert up == 2500 and min(nod) < 1900 and nod[-1] == 2500
    assert trace(motion, 1)[-1][2:] == [900, 700, 450], "the light went its own way"


def test_an_output_goes_to_rest_after_its_longest_time() -> None:
    motion = Motion()
    motion.start("LOOK_LEFT")
    assert trace(motion, AXES["PAN"].on_max_s * 1000 - 100)[-1][0] == 4500
    assert trace(motion, 2000)[-1][0] == 0


# --- damaged frames -----------------------------------------------------------------------------------------------


class CFrame(ctypes.Structure):
    _fields_ = (("sequence", ctypes.c_uint8), ("size", ctypes.c_uint8), ("payload", ctypes.c_uint8 * 59))


class CDecoder(ctypes.Structure):
    _fields_ = (
        ("have", ctypes.c_uint8),
        ("buffer", ctypes.c_uint8 * FRAME_MAX),
        ("frames", ctypes.c_uint32),
        ("bad_bytes", ctypes.c_uint32),
        ("crc_errors", ctypes.c_uint32),
    )


pieces = st.one_of(st.binary(max_size=80), st.builds(encode, st.integers(0, 15), st.binary(max_size=59)), st.just(b"\x40\x10"))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(pieces, max_size=10).map(b"".join))
def test_both_parsers_make_the_same_of_every_stream(data: bytes) -> None:
    lib = ctypes.CDLL(str(built_once()))
    lib.decoder_next.restype = ctypes.c_bool
    c, frame, python, found = CDecoder(), CFrame(), Decoder(), []
    for byte in data:
        lib.decoder_put(ctypes.byref(c), byte)
        while lib.decoder_next(ctypes.byref(c), ctypes.byref(frame)):
            found.append((frame.sequence, bytes(frame.payload[: frame.size])))
    assert found == [tuple(f) for f in python.feed(data)]
    assert (c.have, c.frames, c.bad_bytes, c.crc_errors) == (python.waiting, python.frames, python.bad_bytes, python.crc_errors)


_BUILT: list[Path] = []


def built_once() -> Path:
    if not _BUILT:
        _BUILT.append(built("core.so"))
    return _BUILT[0]


def test_the_c_parser_takes_damaged_frames_as_rarely_as_the_crc_allows() -> None:
    """Under ASan and UBSan, and through the whole core."""
    done = subprocess.run([built("fuzz"), str(FUZZED_FRAMES), "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    frames, wrong_crc, accepted, expected = map(float, re.findall(r"[\d.]+", done.stdout))
    assert frames == FUZZED_FRAMES and wrong_crc > frames / 10, "most damage leaves nothing but the CRC to tell"
    assert accepted <= 4 * expected + 6, "a Poisson variable with the mean that 16 bits allow"


CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())


def test_what_libfuzzer_kept_is_survived_again() -> None:
    """Under ASan and UBSan; `make fuzz-firmware` looks for more."""
    done = subprocess.run([built("fuzz"), *CORPUS], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{len(CORPUS)} inputs\n"), done.stderr


def test_the_corpus_gets_past_the_crc_to_every_command() -> None:
    taken: set[str] = set()
    for path in CORPUS:
        expected = 0
        for sequence, payload in Decoder().feed(path.read_bytes()[1:]):
            if sequence == expected:
                expected = (expected + 1) % SEQUENCES
                taken |= {name for name, number in NUMBERS.items() if payload[:1] == bytes([number])}
    assert taken >= {name for name, message in MESSAGES.items() if message.sender == "host"}


def test_the_host_parser_takes_damaged_frames_as_rarely_as_the_crc_allows() -> None:
    rng, decoder, wrong = random.Random(2), Decoder(), 0
    for _ in range(FUZZED_FRAMES // 10 if not SOAK else FUZZED_FRAMES):
        good = (rng.randrange(16), rng.randbytes(rng.randrange(60)))
        data = bytearray(encode(*good))
        for _ in range(rng.randint(1, 4)):
            at, kind = rng.randrange(len(data)), rng.randrange(4)
            if kind == 0:
                for _ in range(4):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data.insert(at, rng.randrange(256))
            elif kind == 2 and len(data) > 6:
                del data[at]
            else:
                data[2:-1] = rng.randbytes(len(data) - 3)
        wrong += sum(tuple(frame) != good for frame in decoder.feed(bytes(data)) + decoder.flush())
    print(f"{wrong} wrong ones accepted, {decoder.crc_errors / 65535:.1f} expected")
    assert decoder.crc_errors > 1000
    assert wrong <= 4 * decoder.crc_errors / 65535 + 6
