"""The host's end of the bridge: one thread that keeps the link, and calls that never wait for it."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from firmware_bridge.clock import ClockSync
from firmware_bridge.dictionary import (
    LIMITS,
    MOTIONS,
    REVISION,
    SETTINGS,
    Unreadable,
    dictionary_hash,
    name_of,
    pack,
    settings_crc,
    table,
    unpack,
    unpacked,
    value_of,
)
from firmware_bridge.framing import SEQUENCES, Decoder
from firmware_bridge.link import LinkHealth, Window
from firmware_bridge.outputs import MOTION_OF
from firmware_bridge.port import PortError, forget, open_port

ACT_LEAD_NS = 30_000_000  # from the choice to the motion: a lost frame is sent again and still comes in time
ACT_LATE_NS = 200_000_000  # a tick later the moment is over
ASK_AFTER_NS = 100_000_000  # an act whose report is missing so long after its time is asked for
LOST_AFTER_NS = 3_000_000_000  # and counted as lost after so long
ANSWER_NS = 150_000_000  # an answer that has not come by then was lost; it is asked for again
ANSWER_TRIES = 16  # a pty of QEMU, or a board that starts, may be deaf for more than a second
SILENCE_NS = 1_200_000_000  # six ticks without a frame: nobody is there any more
TIMEOUTS_MAX = 6
CLOCK_FIRST, CLOCK_TRIES = 8, 100  # round trips for a first estimate, and how often they are asked for: most are lost on a bad line
CLOCK_PERIOD_NS = 983_900_000  # not a divisor of anything else's period, so that it meets all of their phases
HEALTH_PERIOD_NS = 5_000_000_000
AMPLIFIER_PERIOD_NS = LIMITS["AMPLIFIER_US"][0] * 1000 // 4
BACKOFF_NS = (50_000_000, 100_000_000, 200_000_000, 400_000_000)  # the last one again and again
COMMANDS_MAX = 64
EVENTS_MAX = 256
FLUSH_NS = 50_000_000  # a line that is quiet for so long has ended its frame


class BridgeError(Exception):
    """The bridge cannot work; the text ends with the remedy."""


class NoAnswer(BridgeError):
    """Nobody answers on the port. Remedy: cable, power, port, firmware."""


class BadLine(BridgeError):
    """Answers come, but hardly one in the first place. Remedy: ground, cable, baud rate."""


class WrongDictionary(BridgeError):
    """Host and firmware do not speak the same dictionary. Remedy: flash the side that the text names."""


class LinkLost(Exception):
    """What was there is gone; the thread connects again."""


class Identity(NamedTuple):
    """Who answered."""

    dictionary: int
    build: int
    settings: int
    reset: str
    window: int
    packed_bytes: int


class McuTick(NamedTuple):
    """An edge of the microcontroller's tick; what a clock master steers by."""

    number: int
    at_us: int
    edge_ns: int  # CLOCK_MONOTONIC


@dataclass
class _Act:
    name: str
    at_ns: int
    asked_ns: int = 0


