"""Cameras: the two frames that a tick shows the model, from video files and image folders, by exposure time."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from device.audio import SourceError
from device.config import ModelConfig
from device.streams import STREAMS

if TYPE_CHECKING:
    import av

Frames = NDArray[np.uint8]  # [H, W, 3] or [2, H, W, 3], RGB

STALE_S = STREAMS["camera"].stale_s or 0.0  # an older frame is not shown
FOLDER_HZ = 10  # a folder of images is shown at this rate
AHEAD_FRAMES = 64  # decoded in advance: two seconds at 30 Hz
_SAME_INSTANT_S = 1e-3  # presentation times are rounded to the container's time base, often 1 ms
_IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class Shot(NamedTuple):
    """One frame and when it was exposed, in seconds since the session's start."""

    time_s: float
    frame: Frames


class Camera(Protocol):
    """`end_s`: when its last frame is over, once that is known; `fault`: why it ended early, if it did.

    `resting` is set by the loop while nobody looks (device/ladder.py): what a camera does ahead of being asked, it leaves then.
    """

    resting: bool
    end_s: float | None
    fault: str | None
    counts: dict[str, int]

    def frames_at(self, edge_s: float) -> tuple[Frames, float]:
        """u8[2, H, W, 3], newest last, and the age of the newest in s; never a frame exposed after the edge."""

    def close(self) -> None: ...


class NoCamera:
    """Black, as old as the session."""

    resting = False
    end_s: float | None = None
    fault: str | None = None

    def __init__(self, config: ModelConfig) -> None:
        self._black = _black(config)
        self.counts: dict[str, int] = {}

    def frames_at(self, edge_s: float) -> tuple[Frames, float]:
        return self._black, edge_s

    def close(self) -> None:
        """Nothing to close."""


class FrameCamera:
    """Frames from an iterator that a thread of its own pulls, so that a slow decoder never holds up a tick.

    `patient`: wait for the thread to get past the edge instead, so that a simulated run always sees the same frames.
    The iterator yields shots of the bundle's size in order of time and returns the end of the last one in s.
    """

    def __init__(self, config: ModelConfig, shots: Iterator[Shot | float], patient: bool) -> None:
        self._black, self._shown = _black(config), _black(config)
        self._between_s = config.tick_ms / 2000  # the two frames of a tick lie about half a tick apart
        self._patient = patient
        self._ahead: queue.Queue[Shot | float] = queue.Queue(AHEAD_FRAMES)
        self._upcoming: Shot | None = None
        self._past: deque[Shot] = deque()
        self._closed = False
        self.resting = False  # who is not asked decodes no more than AHEAD_FRAMES
        self.end_s: float | None = None
        self.fault: str | None = None
        self.counts = {"stale_frames": 0}
        self._thread = threading.Thread(target=self._pull, args=(shots,), name="camera", daemon=True)
        self._thread.start()

    def frames_at(self, edge_s: float) -> tuple[Frames, float]:
        while (shot := self._next()) is not None and shot.time_s <= edge_s + _SAME_INSTANT_S:
            self._past.append(shot)
            self._upcoming = None
        if not self._past:
            return self._black, edge_s
        newest = self._past[-1]
        earlier_s = newest.time_s - self._between_s + _SAME_INSTANT_S
        while len(self._past) > 1 and self._past[1].time_s <= earlier_s:
            self._past.popleft()
        age_s = max(0.0, edge_s - newest.time_s)
        if age_s > STALE_S:
            self.counts["stale_frames"] += 1
            return self._black, age_s
        self._shown[0], self._shown[1] = self._past[0].frame, newest.frame
        return self._shown, age_s

    def close(self) -> None:
        """Let the thread go."""
        self._closed = True
        while self._thread.is_alive():
            _drain(self._ahead)
            self._thread.join(0.01)

    def _next(self) -> Shot | None:
        """The next shot not yet shown, if there is one by now."""
        if self._upcoming is None and self.end_s is None:
            try:
                item = self._ahead.get(block=self._patient)
            except queue.Empty:
                return None
            if isinstance(item, Shot):
                self._upcoming = item
            else:
                self.end_s = item
        return self._upcoming

    def _pull(self, shots: Iterator[Shot | float]) -> None:
        end_s = 0.0
        try:
            for shot in shots:
                if self._closed:
                    return
                self._ahead.put(shot)
                end_s = shot if isinstance(shot, float) else shot.time_s
        except Exception as error:  # noqa: BLE001 - whatever a decoder raises, the companion goes on without eyes
            self.fault = str(error)
            self._ahead.put(end_s)


def open_camera(path: str | Path, config: ModelConfig, patient: bool) -> FrameCamera:
    """A video file (mkv, mp4, avi) at its presentation times, or a folder of images in order of name at 10 Hz."""
    path = Path(path)
    shots = _folder_shots(path, config) if path.is_dir() else _video_shots(path, config)
    return FrameCamera(config, shots, patient)


def _video_shots(path: Path, config: ModelConfig) -> Iterator[Shot | float]:
    container = _open(path)
    if not container.streams.video:
        raise SourceError(f"camera file {path} has no video in it; give a video file or a folder of images")
    stream = container.streams.video[0]
    zero_s = (container.start_time or 0) / 1_000_000  # in microseconds (AV_TIME_BASE)

    def shots() -> Iterator[Shot | float]:
        end_s, period_s = 0.0, float(1 / (stream.average_rate or FOLDER_HZ))
        with container:
            for frame in container.decode(stream):
                time_s = frame.time - zero_s
                end_s = time_s + period_s
                yield Shot(time_s, fit(frame, config))
        yield end_s

    return shots()


def _folder_shots(path: Path, config: ModelConfig) -> Iterator[Shot | float]:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
        raise SourceError(f"camera folder {path} holds no images ({', '.join(_IMAGE_SUFFIXES)}); give one that does, or a video file")

    def shots() -> Iterator[Shot | float]:
        for i, file in enumerate(files):
            with _open(file) as container:
                yield Shot(i / FOLDER_HZ, fit(next(container.decode(video=0)), config))
        yield len(files) / FOLDER_HZ

    return shots()


def _open(path: Path) -> av.container.InputContainer:
    import av

    try:
        return av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise SourceError(f"camera file {path} cannot be read: {error}; give a video file or a folder of images") from error


def fit(frame: av.VideoFrame, config: ModelConfig) -> Frames:
    """Scale until it covers the model's frame, then cut the edges off: u8[H, W, 3], RGB."""
    height, width = config.video.height, config.video.width
    scale = max(height / frame.height, width / frame.width)
    tall, wide = max(height, round(frame.height * scale)), max(width, round(frame.width * scale))
    image = frame.to_ndarray(format="rgb24", width=wide, height=tall, interpolation="AREA")
    top, left = (tall - height) // 2, (wide - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def _black(config: ModelConfig) -> Frames:
    video = config.video
    return np.zeros((video.frames, video.height, video.width, 3), np.uint8)


def _drain(items: queue.Queue[Shot | float]) -> None:
    while not items.empty():
        items.get_nowait()
