"""The host's end of the bridge: one thread that keeps the link, and calls that never wait for it.

Elsewhere: a session on the line (session.py), acts under way (acts.py), the microcontroller's clock (clock.py), counters (health.py).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from firmware_bridge.acts import ACT_LEAD_NS, Acts
from firmware_bridge.clock import ClockSync, RoundTrips
from firmware_bridge.dictionary import LIMITS, MOTIONS, SETTINGS, name_of, pack
from firmware_bridge.errors import BadLine, BridgeError, LinkLost, NoAnswer
from firmware_bridge.health import LinkHealth
from firmware_bridge.outputs import MOTION_OF
from firmware_bridge.port import open_port
from firmware_bridge.session import Identity, Session

CLOCK_FIRST, CLOCK_TRIES = 8, 100  # round trips for a first estimate, and how often they are asked for: most are lost on a bad line
CLOCK_PERIOD_NS = 983_900_000  # not a divisor of anything else's period, so that it meets all of their phases
HEALTH_PERIOD_NS = 5_000_000_000
AMPLIFIER_PERIOD_NS = LIMITS["AMPLIFIER_US"][0] * 1000 // 4
BACKOFF_NS = (50_000_000, 100_000_000, 200_000_000, 400_000_000)  # the last one again and again
COMMANDS_MAX = 64
EVENTS_MAX = 256


class McuTick(NamedTuple):
    """An edge of the microcontroller's tick; what a clock master steers by."""

    number: int
    at_us: int
    edge_ns: int  # CLOCK_MONOTONIC


