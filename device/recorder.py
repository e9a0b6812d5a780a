"""The flight recorder: the last minute of a run in memory of fixed size, written to a file when something has gone wrong or somebody asks.

The loop writes each tick into the next slot of a ring and never waits. Dumps are written by a thread of the recorder's own, which
reads behind the loop: the ring is longer than what it promises, so that the loop comes to a slot's place again only long after.

Where raw sound and pictures are kept, so is what a replay begins with: the updates of each tick are in its slot, and a second past
(as in device/session.py, without an engine) takes them over when their slot is about to be used again.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import re
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from device.config import ModelConfig
from device.dump import DumpWriter, tick_dtype
from device.engine import Buffers, HostMemory, Memory, allocate
from device.session import CHOSEN, VALID, Decision, Past
from device.signature import STATE_FOLDER, STATE_VARIABLE
from device.statistics import TickTimes
from device.streams import STREAMS
from device.tensors import tensor_table

KEPT_S = 60  # what a dump covers
MARGIN_S = 10  # the loop is so far from the slots that a dump begins with: a disk may stall for so long
STALL_S = 3.0  # a loop that has finished no tick for so long hangs
KEPT_DUMPS = 8  # older ones in the folder are deleted: a fault that comes back must not fill the disk
HEAD_EVENTS = 32  # from before the first tick, header and notices; kept for good
EVENTS_PER_TICK = 4
AUTOMATIC = ("stall", "overload")  # one in log_s of the streams table at most; a fault ends the run, the others are somebody's wish

_NAME = re.compile(r"copresence-\d{8}T\d{6}Z-\d+-\d+-[a-z]+\.mcap")


class Request:
    """A dump on its way; `file` or `fault` are there once `done` is set."""

    def __init__(self, reason: str) -> None:
        self.reason, self.done = reason, threading.Event()
        self.file: Path | None = None
        self.fault: str | None = None

    def outcome(self) -> dict[str, Any]:
        """As an event."""
        return {"event": "dump", "reason": self.reason, **({"file": str(self.file)} if self.fault is None else {"fault": self.fault})}


class Shadow:
    """A session's past without a session: it follows the slots of a ring."""

    def __init__(self, config: ModelConfig) -> None:
        self.inputs, self.outputs = allocate(config)
        self.memory: Memory = HostMemory(config, self.inputs, self.outputs)
        self.past = Past(config, self)
        rows = tensor_table(config)
        self._state = [*(row.name for row in rows if row.role == "state"), *VALID, *CHOSEN]
        self._taken = [*(row.name for row in rows if row.role == "update"), *CHOSEN.values()]

    def follow(self, slot: np.ndarray) -> None:
        """Take over a tick that was launched and came back, or one that was not launched."""
        tick = int(slot["tick"])
        if not slot["launched"]:
            self.past.lose(tick)
            return
        for name in self._taken:
            self.outputs[name][...] = slot[name]
        self.past.catch_up(tick)
        self.past.absorb(tick)

    def copy(self, other: Shadow) -> None:
        """Become equal to `other`."""
        self.past.restore(other.state(), other.past.next)

    def state(self) -> Buffers:
        return {name: self.inputs[name] for name in self._state}


