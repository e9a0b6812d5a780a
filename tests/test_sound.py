"""Microphone and speaker on devices that are simulated down to their time stamps, and streams on a PortAudio that is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from device import live_audio, loopback, portaudio
from device.audio import Samples
from device.live_audio import LiveMicrophone, LiveSpeaker, open_sound
from device.portaudio import SETTLE_PERIODS, AudioDeviceError, Device, Stream, Track, find

RATE, TICK_MS = 16_000, 200
TICK = RATE * TICK_MS // 1000
MS = 1_000_000

# --- a room ---------------------------------------------------------------------------------------------------------------------


class Card:
    """One direction of a sound device: a converter with a crystal, and callbacks of 10 ms that come a little late."""

    def __init__(self, track: Track, hz: int, ppm: float, latency_ms: float, room: Room) -> None:
        self.track, self.hz, self.latency_ns, self.room = track, hz, latency_ms * MS, room
        self.per_ns = hz * (1 + ppm * 1e-6) / 1e9
        self.done, self.skipped, self.frames = 0, 0, hz // 100
        self.away = (np.inf, np.inf)  # no callbacks from … to, in ns
        self.xrun = 0
        self.track.opened(Device(0, "simulated", hz))

    def run(self, until_ns: float) -> None:
        """All callbacks up to then."""
        while (now_ns := (self.done + self.frames) / self.per_ns) <= until_ns:
            if self.away[0] <= now_ns < self.away[1]:
                self.done += self.frames
                self.skipped = self.done
                continue
            if self.skipped == self.done and self.done:
                self.track.opened(self.track.device)
            # The stamp of the first sample: captured a block ago, or heard after what waits in the device.
            capture = self.track.direction == "input"
            at_ns = self.done / self.per_ns - self.latency_ns if capture else now_ns + self.latency_ns
            samples = self.room.heard(at_ns + np.arange(self.frames) / self.per_ns) if capture else np.zeros(self.frames, np.float32)
            late_ns = self.room.random.uniform(0, 2 * MS)
            self.track.block(samples, round(at_ns), round(now_ns + late_ns), self.xrun)
            self.xrun = 0
            if not capture:
                self.room.sound(at_ns, self.per_ns, samples)
            self.done += self.frames

    def lose(self, ms: float, status: int) -> None:
        """The next samples are lost, and the callback after them is told."""
        self.done += round(ms * self.hz / 1000)
        self.xrun = status


class Room:
    """What the speaker plays is in the air at its time, and comes to the microphone `echo_ms` later."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mic: tuple[int, float], speaker: tuple[int, float], echo_ms: float) -> None:
        self.random, self._echo_ns = np.random.default_rng(0), echo_ms * MS
        self._times, self._air = [np.array([0.0])], [np.zeros(1, np.float32)]
        self.microphone = LiveMicrophone(RATE, TICK)
        self.speaker = LiveSpeaker(RATE, self.microphone)
        self.cards = [Card(self.microphone.track, *mic, 7.3, self), Card(self.speaker.track, *speaker, 21.7, self)]
        self.now_ns = 0.0
        for track in (self.microphone.track, self.speaker.track):
            monkeypatch.setattr(track, "elapsed_ns", lambda track=track: round(self.now_ns) - track.seen[0])
        self.run(1000 * MS)
        self.start_ns = self.now_ns
        self.microphone.start()
        self.speaker.start()
        self.captured: list[Samples] = []
        self.voice: list[Samples] = []
        self.chirp = loopback.chirp(RATE)

    def run(self, until_ns: float) -> None:
        for at_ns in np.append(np.arange(self.now_ns, until_ns, 5 * MS), until_ns):
            for card in reversed(self.cards):  # what is heard must have been played before
                card.run(at_ns)
        self.now_ns = until_ns

    def sound(self, at_ns: float, per_ns: float, samples: Samples) -> None:
        self._times.append(at_ns + np.arange(samples.size) / per_ns)
        self._air.append(samples.copy())

    def heard(self, times_ns: np.ndarray) -> Samples:
        newest = slice(-40, None)
        return np.interp(times_ns - self._echo_ns, np.concatenate(self._times[newest]), np.concatenate(self._air[newest])).astype(
            np.float32
        )

    def tick(self) -> None:
        """One of a session that follows the microphone's crystal."""
        end = (len(self.captured) + 1) * TICK
        edge_ns = self.start_ns + end * 1e9 / RATE / (self.cards[0].per_ns * 1e9 / self.cards[0].hz)
        self.run(edge_ns)
        self.microphone.sync(end)
        self.speaker.sync(end, round(edge_ns))
        for kept, read in ((self.captured, self.microphone.read), (self.voice, self.speaker.heard)):
            kept.append(np.empty(TICK, np.float32))
            read(end - TICK, kept[-1])
        if len(self.captured) % 2:
            self.speaker.put(end + 1600, self.chirp)

    def apart_ms(self, first: int, last: int) -> list[float]:
        """By how much later each chirp is in the microphone than in `voice`."""
        found = []
        for k in range(first, last - 2):
            parts = [np.concatenate(stream[k : k + 3]) for stream in (self.captured, self.voice)]
            matches = [np.correlate(part, self.chirp, "valid") for part in parts]
            peaks = [int(np.argmax(match)) for match in matches]
            if matches[1][peaks[1]] > 0.9 * np.sum(self.chirp**2) and peaks[1] < 2 * TICK and k % 2:
                found.append((peaks[0] - peaks[1]) * 1000 / RATE)
        return found


