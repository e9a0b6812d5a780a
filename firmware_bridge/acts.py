"""Acts under way: sent with their time, and followed until it is known what became of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from firmware_bridge.clock import ClockSync
from firmware_bridge.dictionary import MOTIONS, name_of, pack
from firmware_bridge.health import LinkHealth

ACT_LEAD_NS = 30_000_000  # from the choice to the motion: a lost frame is sent again and still comes in time
ACT_LATE_NS = 200_000_000  # a tick later the moment is over
ASK_AFTER_NS = 100_000_000  # an act whose report is missing so long after its time is asked for
LOST_AFTER_NS = 3_000_000_000  # and counted as lost after so long


@dataclass
class _Act:
    name: str
    at_ns: int
    asked_ns: int = 0


class Acts:
    """Those whose end is not known yet. Each ends in one event `bridge_act`, with its lateness or the reason why it failed."""

    def __init__(self, first_id: int, health: LinkHealth, tell: Callable[..., None]) -> None:
        self._id, self._health, self._tell = first_id, health, tell
        self._under_way: dict[int, _Act] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def send(self, motion: int, at_ns: int, clock: ClockSync, put: Callable[[bytes], bool]) -> None:
        self._id = (self._id + 1) % 65536
        at, deadline = clock.to_us(at_ns), clock.to_us(at_ns + ACT_LATE_NS)
        if put(pack("act", id=self._id, motion=motion, at=at, deadline=deadline)):
            self._under_way[self._id] = _Act(list(MOTIONS)[motion], at_ns)

    def ask(self, now_ns: int, put: Callable[[bytes], bool]) -> None:
        """Ask for those whose report should be here, and give up those that nobody can tell of."""
        for identifier, act in list(self._under_way.items()):
            if now_ns > act.at_ns + LOST_AFTER_NS:
                self._lose(identifier, "no answer")
            elif now_ns > max(act.at_ns, act.asked_ns) + ASK_AFTER_NS:
                act.asked_ns = now_ns
                put(pack("ask_act", id=identifier))

    def take(self, values: dict[str, Any], clock: ClockSync) -> None:
        """The microcontroller's `acted`."""
        result = name_of("RESULT", values["result"])
        if result == "PENDING" or values["id"] not in self._under_way:
            return
        act = self._under_way.pop(values["id"])
        if result == "STARTED":
            self._health.acts_started += 1
            at_ns = clock.to_ns(values["at"])
            self._tell("bridge_act", motion=act.name, at_ns=at_ns, late_ms=round((at_ns - act.at_ns) / 1e6, 3))
        else:
            self._health.acts_failed += 1
            self._tell("bridge_act", motion=act.name, failed=result)

    def lose_all(self, reason: str) -> None:
        for identifier in list(self._under_way):
            self._lose(identifier, reason)

    def _lose(self, identifier: int, reason: str) -> None:
        self._health.acts_lost += 1
        self._tell("bridge_act", motion=self._under_way.pop(identifier).name, failed=reason)
