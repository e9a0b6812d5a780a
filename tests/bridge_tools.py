"""What the bridge's tests share: the firmware's builds, its core on this machine, and a line between host and QEMU that can be spoilt."""

from __future__ import annotations

import ctypes
import os
import random
import select
import subprocess
import sys
import threading
import time
import tty
from pathlib import Path
from typing import Any

from firmware_bridge.dictionary import pack, unpack
from firmware_bridge.framing import SEQUENCES, Decoder, encode

REPOSITORY = Path(__file__).resolve().parents[1]
OUT = REPOSITORY / "build" / "firmware"
SOAK = bool(os.environ.get("COPRESENCE_SOAK"))


def built(name: str, out: Path = OUT) -> Path:
    """The firmware's product `name`, up to date."""
    folder = REPOSITORY / "firmware_bridge" / "firmware"
    command = ["make", "--no-print-directory", "-C", str(folder), f"OUT={out}", f"PYTHON={sys.executable}", str(out / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / name


class Outputs(ctypes.Structure):
    _fields_ = (
        ("servo_us", ctypes.c_uint16 * 2),
        ("light_permille", ctypes.c_uint16 * 3),
        ("amplifier", ctypes.c_bool),
        ("board_reset", ctypes.c_bool),
    )


class Core:
    """The firmware's core in simulated time; one at a time, as in the chip."""

    def __init__(self, reset: int = 0, start_us: int = 0) -> None:
        self.lib = ctypes.CDLL(str(built("core.so")))
        self.lib.core_outputs.restype = ctypes.POINTER(Outputs)
        self.lib.core_edge.restype = ctypes.c_uint32
        self.now_us, self.sequence, self.decoder = start_us, 0, Decoder()
        self.lib.core_init(self._now(), reset)
        self.take()

    def _now(self) -> ctypes.c_uint32:
        return ctypes.c_uint32(self.now_us % (1 << 32))

    @property
    def outputs(self) -> Outputs:
        return self.lib.core_outputs().contents

    def raw(self, data: bytes) -> None:
        for byte in data:
            self.lib.core_receive(byte, self._now())

    def send(self, name: str, **values: int) -> None:
        wrapped = {k: v % (1 << 32) if k in ("at", "deadline") else v for k, v in values.items()}
        self.raw(encode(self.sequence, pack(name, **wrapped)))
        self.sequence = (self.sequence + 1) % SEQUENCES

    def advance(self, us: int, step_us: int = 1000) -> None:
        for _ in range(us // step_us):
            self.now_us += step_us
            self.lib.core_step(self._now())

    def take_frames(self) -> list[tuple[int, bytes]]:
        byte, data = ctypes.c_uint8(), bytearray()
        self.lib.core_transmit.restype = ctypes.c_bool
        while self.lib.core_transmit(ctypes.byref(byte)):
            data.append(byte.value)
        return [(frame.sequence, frame.payload) for frame in self.decoder.feed(bytes(data))]

    def take(self, only: str | None = None) -> list[tuple[str, dict[str, Any]]]:
        """What it said since the last call, empty frames left out."""
        messages = [unpack(payload) for _, payload in self.take_frames() if payload]
        return [message for message in messages if only in (None, message[0])]

    def ask(self, name: str, answer: str, **values: int) -> dict[str, Any]:
        self.take()
        self.send(name, **values)
        return self.take(answer)[0][1]


class Line:
    """A pty for the host in front of QEMU's, with a thread that carries the bytes, hears all of them, and spoils some."""

    def __init__(self, far: Path, near: Path, seed: int = 0) -> None:
        self.rate = 0.0
        self.heard: list[tuple[int, bytes]] = []  # from the microcontroller: when, what
        self._random = random.Random(seed)
        self._far = os.open(far, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        tty.setraw(self._far)
        self._near, self._slave = os.openpty()
        tty.setraw(self._slave)
        os.set_blocking(self._near, False)
        near.unlink(missing_ok=True)
        near.symlink_to(os.ttyname(self._slave))
        self.port = str(near)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        to = {self._far: self._near, self._near: self._far}
        while not self._stop.is_set():
            for end in select.select(list(to), [], [], 0.05)[0]:
                data = os.read(end, 4096)
                if end == self._far:
                    self.heard.append((time.monotonic_ns(), data))
                self._send(to[end], self._spoilt(data) if self.rate else [data])

    def _send(self, end: int, pieces: list[bytes]) -> None:
        for i, piece in enumerate(pieces):
            if i:
                time.sleep(self._random.uniform(0, 0.004))  # chopped and delayed
            try:
                os.write(end, piece)
            except BlockingIOError:
                return  # nobody reads: the line does not remember

    def _spoilt(self, data: bytes) -> list[bytes]:
        pieces = [bytearray()]
        for byte in data:
            if self._random.random() >= self.rate:
                pieces[-1].append(byte)
                continue
            fault = self._random.randrange(5)
            if fault == 0:
                continue  # dropped
            pieces[-1].append(byte ^ 1 << self._random.randrange(8) if fault == 1 else byte)
            if fault == 2:
                pieces[-1].append(self._random.randrange(256))
            elif fault == 3:
                pieces[-1].append(byte)
            elif fault == 4:
                pieces.append(bytearray())
        return [bytes(piece) for piece in pieces]

    def messages(self) -> list[tuple[int, str, dict[str, Any]]]:
        """What the microcontroller has said so far: (when it came, name, values)."""
        decoder = Decoder()
        return [(at, *unpack(frame.payload)) for at, data in self.heard for frame in decoder.feed(data) if frame.payload]

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for end in (self._far, self._near, self._slave):
            os.close(end)
