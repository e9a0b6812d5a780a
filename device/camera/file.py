"""Cameras that need no device: video files, folders of images and a test pattern, at their presentation times."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from device.audio import SourceError
from device.camera.fit import fit
from device.camera.source import Frames, Shot, Window
from device.config import ModelConfig

if TYPE_CHECKING:
    import av

FOLDER_HZ = 10  # a folder of images is shown at this rate
PATTERN_HZ = 30
AHEAD_FRAMES = 64  # decoded in advance: two seconds at 30 Hz
_SAME_INSTANT_S = 1e-3  # presentation times are rounded to the container's time base, often 1 ms
_IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def _session_begins() -> int:
    """Where a simulated session begins: its clock shows session time."""
    return 0


class FrameCamera:
    """Frames from an iterator that a thread of its own pulls, so that a slow decoder never holds up a tick.

    `patient`: wait for the thread to get past the edge instead, so that a simulated run always sees the same frames.
    `origin_ns`: CLOCK_MONOTONIC at session time 0, which is where the first frame begins.
    The iterator yields shots of the bundle's size in order of time and returns the end of the last one in s.
    """

    def __init__(
        self, config: ModelConfig, shots: Iterator[Shot | float], patient: bool, origin_ns: Callable[[], int] = _session_begins
    ) -> None:
        self._window = Window(config, self._next, _SAME_INSTANT_S)
        self._patient, self._origin_ns = patient, origin_ns
        self._ahead: queue.Queue[Shot | float] = queue.Queue(AHEAD_FRAMES)
        self._closed = False
        self.resting = False  # who is not asked decodes no more than AHEAD_FRAMES
        self.exposed_ns: int | None = None
        self.end_s: float | None = None
        self.fault: str | None = None
        self.counts = {"stale_frames": 0}
        self._thread = threading.Thread(target=self._pull, args=(shots,), name="camera", daemon=True)
        self._thread.start()

    def frames_at(self, edge_s: float) -> tuple[Frames, float]:
        frames, age_s, newest_s = self._window.at(edge_s, 0.0)
        self.exposed_ns = None if newest_s is None else self._origin_ns() + round(newest_s * 1e9)
        self.counts["stale_frames"] = self._window.stale_frames
        return frames, age_s

    def close(self) -> None:
        """Let the thread go."""
        self._closed = True
        while self._thread.is_alive():
            _drain(self._ahead)
            self._thread.join(0.01)

    def _next(self) -> Shot | None:
        """The next shot, if there is one by now."""
        if self.end_s is None:
            try:
                item = self._ahead.get(block=self._patient)
            except queue.Empty:
                return None
            if isinstance(item, Shot):
                return item
            self.end_s = item
        return None

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


def file_shots(path: Path, config: ModelConfig) -> Iterator[Shot | float]:
    """A video file (mkv, mp4, avi) at its presentation times, or a folder of images in order of name at 10 Hz. Raises SourceError."""
    return _folder_shots(path, config) if path.is_dir() else _video_shots(_open(path), config, path)


def pattern_shots(config: ModelConfig) -> Iterator[Shot | float]:
    """FFmpeg's moving test picture with a clock in it, for ever. Raises SourceError."""
    size = f"{config.video.width}x{config.video.height}"
    pattern = Path(f"testsrc2=size={size}:rate={PATTERN_HZ}")
    return _video_shots(_open(pattern, "lavfi"), config, pattern)


def _video_shots(container: av.container.InputContainer, config: ModelConfig, path: Path) -> Iterator[Shot | float]:
    if not container.streams.video:
        raise SourceError(f"camera file {path} has no video in it; give a video file or a folder of images")
    stream = container.streams.video[0]
    zero_s = (container.start_time or 0) / 1_000_000  # in microseconds (AV_TIME_BASE)

    def shots() -> Iterator[Shot | float]:
        end_s, period_s = 0.0, float(1 / (stream.average_rate or FOLDER_HZ))
        with container:
            for picture in container.decode(stream):
                time_s = picture.time - zero_s
                end_s = time_s + period_s
                yield Shot(time_s, fit(picture, config))
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


def _open(path: Path, demuxer: str | None = None) -> av.container.InputContainer:
    import av

    try:
        return av.open(str(path), format=demuxer)
    except (av.FFmpegError, OSError) as error:
        raise SourceError(f"camera file {path} cannot be read: {error}; give a video file or a folder of images") from error


def _drain(items: queue.Queue[Shot | float]) -> None:
    while not items.empty():
        items.get_nowait()
