"""Frames on the wire between host and microcontroller: PROTOCOL.md, "Framing"."""

from __future__ import annotations

from binascii import crc_hqx
from typing import NamedTuple

SYNC = 0x7E
FRAME_MIN = 5  # length, sequence, two bytes of CRC, sync
FRAME_MAX = 64  # one USB full-speed packet, and a buffer that any microcontroller can spare
PAYLOAD_MAX = FRAME_MAX - FRAME_MIN
SEQUENCES = 16
_SEQUENCE_TAG = 0x10  # fixed high half of the sequence byte
_CRC_START = 0xFFFF


class Frame(NamedTuple):
    """One frame: `sequence` 0 … 15, `payload` of 0 … 59 bytes."""

    sequence: int
    payload: bytes


def encode(sequence: int, payload: bytes) -> bytes:
    """The frame as it goes over the wire; `sequence` counts modulo 16. A payload over 59 bytes raises ValueError."""
    if len(payload) > PAYLOAD_MAX:
        raise ValueError(f"a payload of {len(payload)} bytes does not fit into a frame; send it in parts of at most {PAYLOAD_MAX}")
    body = bytes((FRAME_MIN + len(payload), _SEQUENCE_TAG | sequence % SEQUENCES)) + payload
    return body + crc_hqx(body, _CRC_START).to_bytes(2, "big") + bytes((SYNC,))


class Decoder:
    """Finds the frames in a byte stream that may be cut, damaged or mixed with garbage anywhere.

    Every byte of the stream ends up in exactly one of three places: in one of the `frames` returned, in `bad_bytes`,
    or in `waiting` for the rest of its frame.
    """

    def __init__(self) -> None:
        self.frames = 0
        self.bad_bytes = 0
        self.crc_errors = 0  # complete frames whose checksum was wrong: a damaged line rather than garbage between frames
        self._buffer = bytearray()

    @property
    def waiting(self) -> int:
        """Bytes held back because they may be the beginning of a frame: at most 63."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Frame]:
        """Take the next bytes of the stream, however they were chopped; returns the frames that they complete, in order."""
        self._buffer += data
        found = []
        start = 0
        while (size := self._size_at(start)) is not None:
            if size:
                found.append(Frame(self._buffer[start + 1] % SEQUENCES, bytes(self._buffer[start + 2 : start + size - 3])))
                start += size
            else:  # no frame begins here: give up this one byte only, so that a frame behind garbage is not lost
                self.bad_bytes += 1
                start += 1
        del self._buffer[:start]
        self.frames += len(found)
        return found

    def flush(self) -> list[Frame]:
        """The line has gone quiet or ended: what waits is no frame. Returns the frames that were hidden behind it."""
        found: list[Frame] = []
        while self._buffer:
            del self._buffer[0]
            self.bad_bytes += 1
            found += self.feed(b"")
        return found

    def _size_at(self, start: int) -> int | None:
        """Size in bytes of the frame that begins at `start`; 0 if none does; None if more bytes are needed to tell."""
        have = len(self._buffer) - start
        if have == 0:
            return None
        size = self._buffer[start]
        if not FRAME_MIN <= size <= FRAME_MAX:
            return 0
        if have >= 2 and self._buffer[start + 1] & ~(SEQUENCES - 1) != _SEQUENCE_TAG:
            return 0
        if have < size:
            return None
        if self._buffer[start + size - 1] != SYNC:
            return 0
        # A frame followed by its own CRC, high byte first, has the CRC 0.
        if crc_hqx(self._buffer[start : start + size - 1], _CRC_START) != 0:
            self.crc_errors += 1
            return 0
        return size
