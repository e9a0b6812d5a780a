"""Streams of sound devices by PortAudio's callbacks, counted by the time that passes; the only module that imports PyAudio."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from device.audio import Samples
from device.steering import Stamp

PERIOD_MS = 10  # of a callback; what is captured waits up to a period before the loop can see it
START_TIMEOUT_S = 4.0  # PulseAudio's first callback took up to 1.9 s
START_ATTEMPTS = 3  # a stream that runs empty while it starts may hang for good (seen on PulseAudio, on a machine at its limit)
SETTLE_PERIODS = 48  # PulseAudio works off a backlog in the first 30 periods
STAMPS = 8  # the median of so many of the device's time stamps is believed
AWAY_S = 0.5  # no callback for so long: the device is gone; PulseAudio was never seen to pause longer than 0.1 s
BACK_OFF_S = (0.1, 0.2, 0.4, 0.8)  # between attempts to open it again; with a stream's start the last is still under 2 s
LEAST_LOSS_NS = 1_000_000  # stamps of hardware are exact to some 0.1 ms

Direction = Literal["input", "output"]
_STAMPS: dict[Direction, str] = {"input": "input_buffer_adc_time", "output": "output_buffer_dac_time"}
_XRUN: dict[Direction, int] = {"input": 0x2, "output": 0x4}  # paInputOverflow, paOutputUnderflow (portaudio.h)
_CONTINUE = 0  # paContinue
_one_at_a_time = threading.Lock()  # or standard error would be given back to the wrong place
# PortAudio's stamps are ALSA's: the first on `hw:` devices, the second on the null and pulse plugins.
_BASES: tuple[int, ...] = (time.CLOCK_MONOTONIC, time.CLOCK_REALTIME, time.CLOCK_MONOTONIC_RAW)


class AudioDeviceError(RuntimeError):
    """No PortAudio, or no device that runs. Remedy: attach one, or name files."""


class Device(NamedTuple):
    """One of PortAudio's devices, used in one direction."""

    number: int  # PortAudio's index
    name: str
    rate_hz: int  # that it will be opened at

    @property
    def hardware(self) -> bool:
        """Whether it is one card; the plugins' devices (default, pulse, dmix) lead to any number of them."""
        return "(hw:" in self.name


class Track:
    """One direction of a stream: its blocks, and where on CLOCK_MONOTONIC they lie.

    Positions are samples at the device's rate. What a device did not deliver or take counts as well, by the time that it lasted:
    a later sample never moves into an earlier one's place. Written by the callback alone; `seen` is one object, read by the loop.
    """

    def __init__(self, direction: Direction, wanted: str, session_hz: int, block: Callable[[int, int, Samples, int], None]) -> None:
        """`block(lost, at, samples, seen_ns)` is called for every block of samples from position `at` on, to take or to fill.

        So many as `lost` are missing before it.
        """
        self.direction, self.wanted, self.session_hz = direction, wanted, session_hz
        self.device = Device(-1, "", session_hz)
        self.position = 0
        self.called_ns = 0  # CLOCK_MONOTONIC of the newest callback
        self.seen = (0, 0)  # the same, once it is settled, and the position after it
        self.counts = {f"{direction}_{what}": 0 for what in ("xruns", "callback_errors", "reopened")}
        self.settled = threading.Event()
        self._exchange = block
        self._given = 0  # up to this position
        self._blocks = 0  # since the stream was opened
        self._zeros, self._seen_zeros = np.zeros(STAMPS, np.int64), np.zeros(STAMPS, np.int64)  # of the newest callbacks
        self._last_zero_ns: int | None = None  # by the callbacks before it went away

    def elapsed_ns(self) -> int:
        """Since the newest callback of which anything was of use."""
        return time.monotonic_ns() - self.seen[0]

    def stamp(self, origin_ns: int) -> Stamp | None:
        """A master's: the device time `origin_ns` is session time 0."""
        seen_ns, position = self.seen
        return Stamp(seen_ns, self.ns(position) - origin_ns, origin_ns) if seen_ns else None

    def zero_ns(self) -> int:
        """CLOCK_MONOTONIC when sample 0 passed the converter, were its crystal exact."""
        return int(np.median(self._zeros))

    def ns(self, position: int) -> int:
        """The device's time at a position."""
        return position * 1_000_000_000 // self.device.rate_hz

    def opened(self, device: Device) -> None:
        """A stream begins; no callback has come yet. The rate must be that of the streams before."""
        if self.settled.is_set():
            self._last_zero_ns = int(np.median(self._seen_zeros))
        self.settled.clear()
        self.device, self._blocks = device, 0

    def block(self, samples: Samples, stamp_ns: int, seen_ns: int, status: int) -> None:
        """A callback's block, whose first sample passes the converter at `stamp_ns`; seen at `seen_ns`."""
        if status & _XRUN[self.direction]:
            self.counts[f"{self.direction}_xruns"] += 1
            if self.settled.is_set():
                late_ns = stamp_ns - self.ns(self.position) - self.zero_ns()
                self._pass(min(late_ns, seen_ns - self.called_ns))
        i = self._blocks % STAMPS
        self._zeros[i], self._seen_zeros[i] = stamp_ns - self.ns(self.position), seen_ns - self.ns(self.position)
        self._blocks += 1
        if self._blocks == SETTLE_PERIODS and self._last_zero_ns is not None:
            # By the time of callbacks, for a plugin's stamps need seconds to become right.
            self._zeros -= (lost_ns := self._pass(int(np.median(self._seen_zeros)) - self._last_zero_ns))
            self._seen_zeros -= lost_ns
        settled = self.settled.is_set() or self._blocks >= SETTLE_PERIODS
        if settled:
            self._exchange(self.position - self._given, self.position, samples, seen_ns)
            self._given = self.position + samples.size
        self.position += samples.size
        self.called_ns = seen_ns
        if settled:
            self.seen = (seen_ns, self.position)
            self.settled.set()  # last, for who waits for it reads the rest

    def _pass(self, ns: int) -> int:
        """So much time went by without samples; returns how much of it counts."""
        lost = self.device.rate_hz * ns // 1_000_000_000 if ns >= LEAST_LOSS_NS else 0
        self.position += lost
        return self.ns(lost)