class Bridge:
    """A body behind a serial port.

    `act`, `heartbeat` and `trim` may be called from the loop: they put a command into a queue of fixed size and return. The
    microcontroller is armed with the first heartbeat of a session, and again when it was started anew; when it has
    latched its safe state in the middle of a session, it stays there until `arm` is called.
    """

    def __init__(
        self, port: str, settings: dict[str, int] | None = None, on_message: Callable[[str, dict[str, Any]], None] | None = None
    ) -> None:
        self.port = port
        self.health, self.clock = LinkHealth(), ClockSync()
        self.identity: Identity | None = None
        self.state = ""  # name in STATE; empty while nobody is there
        self.tick: McuTick | None = None
        self.mcu_health: dict[str, int] = {}
        self.fault: BridgeError | None = None  # why there is no link, if it is not just a lost one
        self._settings = {name: (settings or {}).get(name, values[0]) for name, values in SETTINGS.items()}
        self._on_message = on_message
        self._commands: deque[tuple[str, dict[str, int]]] = deque()
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_MAX)
        self._connected, self._stop = threading.Event(), threading.Event()
        self._wake_out, self._wake_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._may_arm = True  # the next heartbeat may
        self._next_id = int.from_bytes(os.urandom(2), "little")  # not those of a session before
        self._acts: dict[int, _Act] = {}
        self._beat_ns = 0  # of the heartbeat that waits to be sent; 0: none
        self._thread = threading.Thread(target=self._run, name="bridge", daemon=True)
        self._serial: Any = None
        self._new_session()

    # --- calls from other threads ---

    def start(self, patience_s: float = 5.0) -> None:
        """Connect, and return when commands are taken; raises BridgeError or PortError."""
        self._serial = open_port(self.port)
        self._thread.start()
        deadline = time.monotonic() + patience_s
        while not self._connected.wait(0.02):
            hopeless = self.fault is not None and not isinstance(self.fault, NoAnswer)
            if hopeless or time.monotonic() > deadline:
                fault = self.fault
                self.close()
                raise fault or NoAnswer(_no_answer(self.port))

    def close(self) -> None:
        self._stop.set()
        if self._wake_in >= 0:
            self._wake()
        if self._thread.is_alive():
            self._thread.join(2.0)
        if self._wake_in >= 0 and not self._thread.is_alive():
            for end in (self._wake_in, self._wake_out):
                os.close(end)
            self._wake_in = self._wake_out = -1

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    @property
    def backlog(self) -> int:
        """Commands that have not been sent yet."""
        return len(self._commands) + self._window.waiting

    @property
    def dropped(self) -> int:
        """Acts that did not move anything, and commands that nobody could take."""
        return self.health.dropped + self.health.acts_failed + self.health.acts_lost

    def act(self, name: str, at_ns: int | None = None) -> None:
        """Begin the motion of act `name` at `at_ns` of CLOCK_MONOTONIC, or as soon as is safe; unknown acts are dropped and counted."""
        motion = MOTION_OF.get(name, "")
        if motion is None:
            return
        if not motion or not self.connected:
            self.health.dropped += 1
            return
        at_ns = time.monotonic_ns() + ACT_LEAD_NS if at_ns is None else at_ns
        self._command("move", motion=list(MOTIONS).index(motion), at_ns=at_ns)

    def heartbeat(self) -> None:
        """The loop has completed a tick, now."""
        if self.connected:
            self._beat_ns = time.monotonic_ns()  # the newest one counts; those that could not go out are forgotten
            self._wake()

    def arm(self) -> None:
        """Take the microcontroller out of its safe state, with the next heartbeat."""
        self._may_arm = True

    def trim(self, ppm: int) -> None:
        """Make the microcontroller's tick longer by `ppm`."""
        self._command("trim", ppm=ppm)

    def send(self, name: str, **values: int) -> None:
        """Any command of the dictionary; raises ValueError for one that does not fit it."""
        pack(name, **values)
        self._command(name, **values)

    def take_events(self) -> list[dict[str, Any]]:
        """What happened since the last call: links lost and found, states, acts that failed."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def _command(self, name: str, **values: int) -> None:
        if len(self._commands) >= COMMANDS_MAX:
            self.health.dropped += 1
            return
        self._commands.append((name, values))
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it has been woken already
            os.write(self._wake_in, b"\0")

    # --- the thread: sessions, one after the other ---

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            failures = 0 if self._one_session() else failures + 1
            self._stop.wait(BACKOFF_NS[min(failures, len(BACKOFF_NS) - 1)] / 1e9)
        self._close_port()

    def _one_session(self) -> bool:
        """True if there was one."""
        try:
            if self._serial is None:
                self._serial = open_port(self.port)
            self._connect()
            while not self._stop.is_set():
                self._serve()
        except (LinkLost, BridgeError, OSError) as error:
            was_connected = self.connected
            self._disconnect(error)
            return was_connected
        return True

    def _new_session(self) -> None:
        self._decoder, self._window = Decoder(), Window(self.health)
        self._timeouts = self.health.timeouts
        self._answers: deque[tuple[str, dict[str, Any], int]] = deque(maxlen=16)
        self._clock_asked: tuple[int, int, int] | None = None  # token, when, and the count of frames sent again
        self._heard_ns = self._byte_ns = time.monotonic_ns()
        self._next_clock_ns = self._next_health_ns = self._next_amplifier_ns = 0
        self._seen_decoder = (0, 0)

    def _connect(self) -> None:
        self._new_session()
        self.clock = ClockSync()
        forget(self._serial)
        self._beat_ns = 0
        self.identity = self._identify()
        if self.identity.dictionary != dictionary_hash():
            raise WrongDictionary(_mismatch(self.identity, self._read_dictionary(self.identity.packed_bytes)))
        self._window.adopting, self._window.limit = False, self.identity.window
        self._configure(self.identity.settings)
        for _ in range(CLOCK_TRIES):
            self._ask_clock()
            self._ask("get_state", "state")  # and with it the time's answer
            if self.clock.samples >= CLOCK_FIRST:
                break
        else:
            raise BadLine(
                f"{self.port}: {CLOCK_TRIES} questions, and hardly one answer to the first asking; check ground, cable and baud rate"
            )
        self.fault = None
        self.health.connects += 1
        self._connected.set()
        self._event("bridge_up", build=f"{self.identity.build:08x}", reset=self.identity.reset, state=self.state)

    def _disconnect(self, error: Exception) -> None:
        was_connected = self._connected.is_set()
        self._connected.clear()
        self.state = ""
        if isinstance(error, BridgeError):
            self.fault = error
        self.health.dropped += len(self._commands)
        self._commands.clear()
        for identifier in list(self._acts):
            self._lose(identifier, "the link was lost")
        if was_connected:
            self._event("bridge_down", reason=str(error))
        if not isinstance(error, LinkLost):  # a microcontroller that started anew is behind the same port
            self._close_port()

    def _close_port(self) -> None:
        if self._serial is not None:
            self._serial.close()
            self._serial = None

    def _identify(self, offset: int = 0) -> Identity:
        values = self._ask("identify", "identity", offset=offset)
        return Identity(
            values["dictionary"],
            values["build"],
            values["settings"],
            name_of("RESET", values["reset"]),
            max(1, min(values["window"], SEQUENCES // 2)),
            values["total"],
        )

    def _read_dictionary(self, total: int) -> dict[str, Any]:
        """What the firmware carries; empty if it cannot be read."""
        data = b""
        while len(data) < total:
            values = self._ask("identify", "identity", offset=len(data))
            if values["offset"] == len(data):
                data += values["data"]
                if not values["data"]:
                    break
        try:
            return unpacked(data)
        except Unreadable:
            return {}

    def _configure(self, crc: int) -> None:
        if crc == settings_crc(self._settings):
            return
        self._ask("disarm", "state")
        for number, value in enumerate(self._settings.values()):
            self._window.put(pack("set", setting=number, value=value))
        if self._ask("get_settings", "settings")["crc"] != settings_crc(self._settings):
            raise BridgeError("the microcontroller refused a setting; give values within the ranges of PROTOCOL.md, 'Settings'")

    def _ask(self, name: str, answer: str, **values: int) -> dict[str, Any]:
        """Send a question until its answer comes; raises NoAnswer."""
        for _ in range(ANSWER_TRIES):
            self._answers.clear()
            if self._window.in_flight + 1 < 4:
                self._window.put(pack(name, **values))
            until_ns = time.monotonic_ns() + ANSWER_NS
            while time.monotonic_ns() < until_ns:
                self._pump(until_ns)
                for found, content, _ in self._answers:
                    if found == answer:
                        return content
                if self._stop.is_set():
                    raise LinkLost("closed")
        raise NoAnswer(_no_answer(self.port))

    # --- the thread: one round ---

    def _serve(self) -> None:
        now_ns = time.monotonic_ns()
        self._take_commands()
        self._ask_what_is_due(now_ns)
        self._pump(now_ns + 20_000_000)
        now_ns = time.monotonic_ns()
        if now_ns - self._heard_ns > SILENCE_NS:
            raise LinkLost(f"nothing heard for {SILENCE_NS / 1e9:.1f} s")
        if self.health.timeouts - self._timeouts > TIMEOUTS_MAX:
            raise LinkLost("the microcontroller talks but does not listen")

    def _take_commands(self) -> None:
        while self._commands:
            name, values = self._commands.popleft()
            if name == "move":
                self._send_act(values["motion"], values["at_ns"])
            else:
                self._window.put(pack(name, **values))
        beat_ns = self._beat_ns
        if beat_ns and self._window.has_room:
            self._beat_ns = 0
            if self._may_arm and self.state in ("WAITING", "SAFE"):
                self._window.put(pack("arm"))
                self._may_arm = False
            self._window.put(pack("heartbeat", at=self.clock.to_us(beat_ns)))

    def _send_act(self, motion: int, at_ns: int) -> None:
        self._next_id = (self._next_id + 1) % 65536
        at, deadline = self.clock.to_us(at_ns), self.clock.to_us(at_ns + ACT_LATE_NS)
        if self._window.put(pack("act", id=self._next_id, motion=motion, at=at, deadline=deadline)):
            self._acts[self._next_id] = _Act(list(MOTIONS)[motion], at_ns)

    def _ask_what_is_due(self, now_ns: int) -> None:
        for identifier, act in list(self._acts.items()):
            if now_ns > act.at_ns + LOST_AFTER_NS:
                self._lose(identifier, "no answer")
            elif now_ns > max(act.at_ns, act.asked_ns) + ASK_AFTER_NS:
                act.asked_ns = now_ns
                self._window.put(pack("ask_act", id=identifier))
        if now_ns >= self._next_clock_ns and self._window.idle:
            self._ask_clock()
            self._next_clock_ns = now_ns + CLOCK_PERIOD_NS
        if now_ns >= self._next_health_ns:
            self._window.put(pack("get_health"))
            self._next_health_ns = now_ns + HEALTH_PERIOD_NS
        if now_ns >= self._next_amplifier_ns:
            if self._next_amplifier_ns and self.state == "ARMED":
                self._window.put(pack("amplifier", on=1))
            self._next_amplifier_ns = now_ns + AMPLIFIER_PERIOD_NS

    def _ask_clock(self) -> None:
        token = (self._clock_asked[0] + 1) % 65536 if self._clock_asked else 0
        self._clock_asked = (token, time.monotonic_ns(), self.health.resent)
        self._window.put(pack("get_clock", token=token))
        self._write(self._window.due(time.monotonic_ns()))

    def _pump(self, until_ns: int) -> None:
        """Write what is due, then wait for bytes, a command, a time-out or `until_ns`, and take what came."""
        now_ns = time.monotonic_ns()
        self._write(self._window.due(now_ns))
        if self._window.in_flight:
            until_ns = min(until_ns, self._window.deadline_ns())
        ready, _, _ = select.select([self._serial.fileno(), self._wake_out], [], [], max(0, until_ns - now_ns) / 1e9)
        now_ns = time.monotonic_ns()
        if self._wake_out in ready:
            os.read(self._wake_out, 4096)
        frames = []
        if self._serial.fileno() in ready:
            data = os.read(self._serial.fileno(), 4096)
            if not data:
                raise PortError(f"{self.port} is gone; check the cable")
            frames = self._decoder.feed(data)
            self._byte_ns = now_ns
        elif self._decoder.waiting and now_ns - self._byte_ns > FLUSH_NS:
            frames = self._decoder.flush()
        for frame in frames:
            self._heard_ns = now_ns
            self._write(self._window.heard(frame.sequence, not frame.payload, now_ns))
            if self._window.in_flight == 0:
                self._timeouts = self.health.timeouts
            if frame.payload:
                self._take(frame.payload, now_ns)
        self._count_damage()

    def _write(self, frames: list[bytes]) -> None:
        data = b"".join(frames)
        with contextlib.suppress(BlockingIOError):  # the line is full; what is lost here is sent again
            while data:
                data = data[os.write(self._serial.fileno(), data) :]

    def _count_damage(self) -> None:
        seen = (self._decoder.bad_bytes, self._decoder.crc_errors)
        self.health.bad_bytes += seen[0] - self._seen_decoder[0]
        self.health.crc_errors += seen[1] - self._seen_decoder[1]
        self._seen_decoder = seen

    def _take(self, payload: bytes, now_ns: int) -> None:
        try:
            name, values = unpack(payload)
        except Unreadable:
            self.health.unreadable += 1
            return
        self._answers.append((name, values, now_ns))
        if self._on_message is not None:
            self._on_message(name, values)
        if name == "clock":
            self._take_clock(values, now_ns)
        elif name == "tick":
            self._take_tick(values)
        elif name == "state":
            self._take_state(name_of("STATE", values["state"]), name_of("CAUSE", values["cause"]))
        elif name == "acted":
            self._take_acted(values["id"], name_of("RESULT", values["result"]), values["at"])
        elif name == "pose" and self.connected and self.state == "ARMED":
            pose = {axis: values[axis] for axis in values if axis != "at"}
            self._event("bridge_pose", at_ns=self.clock.to_ns(values["at"]), **pose)
        elif name == "health":
            self.mcu_health = values
        elif name == "refused":
            self.health.dropped += 1
            self._event("bridge_refused", message=values["message"])

    def _take_clock(self, values: dict[str, int], now_ns: int) -> None:
        if self._clock_asked is None or self._clock_asked[0] != values["token"] or self._clock_asked[2] != self.health.resent:
            return
        self.clock.add(self._clock_asked[1], now_ns, values["at"])

    def _take_tick(self, values: dict[str, int]) -> None:
        if self.connected:
            if self.tick is not None and values["number"] < self.tick.number:
                self.tick = None
                raise LinkLost("the microcontroller started anew")
            self.tick = McuTick(values["number"], values["at"], self.clock.to_ns(values["at"]))

    def _take_state(self, state: str, cause: str) -> None:
        if self.connected and state == "WAITING" and cause == "RESET" and self.state != "WAITING":
            raise LinkLost("the microcontroller started anew")
        if state == "WAITING":
            self._may_arm = True
        if self.connected and state != self.state:
            self._event("bridge_state", state=state, cause=cause)
        self.state = state

    def _take_acted(self, identifier: int, result: str, at_us: int) -> None:
        if result == "PENDING" or identifier not in self._acts:
            return
        act = self._acts.pop(identifier)
        if result == "STARTED":
            self.health.acts_started += 1
            at_ns = self.clock.to_ns(at_us)
            self._event("bridge_act", motion=act.name, at_ns=at_ns, late_ms=round((at_ns - act.at_ns) / 1e6, 3))
        else:
            self.health.acts_failed += 1
            self._event("bridge_act", motion=act.name, failed=result)

    def _lose(self, identifier: int, reason: str) -> None:
        self.health.acts_lost += 1
        self._event("bridge_act", motion=self._acts.pop(identifier).name, failed=reason)

    def _event(self, event: str, **values: Any) -> None:
        self._events.append({"event": event, **values})


def _no_answer(port: str) -> str:
    return (
        f"nobody answers on {port}; in this order: is the board powered, is it the right port, are both data wires and ground connected "
        "(out to in, in to out), does it run this firmware (make flash-mcu)?"
    )


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


__all__ = ["BadLine", "Bridge", "BridgeError", "Identity", "McuTick", "NoAnswer", "PortError", "WrongDictionary", "value_of"]
