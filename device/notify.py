"""Tells systemd that the companion is ready, and that it is alive; sd_notify(3) without its library."""

from __future__ import annotations

import os
import socket

ALIVE_NS = 1_000_000_000  # WatchdogSec is five times as long


class Notifier:
    """READY=1 with the first tick that was in time, WATCHDOG=1 once a second of ticks. Without $NOTIFY_SOCKET nobody is told."""

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if address else None
        if self._socket is not None:
            self._socket.setblocking(False)
        self.ready = False
        self._told_ns = 0

    def ticked(self, now_ns: int, in_time: bool) -> None:
        """The loop has completed a tick, at `now_ns` of CLOCK_MONOTONIC. Never waits."""
        if not self.ready:
            if not in_time:
                return
            self.ready = self._tell("READY=1\nSTATUS=ticking")
        if now_ns - self._told_ns >= ALIVE_NS:
            self._tell("WATCHDOG=1")
            self._told_ns = now_ns

    def close(self) -> None:
        """The companion ends, and means to."""
        self._tell("STOPPING=1")
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _tell(self, text: str) -> bool:
        """False if it could not be told now: a full queue is tried again with the next tick."""
        if self._socket is not None:
            try:
                self._socket.sendto(text.encode(), self._address)
            except OSError:
                return False
        return True
