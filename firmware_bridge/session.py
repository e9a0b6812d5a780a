"""One session on the line: bytes in and out, questions until their answers come, and what is settled before the first command."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from firmware_bridge.dictionary import (
    REVISION,
    Unreadable,
    dictionary_hash,
    name_of,
    pack,
    settings_crc,
    table,
    unpack,
    unpacked,
)
from firmware_bridge.errors import BridgeError, LinkLost, NoAnswer, WrongDictionary
from firmware_bridge.framing import SEQUENCES, Decoder
from firmware_bridge.health import LinkHealth
from firmware_bridge.link import Window
from firmware_bridge.port import PortError, forget

ANSWER_NS = 150_000_000  # an answer that has not come by then was lost; it is asked for again
ANSWER_TRIES = 16  # a pty of QEMU, or a board that starts, may be deaf for more than a second
QUESTIONS_MAX = 4  # in flight; more would only stand in line
SILENCE_NS = 1_200_000_000  # six ticks without a frame: nobody is there any more
TIMEOUTS_MAX = 6
FLUSH_NS = 50_000_000  # a line that is quiet for so long has ended its frame


class Identity(NamedTuple):
    """Who answered."""

    dictionary: int
    build: int
    settings: int
    reset: str
    window: int
    packed_bytes: int


class Session:
    """From the first question to the loss of the link; belongs to the bridge's thread."""

    def __init__(
        self, port: Any, wake: int, stop: threading.Event, health: LinkHealth, take: Callable[[str, dict[str, Any], int], None]
    ) -> None:
        """`port` as of open_port; `wake` is readable when a command waits; `take` gets name, values and time (ns) of every message."""
        self.window = Window(health)
        self._port, self._wake, self._stop, self._health, self._take = port, wake, stop, health, take
        self._decoder = Decoder()
        self._answers: deque[tuple[str, dict[str, Any]]] = deque(maxlen=16)
        self._heard_ns = self._byte_ns = time.monotonic_ns()
        self._timeouts = health.timeouts
        self._seen_damage = (0, 0)
        forget(port)

    # --- what comes before the first command ---

    def identify(self, offset: int = 0) -> Identity:
        values = self.ask("identify", "identity", offset=offset)
        return Identity(
            values["dictionary"],
            values["build"],
            values["settings"],
            name_of("RESET", values["reset"]),
            max(1, min(values["window"], SEQUENCES // 2)),
            values["total"],
        )

    def agree(self, identity: Identity) -> None:
        """From here on both sides speak the same dictionary; raises WrongDictionary."""
        if identity.dictionary != dictionary_hash():
            raise WrongDictionary(_mismatch(identity, self._read_dictionary(identity.packed_bytes)))
        self.window.adopting, self.window.limit = False, identity.window

    def configure(self, settings: dict[str, int], crc: int) -> None:
        """Bring all SETTINGS over, if `crc` says that they are not there yet; raises BridgeError."""
        if crc == settings_crc(settings):
            return
        self.ask("disarm", "state")
        for number, value in enumerate(settings.values()):
            self.window.put(pack("set", setting=number, value=value))
        if self.ask("get_settings", "settings")["crc"] != settings_crc(settings):
            raise BridgeError("the microcontroller refused a setting; give values within the ranges of PROTOCOL.md, 'Settings'")

    def ask(self, name: str, answer: str, **values: int) -> dict[str, Any]:
        """Send a question until its answer comes; raises NoAnswer."""
        for _ in range(ANSWER_TRIES):
            self._answers.clear()
            if self.window.in_flight + 1 < QUESTIONS_MAX:
                self.window.put(pack(name, **values))
            until_ns = time.monotonic_ns() + ANSWER_NS
            while time.monotonic_ns() < until_ns:
                self.pump(until_ns)
                for found, content in self._answers:
                    if found == answer:
                        return content
                if self._stop.is_set():
                    raise LinkLost("closed")
        raise NoAnswer(self._port.port)

    def _read_dictionary(self, total: int) -> dict[str, Any]:
        """What the firmware carries; empty if it cannot be read."""
        data = b""
        while len(data) < total:
            values = self.ask("identify", "identity", offset=len(data))
            if values["offset"] == len(data):
                data += values["data"]
                if not values["data"]:
                    break
        try:
            return unpacked(data)
        except Unreadable:
            return {}

    # --- bytes ---

    def pump(self, until_ns: int) -> None:
        """Write what is due, then wait for bytes, a command, a time-out or `until_ns`, and take what came."""
        now_ns = time.monotonic_ns()
        self.write(self.window.due(now_ns))
        if self.window.in_flight:
            until_ns = min(until_ns, self.window.deadline_ns())
        ready, _, _ = select.select([self._port.fileno(), self._wake], [], [], max(0, until_ns - now_ns) / 1e9)
        now_ns = time.monotonic_ns()
        if self._wake in ready:
            os.read(self._wake, 4096)
        frames = []
        if self._port.fileno() in ready:
            data = os.read(self._port.fileno(), 4096)
            if not data:
                raise PortError(f"{self._port.port} is gone; check the cable")
            frames = self._decoder.feed(data)
            self._byte_ns = now_ns
        elif self._decoder.waiting and now_ns - self._byte_ns > FLUSH_NS:
            frames = self._decoder.flush()
        for frame in frames:
            self._heard_ns = now_ns
            self.write(self.window.heard(frame.sequence, not frame.payload, now_ns))
            if self.window.in_flight == 0:
                self._timeouts = self._health.timeouts
            if frame.payload:
                self._read(frame.payload, now_ns)
        self._count_damage()

    def write(self, frames: list[bytes]) -> None:
        data = b"".join(frames)
        with contextlib.suppress(BlockingIOError):  # the line is full; what is lost here is sent again
            while data:
                data = data[os.write(self._port.fileno(), data) :]

    def require_life(self) -> None:
        """Raises LinkLost when nobody seems to be there any more."""
        if time.monotonic_ns() - self._heard_ns > SILENCE_NS:
            raise LinkLost(f"nothing heard for {SILENCE_NS / 1e9:.1f} s")
        if self._health.timeouts - self._timeouts > TIMEOUTS_MAX:
            raise LinkLost("the microcontroller talks but does not listen")

    def _read(self, payload: bytes, now_ns: int) -> None:
        try:
            name, values = unpack(payload)
        except Unreadable:
            self._health.unreadable += 1
            return
        self._answers.append((name, values))
        self._take(name, values, now_ns)

    def _count_damage(self) -> None:
        seen = (self._decoder.bad_bytes, self._decoder.crc_errors)
        self._health.bad_bytes += seen[0] - self._seen_damage[0]
        self._health.crc_errors += seen[1] - self._seen_damage[1]
        self._seen_damage = seen


def _mismatch(identity: Identity, theirs: dict[str, Any]) -> str:
    revision, ours = theirs.get("revision", 0), table()
    differing = [name for name in {**ours, **theirs} if name != "version" and ours.get(name) != theirs.get(name)]
    messages = theirs.get("messages", {})
    detail = [name for name in {**ours["messages"], **messages} if ours["messages"].get(name) != messages.get(name)]
    side = "update copresence on the host" if revision > REVISION else "flash the microcontroller: make flash-mcu"
    return (
        f"the firmware ({theirs.get('version', 'unknown version')}, dictionary {identity.dictionary:08x}, revision {revision}) and this "
        f"copresence (dictionary {dictionary_hash():08x}, revision {REVISION}) differ in {', '.join(detail or differing)}; {side}"
    )
