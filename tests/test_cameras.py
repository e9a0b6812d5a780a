"""Cameras that are devices: the newest frame at an edge, time stamps, losses, silence and return; GStreamer's real pipeline; V4L2."""

from __future__ import annotations

import collections
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_loop import write_bundle
from test_sources import CONFIG, image, levels

from device.audio import SourceError
from device.camera import DEVICES, FrameSource, Shot, live, open_camera
from device.camera.live import GAPS, CameraFault, Device, LiveCamera, Period, Picture, StampClock, within
from device.camera.source import STALE_S, Window
from device.cli import main

HZ = 30
PERIOD_NS = 1_000_000_000 // HZ
PATIENCE_S = 30.0  # for a machine that is busy with other things


def until(condition: Callable[[], Any]) -> Any:
    """What `condition` gives once it is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not (result := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
    return result


def picture(level: int, stamp_ns: int) -> Picture:
    return Picture(stamp_ns, av.VideoFrame.from_ndarray(image(level), format="rgb24"))


class Scripted:
    """A camera that gives what a test puts into it: pictures, None for silence, or an exception to be raised."""

    def __init__(self) -> None:
        self.script: queue.Queue[Picture | Exception] = queue.Queue()
        self.opened = self.closed = 0
        self.refuse: Exception | None = None

    def open(self) -> Device:
        self.opened += 1
        if self.refuse is not None:
            raise self.refuse
        return self

    def read(self, timeout_s: float) -> Picture | None:
        try:
            item = self.script.get(timeout=min(timeout_s, 0.01))
        except queue.Empty:
            return None
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-off and patience of a tenth of a second rather than seconds."""
    monkeypatch.setattr(live, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(live, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(live, "SILENT_S", 0.2)


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


def see(camera: FrameSource, at_ns: int) -> tuple[tuple[int, int], float]:
    """What a tick with its edge at CLOCK_MONOTONIC `at_ns` is shown, of a camera whose session begins at 0."""
    frames, age_s = camera.frames_at(at_ns / 1e9)
    return levels(frames), age_s


def test_a_tick_sees_the_newest_frame_before_its_edge_with_its_age(scripted: Scripted) -> None:
    now_ns = time.monotonic_ns()
    for i in range(10):
        scripted.script.put(picture(20 * i, now_ns - (10 - i) * PERIOD_NS))
    camera = LiveCamera(CONFIG, scripted.open, lambda: 0)
    until(lambda: len(camera._arrived) == 10)
    edge_ns = now_ns - 4 * PERIOD_NS - 1
    pair, age_s = see(camera, edge_ns)
    assert pair == (40, 100), "the newest is of just before the edge, and the other the last that is half a tick older"
    assert age_s == pytest.approx((PERIOD_NS - 1) / 1e9, abs=1e-6)
    assert camera.exposed_ns is not None and abs(camera.exposed_ns - (now_ns - 5 * PERIOD_NS)) <= 1000
    pair, age_s = see(camera, now_ns - 4 * PERIOD_NS + 1000)
    assert pair[1] == 120, "a frame counts from its exposure on"
    assert see(camera, now_ns)[0][1] == 180
    camera.close()
    assert (scripted.opened, scripted.closed) == (1, 1)


def test_a_camera_that_rests_keeps_no_frames_and_goes_on(scripted: Scripted) -> None:
    now_ns = time.monotonic_ns()
    camera = LiveCamera(CONFIG, scripted.open, lambda: 0)
    camera.resting = True
    for i in range(5):
        scripted.script.put(picture(20 * i, now_ns - (10 - i) * PERIOD_NS))
    until(lambda: scripted.script.empty())
    scripted.script.put(picture(100, now_ns - 5 * PERIOD_NS))
    until(lambda: scripted.script.empty())
    camera.resting = False
    scripted.script.put(picture(200, now_ns - PERIOD_NS))
    until(lambda: len(camera._arrived) > 0)
    assert see(camera, now_ns)[0] == (200, 200)
    assert camera.fault is None
    camera.close()


@given(
    exposures=st.lists(st.integers(live.CLOSEST_NS, 400_000_000), min_size=1, max_size=40),
    edges=st.lists(st.integers(1, 400_000_000), min_size=1, max_size=40),
)
def test_no_tick_ever_sees_a_frame_exposed_after_its_edge(exposures: list[int], edges: list[int]) -> None:
    at_ns = np.cumsum(exposures) + 10**12
    coming = collections.deque(Shot(ns / 1e9, image(i)) for i, ns in enumerate(at_ns))
    window = Window(CONFIG, lambda: coming.popleft() if coming else None)
    for edge_ns in np.cumsum(edges) + 10**12:
        frames, age_s, newest_s = window.at(edge_ns / 1e9, 0.0)
        before = np.flatnonzero(at_ns <= edge_ns)
        if not before.size:
            assert newest_s is None and not frames.any()
            continue
        newest = before[-1]
        assert newest_s == at_ns[newest] / 1e9 <= edge_ns / 1e9
        assert age_s == pytest.approx((edge_ns - at_ns[newest]) / 1e9, abs=1e-6)
        assert levels(frames)[1] == (newest if age_s <= STALE_S else 0), "the newest of all that are not after the edge"


def test_a_tick_never_waits_for_a_camera_that_does_not_answer() -> None:
    go = threading.Event()

    def hang() -> Device:
        go.wait(PATIENCE_S)
        raise CameraFault("gone")

    camera = LiveCamera(CONFIG, hang, lambda: 0)
    shown = [see(camera, ns) for ns in (10**8, 2 * 10**8, 3 * 10**9)]
    assert shown == [((0, 0), 0.1), ((0, 0), 0.2), ((0, 0), 3.0)], "black, as old as the session, at once"
    assert camera.counts["stale_frames"] == 1
    go.set()
    camera.close()


@pytest.mark.usefixtures("brisk")
def test_a_camera_that_fails_is_closed_and_opened_again_with_back_off(scripted: Scripted) -> None:
    camera = LiveCamera(CONFIG, scripted.open, lambda: 0)
    scripted.script.put(picture(50, time.monotonic_ns()))
    until(lambda: camera._arrived)
    scripted.refuse = OSError("no such device")
    scripted.script.put(OSError("USB disconnect"))
    until(lambda: scripted.opened > 3)
    assert scripted.closed == 1
    assert camera.fault == "OSError: USB disconnect; check the camera and its cable", "why it stopped, not how the attempts ended"
    see(camera, time.monotonic_ns())
    assert camera.counts["blind_ticks"] == 1
    scripted.refuse = None
    back_ns = time.monotonic_ns()
    scripted.script.put(picture(80, back_ns))
    until(lambda: camera.fault is None and see(camera, time.monotonic_ns())[0][1] == 80)
    camera.close()
    assert scripted.closed == 2


@pytest.mark.usefixtures("brisk")
def test_a_camera_that_falls_silent_is_opened_again(scripted: Scripted) -> None:
    camera = LiveCamera(CONFIG, scripted.open, lambda: 0)
    scripted.script.put(picture(50, time.monotonic_ns()))
    assert "no frame came" in until(lambda: camera.fault)
    until(lambda: scripted.opened > 1)
    scripted.script.put(picture(60, time.monotonic_ns()))
    until(lambda: camera.fault is None)
    camera.close()


@pytest.mark.usefixtures("brisk")
def test_a_driver_that_hangs_is_left_behind(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "CLOSE_S", 0.1)
    hung = threading.Event()
    monkeypatch.setattr(scripted, "close", lambda: hung.wait(PATIENCE_S))
    camera = LiveCamera(CONFIG, scripted.open, lambda: 0)
    scripted.script.put(picture(50, time.monotonic_ns()))
    scripted.script.put(OSError("USB disconnect"))
    until(lambda: scripted.opened > 1)
    scripted.script.put(picture(70, time.monotonic_ns()))
    until(lambda: camera.fault is None and see(camera, time.monotonic_ns())[0][1] == 70)
    camera.close()
    hung.set()


def test_what_comes_too_late_is_put_away() -> None:
    go, put_away = threading.Event(), queue.SimpleQueue[str]()

    def slow() -> str:
        go.wait(PATIENCE_S)
        return "device"

    with pytest.raises(CameraFault, match=r"opening it took longer than 0 s.*unplug"):
        within(0.01, "opening it", slow, put_away.put)
    go.set()
    assert put_away.get(timeout=PATIENCE_S) == "device"
    assert within(PATIENCE_S, "opening it", lambda: 3) == 3
    with pytest.raises(TimeoutError, match="its own"):
        within(PATIENCE_S, "opening it", lambda: (_ for _ in ()).throw(TimeoutError("its own")))


# --- time stamps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clock", [time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME, time.CLOCK_REALTIME])
def test_stamps_of_any_clock_become_monotonic(monkeypatch: pytest.MonkeyPatch, clock: int) -> None:
    apart_ns = {time.CLOCK_MONOTONIC: 0, time.CLOCK_BOOTTIME: 7_000_000_000_000, time.CLOCK_REALTIME: 10**18}
    monkeypatch.setattr(live.time, "monotonic_ns", lambda: 5 * 10**12)
    monkeypatch.setattr(live.time, "clock_gettime_ns", lambda which: 5 * 10**12 + apart_ns[which])
    stamps = StampClock()
    for age_ns in (90_000_000, 50_000_000, 10_000_000):
        assert stamps.monotonic_ns(5 * 10**12 + apart_ns[clock] - age_ns, 5 * 10**12) == 5 * 10**12 - age_ns


@pytest.mark.parametrize("step_s", [-3600, -1, 1, 3600])
def test_setting_the_time_of_day_costs_no_frame(monkeypatch: pytest.MonkeyPatch, step_s: int) -> None:
    now_ns, apart_ns = 5 * 10**12, 10**18
    monkeypatch.setattr(live.time, "monotonic_ns", lambda: now_ns)
    monkeypatch.setattr(live.time, "clock_gettime_ns", lambda which: now_ns + (apart_ns if which == time.CLOCK_REALTIME else 0))
    stamps = StampClock()
    for i in range(6):
        now_ns += PERIOD_NS
        apart_ns += step_s * 10**9 if i == 3 else 0
        assert stamps.monotonic_ns(now_ns + apart_ns - 20_000_000, now_ns) == now_ns - 20_000_000


def test_an_old_frame_stays_old() -> None:
    stamps, now_ns = StampClock(), time.monotonic_ns()
    assert stamps.monotonic_ns(now_ns - 10_000_000, now_ns) == now_ns - 10_000_000
    assert stamps.monotonic_ns(now_ns, now_ns + 5 * 10**9) == now_ns, "what a stall held up is not taken for new"


def test_stamps_of_an_unknown_clock_count_from_the_first_arrival() -> None:
    stamps = StampClock()
    begin_ns, now_ns = 10**10, time.monotonic_ns()
    assert stamps.monotonic_ns(begin_ns, now_ns) == now_ns
    assert stamps.monotonic_ns(begin_ns + PERIOD_NS, now_ns + PERIOD_NS + 5_000_000) == now_ns + PERIOD_NS, "jitter of arrival is left out"
    assert stamps.monotonic_ns(begin_ns + PERIOD_NS, now_ns + PERIOD_NS + 6_000_000) is None, "the same frame again"
    later_ns = now_ns + 10**10
    assert stamps.monotonic_ns(5, later_ns) == later_ns, "the device has begun anew"


@given(st.lists(st.integers(-(10**9), 10**9), max_size=50))
def test_stamps_never_step_back_nor_into_the_future(steps: list[int]) -> None:
    stamps, last_ns, now_ns = StampClock(), 0, time.monotonic_ns()
    for i, step_ns in enumerate(steps):
        now_ns += PERIOD_NS
        exposed_ns = stamps.monotonic_ns(now_ns + step_ns, now_ns)
        assert exposed_ns is None or last_ns < exposed_ns <= now_ns, i
        last_ns = exposed_ns or last_ns


def test_missing_frames_are_counted_from_the_gaps(scripted: Scripted) -> None:
    numbers = [*range(GAPS + 5), *range(GAPS + 7, GAPS + 12), GAPS + 15]
    begin_ns = time.monotonic_ns() - (GAPS + 20) * PERIOD_NS
    for number in numbers:
        scripted.script.put(picture(number, begin_ns + number * PERIOD_NS))
    scripted.script.put(picture(0, begin_ns))  # a step back
    camera = LiveCamera(CONFIG, scripted.open, lambda: 0)
    until(lambda: camera.counts["dropped_frames"] >= 6)
    camera.close()
    assert camera.counts["dropped_frames"] == 2 + 3 + 1


def test_a_camera_that_slows_down_in_the_dark_loses_nothing_for_long() -> None:
    period, at_ns, lost = Period(), 0, []
    for gap_ns in (*[PERIOD_NS] * 40, *[2 * PERIOD_NS] * 40):
        at_ns += gap_ns
        lost.append(period.lost_before(at_ns))
    assert not any(lost[:40]) and not any(lost[40 + GAPS // 2 + 1 :])


# --- the choice ------------------------------------------------------------------------------------------------------


def test_test_pattern_moves_and_never_ends() -> None:
    camera = open_camera("pattern", CONFIG, patient=True)
    shown = [camera.frames_at(0.2 * (tick + 1))[0].copy() for tick in range(20)]
    assert len({frames.tobytes() for frames in shown}) == len(shown)
    assert all((frames[0] != frames[1]).any() and np.ptp(frames) > 200 for frames in shown)
    assert camera.end_s is None
    assert camera.exposed_ns == pytest.approx(4_000_000_000, abs=40_000_000)
    camera.close()


def test_no_backend_is_imported_before_it_is_chosen() -> None:
    code = "import sys, device.camera; print(*({'av', 'gi', 'picamera2', 'libcamera'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", DEVICES)
def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in ("av", "gi", "picamera2"):
        monkeypatch.setitem(sys.modules, module, None)
    for module in ("argus", "libcamera", "v4l2"):
        monkeypatch.delitem(sys.modules, f"device.camera.{module}", raising=False)
    with pytest.raises(SourceError, match=rf"--camera {name}: .*; install the extra"):
        open_camera(name, CONFIG, patient=False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--camera", "argus:left"], "'left' is not the number of a camera"),
        (["--camera", "live"], "say which kind of camera it is: picamera2, argus, v4l2"),
        (["--camera", "v4l2", "--clock", "simulated"], "cannot pace a live device"),
        (["--camera", "pattern", "--clock", "simulated"], "nothing would end this simulated run"),
    ],
)
def test_bad_choices_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str) -> None:
    if options[1].startswith("argus"):
        pytest.importorskip("gi")
    assert main(["run", "--bundle", str(write_bundle(tmp_path / "echo")), "--mic", "none", "--speaker", "none", *options]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and text in errors


# --- GStreamer -------------------------------------------------------------------------------------------------------


@pytest.fixture
def argus() -> Any:
    """The module that wraps GStreamer, where there is GStreamer."""
    pytest.importorskip("gi", reason="PyGObject is not installed (extra 'dev')")
    try:
        from device.camera import argus
    except (ImportError, ValueError) as error:
        pytest.skip(f"no GStreamer: {error}; install gir1.2-gstreamer-1.0 and gstreamer1.0-plugins-base")
    return argus


TEST_SENSOR = "videotestsrc is-live=true pattern=ball"


def test_the_csi_pipeline_runs_with_a_test_picture_for_the_sensor(argus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argus, "SENSOR", TEST_SENSOR)
    camera = open_camera("argus:0", CONFIG, patient=False)
    exposed_ns: list[int] = []
    seen = set()
    while len(seen) < 5:
        edge_ns = time.monotonic_ns()
        frames, _ = until(lambda: (pair := camera.frames_at(time.monotonic_ns() / 1e9))[0].any() and pair)
        assert camera.exposed_ns is not None and edge_ns - live.FRESH_NS < camera.exposed_ns <= time.monotonic_ns()
        exposed_ns.append(camera.exposed_ns)
        seen.add(frames[1].tobytes())
        time.sleep(0.05)
    assert exposed_ns == sorted(exposed_ns)
    assert camera.counts["blind_ticks"] == 0
    camera.close()


def test_a_csi_pipeline_that_ends_is_one_loss_in_the_log_and_one_recovery(
    argus: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sensors = itertools.chain(["videotestsrc is-live=true num-buffers=20", "nonsense", "nonsense"], itertools.repeat(TEST_SENSOR))
    make = argus.ArgusDevice
    monkeypatch.setattr(argus, "ArgusDevice", lambda number: (monkeypatch.setattr(argus, "SENSOR", next(sensors)), make(number))[1])
    files = ("--mic", "none", "--speaker", "none", "--events", str(tmp_path / "events.jsonl"))
    bundle = write_bundle(tmp_path / "echo")
    assert main(["run", "--bundle", str(bundle), "--camera", "argus", *files, "--seconds", "6", "--no-priority"]) == 0
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    losses = [event for event in events if event["event"] == "loss" and "blind_ticks" in event["of"]]
    recoveries = [event for event in events if event["event"] == "recovery" and "blind_ticks" in event]
    assert len(losses) == len(recoveries) == 1
    assert "end of stream" in losses[0]["camera_fault"]
    assert recoveries[0]["blind_ticks"] == events[-1]["blind_ticks"] > 0
    assert events[-1]["camera_fault"] is None
    ages_s = [event["frame_age_s"] for event in events if event["event"] == "tick" and event["tick"] > recoveries[0]["tick"]]
    assert ages_s and max(ages_s) < live.FRESH_NS / 1e9, "the age is in every tick's line"


def test_argus_without_its_element_says_what_to_install(argus: Any) -> None:
    with pytest.raises(CameraFault, match=r"nvarguscamerasrc.*install"):
        argus.ArgusDevice(0)


def test_only_the_sensor_stands_between_the_test_and_the_board(argus: Any) -> None:
    board = argus.PIPELINE.format(sensor=argus.SENSOR.format(number=0), width=argus.WIDTH, height=argus.HEIGHT)
    assert board.startswith("nvarguscamerasrc sensor-id=0 ! ")
    assert board.endswith("appsink name=frames drop=true max-buffers=1 sync=false")


# --- V4L2 --------------------------------------------------------------------------------------------------------------


class FakeContainer:
    """PyAV's view of a V4L2 device: a packet a picture, and EAGAIN when there is none. A pipe stands for the device file."""

    def __init__(self) -> None:
        self.readable, self.writable = os.pipe()
        self.pictures: collections.deque[Any] = collections.deque()
        self.streams = SimpleNamespace(video=[SimpleNamespace(codec_context=SimpleNamespace(thread_count=0))])

    def put(self, level: int, pts_us: int) -> None:
        frame = av.VideoFrame.from_ndarray(image(level), format="rgb24")
        frame.pts, frame.time_base = pts_us, Fraction(1, 1_000_000)
        self.pictures.append(frame)
        os.write(self.writable, b"\0")

    def demux(self, stream: Any) -> Any:
        os.read(self.readable, 1)  # BlockingIOError when there is none, as FFmpeg's EAGAIN
        frame = self.pictures.popleft()
        yield SimpleNamespace(size=1, decode=lambda: [frame])

    def close(self) -> None:
        os.close(self.readable)


def test_v4l2_waits_no_longer_than_it_is_told_and_gives_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    from device.camera import v4l2

    container = FakeContainer()
    monkeypatch.setattr(v4l2.av, "open", lambda path, format, options: container)
    monkeypatch.setattr(v4l2, "_descriptor_of", lambda path: container.readable)
    device = v4l2.V4l2Device("/dev/video0")
    assert not os.get_blocking(container.readable), "FFmpeg must not wait by itself"
    assert device.read(0.01) is None
    for i in range(3):
        container.put(10 * i, 5_000_000 + i * 33_333)
    newest = device.read(1)
    assert newest is not None and newest.stamp_ns == (5_000_000 + 2 * 33_333) * 1000
    assert newest.image.to_ndarray(format="rgb24")[0, 0, 0] == 20
    assert device.read(0.01) is None
    device.close()


def test_v4l2_finds_its_own_descriptor(tmp_path: Path) -> None:
    from device.camera.v4l2 import _descriptor_of

    (tmp_path / "video2").write_bytes(b"")
    (tmp_path / "by-id").symlink_to(tmp_path / "video2")
    with (tmp_path / "by-id").open("rb") as file:
        assert _descriptor_of(str(tmp_path / "by-id")) == file.fileno()


def test_v4l2_without_a_device_says_so(tmp_path: Path) -> None:
    from device.camera.v4l2 import V4l2Device

    with pytest.raises(CameraFault, match=r"video9 cannot be opened.*v4l2-ctl"):
        V4l2Device(str(tmp_path / "video9"))
