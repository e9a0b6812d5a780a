"""What the kernel can do for the loop's thread: priority, a CPU of its own, memory that stays, a CPU that does not doze; and garbage."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

PRIORITY = 70  # above the kernel's interrupt threads (50), below its own migration and watchdog threads (99)
DMA_LATENCY = Path("/dev/cpu_dma_latency")  # as long as it is open, no CPU sleeps so deep that waking takes longer than what was written
ISOLATED = Path("/sys/devices/system/cpu/isolated")
# <sys/mman.h>: all that there is and will be, but only once it has been touched: eight MB of stack for each thread stay untouched.
_MCL = 1 | 2 | 4
_CAP_IPC_LOCK = 14  # <linux/capability.h>

COLLECT_TICKS = 25  # garbage in reference cycles is rare: once in five seconds keeps it below a megabyte
COLLECT_SLACK_NS = 20_000_000  # ten times what a collection takes, once what start-up made is frozen

GRANTS = {
    "scheduler": f"'@audio - rtprio {PRIORITY}' in /etc/security/limits.d/copresence.conf, or LimitRTPRIO={PRIORITY} in the systemd unit",
    "memory": "'@audio - memlock unlimited' in /etc/security/limits.d/copresence.conf, or LimitMEMLOCK=infinity in the systemd unit",
    "cpu_dma_latency": 'KERNEL=="cpu_dma_latency", GROUP="audio", MODE="0660" in /etc/udev/rules.d/60-copresence.rules',
}


class RealTime:
    """Sets up the calling thread, and the process around it, for as long as it is open; then everything is as before.

    `event` is what took effect, read back from the kernel, and `missing` what did not: name → why. Nothing here is needed
    for the loop to run, so nothing raises. Threads begun afterwards are ordinary ones.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.missing: dict[str, str] = {}
        self.event: dict[str, Any] = {"event": "realtime"}

    def __enter__(self) -> RealTime:
        for name, set_up in (
            ("scheduler", self._schedule),
            ("cpus", self._pin),
            ("memory", self._lock_memory),
            ("cpu_dma_latency", self._keep_awake),
        ):
            self._attempt(name, set_up)
        if self.missing:
            self.event["missing"] = {name: {"why": why, "grant": GRANTS[name]} for name, why in self.missing.items() if name in GRANTS}
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def advice(self) -> str:
        """What is missing and how to grant it, for a person; empty if nothing is."""
        lines = [f"  {name} ({why}): {GRANTS[name]}" for name, why in self.missing.items() if name in GRANTS]
        return "\n".join(["real time without privileges; to grant them to the group 'audio' ('man limits.conf'):", *lines]) if lines else ""

    def _attempt(self, name: str, set_up: Callable[[], object]) -> None:
        try:
            self.event[name] = set_up()
        except OSError as error:
            self.event[name] = None
            self.missing[name] = error.strerror or str(error)

    def _schedule(self) -> str:
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        if before[0] in (os.SCHED_IDLE, os.SCHED_BATCH) or os.getpriority(os.PRIO_PROCESS, 0) > 0:
            raise OSError(0, "it was begun with less than ordinary priority, which somebody meant; begin it without nice or chrt")
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(PRIORITY))
        self._stack.callback(os.sched_setscheduler, 0, *before)
        policy, priority = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK, os.sched_getparam(0).sched_priority
        return f"SCHED_FIFO {priority}" if policy == os.SCHED_FIFO else f"policy {policy}, priority {priority}"

    def _pin(self) -> list[int]:
        """To the last CPU that is kept free for such as us, or to the last one; the kernel's own work is mostly on the first."""
        before = os.sched_getaffinity(0)
        if "scheduler" not in self.missing:  # a pinned thread without priority waits for whatever else runs there
            chosen = max(before & cpu_list(ISOLATED.read_text() if ISOLATED.exists() else "") or before)
            os.sched_setaffinity(0, {chosen})
            self._stack.callback(os.sched_setaffinity, 0, before)
        return sorted(os.sched_getaffinity(0))

    def _lock_memory(self) -> str:
        soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if not _capable(_CAP_IPC_LOCK):
            # With a limit, some allocation later would fail; better none is locked.
            if hard != resource.RLIM_INFINITY:
                raise OSError(0, f"no more than {hard // 1024} KiB may be locked")
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
            self._stack.callback(resource.setrlimit, resource.RLIMIT_MEMLOCK, (soft, hard))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mlockall(_MCL):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._stack.callback(libc.munlockall)
        locked = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmLck"))
        return f"{int(locked.split()[1]) // 1024} MB locked"

    def _keep_awake(self) -> int:
        """Returns the latency in µs that the kernel now keeps to."""
        device = os.open(DMA_LATENCY, os.O_RDWR | os.O_CLOEXEC)
        self._stack.callback(os.close, device)
        os.write(device, struct.pack("=i", 0))
        return int(struct.unpack("=i", os.pread(device, 4, 0))[0])


class SlackCollector:
    """Python's cycle collector, out of the tick's way: start-up's objects are frozen, the others are searched when there is time."""

    def __init__(self) -> None:
        self.collections = self.longest_ns = 0
        self._ticks = 0

    def __enter__(self) -> SlackCollector:
        self._was_enabled = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def after_tick(self, slack_ns: int) -> None:
        """A tick is done, and the next edge is `slack_ns` away."""
        self._ticks += 1
        if self._ticks >= COLLECT_TICKS and slack_ns >= COLLECT_SLACK_NS:
            begin_ns = time.monotonic_ns()
            gc.collect()
            self.longest_ns = max(self.longest_ns, time.monotonic_ns() - begin_ns)
            self.collections += 1
            self._ticks = 0


def cpu_list(text: str) -> set[int]:
    """The kernel's notation: '2-3,5'."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        with contextlib.suppress(ValueError):
            cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def _capable(capability: int) -> bool:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    return bool(int(line.split()[1], 16) >> capability & 1)
