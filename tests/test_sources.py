"""Microphone, speaker and camera: what a tick is given, and what is done when it is late, missing or stale."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr

from device.audio import Line, Ring, Silence, SoundFile, SourceError, VirtualPlayout
from device.camera import FrameCamera, NoCamera, Shot, open_camera
from device.config import ModelConfig, TextConfig

CONFIG = ModelConfig(text=TextConfig(words=("", "one"), acts=("none", "up")))
RATE, TICK = CONFIG.audio.sample_rate_hz, CONFIG.tick_samples
RNG = np.random.default_rng(0)


def noise(samples: int) -> np.ndarray:
    return RNG.uniform(-0.5, 0.5, samples).astype(np.float32)


# --- microphone ------------------------------------------------------------------------------------------------


def read_whole(source: SoundFile, step: int = TICK) -> np.ndarray:
    pieces = []
    while source.length is None or len(pieces) * step < source.length:
        out = np.empty(step, np.float32)
        source.read(len(pieces) * step, out)
        pieces.append(out)
    return np.concatenate(pieces)


@pytest.mark.parametrize(("rate_hz", "channels"), [(16000, 1), (16000, 2), (8000, 1), (44100, 2), (48000, 6)])
def test_any_rate_and_channels(tmp_path: Path, rate_hz: int, channels: int) -> None:
    sound = noise(channels * round(2.37 * rate_hz)).reshape(-1, channels)
    soundfile.write(tmp_path / "in.wav", sound, rate_hz, subtype="FLOAT")
    source = SoundFile(tmp_path / "in.wav", RATE)
    got = read_whole(source)
    expected = soxr.resample(sound.mean(axis=1), rate_hz, RATE)
    assert source.length is not None
    assert abs(source.length - len(expected)) <= 1, "resampled in pieces or at once, the length is the same"
    np.testing.assert_allclose(got[: len(expected) - 1], expected[: len(got)][:-1], atol=1e-5)
    assert not got[source.length :].any(), "the last tick is padded with zeros"


def test_the_end_is_known_with_the_last_tick(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "in.wav", noise(3 * TICK), RATE)
    source, out = SoundFile(tmp_path / "in.wav", RATE), np.empty(TICK, np.float32)
    for tick in range(3):
        source.read(tick * TICK, out)
    assert source.length == 3 * TICK


def test_a_tick_begins_with_the_samples_before_it_and_lost_ticks_are_passed_over(tmp_path: Path) -> None:
    sound = noise(40 * TICK)
    soundfile.write(tmp_path / "in.wav", sound, RATE, subtype="FLOAT")
    source, context = SoundFile(tmp_path / "in.wav", RATE), CONFIG.context_samples
    line = Line(CONFIG, source, VirtualPlayout(RATE, lambda: 0), 0)
    line.gather(0, 0)
    np.testing.assert_array_equal(line.mic, np.concatenate([np.zeros(context, np.float32), sound[:TICK]]))
    for tick in (1, 2, 33):
        line.gather(tick, 0)
        np.testing.assert_array_equal(line.mic, sound[tick * TICK - context : (tick + 1) * TICK])


@pytest.mark.parametrize("content", [None, b"", b"RIFF nonsense"])
def test_a_bad_microphone_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError, match=r"bad\.wav.*give a WAV"):
        SoundFile(path, RATE)


# --- speaker ---------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.samples = 0

    def now_ns(self) -> int:
        return -(-self.samples * 1_000_000_000 // RATE)


def heard(playout: VirtualPlayout, start: int, count: int) -> np.ndarray:
    out = np.empty(count, np.float32)
    playout.sync(start + count, 0)
    playout.heard(start, out)
    return out


def test_ring_wraps() -> None:
    ring, stream = Ring(100), noise(1000)
    for start in range(0, 1000, 40):
        ring.write(start, stream[start : start + 40])
        out = np.empty(min(100, start + 40), np.float32)
        ring.read(start + 40 - out.size, out)
        np.testing.assert_array_equal(out, stream[start + 40 - out.size : start + 40])
    ring.clear(950, 30)
    out = np.empty(100, np.float32)
    ring.read(900, out)
    np.testing.assert_array_equal(np.flatnonzero(out == 0), np.arange(50, 80))


def test_speech_plays_where_it_is_due_for_longer_than_any_ring() -> None:
    clock, offset = Clock(), 960
    playout = VirtualPlayout(RATE, clock.now_ns)
    speech = noise(400 * TICK)
    for tick in range(400):
        clock.samples = (tick + 1) * TICK
        got = heard(playout, tick * TICK, TICK)
        expected = speech[max(0, (tick - 1) * TICK - offset) : tick * TICK - offset] if tick else speech[:0]
        np.testing.assert_array_equal(got[TICK - len(expected) :], expected)
        assert playout.put((tick + 1) * TICK + offset, speech[tick * TICK : (tick + 1) * TICK]) == 0


def test_late_speech_loses_its_late_part_and_the_gap_is_heard_as_zeros() -> None:
    clock = Clock()
    playout = VirtualPlayout(RATE, clock.now_ns)
    speech = np.ones(TICK, np.float32)
    clock.samples = TICK + 1000
    assert playout.put(TICK + 960, speech) == 40
    clock.samples = 3 * TICK
    got = heard(playout, TICK, 2 * TICK)
    np.testing.assert_array_equal(np.flatnonzero(got), np.arange(1000, TICK + 960))
    assert playout.put(TICK, speech) == TICK, "all of it is late"
    clock.samples = 4 * TICK
    assert not heard(playout, 3 * TICK, TICK).any()


def test_an_hour_of_stall_leaves_no_old_speech_behind() -> None:
    clock = Clock()
    playout = VirtualPlayout(RATE, clock.now_ns)
    playout.put(960, np.ones(TICK, np.float32))
    clock.samples = 3600 * RATE
    assert not heard(playout, 3600 * RATE - TICK, TICK).any()


# --- camera ----------------------------------------------------------------------------------------------------


def image(level: int, height: int = 120, width: int = 160) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def write_video(path: Path, levels: list[int], rate: int, times: list[int] | None = None, size: tuple[int, int] = (120, 160)) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate, width=size[1], height=size[0], pix_fmt="bgr0")
        for i, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(image(level, *size), format="rgb24")
            frame.pts = i if times is None else times[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def levels(frames: np.ndarray) -> tuple[int, int]:
    assert frames.shape == (2, 120, 160, 3)
    assert frames.dtype == np.uint8
    return int(frames[0, 60, 80, 0]), int(frames[1, 60, 80, 0])


def test_video_is_shown_by_presentation_time(tmp_path: Path) -> None:
    # Frames at 0, 33, 67, 100 ms and so on, and a pause between the 9th and the 10th.
    times = [*range(9), *range(30, 40)]
    write_video(tmp_path / "in.mkv", [10 * t // 2 for t in times], 30, times)
    camera = open_camera(tmp_path / "in.mkv", CONFIG, patient=True)
    frames, age_s = camera.frames_at(0.2)
    assert levels(frames) == (5 * 3, 5 * 6)
    assert age_s == pytest.approx(0.0, abs=1e-3)
    frames, age_s = camera.frames_at(0.4)
    assert levels(frames) == (5 * 5, 5 * 8), "the newest before the edge, and the one half a tick before that"
    assert age_s == pytest.approx(0.4 - 8 / 30, abs=1e-3)
    frames, age_s = camera.frames_at(1.2)
    assert levels(frames) == (5 * 33, 5 * 36)
    assert camera.end_s is None
    frames, age_s = camera.frames_at(1.4)
    assert camera.end_s == pytest.approx(40 / 30, abs=2e-3)
    assert levels(frames) == (5 * 36, 5 * 39)
    frames, age_s = camera.frames_at(2.4)
    assert levels(frames) == (0, 0), "over a second old: black"
    assert age_s == pytest.approx(2.4 - 39 / 30, abs=1e-3), "with its age"
    assert camera.counts == {"stale_frames": 1}
    camera.close()


def test_no_frame_from_after_the_edge() -> None:
    camera = FrameCamera(CONFIG, iter([Shot(0.81, image(50)), Shot(1.0, image(100)), 1.1]), patient=True)
    frames, age_s = camera.frames_at(0.8)
    assert (levels(frames), age_s) == ((0, 0), 0.8), "nothing seen yet"
    frames, age_s = camera.frames_at(0.99)
    assert (levels(frames), age_s) == ((50, 50), pytest.approx(0.18))
    frames, age_s = camera.frames_at(1.0)
    assert (levels(frames), age_s) == ((50, 100), 0.0)
    camera.close()


def test_folder_of_images_at_ten_a_second_in_order_of_name(tmp_path: Path) -> None:
    for i in range(12):
        with av.open(str(tmp_path / f"frame{i:02}.png"), "w", format="image2", options={"update": "1"}) as container:
            stream = container.add_stream("png", rate=1, width=160, height=120, pix_fmt="rgb24")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image(20 * i), format="rgb24")))
            container.mux(stream.encode(None))
    camera = open_camera(tmp_path, CONFIG, patient=True)
    for tick in range(5):
        frames, age_s = camera.frames_at(round((tick + 1) * 0.2, 3))
        assert levels(frames) == (20 * (2 * tick + 1), 20 * (2 * tick + 2))
        assert age_s == pytest.approx(0.0, abs=1e-6)
    camera.frames_at(1.2)
    assert camera.end_s == pytest.approx(1.2)
    camera.close()


def test_frames_are_scaled_to_cover_and_cut_in_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((240, 640, 3), np.uint8)
    wide[:, 160:480] = (200, 100, 50)  # the middle 4:3 part
    with av.open(str(tmp_path / "wide.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10, width=640, height=240, pix_fmt="bgr0")
        container.mux(stream.encode(av.VideoFrame.from_ndarray(wide, format="rgb24")))
        container.mux(stream.encode(None))
    camera = open_camera(tmp_path / "wide.mkv", CONFIG, patient=True)
    frames, _ = camera.frames_at(0.2)
    assert np.abs(frames[1, :, 2:-2].astype(int) - (200, 100, 50)).max() <= 2
    camera.close()


def test_a_stalled_camera_never_holds_up_a_tick_and_comes_back() -> None:
    go = threading.Event()

    def shots() -> Iterator[Shot | float]:
        yield Shot(0.0, image(10))
        go.wait(10)
        yield Shot(1.9, image(20))
        yield 2.0

    camera = FrameCamera(CONFIG, shots(), patient=False)
    time.sleep(0.05)
    begin = time.monotonic()
    seen = [(levels(frames), age_s) for frames, age_s in (camera.frames_at(0.2 * (tick + 1)) for tick in range(8))]
    assert time.monotonic() - begin < 0.1
    assert [age_s for _, age_s in seen] == pytest.approx([0.2 * (tick + 1) for tick in range(8)]), "the age grows"
    assert [pair for pair, _ in seen] == [(10, 10)] * 5 + [(0, 0)] * 3, "black after a second"
    go.set()
    time.sleep(0.05)
    frames, age_s = camera.frames_at(2.0)
    assert (levels(frames), age_s) == ((10, 20), pytest.approx(0.1))
    assert camera.counts == {"stale_frames": 3}
    camera.close()


def test_a_decoder_that_fails_is_a_camera_that_ended() -> None:
    def shots() -> Iterator[Shot | float]:
        yield Shot(0.0, image(10))
        raise ValueError("broken stream")

    camera = FrameCamera(CONFIG, shots(), patient=True)
    assert levels(camera.frames_at(0.2)[0]) == (10, 10)
    assert camera.fault == "broken stream"
    camera.close()


def test_closing_lets_a_full_decoder_go() -> None:
    camera = FrameCamera(CONFIG, (Shot(i / 1000, image(0)) for i in range(100_000)), patient=False)
    time.sleep(0.02)
    camera.close()
    assert not camera._thread.is_alive()


def test_no_camera_is_black_and_ages() -> None:
    frames, age_s = NoCamera(CONFIG).frames_at(12.4)
    assert (levels(frames), age_s) == ((0, 0), 12.4)


def test_bad_cameras_are_named(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "sound.wav", noise(1000), RATE)
    (tmp_path / "text.mkv").write_text("not a video")
    (tmp_path / "empty").mkdir()
    for name, remedy in (("sound.wav", "no video"), ("text.mkv", "video file or"), ("empty", "no images"), ("absent.mkv", "video file or")):
        with pytest.raises(SourceError, match=rf"{name}.*{remedy}"):
            open_camera(tmp_path / name, CONFIG, patient=True)


def test_silence() -> None:
    out = np.ones(TICK, np.float32)
    Silence().read(0, out)
    assert not out.any()
