"""picamera2 and libcamera as Debian 13 has them, in a root of their own: a virtual camera shows hands to the product's own code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest

from device.camera.source import STALE_S
from export.hands import draw_hand

HERE = Path(__file__).parent / "camera_root"
ROOT = Path(__file__).parents[1] / "build" / "camera-root"
WIDTH, HEIGHT = 640, 480
LOOKS = 40  # as in watch.py

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="a root of its own needs root's rights"),
    pytest.mark.skipif(not (ROOT / "made").exists(), reason=f"no Debian 13 root in {ROOT}; make it with: make camera-test"),
]


class Watched(NamedTuple):
    """What `watch.py` reports, and the newest frames that it was shown before and after the camera was killed: u8[N, H, W, 3]."""

    report: dict[str, Any]
    before: np.ndarray
    after: np.ndarray

    @property
    def looks(self) -> list[dict[str, Any]]:
        return [*self.report["before"], *self.report["after"]]

    @classmethod
    def read(cls, report: str) -> Watched:
        seen = np.load(ROOT / "opt" / "seen.npz")
        return cls(json.loads(report.splitlines()[-1]), seen["before"], seen["after"])


@pytest.fixture(scope="module")
def hands() -> list[np.ndarray]:
    """Ten pictures, u8[480, 640, 3] RGB, grey left and right: photographs of real hands where there are any, otherwise drawn ones."""
    photos = Path(os.environ.get("COPRESENCE_DATA") or Path(__file__).parents[2] / "shared" / "data") / "signs"
    rng = np.random.default_rng(0)
    pictures = []
    for digit in range(10):
        files = sorted((photos / str(digit)).glob("*"))
        hand = cv2.cvtColor(cv2.imread(str(files[0])), cv2.COLOR_BGR2RGB) if files else draw_hand(digit, rng)
        hand = cv2.resize(hand, (HEIGHT, HEIGHT), interpolation=cv2.INTER_CUBIC)
        pictures.append(np.pad(hand, ((0, 0), ((WIDTH - HEIGHT) // 2,) * 2, (0, 0)), constant_values=128))
    return pictures


@pytest.fixture(scope="module")
def furnished() -> Path:
    """The root, with this checkout's `device` in it."""
    inside = ROOT / "opt" / "copresence"
    shutil.rmtree(inside, ignore_errors=True)
    shutil.copytree(HERE.parents[1] / "device", inside / "device", ignore=shutil.ignore_patterns("__pycache__"))
    for script in HERE.glob("*.py"):
        shutil.copy(script, inside)
    return ROOT


@pytest.fixture(scope="module")
def libcamera(furnished: Path, hands: list[np.ndarray]) -> Watched:
    """libcamera's virtual camera, watched through picamera2."""
    shown = furnished / "opt" / "hands"
    shutil.rmtree(shown, ignore_errors=True)
    shown.mkdir()
    for i, hand in enumerate(hands):
        cv2.imwrite(str(shown / f"{i}.jpg"), cv2.cvtColor(hand, cv2.COLOR_RGB2BGR))
    configuration = furnished / "usr" / "share" / "libcamera" / "pipeline" / "virtual"
    configuration.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "virtual.yaml", configuration)
    inside = "env -i PATH=/usr/bin:/bin PYTHONPATH=/opt/copresence LD_PRELOAD=/opt/udmabuf.so python3 /opt/copresence/watch.py"
    # A mount namespace of its own: nothing stays mounted, whatever happens.
    steps = f'mount -t proc proc "{ROOT}/proc" && mount --rbind /dev "{ROOT}/dev" && exec chroot "{ROOT}" {inside}'
    done = subprocess.run(["unshare", "--mount", "sh", "-c", steps], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return Watched.read(done.stdout)


def likeness(frame: np.ndarray, hands: list[np.ndarray]) -> tuple[int, float]:
    """Which of the hands it is, and how much it is it."""
    small = [cv2.resize(hand, (frame.shape[1], frame.shape[0]), interpolation=cv2.INTER_AREA) for hand in hands]
    alike = [np.corrcoef(frame.ravel(), each.ravel())[0, 1] for each in small]
    return int(np.argmax(alike)), float(max(alike))


def test_the_hands_arrive_in_the_bundles_size_and_right_colours(libcamera: Watched, hands: list[np.ndarray]) -> None:
    frames = [frame for frame in (*libcamera.before, *libcamera.after) if frame.any()]
    assert {frame.shape for frame in frames} == {(120, 160, 3)}
    assert len(frames) >= 2 * LOOKS
    found = [likeness(frame, hands) for frame in frames]
    assert min(alike for _, alike in found) > 0.95
    assert len({which for which, _ in found}) == 10, "every picture that the camera was given"


def test_time_stamps_rise_on_the_monotonic_clock_and_never_pass_the_edge(libcamera: Watched) -> None:
    looks = [each for each in libcamera.looks if each["exposed_ns"]]
    exposed_ns = [each["exposed_ns"] for each in looks]
    assert exposed_ns == sorted(exposed_ns) and len({*exposed_ns}) > LOOKS
    for each in looks:
        assert each["exposed_ns"] <= each["edge_ns"] + 1000, "rounded to a float of seconds, and no more"
        assert each["age_s"] == pytest.approx((each["edge_ns"] - each["exposed_ns"]) / 1e9, abs=1e-5)
    ages_s = sorted(each["age_s"] for each in libcamera.report["before"] if not each["black"])
    assert ages_s[len(ages_s) // 2] < STALE_S, "on another clock they would be hours old"


def test_a_camera_that_is_killed_comes_back(libcamera: Watched) -> None:
    assert "check the camera" in libcamera.report["fault"]
    assert libcamera.report["fault_at_the_end"] is None
    assert libcamera.report["counts"]["blind_ticks"] > 0
    assert sum((each["exposed_ns"] or 0) > libcamera.report["noticed_ns"] for each in libcamera.report["after"]) == LOOKS
