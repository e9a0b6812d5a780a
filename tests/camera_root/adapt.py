"""What picamera2 needs to run without a sensor, beside pykms.py and udmabuf.c: a board has raw modes and a DMA heap."""

from __future__ import annotations

from typing import Any

import picamera2.picamera2
from picamera2 import Picamera2
from picamera2.allocators import Allocator, LibcameraAllocator

cameras: list[Picamera2] = []  # in the order in which they were opened


def adapt() -> None:
    """To be called before a camera is opened."""
    original = Picamera2.__init__

    def init(self: Picamera2, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self.allocator = LibcameraAllocator(self.camera)
        cameras.append(self)

    Picamera2.__init__ = init
    Picamera2._get_raw_modes = lambda self: [{"format": "NV12", "size": (640, 480)}]
    picamera2.picamera2.DmaAllocator = Allocator  # one that allocates nothing, until `init` puts libcamera's in its place


def kill() -> None:
    """Stop libcamera's own camera behind picamera2's back: no frame comes any more."""
    cameras[-1].camera.stop()