HARDWARE = [
    ((16_000, 0.0), (16_000, 0.0)),
    ((16_000, 250.0), (16_000, -250.0)),
    ((48_000, 40.0), (44_100, -60.0)),
    ((44_100, -100.0), (48_000, 100.0)),
]


@pytest.mark.parametrize(("mic", "speaker"), HARDWARE)
def test_voice_is_what_the_microphone_hears_to_the_millisecond(
    monkeypatch: pytest.MonkeyPatch, mic: tuple[int, float], speaker: tuple[int, float]
) -> None:
    room = Room(monkeypatch, mic, speaker, echo_ms=23.0)
    for _ in range(90):
        room.tick()
    apart = room.apart_ms(2, 90)
    assert len(apart) >= 30
    assert np.abs(np.array(apart) - 23.0).max() <= 1.0, apart
    assert room.microphone.counts["inserted_samples"] == room.speaker.counts["slipped_samples"] == 0


def test_the_speaker_is_bent_to_the_microphones_crystal(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(monkeypatch, (16_000, 200.0), (16_000, -200.0), echo_ms=10.0)
    for _ in range(120):
        room.tick()
    assert room.speaker._bend == pytest.approx(-400e-6, abs=60e-6), "it runs slower by so much, so a session's sample is less of its own"


def test_what_an_overrun_lost_is_silence_of_the_same_length(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(monkeypatch, (16_000, 0.0), (16_000, 0.0), echo_ms=23.0)
    for k in range(40):
        if k in (15, 21):
            room.cards[0].lose(37.0, portaudio._XRUN["input"])
        if k in (25, 29):
            room.cards[1].lose(55.0, portaudio._XRUN["output"])
        room.tick()
    assert room.microphone.counts["input_xruns"] == room.speaker.counts["output_xruns"] == 2
    late = room.apart_ms(30, 40)
    assert len(late) >= 3 and np.abs(np.array(late) - 23.0).max() <= 1.0, "and nothing has moved"
    true = (room.now_ns - room.start_ns) * RATE / 1e9
    assert room.microphone.position - room.microphone.origin == pytest.approx(true + 400, abs=400), "no shift against the time"
    assert room.microphone.counts["inserted_samples"] == room.microphone.counts["dropped_samples"] == 0


def test_a_card_that_was_away_is_joined_by_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(monkeypatch, (48_000, 0.0), (44_100, 0.0), echo_ms=23.0)
    for k in range(60):
        if k == 10:
            for card in room.cards:
                card.away = (room.now_ns, room.now_ns + 2345 * MS)
        room.tick()
    gone = np.concatenate(room.captured[13:21])
    assert not gone.any() and not np.concatenate(room.voice[13:21]).any()
    late = room.apart_ms(28, 60)
    assert len(late) >= 10 and np.abs(np.array(late) - 23.0).max() <= 1.0
    true = (room.now_ns - room.start_ns) * RATE / 1e9
    assert room.microphone.position - room.microphone.origin == pytest.approx(true + 400, abs=400)
    assert room.microphone.counts["inserted_samples"] == pytest.approx((2.345 + 0.48) * RATE, abs=TICK)
    assert room.speaker.counts["unplayed_samples"] >= 8 * TICK


def test_an_error_in_a_callback_is_counted_and_ends_nothing() -> None:
    def fails(*_: object) -> None:
        raise ValueError("no")

    track = Track("output", "", RATE, fails)
    stream = Stream.__new__(Stream)
    stream._tracks, stream._base = (track,), None
    track.settled.set()
    played, going_on = stream._callback(None, 160, {"current_time": 0.0, "output_buffer_dac_time": 0.0}, 0)
    assert (played, going_on) == (bytes(640), 0)
    assert track.counts["output_callback_errors"] == 1


# --- PortAudio -------------------------------------------------------------------------------------------------------------------


DEVICES: list[dict[str, Any]] = [
    {"index": 0, "name": "HDA Intel: ALC257 (hw:0,0)", "maxInputChannels": 2, "maxOutputChannels": 2, "defaultSampleRate": 48000.0},
    {"index": 1, "name": "USB Speakerphone (hw:1,0)", "maxInputChannels": 1, "maxOutputChannels": 2, "defaultSampleRate": 44100.0},
    {"index": 2, "name": "USB Camera (hw:2,0)", "maxInputChannels": 1, "maxOutputChannels": 0, "defaultSampleRate": 16000.0},
    {"index": 3, "name": "default", "maxInputChannels": 32, "maxOutputChannels": 32, "defaultSampleRate": 44100.0},
]


class FakePyAudio:
    """PyAudio's module and its class at once: streams call back from a thread, on a clock of the wall or the monotonic one."""

    paFloat32 = 1

    def __init__(self, base: int = time.CLOCK_MONOTONIC) -> None:
        self.base, self.opened, self.there = base, [], True  # type: ignore[var-annotated]
        self.live: list[FakeStream] = []

    def PyAudio(self) -> FakePyAudio:
        return self

    def get_default_input_device_info(self) -> dict[str, Any]:
        return DEVICES[3]

    get_default_output_device_info = get_default_input_device_info

    def get_device_count(self) -> int:
        return len(DEVICES)

    def get_device_info_by_index(self, index: int) -> dict[str, Any]:
        return DEVICES[index]

    def is_format_supported(self, rate: int, **options: Any) -> bool:
        device = DEVICES[options.get("input_device", options.get("output_device"))]
        if "hw:" in device["name"] and rate != device["defaultSampleRate"]:
            raise ValueError("Invalid sample rate")
        return True

    def open(self, **options: Any) -> FakeStream:
        if not self.there:
            raise OSError(-9996, "Invalid device")
        self.opened.append(options)
        self.live.append(FakeStream(self, options))
        return self.live[-1]

    def terminate(self) -> None:
        pass


class FakeStream:
    def __init__(self, library: FakePyAudio, options: dict[str, Any]) -> None:
        import threading

        self._library, self._options, self.gone = library, options, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        frames, hz = self._options["frames_per_buffer"], self._options["rate"]
        while not self.gone.wait(0.001):
            now_s = time.clock_gettime(self._library.base)
            times = {"current_time": now_s, "input_buffer_adc_time": now_s - frames / hz, "output_buffer_dac_time": now_s + 0.02}
            captured = np.full(frames, 0.25, np.float32).tobytes() if self._options.get("input") else None
            self._options["stream_callback"](captured, frames, times, 0)

    def close(self) -> None:
        self.gone.set()
        self._thread.join()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakePyAudio:
    fake = FakePyAudio()
    monkeypatch.setattr(portaudio, "pyaudio", lambda: fake)
    return fake


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("wanted", "number", "rate_hz"),
    [("", 3, 16000), ("1", 1, 44100), ("usb speakerphone", 1, 44100), ("HDA Intel: ALC257 (hw:0,0)", 0, 48000), ("Camera", 2, 16000)],
)
def test_a_device_is_chosen_by_default_index_or_name(library: FakePyAudio, wanted: str, number: int, rate_hz: int) -> None:
    device = find(library, "input", wanted, RATE)
    assert (device.number, device.rate_hz) == (number, rate_hz), "at the session's rate where it can, or at its own"


@pytest.mark.parametrize(("wanted", "direction"), [("USB", "input"), ("Theremin", "input"), ("Camera", "output"), ("9", "input")])
def test_a_device_that_is_not_there_is_named_with_those_that_are(library: FakePyAudio, wanted: str, direction: Any) -> None:
    with pytest.raises(AudioDeviceError, match=rf"'{wanted}'.*give the index or the name of one of: 0 HDA Intel"):
        find(library, direction, wanted, RATE)


def test_one_card_has_one_stream_and_one_clock(library: FakePyAudio, stack: ExitStack) -> None:
    microphone, speaker = open_sound(RATE, TICK, "1", "Speakerphone", "audio", stack)
    (options,) = library.opened
    assert options["input"] and options["output"] and options["rate"] == 44100 and options["frames_per_buffer"] == 441
    assert (options["input_device_index"], options["output_device_index"]) == (1, 1)
    assert microphone is not None and speaker is not None
    assert not speaker._follows, "nothing lies between a crystal and itself"
    microphone.start()
    wait_for(lambda: microphone.position - microphone.origin > 2 * TICK)
    heard = np.empty(TICK, np.float32)
    microphone.read(TICK // 2, heard)
    assert heard == pytest.approx(0.25, abs=1e-3), "resampled from 44.1 kHz"


@pytest.mark.parametrize(("mic", "speaker"), [("0", "1"), ("", "")])
def test_two_cards_or_a_plugin_have_two_streams(library: FakePyAudio, stack: ExitStack, mic: str, speaker: str) -> None:
    _, player = open_sound(RATE, TICK, mic, speaker, "audio", stack)
    assert [(bool(o.get("input")), bool(o.get("output"))) for o in library.opened] == [(True, False), (False, True)]
    assert player is not None and player._follows


def test_a_speaker_that_is_the_master_is_not_bent(library: FakePyAudio, stack: ExitStack) -> None:
    _, player = open_sound(RATE, TICK, None, "", "audio", stack)
    assert player is not None and not player._follows
    _, player = open_sound(RATE, TICK, None, "", "soc", stack)
    assert player is not None and player._follows


@pytest.mark.parametrize("base", [time.CLOCK_MONOTONIC, time.CLOCK_REALTIME])
def test_stamps_are_mapped_to_the_monotonic_clock(library: FakePyAudio, stack: ExitStack, base: int) -> None:
    library.base = base
    microphone, _ = open_sound(RATE, TICK, "", None, "audio", stack)
    assert microphone is not None
    position_ns = microphone.track.ns(microphone.track.position)
    assert abs(time.monotonic_ns() - microphone.track.zero_ns() - position_ns) < 10_000 * MS, "and not the decades of the wall clock"


def test_a_device_that_stops_is_opened_again_until_it_is_there(library: FakePyAudio, stack: ExitStack) -> None:
    microphone, _ = open_sound(RATE, TICK, "", None, "audio", stack)
    assert microphone is not None
    library.there = False
    library.live[-1].gone.set()
    wait_for(lambda: microphone.track.elapsed_ns() > 1500 * MS)
    assert len(library.opened) == 1 and microphone.counts["input_reopened"] == 0
    library.there = True
    wait_for(lambda: microphone.counts["input_reopened"] == 1)
    assert microphone.track.elapsed_ns() < live_audio.AWAY_S * 1e9


def test_a_device_that_does_not_open_is_named(library: FakePyAudio, stack: ExitStack) -> None:
    library.there = False
    with pytest.raises(AudioDeviceError, match=r"sound input '2' does not open at 16000 Hz.*--mic live:NAME"):
        open_sound(RATE, TICK, "2", None, "audio", stack)


# --- loopback --------------------------------------------------------------------------------------------------------------------


def test_a_loopback_is_measured_to_the_sample() -> None:
    sound, due = loopback.chirp(RATE), [TICK * 5 * (k + 1) for k in range(8)]
    voice = np.zeros(TICK * 60, np.float32)
    for at in due:
        voice[at + 640 : at + 640 + sound.size] = sound
    heard = 0.1 * np.roll(voice, 160) + 1e-3 * np.random.default_rng(0).standard_normal(voice.size).astype(np.float32)
    found = loopback.evaluate(RATE, TICK_MS, 60, heard, voice, due)
    assert (found.heard, found.hardware_ms, found.voice_ms, found.spread_ms) == (8, 50.0, 10.0, 0.0)
    assert found.level_db == pytest.approx(-20, abs=0.2)
    assert found.floor_ms == 200 + 60 + 50
    assert "reaction floor     310 ms = tick 200 + offset 60 + hardware 50" in loopback.render(found)


def test_a_loopback_that_hears_nothing_says_what_to_do() -> None:
    due = [TICK * 5 * (k + 1) for k in range(8)]
    hiss = 1e-2 * np.random.default_rng(0).standard_normal(TICK * 60).astype(np.float32)
    with pytest.raises(loopback.LoopbackError, match="0 of 8 chirps were heard; turn the speaker up"):
        loopback.evaluate(RATE, TICK_MS, 60, hiss, hiss, due)


def test_settling_takes_less_than_what_a_device_may_take_to_be_back() -> None:
    slowest_s = portaudio.BACK_OFF_S[-1] + SETTLE_PERIODS * portaudio.PERIOD_MS / 1000
    assert slowest_s < 2 - 0.3, "0.3 s are left for PortAudio's search, which takes 0.15"
