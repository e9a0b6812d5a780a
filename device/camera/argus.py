"""CSI cameras of a Jetson: Argus, NVIDIA's camera stack with its image processor, through GStreamer."""

from __future__ import annotations

import av
import gi
import numpy as np

from device.camera.live import CameraFault, Picture

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402 - its version has to be named first

# 16:9, which most sensors of these boards have a mode for: nvvidconv stretches what has another shape.
SENSOR = (
    "nvarguscamerasrc sensor-id={number} ! video/x-raw(memory:NVMM),width=1280,height=720,framerate=30/1 ! nvvidconv interpolation-method=1"
)
WIDTH, HEIGHT = 640, 360
# sync=false: a frame is wanted when it is there, not when it would be shown.
PIPELINE = "{sensor} ! video/x-raw,format=RGBA,width={width},height={height} ! appsink name=frames drop=true max-buffers=1 sync=false"


class ArgusDevice:
    """Camera `number` of the board, from 0.

    A stamp is GStreamer's: when `nvarguscamerasrc` had the frame, on CLOCK_MONOTONIC. Argus' own stamp of the exposure, one or two frames
    earlier, does not leave that element in a form that Python can read.
    """

    def __init__(self, number: int) -> None:
        Gst.init(None)
        description = PIPELINE.format(sensor=SENSOR.format(number=number), width=WIDTH, height=HEIGHT)
        try:
            self._pipeline = Gst.parse_launch(description)
        except gi.repository.GLib.Error as error:
            raise CameraFault(
                f"GStreamer cannot make the pipeline: {error.message}; install nvidia-l4t-gstreamer, or choose v4l2"
            ) from error
        self._frames = self._pipeline.get_by_name("frames")
        self._pipeline.use_clock(Gst.SystemClock.obtain())  # CLOCK_MONOTONIC, whatever else the pipeline would offer
        if self._pipeline.set_state(Gst.State.PLAYING) == Gst.StateChangeReturn.FAILURE:
            self._pipeline.set_state(Gst.State.NULL)
            raise CameraFault(f"camera {number} does not start{self._reason()}; check its cable, then: systemctl restart nvargus-daemon")

    def read(self, timeout_s: float) -> Picture | None:
        sample = self._frames.emit("try-pull-sample", round(timeout_s * Gst.SECOND))
        if sample is None:
            if reason := self._reason():
                raise CameraFault(f"the camera stopped{reason}; check its cable, then: systemctl restart nvargus-daemon")
            return None
        buffer = sample.get_buffer()
        mapped, memory = buffer.map(Gst.MapFlags.READ)
        if not mapped:
            raise CameraFault("a frame's memory cannot be read; the camera is opened again")
        try:
            lines = np.frombuffer(memory.data, np.uint8).reshape(HEIGHT, -1)  # lines may be padded
            image = np.ascontiguousarray(lines[:, : WIDTH * 4]).reshape(HEIGHT, WIDTH, 4)
        finally:
            buffer.unmap(memory)
        return Picture(self._pipeline.get_base_time() + buffer.pts, av.VideoFrame.from_ndarray(image, format="rgba"))

    def close(self) -> None:
        self._pipeline.set_state(Gst.State.NULL)

    def _reason(self) -> str:
        """What the pipeline says of its end, if it has ended."""
        message = self._pipeline.get_bus().pop_filtered(Gst.MessageType.ERROR | Gst.MessageType.EOS)
        if message is None:
            return ""
        return f": {message.parse_error()[0].message}" if message.type == Gst.MessageType.ERROR else ": end of stream"
