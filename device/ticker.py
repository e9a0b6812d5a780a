"""Tickers: when the edges are; in real time from a kernel timer, or simulated, as fast as it computes."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import NamedTuple, Protocol

_CLOCK_MONOTONIC = 1  # <time.h>
_TFD_TIMER_ABSTIME = 1  # <sys/timerfd.h>
_TFD_CLOEXEC = os.O_CLOEXEC


class Edge(NamedTuple):
    """A tick whose last sample has been captured."""

    tick: int
    edge_ns: int  # in session time
    late_ns: int  # how long after the edge the ticker returned
    missed: int  # ticks lost just before this one


class Ticker(Protocol):
    """All times are nanoseconds of session time: 0 is `start`, the beginning of tick 0, and a tick is always as long."""

    def start(self) -> None: ...

    def wait(self, tick: int) -> Edge:
        """Sleep to the edge of `tick`; after a stall, return the newest edge there was and count the ticks it skips."""

    def now_ns(self) -> int: ...

    @property
    def origin_ns(self) -> int:
        """CLOCK_MONOTONIC at session time 0, where it is now."""

    def steer(self, shift_ns: int) -> None:
        """Delay all edges to come, and with them session time."""

    def close(self) -> None: ...


class SimulatedTicker:
    """Time stands still at an edge until the next one is waited for, so nothing ever comes late."""

    origin_ns = 0

    def __init__(self, tick_ns: int) -> None:
        self._tick_ns = tick_ns
        self._now_ns = 0

    def start(self) -> None:
        self._now_ns = 0

    def wait(self, tick: int) -> Edge:
        self._now_ns = (tick + 1) * self._tick_ns
        return Edge(tick, self._now_ns, 0, 0)

    def now_ns(self) -> int:
        return self._now_ns

    def steer(self, shift_ns: int) -> None:
        """Simulated edges need no steering."""

    def close(self) -> None:
        """Nothing to close."""


class RealtimeTicker:
    """Absolute deadlines on CLOCK_MONOTONIC by timerfd: no drift, no polling. Linux only."""

    def __init__(self, tick_ns: int) -> None:
        self._tick_ns = tick_ns
        self.origin_ns = 0
        # Called through libc because os.timerfd_create came with Python 3.13.
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.timerfd_settime.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Itimerspec), ctypes.c_void_p)
        self._spec = _Itimerspec(interval=_Timespec(*divmod(tick_ns, 1_000_000_000)))
        self._fd = _checked(self._libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_CLOEXEC))

    def start(self) -> None:
        self.origin_ns = time.monotonic_ns()

    def wait(self, tick: int) -> Edge:
        # Armed anew for every edge, which steering may have moved; the interval makes the kernel count those that pass unseen.
        edge_ns = (tick + 1) * self._tick_ns
        self._spec.value.s, self._spec.value.ns = divmod(self.origin_ns + edge_ns, 1_000_000_000)
        _checked(self._libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, ctypes.byref(self._spec), None))
        missed = int.from_bytes(os.read(self._fd, 8), sys.byteorder) - 1  # returns at once when the deadline has passed
        edge_ns += missed * self._tick_ns
        return Edge(tick + missed, edge_ns, self.now_ns() - edge_ns, missed)

    def now_ns(self) -> int:
        return time.monotonic_ns() - self.origin_ns

    def steer(self, shift_ns: int) -> None:
        self.origin_ns += shift_ns

    def close(self) -> None:
        os.close(self._fd)


class _Timespec(ctypes.Structure):
    _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"timerfd: {os.strerror(code)}; run with --clock simulated")
    return result