class FlightRecorder:
    """Records a run; `raw`: sound, pictures and what the model makes of them as well. `watch`: dump if the loop hangs."""

    def __init__(self, config: ModelConfig, folder: Path | None = None, raw: bool = False, watch: bool = True) -> None:
        self._config, self._folder, self._raw, self._watch = config, folder, raw, watch
        dtype = tick_dtype(config, raw)
        self._kept = math.ceil(KEPT_S * 1000 / config.tick_ms)
        self._slots = np.zeros(self._kept + math.ceil(MARGIN_S * 1000 / config.tick_ms), dtype)
        self._slots.view(np.uint8)[...] = 0  # touched once: the first minute of ticks shall not wait for the kernel to find pages
        names = dtype.names or ()
        rows = tensor_table(config)
        self._inputs = [row.name for row in rows if row.role == "input" and row.name in names]
        self._updates = [row.name for row in rows if row.role == "update" and row.name in names]
        self._begun = self._whole = 0  # ticks begun and finished so far; slot i mod size is tick i's
        self._base = Shadow(config) if raw else None
        self._start = Shadow(config) if raw else None
        self._base_at = 0  # the base is the past before this tick; -1 while it changes
        self._head: list[tuple[int, dict[str, Any]]] = []
        self._events: deque[tuple[int, dict[str, Any]]] = deque(maxlen=EVENTS_PER_TICK * self._kept)
        self._wishes: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._outcomes: deque[dict[str, Any]] = deque(maxlen=HEAD_EVENTS)
        self._automatic_s = -math.inf
        self._alive_s, self._dumps = math.inf, 0
        self._thread = threading.Thread(target=self._serve, name="recorder", daemon=True)
        self._thread.start()

    # What the loop calls: none of it waits.

    def launch(self, tick: int, inputs: Buffers) -> None:
        """`tick` is about to be launched with these inputs."""
        slot = self._begin(tick)
        slot["launched"] = True
        for name in self._inputs:
            slot[name] = inputs[name]

    def tick(self, times: TickTimes, decision: Decision, memory: Memory, launched: bool) -> None:
        """A tick is done."""
        slot = self._slots[(self._begun - 1) % self._slots.size] if launched else self._begin(times.tick)
        for name, value in times._asdict().items():
            slot[name] = value
        if launched:
            for name in ("say", "act", "say_prob", "act_prob"):
                slot[name] = getattr(decision, name)
            if self._raw:
                slot["speech"] = decision.speech
                memory.copy_updates({name: slot[name] for name in self._updates})
        slot["whole"] = True
        self._whole = self._begun
        self._alive_s = time.monotonic()

    def event(self, at_ns: int, event: dict[str, Any]) -> None:
        """At `at_ns` (as TickTimes.edge_ns) this was logged."""
        if not self._begun and len(self._head) < HEAD_EVENTS:
            self._head.append((at_ns, event))
        elif event["event"] != "tick":  # which is in its slot
            self._events.append((at_ns, event))

    def request(self, reason: str) -> Request:
        """Ask for a dump, from any thread or from a signal handler."""
        wish = Request(reason)
        self._wishes.put(wish)
        if not self._thread.is_alive():
            self._refuse()
        return wish

    def take_events(self) -> list[dict[str, Any]]:
        """Which dumps were written since the last call, and which could not be."""
        return [self._outcomes.popleft() for _ in range(len(self._outcomes))]

    def close(self) -> None:
        """Wait for the dumps asked for."""
        self._alive_s = math.inf
        self._wishes.put(None)
        self._thread.join()
        self._refuse()

    def _refuse(self) -> None:
        """Whoever asks when the run is over gets an answer too."""
        with contextlib.suppress(queue.Empty):
            while True:
                if wish := self._wishes.get_nowait():
                    wish.fault = "the run is over"
                    wish.done.set()

    def _begin(self, tick: int) -> np.ndarray:
        """The slot for the next tick; what it held goes into the base."""
        slot = self._slots[self._begun % self._slots.size]
        if self._base is not None and self._begun >= self._slots.size:
            self._base_at = -1
            self._base.follow(slot)
            self._base_at = self._begun + 1 - self._slots.size
        self._begun += 1
        slot["whole"] = slot["launched"] = False
        slot["tick"] = tick
        return slot

    # What the recorder's own thread does.

    def _serve(self) -> None:
        import mcap.writer  # noqa: F401 - now, and not when a dump is wanted

        stalled_s = 0.0
        while True:
            try:
                wish = self._wishes.get(timeout=1.0)
            except queue.Empty:
                alive_s = self._alive_s
                if not self._watch or time.monotonic() - alive_s < STALL_S or alive_s == stalled_s:
                    continue
                wish, stalled_s = Request("stall"), alive_s
            if wish is None:
                return
            if wish.reason in AUTOMATIC:
                now_s = time.monotonic()
                if now_s - self._automatic_s < (STREAMS["dump"].log_s or 0):
                    wish.fault = "the last dump of its kind is not a minute old"
                    wish.done.set()
                    continue
                self._automatic_s = now_s
            try:
                wish.file = self._dump(wish.reason)
            except Exception as error:  # noqa: BLE001 - a full disk or whatever it was must not end the companion
                wish.fault = f"{type(error).__name__}: {error}"
            self._outcomes.append(wish.outcome())
            wish.done.set()

    def _dump(self, reason: str) -> Path:
        self._dumps += 1
        folder = dumps_folder(self._folder)
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        path = folder / f"copresence-{stamp}-{os.getpid()}-{self._dumps}-{reason}.mcap"
        end, begun = self._whole, self._begun
        first = max(0, end - self._kept)
        state = self._state_before(first)
        with DumpWriter(path, self._config, self._raw) as writer:
            slot = np.zeros((), self._slots.dtype)
            events = self._events.copy()  # in one step of the interpreter
            writer.begin(reason, self._head, None if state is None else (state.state(), state.past.next))
            for index in range(first, begun):  # one more if the newest tick has been launched and has not come back
                self._read(index, slot)
                writer.tick(slot)
            oldest_ns = self._slots[first % self._slots.size]["edge_ns"] if end > first else 0
            for at_ns, event in events:
                if at_ns >= oldest_ns:
                    writer.event(at_ns, event)
        _delete_old(folder)
        return path

    def _state_before(self, first: int) -> Shadow | None:
        """The past before tick `first`: the base, and what was recorded since."""
        if self._base is None or self._start is None:
            return None
        slot = np.zeros((), self._slots.dtype)
        for _ in range(100):  # the loop moves on five times a second, this takes milliseconds
            at = self._base_at
            if at >= 0:
                self._start.copy(self._base)
                if self._base_at == at:
                    with contextlib.suppress(Overtaken):
                        for index in range(at, first):
                            self._read(index, slot)
                            self._start.follow(slot)
                        return self._start
            time.sleep(0.001)
        raise Overtaken("the machine is too busy to copy the recorder's state; try again")

    def _read(self, index: int, into: np.ndarray) -> None:
        """Copy what tick `index` left in the ring; raises Overtaken if it is no longer there."""
        into[...] = self._slots[index % self._slots.size]
        if self._begun > index + self._slots.size:
            raise Overtaken(f"the disk was slower than {MARGIN_S} s: the loop has used the memory again; name a faster one with --dumps")