class Stream:
    """A PortAudio stream of one track, or of two when one card serves both directions, kept open until it is closed.

    Its callback neither waits nor raises. Where a plugin serves both directions the tracks get a stream each: a common one runs
    empty until the first sample is captured, and PulseAudio's plugin may hang then.
    """

    def __init__(self, *tracks: Track) -> None:
        self._tracks = tracks
        self._base: int | None = None
        self._closing = threading.Event()
        self._portaudio: Any = None
        self._stream: Any = None
        self._opened_ns = 0
        with quiet():
            self._start()
        self._keeper = threading.Thread(target=self._keep, name="sound-" + "-".join(t.direction for t in tracks), daemon=True)
        self._keeper.start()

    def close(self) -> None:
        self._closing.set()
        self._keeper.join()
        with quiet():
            self._shut()

    def _start(self) -> None:
        """The first time: what does not work is said at once."""
        try:
            for _ in range(START_ATTEMPTS):
                self._open()
                if all(track.settled.wait(START_TIMEOUT_S) for track in self._tracks):
                    return
                self._shut()
            reason = f"does not run within {START_TIMEOUT_S:.0f} s"
        except AudioDeviceError:
            self._shut()
            raise
        except OSError as error:
            self._shut()
            reason = f"does not open at {self._tracks[0].device.rate_hz} Hz, one channel ({error})"
        named = " and ".join(f"sound {track.direction} '{track.wanted or 'default'}'" for track in self._tracks)
        raise AudioDeviceError(f"{named} {reason}; choose another with --mic live:NAME or --speaker live:NAME, or name files")

    def _open(self) -> None:
        self._portaudio = pyaudio().PyAudio()
        options: dict[str, Any] = {}
        for track in self._tracks:
            device = find(self._portaudio, track.direction, track.wanted, track.session_hz)
            if track.device.number >= 0 and device.rate_hz != track.device.rate_hz:
                raise OSError(f"{device.name} came back with another rate: {device.rate_hz} Hz")
            track.opened(device)
            self._opened_ns = time.monotonic_ns()
            options |= {track.direction: True, f"{track.direction}_device_index": device.number}
        rate_hz = self._tracks[0].device.rate_hz
        self._stream = self._portaudio.open(
            rate=rate_hz,
            channels=1,
            format=pyaudio().paFloat32,
            frames_per_buffer=rate_hz * PERIOD_MS // 1000,
            stream_callback=self._callback,
            **options,
        )

    def _shut(self) -> None:
        stream, portaudio, self._stream, self._portaudio = self._stream, self._portaudio, None, None
        if stream is not None:
            stream.close()
        if portaudio is not None:
            portaudio.terminate()  # the last one makes PortAudio forget its list of devices, so that a new one is seen

    def _keep(self) -> None:
        """Open it again whenever it has gone."""
        attempt = 0
        while not self._closing.wait(0.1):
            if self._runs():
                if attempt and all(track.settled.is_set() for track in self._tracks):
                    attempt = 0
                    for track in self._tracks:
                        track.counts[f"{track.direction}_reopened"] += 1
                continue
            with quiet():
                self._shut()
            if self._closing.wait(BACK_OFF_S[min(attempt, len(BACK_OFF_S) - 1)]):
                return
            attempt += 1
            with quiet(), contextlib.suppress(OSError, AudioDeviceError):
                self._open()

    def _runs(self) -> bool:
        if self._stream is None:
            return False
        called_ns = min(track.called_ns for track in self._tracks)
        patience_s = AWAY_S if called_ns > self._opened_ns else START_TIMEOUT_S
        return time.monotonic_ns() - max(called_ns, self._opened_ns) < patience_s * 1e9

    def _callback(self, captured: bytes | None, frames: int, times: Mapping[str, float], status: int) -> tuple[bytes | None, int]:
        played = None
        for track in self._tracks:
            samples = np.zeros(frames, np.float32)
            if track.direction == "output":
                played = samples
            elif captured is not None:
                samples[...] = np.frombuffer(captured, np.float32)
            self._block(track, samples, times, status)
        return None if played is None else played.tobytes(), _CONTINUE

    def _block(self, track: Track, samples: Samples, times: Mapping[str, float], status: int) -> None:
        try:
            seen_ns = time.monotonic_ns()
            track.block(samples, self._monotonic_ns(times, _STAMPS[track.direction], seen_ns), seen_ns, status)
        except Exception:  # noqa: BLE001 - out of a PortAudio callback it would end the stream; the count is in the events
            track.counts[f"{track.direction}_callback_errors"] += 1

    def _monotonic_ns(self, times: Mapping[str, float], name: str, seen_ns: int) -> int:
        """One of the device's stamps as CLOCK_MONOTONIC; the time of the callback from a host that gives none."""
        if not times["current_time"]:
            return seen_ns
        if self._base is None:
            self._base = min(_BASES, key=lambda base: abs(time.clock_gettime(base) - times["current_time"]))
        # Both clocks are read now, so that a step of the wall clock moves nothing.
        return round(times[name] * 1e9) - time.clock_gettime_ns(self._base) + seen_ns


