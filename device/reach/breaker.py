"""The circuit breaker: who has failed several times in a row is not asked for a while."""

from __future__ import annotations

FAILURES = 3  # in a row open it
OPEN_S = 30.0  # at first; twice as long after each trial that fails
LONGEST_S = 600.0


class Breaker:
    """Closed, it lets every question through; open, none; when its time is over, one, whose outcome decides. Times in s, any origin."""

    def __init__(self) -> None:
        self._failures, self._open_s, self._until_s = 0, 0.0, 0.0

    def allows(self, now_s: float) -> bool:
        return now_s >= self._until_s

    def failed(self, now_s: float) -> float:
        """Returns for how many seconds it is open now; 0 while it is closed."""
        self._failures += 1
        if self._failures < FAILURES:
            return 0.0
        self._open_s = min(2 * self._open_s, LONGEST_S) if self._open_s else OPEN_S
        self._until_s = now_s + self._open_s
        return self._open_s

    def succeeded(self) -> None:
        self._failures, self._open_s, self._until_s = 0, 0.0, 0.0
