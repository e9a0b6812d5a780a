"""Runs inside the Debian 13 root: watches a camera through the product's own code, kills it, and prints what came as JSON."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
from adapt import adapt, kill

from device.camera import FrameSource, open_camera
from device.config import ModelConfig, TextConfig

CONFIG = ModelConfig(text=TextConfig(words=("", "one"), acts=("none", "up")))
LOOKS, BETWEEN_S = 40, 0.05
PATIENCE_S = 60.0


class Watcher:
    """Looks at a camera as ticks do, whose session began with CLOCK_MONOTONIC."""

    def __init__(self, camera: FrameSource) -> None:
        self.camera = camera
        self.seen: list[np.ndarray] = []

    def look(self) -> dict[str, Any]:
        edge_ns = time.monotonic_ns()
        frames, age_s = self.camera.frames_at(edge_ns / 1e9)
        self.seen.append(frames[1].copy())
        time.sleep(BETWEEN_S)
        return {"edge_ns": edge_ns, "exposed_ns": self.camera.exposed_ns, "age_s": age_s, "black": not frames[1].any()}

    def until_fresh(self, newer_than_ns: int) -> list[dict[str, Any]]:
        """Looks, `LOOKS` of them at frames exposed after `newer_than_ns`."""
        found: list[dict[str, Any]] = []
        give_up = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up and sum((each["exposed_ns"] or 0) > newer_than_ns for each in found) < LOOKS:
            found.append(self.look())
        return found

    def until_fault(self) -> str | None:
        give_up = time.monotonic() + PATIENCE_S
        while self.camera.fault is None and time.monotonic() < give_up:
            self.look()
        return self.camera.fault


def main() -> None:
    adapt()
    watcher = Watcher(open_camera("picamera2:0", CONFIG, patient=False))
    before = watcher.until_fresh(0)
    kill()
    fault, noticed_ns, looks_before = watcher.until_fault(), time.monotonic_ns(), len(watcher.seen)
    after = watcher.until_fresh(noticed_ns)
    watcher.camera.close()
    np.savez("/opt/seen.npz", before=watcher.seen[: len(before)], after=watcher.seen[looks_before:])
    report = {"before": before, "after": after, "noticed_ns": noticed_ns, "fault": fault, "fault_at_the_end": watcher.camera.fault}
    print(json.dumps({**report, "counts": watcher.camera.counts}))


if __name__ == "__main__":
    main()
