"""What the loop sees through: the interface of every camera, and the choice of the two frames that a tick is shown."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from device.config import ModelConfig
from device.streams import STREAMS

Frames = NDArray[np.uint8]  # [H, W, 3] or [2, H, W, 3], RGB

STALE_S = STREAMS["camera"].stale_s or 0.0  # an older frame is not shown
JITTER_S = 1e-3  # between the stamps of a camera; at 30 Hz half a tick is exactly three frames


class Shot(NamedTuple):
    """One frame of the bundle's size, and when its exposure began, in s: of session time from a file, of CLOCK_MONOTONIC from a device."""

    time_s: float
    frame: Frames


class FrameSource(Protocol):
    """A camera, whichever it is. None of these waits for the device.

    `exposed_ns`: when the newest frame that was last shown was exposed, on CLOCK_MONOTONIC; None before the first.
    `end_s`: when its last frame is over, once that is known; a device has none.
    `fault`: why it ended early or, of a device, why it gives no frames now.
    `counts`: what was lost: `stale_frames` (ticks that saw black because the newest frame was too old) and, of a device, `dropped_frames`
    (exposed, as its time stamps tell, and never arrived) and `blind_ticks` (from its stop until it has been opened again).
    `resting` is set by the loop while nobody looks (device/ladder.py): what a camera does ahead of being asked, it leaves then.
    """

    resting: bool
    exposed_ns: int | None
    end_s: float | None
    fault: str | None
    counts: dict[str, int]

    def frames_at(self, edge_s: float) -> tuple[Frames, float]:
        """u8[2, H, W, 3], newest last, and the age of the newest in s at the edge; never a frame exposed after the edge."""

    def close(self) -> None: ...


class NoCamera:
    """Black, as old as the session."""

    resting = False
    exposed_ns: int | None = None
    end_s: float | None = None
    fault: str | None = None

    def __init__(self, config: ModelConfig) -> None:
        self._black = black(config)
        self.counts: dict[str, int] = {}

    def frames_at(self, edge_s: float) -> tuple[Frames, float]:
        return self._black, edge_s

    def close(self) -> None:
        """Nothing to close."""


class Window:
    """The newest frame at an edge, and the one about half a tick before it.

    `take`: the next shot in order of time, or None if there is none by now. Shots come in one time base, and `at` is asked in it.
    """

    def __init__(self, config: ModelConfig, take: Callable[[], Shot | None], same_instant_s: float = 0.0) -> None:
        self._black, self._shown = black(config), black(config)
        self._between_s = config.tick_ms / 2000
        self._take, self._same_instant_s = take, same_instant_s
        self._upcoming: Shot | None = None
        self._past: deque[Shot] = deque()
        self.stale_frames = 0

    def at(self, edge_s: float, started_s: float) -> tuple[Frames, float, float | None]:
        """Frames u8[2, H, W, 3], their age in s, and the time of the newest; without any, black, as old as what began at `started_s`."""
        self._catch_up(edge_s)
        newest = self._past[-1] if self._past else None
        age_s = max(0.0, edge_s - (started_s if newest is None else newest.time_s))
        if newest is None or age_s > STALE_S:
            self.stale_frames += age_s > STALE_S
            return self._black, age_s, newest and newest.time_s
        self._shown[0], self._shown[1] = self._past[0].frame, newest.frame
        return self._shown, age_s, newest.time_s

    def _catch_up(self, edge_s: float) -> None:
        """Drop what the tick will not show."""
        self._upcoming = self._upcoming or self._take()
        while self._upcoming is not None and self._upcoming.time_s <= edge_s + self._same_instant_s:
            self._past.append(self._upcoming)
            self._upcoming = self._take()
        if self._past:
            earlier_s = self._past[-1].time_s - self._between_s + JITTER_S
            while len(self._past) > 1 and self._past[1].time_s <= earlier_s:
                self._past.popleft()


def black(config: ModelConfig) -> Frames:
    """u8[2, H, W, 3] of zeros."""
    video = config.video
    return np.zeros((video.frames, video.height, video.width, 3), np.uint8)
