"""Runs inside the Debian 13 root: watches libcamera's virtual camera through the product's own code, and prints what came as JSON.

A board needs none of what is adapted here first, nor pykms.py and udmabuf.c beside it: it has screens, a DMA heap and a sensor with raw
modes.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import picamera2.picamera2
from picamera2.allocators import Allocator, LibcameraAllocator

from device.camera import open_camera
from device.config import ModelConfig, TextConfig

CONFIG = ModelConfig(text=TextConfig(words=("", "one"), acts=("none", "up")))
LOOKS = 40  # at edges 50 ms apart
PATIENCE_S = 60.0

cameras: list[Any] = []
original = picamera2.picamera2.Picamera2.__init__


def adapted(self: Any, *arguments: Any, **options: Any) -> None:
    original(self, *arguments, **options)
    self.allocator = LibcameraAllocator(self.camera)  # instead of a DMA heap's
    cameras.append(self)


picamera2.picamera2.DmaAllocator = Allocator
picamera2.picamera2.Picamera2.__init__ = adapted
picamera2.picamera2.Picamera2._get_raw_modes = lambda self: [{"format": "NV12", "size": (640, 480)}]


def look(camera: Any) -> dict[str, Any]:
    """One tick's view, at an edge that is now."""
    edge_ns = time.monotonic_ns()
    frames, age_s = camera.frames_at(edge_ns / 1e9)
    seen.append(frames[1].copy())
    return {"edge_ns": edge_ns, "exposed_ns": camera.exposed_ns, "age_s": age_s, "black": not frames[1].any()}


def looks_until_fresh(camera: Any, newer_than_ns: int) -> list[dict[str, Any]]:
    """Looks from now until `LOOKS` of them were at frames exposed after `newer_than_ns`."""
    found: list[dict[str, Any]] = []
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up and sum((each["exposed_ns"] or 0) > newer_than_ns for each in found) < LOOKS:
        found.append(look(camera))
        time.sleep(0.05)
    return found


seen: list[Any] = []
camera = open_camera("picamera2:0", CONFIG, patient=False)
before = looks_until_fresh(camera, 0)
killed_ns = time.monotonic_ns()
cameras[-1].camera.stop()  # libcamera's own camera, behind picamera2's back: no frame will come any more
stopped_ns = time.monotonic_ns()
give_up = time.monotonic() + PATIENCE_S
while camera.fault is None and time.monotonic() < give_up:
    time.sleep(0.05)
fault, noticed_ns = camera.fault, time.monotonic_ns()
after = looks_until_fresh(camera, noticed_ns)
camera.close()
np.save(sys.argv[1], np.stack(seen))
report = {
    "before": before,
    "after": after,
    "killed_ns": killed_ns,
    "stopped_ns": stopped_ns,
    "noticed_ns": noticed_ns,
    "fault": fault,
    "fault_at_the_end": camera.fault,
    "counts": camera.counts,
    "opened": len(cameras),
}
print(json.dumps(report))
