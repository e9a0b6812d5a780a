"""The frame codec on a line that chops, flips and inserts, and the program that reads a capture."""

from __future__ import annotations

import io
import re
import sys
from binascii import crc_hqx
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firmware_bridge import cli
from firmware_bridge.framing import FRAME_MAX, PAYLOAD_MAX, SEQUENCES, SYNC, Decoder, Frame, encode

# The same examples every run: a random search would in time find one of the false frames that 16 bits of CRC must let through.
repeatable = settings(derandomize=True, deadline=None, max_examples=300)

frames = st.builds(Frame, st.integers(0, SEQUENCES - 1), st.binary(max_size=PAYLOAD_MAX))
# Noise, runs of sync bytes, and frames cut off before their CRC.
garbage = st.one_of(
    st.binary(max_size=80),
    st.just(bytes([SYNC]) * 5),
    st.builds(lambda frame, keep: encode(*frame)[:-keep], frames, st.integers(3, 5)),
)
streams = st.lists(st.one_of(frames, garbage), max_size=12)
bits = st.integers(8, 8 * FRAME_MAX - 1)  # any bit after the length byte


def on_the_wire(stream: list[Frame | bytes]) -> bytes:
    return b"".join(encode(*part) if isinstance(part, Frame) else part for part in stream)


def decode(data: bytes, cuts: list[int] | None = None) -> tuple[list[Frame], Decoder]:
    """Everything in `data`, fed in the pieces that `cuts` make of it."""
    decoder, found, edges = Decoder(), [], sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts or [])})
    for start, end in pairwise(edges):
        found += decoder.feed(data[start:end])
        assert decoder.waiting < FRAME_MAX
    return found + decoder.flush(), decoder


@repeatable
@given(streams)
def test_every_whole_frame_is_found_whatever_lies_between(stream: list[Frame | bytes]) -> None:
    expected = [part for part in stream if isinstance(part, Frame)]
    found, decoder = decode(on_the_wire(stream))
    assert found == expected
    assert decoder.frames == len(expected)
    assert decoder.bad_bytes == sum(len(part) for part in stream if not isinstance(part, Frame))


@repeatable
@given(streams, st.lists(st.integers(0, 10_000), max_size=20))
def test_chopping_changes_nothing(stream: list[Frame | bytes], cuts: list[int]) -> None:
    data = on_the_wire(stream)
    (whole, at_once), (chopped, in_pieces) = decode(data), decode(data, cuts)
    assert chopped == whole
    assert vars(in_pieces) == vars(at_once)


@repeatable
@given(frames, frames, st.lists(bits, min_size=1, max_size=3, unique=True))
def test_up_to_three_flipped_bits_never_pass(damaged: Frame, good: Frame, flips: list[int]) -> None:
    data = bytearray(encode(*damaged))
    for bit in {8 + (flip - 8) % (8 * len(data) - 8) for flip in flips}:
        data[bit // 8] ^= 1 << bit % 8
    found, decoder = decode(bytes(data) + encode(*good))
    assert found == [good]
    assert decoder.bad_bytes == len(data)


@repeatable
@given(frames, frames, st.integers(1, 255))
def test_a_damaged_length_costs_that_frame_only(damaged: Frame, good: Frame, flip: int) -> None:
    data = bytearray(encode(*damaged))
    data[0] ^= flip
    found, _ = decode(bytes(data) + encode(*good))
    assert found == [good]


@repeatable
@given(st.binary(max_size=600), st.lists(st.integers(0, 600), max_size=6))
def test_every_byte_is_accounted_for(data: bytes, cuts: list[int]) -> None:
    found, decoder = decode(data, cuts)
    assert decoder.bad_bytes + sum(len(encode(*frame)) for frame in found) == len(data)


def test_damage_and_garbage_are_told_apart() -> None:
    data = bytearray(encode(1, b"nod"))
    data[3] ^= 0x04
    assert decode(bytes(data))[1].crc_errors == 1
    assert decode(b"\x00\xff" * 20)[1].crc_errors == 0


def test_flush_finds_the_frame_behind_a_false_beginning() -> None:
    decoder, frame = Decoder(), Frame(9, b"tick")
    assert decoder.feed(b"\x40\x10" + encode(*frame)) == []  # looks like the head of a frame of 64 bytes
    assert decoder.flush() == [frame]
    assert (decoder.frames, decoder.bad_bytes, decoder.waiting) == (1, 2, 0)


def test_a_payload_that_is_too_long_is_refused() -> None:
    assert len(encode(0, bytes(PAYLOAD_MAX))) == FRAME_MAX
    with pytest.raises(ValueError, match=r"60 bytes does not fit .* at most 59"):
        encode(0, bytes(PAYLOAD_MAX + 1))


def test_the_examples_of_the_specification_hold(repository: Path) -> None:
    assert crc_hqx(b"123456789", 0xFFFF) == 0x29B1  # the check value that the specification names
    text = (repository / "firmware_bridge" / "PROTOCOL.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `?([0-9a-f ]*?)`? *\| `([0-9a-f ]+)` \|$", text, flags=re.MULTILINE)
    assert len(rows) >= 3
    for sequence, payload, wire in rows:
        assert encode(int(sequence), bytes.fromhex(payload)).hex(" ") == wire


def test_decode_prints_frames_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture = tmp_path / "line.bin"
    capture.write_bytes(b"\x00" + encode(3, b"\x01\x02") + encode(4, b"")[:-2])
    assert cli.main(["decode", str(capture)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        " 3   2 bytes  01 02",
        "frames: 1, bytes outside of frames: 4, CRC errors: 0",
    ]


def test_decode_reads_standard_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    capture = tmp_path / "line.bin"
    capture.write_bytes(encode(15, b""))
    with capture.open("rb") as raw:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw))
        assert cli.main(["decode", "-"]) == 0
    assert capsys.readouterr().out.startswith("15   0 bytes\nframes: 1, bytes outside of frames: 0,")


@pytest.mark.parametrize(("name", "reason"), [("absent.bin", "No such file"), (".", "Is a directory")])
def test_decode_names_a_capture_that_cannot_be_read(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["decode", name]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert name in error
    assert reason in error