def find(portaudio: Any, direction: Direction, wanted: str, session_hz: int) -> Device:
    """The device of an index, of a name or a part of one, or ("") the default. Raises AudioDeviceError, which lists what there is."""
    if not wanted:
        default = portaudio.get_default_input_device_info if direction == "input" else portaudio.get_default_output_device_info
        try:
            return _device(portaudio, direction, default(), session_hz)
        except OSError as error:
            raise AudioDeviceError(f"there is no default sound {direction} ({error}); attach one, or name a file") from error
    known = [portaudio.get_device_info_by_index(i) for i in range(portaudio.get_device_count())]
    known = [info for info in known if info[f"max{direction.capitalize()}Channels"] > 0]
    found = [info for info in known if wanted == str(info["index"]) or wanted.lower() == info["name"].lower()]
    found = found or [info for info in known if wanted.lower() in info["name"].lower() and not wanted.isdecimal()]
    if len(found) != 1:
        which = "no" if not found else "more than one"
        there = "; ".join(f"{info['index']} {info['name']}" for info in known) or "none"
        raise AudioDeviceError(f"there is {which} sound {direction} '{wanted}'; give the index or the name of one of: {there}")
    return _device(portaudio, direction, found[0], session_hz)


def _device(portaudio: Any, direction: Direction, info: Mapping[str, Any], session_hz: int) -> Device:
    """At the session's rate, or at its own, which is resampled then."""
    options = {f"{direction}_device": info["index"], f"{direction}_channels": 1, f"{direction}_format": pyaudio().paFloat32}
    try:
        portaudio.is_format_supported(session_hz, **options)
    except ValueError:
        return Device(info["index"], info["name"], round(info["defaultSampleRate"]))
    return Device(info["index"], info["name"], session_hz)


def find_all(session_hz: int, wanted: Sequence[tuple[Direction, str]]) -> list[Device]:
    """The devices of directions and names, as `find` has them."""
    with quiet():
        portaudio = pyaudio().PyAudio()
        try:
            return [find(portaudio, direction, name, session_hz) for direction, name in wanted]
        finally:
            portaudio.terminate()


def available() -> tuple[bool, bool]:
    """Whether this machine has a default microphone, and a default speaker."""
    try:
        with quiet():
            portaudio = pyaudio().PyAudio()
    except AudioDeviceError:
        return False, False
    try:
        return _succeeds(portaudio.get_default_input_device_info), _succeeds(portaudio.get_default_output_device_info)
    finally:
        with quiet():
            portaudio.terminate()


def _succeeds(query: Callable[[], object]) -> bool:
    try:
        query()
    except OSError:  # PyAudio's way to say that there is none
        return False
    return True


def pyaudio() -> Any:
    """The library. Raises AudioDeviceError where it is missing."""
    try:
        import pyaudio
    except ImportError as error:
        raise AudioDeviceError(
            f"PyAudio is not usable here ({error}); install the extra 'board', or name files with --mic and --speaker"
        ) from error
    return pyaudio


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """ALSA and JACK write dozens of lines to standard error while PortAudio looks for devices."""
    with _one_at_a_time:
        yield from _nowhere()


def _nowhere() -> Iterator[None]:
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
