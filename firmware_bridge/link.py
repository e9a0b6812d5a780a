"""The session on a line that may lose anything: go-back-N towards the microcontroller, with a time-out from the round trips seen."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from firmware_bridge.framing import SEQUENCES, encode
from firmware_bridge.health import LinkHealth

TIMEOUT_MIN_NS = 25_000_000  # a scheduler's hiccup on the host is no loss
TIMEOUT_MAX_NS = 300_000_000  # three in a row fit into the second within which a clean line has to work again
FIRST_TIMEOUT_NS = 100_000_000
WAITING_MAX = 64  # frames not yet in flight; one more is dropped and counted


@dataclass
class _Flight:
    frame: bytes
    sent_ns: int
    resent: bool = False


class Window:
    """Frames towards the microcontroller, in order. No input or output of its own: it says what to write, and when to ask again."""

    def __init__(self, health: LinkHealth) -> None:
        self.limit = 1  # until the microcontroller has announced how many it takes
        self.adopting = True  # whose sequence numbers hold is not known yet
        self._health = health
        self._base = 0  # sequence of the oldest frame in flight, or of the next one
        self._flight: deque[_Flight] = deque()
        self._waiting: deque[bytes] = deque()
        self._smooth_ns, self._variation_ns, self._timeout_ns = 0.0, 0.0, float(FIRST_TIMEOUT_NS)
        self._asked_ns = 0  # when everything in flight was last sent again
        # For the oldest frame in flight. Once: each repetition may be refused again, and would breed repetitions.
        self._answered_refusal = False

    @property
    def idle(self) -> bool:
        return not self._flight and not self._waiting

    @property
    def has_room(self) -> bool:
        """What is put now goes out at once."""
        return not self._waiting and len(self._flight) < self.limit

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        return len(self._flight)

    @property
    def timeout_ns(self) -> int:
        return round(self._timeout_ns)

    def put(self, payload: bytes) -> bool:
        """Queue a payload; False, and counted, when the queue is full."""
        if len(self._waiting) >= WAITING_MAX:
            self._health.dropped += 1
            return False
        self._waiting.append(payload)
        return True

    def due(self, now_ns: int) -> list[bytes]:
        """Frames to write now."""
        out: list[bytes] = []
        if self._flight and now_ns >= self.deadline_ns():
            self._health.timeouts += 1
            self._timeout_ns = min(self._timeout_ns * 2, TIMEOUT_MAX_NS)
            out += self._again(now_ns)
        while self._waiting and len(self._flight) < self.limit:
            frame = encode(self._base + len(self._flight), self._waiting.popleft())
            self._flight.append(_Flight(frame, now_ns))
            self._health.sent += 1
            out.append(frame)
        return out

    def deadline_ns(self) -> int:
        """When the oldest frame in flight is to be sent again; only if there is one."""
        return max(self._flight[0].sent_ns, self._asked_ns) + self.timeout_ns

    def heard(self, sequence: int, empty: bool, now_ns: int) -> list[bytes]:
        """A frame came that says `sequence` is expected next, and an `empty` one refuses what came; returns what to write at once."""
        count = (sequence - self._base) % SEQUENCES
        if 0 < count <= len(self._flight):
            for _ in range(count):
                flight = self._flight.popleft()
            if not flight.resent:  # Karn: nobody knows which of the two was answered
                self._measure(now_ns - flight.sent_ns)
            self._base = sequence
            self._answered_refusal = False
            return []
        if not self._flight:
            return []
        if count and self.adopting:  # nothing but questions are in flight: they may take the numbers that are expected
            payloads = [flight.frame[2:-3] for flight in self._flight]
            self._base = sequence
            self._flight = deque(_Flight(encode(sequence + i, payload), now_ns, True) for i, payload in enumerate(payloads))
            return [flight.frame for flight in self._flight]
        if count == 0 and empty and not self._answered_refusal:
            self._health.refusals += 1
            self._answered_refusal = True
            return self._again(now_ns)
        return []

    def _again(self, now_ns: int) -> list[bytes]:
        self._asked_ns = now_ns
        self._health.resent += len(self._flight)
        for flight in self._flight:
            flight.resent = True
        return [flight.frame for flight in self._flight]

    def _measure(self, rtt_ns: int) -> None:
        """RFC 6298."""
        if self._smooth_ns == 0:
            self._smooth_ns, self._variation_ns = float(rtt_ns), rtt_ns / 2
        else:
            self._variation_ns += (abs(self._smooth_ns - rtt_ns) - self._variation_ns) / 4
            self._smooth_ns += (rtt_ns - self._smooth_ns) / 8
        self._timeout_ns = min(max(self._smooth_ns + 4 * self._variation_ns, TIMEOUT_MIN_NS), TIMEOUT_MAX_NS)