class Bridge:
    """A body behind a serial port.

    `act`, `heartbeat` and `trim` may be called from the loop: they put a command into a queue of fixed size and return. The
    microcontroller is armed with the first heartbeat of a session, and again when it was started anew; when it has
    latched its safe state in the middle of a session, it stays there until `arm` is called.

    `settings` are the body's, as read_body gives them; those not named are the defaults. With None whatever settings are there stay.
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
        self._settings = None if settings is None else {name: settings.get(name, values[0]) for name, values in SETTINGS.items()}
        self._on_message = on_message
        self._commands: deque[tuple[str, dict[str, int]]] = deque()
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_MAX)
        self._connected, self._stop = threading.Event(), threading.Event()
        self._wake_out, self._wake_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._may_arm = True  # the next heartbeat may
        self._ticking = False  # whether `tick` is one of this session
        self._acts = Acts(int.from_bytes(os.urandom(2), "little"), self.health, self._event)  # ids that are not those of a session before
        self._beat_ns = 0  # of the heartbeat that waits to be sent; 0: none
        self._thread = threading.Thread(target=self._run, name="bridge", daemon=True)
        self._serial: Any = None
        self._session: Session | None = None
        self._trips = RoundTrips(self.clock, self.health)
        self._next_clock_ns = self._next_health_ns = self._next_amplifier_ns = 0
        self._takers: dict[str, Callable[[dict[str, Any]], None]] = {
            "tick": self._take_tick,
            "state": self._take_state,
            "acted": lambda values: self._acts.take(values, self.clock),
            "pose": self._take_pose,
            "health": self._take_health,
            "refused": self._take_refused,
        }

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
                raise fault or NoAnswer(self.port)

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
        session = self._session
        return len(self._commands) + (session.window.waiting if session else 0)

    @property
    def dropped(self) -> int:
        """Acts that did not move anything, and commands that nobody could take."""
        return self.health.in_vain

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
            session = self._connect()
            while not self._stop.is_set():
                self._serve(session)
        except (LinkLost, BridgeError, OSError) as error:
            was_connected = self.connected
            self._disconnect(error)
            return was_connected
        return True

    def _connect(self) -> Session:
        self.clock = ClockSync()
        self._trips = RoundTrips(self.clock, self.health)
        self._next_clock_ns = self._next_health_ns = self._next_amplifier_ns = self._beat_ns = 0
        self._ticking = False
        self._session = session = Session(self._serial, self._wake_out, self._stop, self.health, self._take)
        self.identity = session.identify()
        session.agree(self.identity)
        if self._settings is not None:
            session.configure(self._settings, self.identity.settings)
        for _ in range(CLOCK_TRIES):
            self._ask_clock(session)
            session.ask("get_state", "state")  # and with it the time's answer
            if self.clock.samples >= CLOCK_FIRST:
                break
        else:
            raise BadLine(
                f"{self.port}: {CLOCK_TRIES} questions, and hardly one answer to the first asking; check ground, cable and baud rate"
            )
        self.fault = None
        self.health.connects += 1
        self._connected.set()
        who = {"build": f"{self.identity.build:08x}", "reset": self.identity.reset, "state": self.state}
        self._event("bridge_up", at_ns=time.monotonic_ns(), **who)
        return session

    def _disconnect(self, error: Exception) -> None:
        was_connected = self._connected.is_set()
        self._connected.clear()
        self.state = ""
        if isinstance(error, BridgeError):
            self.fault = error
        self.health.dropped += len(self._commands)
        self._commands.clear()
        self._acts.lose_all("the link was lost")
        if was_connected:
            self._event("bridge_down", at_ns=time.monotonic_ns(), reason=str(error))
        if not isinstance(error, LinkLost):  # a microcontroller that started anew is behind the same port
            self._close_port()

    def _close_port(self) -> None:
        if self._serial is not None:
            self._serial.close()
            self._serial = None

    # --- the thread: one round ---

    def _serve(self, session: Session) -> None:
        now_ns = time.monotonic_ns()
        self._take_commands(session)
        self._ask_what_is_due(session, now_ns)
        session.pump(now_ns + 20_000_000)
        session.require_life()

    def _take_commands(self, session: Session) -> None:
        put = session.window.put
        while self._commands:
            name, values = self._commands.popleft()
            if name == "move":
                self._acts.send(values["motion"], values["at_ns"], self.clock, put)
            else:
                put(pack(name, **values))
        beat_ns = self._beat_ns
        if beat_ns and session.window.has_room:
            self._beat_ns = 0
            if self._may_arm and self.state in ("WAITING", "SAFE"):
                put(pack("arm"))
                self._may_arm = False
            put(pack("heartbeat", at=self.clock.to_us(beat_ns)))

    def _ask_what_is_due(self, session: Session, now_ns: int) -> None:
        put = session.window.put
        self._acts.ask(now_ns, put)
        if now_ns >= self._next_clock_ns and session.window.idle:
            self._ask_clock(session)
            self._next_clock_ns = now_ns + CLOCK_PERIOD_NS
        if now_ns >= self._next_health_ns:
            put(pack("get_health"))
            self._next_health_ns = now_ns + HEALTH_PERIOD_NS
        if now_ns >= self._next_amplifier_ns:
            if self._next_amplifier_ns and self.state == "ARMED":
                put(pack("amplifier", on=1))
            self._next_amplifier_ns = now_ns + AMPLIFIER_PERIOD_NS

    def _ask_clock(self, session: Session) -> None:
        session.window.put(pack("get_clock", token=self._trips.begin()))
        session.write(session.window.due(time.monotonic_ns()))

    # --- the thread: what the microcontroller says ---

    def _take(self, name: str, values: dict[str, Any], now_ns: int) -> None:
        if self._on_message is not None:
            self._on_message(name, values)
        if name == "clock":
            self._trips.end(values["token"], values["at"], now_ns)
        elif name in self._takers:
            self._takers[name](values)

    def _take_tick(self, values: dict[str, Any]) -> None:
        if self.connected:
            # One of a session before says nothing: whoever came back may have started anew meanwhile, and that is known.
            if self.tick is not None and self._ticking and values["number"] < self.tick.number:
                self.tick = None
                raise LinkLost("the microcontroller started anew")
            self._ticking = True
            self.tick = McuTick(values["number"], values["at"], self.clock.to_ns(values["at"]))

    def _take_state(self, values: dict[str, Any]) -> None:
        state, cause = name_of("STATE", values["state"]), name_of("CAUSE", values["cause"])
        if self.connected and state == "WAITING" and cause == "RESET" and self.state != "WAITING":
            raise LinkLost("the microcontroller started anew")
        if state == "WAITING":
            self._may_arm = True
        if self.connected and state != self.state:
            self._event("bridge_state", state=state, cause=cause)
        self.state = state

    def _take_pose(self, values: dict[str, Any]) -> None:
        if self.connected and self.state == "ARMED":
            pose = {axis: values[axis] for axis in values if axis != "at"}
            self._event("bridge_pose", at_ns=self.clock.to_ns(values["at"]), **pose)

    def _take_health(self, values: dict[str, Any]) -> None:
        self.mcu_health = values

    def _take_refused(self, values: dict[str, Any]) -> None:
        self.health.dropped += 1
        self._event("bridge_refused", message=values["message"])

    def _event(self, event: str, **values: Any) -> None:
        self._events.append({"event": event, **values})
