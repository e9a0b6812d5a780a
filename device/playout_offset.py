"""How long after a tick's edge its speech begins: chosen from the engine's measured time, and raised when that was too little."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from device.camera import NoCamera
from device.config import ModelConfig
from device.engine import Engine
from device.portaudio import PERIOD_MS
from device.session import Session

TRIALS, REST_S = 100, 0.01  # launches that are timed, with rests between: after a rest they take longer, as they do in a running loop
ON_FILES_MS = 60  # where nothing is measured: covers an engine of 12 ms (p99) with a wide margin on a busy two-core machine
MARGIN_MS = 10  # for longer rests, and for what the loop itself takes: p99 2.3
QUANTILE = 99.9
STEP_MS = PERIOD_MS
WINDOW_MS = 60_000
LATE_SHARE = 1 / 1000  # of the ticks of a window came later: it is raised
LONGEST_MS = 1000


def measure(config: ModelConfig, engine: Engine) -> int:
    """The offset in ms that this engine needs here. Leaves traces in its memory: a session begins after it."""
    trial, ticks = Session(config, engine), itertools.count()
    hush = np.zeros(config.tick_samples + config.context_samples, np.float32)
    frames = NoCamera(config).frames_at(0.0)
    return choose(lambda: trial.step(next(ticks), hush, hush, *frames).engine_ns)


def choose(launch: Callable[[], int]) -> int:
    """In ms: p99.9 of what `launch` returns, the ns that the engine took, and a margin, rounded up to the audio period."""
    launch()  # the first one allocates
    times_ns = []
    for _ in range(TRIALS):
        time.sleep(REST_S)
        times_ns.append(launch())
    return rounded(float(np.percentile(times_ns, QUANTILE)) / 1e6)


def rounded(engine_ms: float) -> int:
    """The offset, in ms, that an engine of that time needs."""
    return min(PERIOD_MS * math.ceil((engine_ms + MARGIN_MS) / PERIOD_MS), LONGEST_MS)


class OffsetGuard:
    """Watches which ticks came late, and says when the offset must go up by a step."""

    def __init__(self, offset_ms: int, tick_ms: int) -> None:
        self.offset_ms = offset_ms
        self._window = WINDOW_MS // tick_ms
        self._late: deque[int] = deque()  # the ticks of the newest window that came late

    def raised(self, tick: int, late_samples: int) -> dict[str, Any] | None:
        """Whether this tick makes it too many: then an event, and `offset_ms` is a step higher from now on."""
        while self._late and self._late[0] <= tick - self._window:
            self._late.popleft()
        if late_samples:
            self._late.append(tick)
        late = len(self._late)
        if late <= LATE_SHARE * self._window or self.offset_ms + STEP_MS > LONGEST_MS:
            return None
        self._late.clear()  # the new one gets its own minute
        self.offset_ms += STEP_MS
        return {"event": "playout_offset", "ms": self.offset_ms, "late_ticks": late, "within_s": WINDOW_MS // 1000}
