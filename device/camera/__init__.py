"""Cameras: the two frames that a tick shows the model, by exposure time. One module for each kind, imported only when it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from device.audio import SourceError
from device.camera.file import FrameCamera, file_shots, pattern_shots
from device.camera.live import Device, LiveCamera
from device.camera.source import Frames, FrameSource, NoCamera, Shot
from device.config import ModelConfig

__all__ = ["DEVICES", "PATTERN", "FrameCamera", "FrameSource", "Frames", "NoCamera", "Shot", "is_device", "is_recording", "open_camera"]

PATTERN = "pattern"


def _libcamera(which: str, config: ModelConfig) -> Callable[[], Device]:
    from device.camera.libcamera import LibcameraDevice

    return partial(LibcameraDevice, _number(which, "picamera2"), config)


def _argus(which: str, config: ModelConfig) -> Callable[[], Device]:
    from device.camera.argus import ArgusDevice

    return partial(ArgusDevice, _number(which, "argus"))


def _v4l2(which: str, config: ModelConfig) -> Callable[[], Device]:
    from device.camera.v4l2 import V4l2Device

    return partial(V4l2Device, which or "/dev/video0")


# By name: what opens it, and what its library needs. `--camera NAME` or `NAME:WHICH`.
DEVICES: dict[str, tuple[Callable[[str, ModelConfig], Callable[[], Device]], str]] = {
    "picamera2": (
        _libcamera,
        "install the extra 'libcamera' and the package python3-libcamera, in an environment with --system-site-packages",
    ),
    "argus": (_argus, "install the extra 'jetson' and the packages python3-gi and gir1.2-gstreamer-1.0"),
    "v4l2": (_v4l2, "install the extra 'board'"),
}


def is_device(choice: str | None) -> bool:
    """Whether `choice` names a camera that runs on its own time."""
    return choice is not None and choice.partition(":")[0] in DEVICES


def is_recording(choice: str | None) -> bool:
    """Whether `choice` names a video file or a folder of images."""
    return choice not in (None, "none", PATTERN) and not is_device(choice)


def open_camera(choice: str | Path | None, config: ModelConfig, patient: bool, origin_ns: Callable[[], int] = lambda: 0) -> FrameSource:
    """A video file, a folder of images, 'pattern', 'none', or a device: 'picamera2:0', 'argus:0', 'v4l2:/dev/video0'. Raises SourceError.

    `patient`: wait for a file's frames, for a simulated run. `origin_ns`: CLOCK_MONOTONIC at session time 0, where it is now.
    """
    if choice is None or choice == "none":
        return NoCamera(config)
    name, _, which = str(choice).partition(":")
    if name in DEVICES:
        opener, remedy = DEVICES[name]
        try:
            open_device = opener(which, config)
        except SourceError:
            raise
        except (ImportError, ValueError) as error:  # ValueError: PyGObject's way to say that a library is not there
            raise SourceError(f"--camera {choice}: {error}; {remedy}") from error
        return LiveCamera(config, open_device, origin_ns)
    shots = pattern_shots(config) if name == PATTERN else file_shots(Path(choice), config)
    return FrameCamera(config, shots, patient, origin_ns)


def _number(which: str, name: str) -> int:
    if which and not which.isdecimal():
        raise SourceError(f"--camera {name}:{which}: {which!r} is not the number of a camera; give it as in '{name}:0'")
    return int(which or 0)
