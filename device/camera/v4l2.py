"""USB cameras and others that Linux shows as /dev/videoN, through FFmpeg's V4L2 input in PyAV.

PyAV is here already, decodes the Motion JPEG that most USB cameras give, and passes the kernel's stamps on. linuxpy would do as well, but
is under the GPL.
"""

from __future__ import annotations

import os
import select
from pathlib import Path

import av

from device.camera.live import CameraFault, Picture

# What every USB camera has; another size that the driver settles on does as well.
OPTIONS = {"video_size": "640x480", "framerate": "30"}
DEMUXER = "v4l2"


class V4l2Device:
    """The camera behind `path`, such as /dev/video0."""

    def __init__(self, path: str) -> None:
        try:
            self._container = av.open(path, format=DEMUXER, options=OPTIONS)
        except (av.FFmpegError, OSError) as error:
            raise CameraFault(f"{path} cannot be opened: {error}; plug a camera in, or name another: v4l2-ctl --list-devices") from error
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = 1  # decoding on several would hold frames back
        self._fd = _descriptor_of(path)
        # FFmpeg would wait for a frame without end where the camera gives none.
        os.set_blocking(self._fd, False)

    def read(self, timeout_s: float) -> Picture | None:
        newest, wait_s = None, timeout_s
        while select.select((self._fd,), (), (), wait_s)[0]:
            try:
                packet = next(self._container.demux(self._stream))
            except BlockingIOError:
                break
            if packet.size == 0:
                raise CameraFault("the camera has ended; plug it in again")
            for image in packet.decode():
                newest = Picture(round((image.time or 0.0) * 1e9), image)
            wait_s = 0  # what piled up behind it is newer
        return newest

    def close(self) -> None:
        self._container.close()


def _descriptor_of(path: str) -> int:
    """The number under which this process has `path` open; FFmpeg does not tell."""
    wanted = os.path.realpath(path)
    open_files = {int(entry.name): os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()}
    return max(number for number, name in open_files.items() if name == wanted)