class Overtaken(RuntimeError):
    """The loop came round before the dump was written. Remedy: a faster disk."""


class NoRecorder:
    """Nothing is recorded."""

    def tick(self, times: TickTimes, decision: Decision, memory: Memory, launched: bool) -> None:
        """Not kept."""

    def event(self, at_ns: int, event: dict[str, Any]) -> None:
        """Not kept."""

    def request(self, reason: str) -> object:
        """Nothing to dump."""

    def take_events(self) -> list[dict[str, Any]]:
        return []

    def close(self) -> None:
        """Nothing to close."""


def dumps_folder(named: Path | None) -> Path:
    """`named`, or `dumps` in this machine's state folder, or where that cannot be written a folder of this user's own in /tmp."""
    if named is not None:
        named.mkdir(parents=True, exist_ok=True)
        return named
    usual = Path(os.environ.get(STATE_VARIABLE) or STATE_FOLDER) / "dumps"
    with contextlib.suppress(OSError):
        usual.mkdir(mode=0o750, parents=True, exist_ok=True)
        if os.access(usual, os.W_OK):
            return usual
    own = Path(tempfile.gettempdir()) / f"copresence-{os.geteuid()}" / "dumps"
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    return own


def _delete_old(folder: Path) -> None:
    dumps = sorted((path.stat().st_mtime_ns, path) for path in folder.iterdir() if _NAME.fullmatch(path.name))
    for _, path in dumps[:-KEPT_DUMPS]:
        path.unlink(missing_ok=True)
