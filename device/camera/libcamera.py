"""Cameras of libcamera boards (Raspberry Pi and others), through picamera2."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import av
import numpy as np
from picamera2 import Picamera2

from device.camera.live import CameraFault, Picture
from device.config import ModelConfig

OVERSIZE = 4  # the board's image processor scales down to this many times the model's frame; the rest is averaged here
BUFFERS = 4  # one being exposed, one being read, two waiting: a short stall loses nothing
WANTED = "BGR888"  # libcamera's name for bytes in the order red, green, blue; a pipeline without it gives what it has

# What libcamera may give: (as PyAV calls it, bytes per pixel of a row, rows per pixel row).
LAYOUTS = {
    "BGR888": ("rgb24", 3, 1.0),
    "RGB888": ("bgr24", 3, 1.0),
    "XBGR8888": ("rgba", 4, 1.0),
    "XRGB8888": ("bgra", 4, 1.0),
    "YUYV": ("yuyv422", 2, 1.0),
    "NV12": ("nv12", 1, 1.5),
}


class LibcameraDevice:
    """Camera `number` in libcamera's order, from 0."""

    def __init__(self, number: int, config: ModelConfig) -> None:
        self._camera = Picamera2(number)
        self._asked: Any = None  # picamera2's job that ends with the next frame
        try:
            size = (OVERSIZE * config.video.width, OVERSIZE * config.video.height)
            # queue=False: each request waits for a frame that was not there before.
            wanted = self._camera.create_video_configuration({"size": size, "format": WANTED}, buffer_count=BUFFERS, queue=False)
            self._camera.configure(wanted)
            self._stream = self._camera.stream_configuration("main")
            if self._stream["format"] not in LAYOUTS:
                raise CameraFault(f"camera {number} gives {self._stream['format']}, not one of {', '.join(LAYOUTS)}; try v4l2")
            self._camera.start()
        except BaseException:
            self._camera.close()
            raise

    def read(self, timeout_s: float) -> Picture | None:
        # One that was not answered in time stays asked for: given up, its frame would never go back to the camera.
        self._asked = self._asked or self._camera.capture_request(wait=False)
        try:
            request = self._camera.wait(self._asked, timeout=timeout_s)
        except concurrent.futures.TimeoutError:
            return None
        self._asked = None
        try:
            stamp_ns = request.get_metadata()["SensorTimestamp"]  # the first line's start of exposure
            return Picture(stamp_ns, self._picture(request.make_buffer("main")))
        finally:
            request.release()

    def close(self) -> None:
        self._camera.cancel_all_and_flush()  # a request that a dead camera never answers would keep close() waiting behind it
        self._camera.close()

    def _picture(self, buffer: np.ndarray[Any, np.dtype[np.uint8]]) -> av.VideoFrame:
        (width, height), stride = self._stream["size"], self._stream["stride"]
        layout, pixel_bytes, rows = LAYOUTS[self._stream["format"]]
        lines = buffer[: round(height * rows) * stride].reshape(-1, stride)[:, : width * pixel_bytes]
        image = lines if pixel_bytes == 1 else lines.reshape(height, width, pixel_bytes)
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=layout)
