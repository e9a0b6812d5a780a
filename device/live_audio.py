"""The microphone and the speaker of this machine, by PortAudio's callbacks; the only module that imports PyAudio."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from device.audio import Playout, Ring, Samples, Source
from device.steering import Stamp

PERIOD_MS = 10  # of a callback; what is captured waits up to a period before the loop can see it
MARGIN_MS = 25  # captured beyond the tick at its edge: one period is under way, the rest is jitter; PulseAudio hands over two at a time
LOST_EDGES = 3  # what is missing at so many in a row was lost; before, it is late, and will be in its place
BURST_MS = 100  # beyond this the oldest samples are dropped, for a backlog is reaction time
SLIP_MS = 20  # a speaker this far off the session's time is set right; at 50 ppm between two devices every 7 minutes
START_TIMEOUT_S = 4.0  # PulseAudio's first callback took up to 1.9 s
START_ATTEMPTS = 3  # a stream that runs empty while it starts may hang for good (seen on PulseAudio, on a machine at its limit)
SETTLE_PERIODS = 48  # PulseAudio works off a backlog in the first 30 periods
STAMPS = 8  # the median of so many of the device's time stamps is believed
CAPTURE_S = 4  # of microphone kept for a loop that stalls

_XRUN = 0x2 | 0x4  # paInputOverflow, paOutputUnderflow (portaudio.h)
_CONTINUE = 0  # paContinue


class AudioDeviceError(RuntimeError):
    """No PortAudio, or no device that runs. Remedy: attach one, or name files."""


class _Stream:
    """One PortAudio stream, one direction, counted in its own samples. Its callback neither waits nor raises.

    `exchange` takes a position and what was captured from there on, and returns what is to be played. Microphone and speaker
    have a stream each: a common one runs empty until the first sample is captured, and PulseAudio's plugin may hang then.
    """

    def __init__(self, rate_hz: int, direction: str, exchange: Callable[[int, bytes | None], bytes | None]) -> None:
        self._rate_hz, self._direction, self._exchange = rate_hz, direction, exchange
        self._stamp = {"input": "input_buffer_adc_time", "output": "output_buffer_dac_time"}[direction]
        self.period = rate_hz * PERIOD_MS // 1000
        self.position = 0
        self.counts = {f"{direction}_xruns": 0, f"{direction}_callback_errors": 0}
        self.seen = (0, 0)  # CLOCK_MONOTONIC of the newest callback, and the position after it: one object, read by another thread
        self._callbacks = 0
        self._zeros_s = np.zeros(STAMPS)
        self._settled = threading.Event()
        with _quiet():
            self._portaudio = _pyaudio().PyAudio()
            self._stream = self._start()

    def now(self) -> int:
        """The position by the time, for callbacks come in periods and late."""
        seen_ns, position = self.seen
        return position + (time.monotonic_ns() - seen_ns) * self._rate_hz // 1_000_000_000

    def stamp(self, origin: int) -> Stamp | None:
        """When its sample `origin` is the session's first."""
        seen_ns, position = self.seen
        return Stamp(seen_ns, (position - origin) * 1_000_000_000 // self._rate_hz, origin) if seen_ns else None

    def zero_s(self) -> float:
        """When sample 0 passed the converter, on the device's clock."""
        return float(np.median(self._zeros_s))

    def close(self) -> None:
        with _quiet():
            self._stream.close()
            self._portaudio.terminate()

    def _start(self) -> Any:
        for _ in range(START_ATTEMPTS):
            try:
                stream = self._portaudio.open(
                    rate=self._rate_hz,
                    channels=1,
                    format=_pyaudio().paFloat32,
                    frames_per_buffer=self.period,
                    stream_callback=self._callback,
                    **{self._direction: True},
                )
            except OSError as error:
                reason = f"does not open at {self._rate_hz} Hz, one channel ({error})"
                break
            if self._settled.wait(START_TIMEOUT_S):
                return stream
            stream.close()
            reason = f"did not run within {START_TIMEOUT_S:.0f} s"
        self._portaudio.terminate()
        raise AudioDeviceError(
            f"the default sound {self._direction} {reason}; choose another default, or name files with --mic and --speaker"
        )

    def _callback(self, captured: bytes | None, frames: int, times: Mapping[str, float], status: int) -> tuple[bytes | None, int]:
        answer = None
        try:
            answer = self._exchange(self.position, captured)
            self._zeros_s[self._callbacks % STAMPS] = times[self._stamp] - self.position / self._rate_hz
            self.position += frames
            if status & _XRUN:
                self.counts[f"{self._direction}_xruns"] += 1
            self.seen = (time.monotonic_ns(), self.position)
            self._callbacks += 1
            if self._callbacks == SETTLE_PERIODS:
                self._settled.set()
        except Exception:  # noqa: BLE001 - out of a PortAudio callback it would end the stream; the count is in the events
            self.counts[f"{self._direction}_callback_errors"] += 1
        return answer, _CONTINUE


class LiveMicrophone(Source):
    """The default microphone as a `Source`, and a master clock.

    The loop keeps the ticker's time. What is late is silence for the tick that misses it, and in its place when it comes. What
    the device lost is made up for by silence of the same length; where it delivers too much, the oldest is dropped. All is counted.
    """

    def __init__(self, rate_hz: int, tick_samples: int) -> None:
        super().__init__()
        self._tick_samples = tick_samples
        self._margin, self._burst = rate_hz * MARGIN_MS // 1000, rate_hz * BURST_MS // 1000
        self._captured = Ring(CAPTURE_S * rate_hz)
        self._silent_until = 0  # in session samples: what the device lost ends there
        self._missing_edges = self._synced = 0
        self.origin = 0  # session sample i is the stream's sample origin + i
        self.stream = _Stream(rate_hz, "input", self._exchange)
        self.counts = self.stream.counts
        self.counts.update(late_samples=0, inserted_samples=0, dropped_samples=0)

    def start(self) -> None:
        self._synced = self.stream.position
        self.origin = self._synced - self._margin

    def sync(self, end: int) -> None:
        position = self.stream.position
        surplus = position - self.origin - end
        self._missing_edges = self._missing_edges + 1 if surplus < 0 else 0
        if self._missing_edges >= LOST_EDGES:
            # What came since the last edge belongs at the tick's end: the device was silent first.
            self._silent_until = end - min(position - self._synced, self._tick_samples)
            self.counts["inserted_samples"] -= surplus
            self.origin += surplus
        elif surplus < 0:
            self.counts["late_samples"] += min(-surplus, self._tick_samples)
        elif surplus > self._margin + self._burst:
            self.counts["dropped_samples"] += surplus - self._margin
            self.origin += surplus - self._margin
        self._synced = position

    def stamp(self) -> Stamp | None:
        """Session time is where its margin begins."""
        return self.stream.stamp(self.origin + self._margin)

    def read(self, start: int, out: Samples) -> None:
        self._captured.read(self.origin + start, out)
        out[: max(0, self._silent_until - start)] = 0
        out[max(0, self.stream.position - self.origin - start) :] = 0  # not there yet

    def close(self) -> None:
        """Stop the device."""
        self.stream.close()

    def _exchange(self, position: int, captured: bytes | None) -> None:
        if captured is not None:
            self._captured.write(position, np.frombuffer(captured, np.float32))


class LiveSpeaker(Playout):
    """The default speaker. Its place in time is known from the device's own stamps of it and of the microphone, if that is live."""

    def __init__(self, rate_hz: int, microphone: LiveMicrophone | None) -> None:
        super().__init__(rate_hz)
        self._rate_hz, self._microphone = rate_hz, microphone
        self._slip, self._apart_edges = rate_hz * SLIP_MS // 1000, 0
        self._out = np.zeros(rate_hz * PERIOD_MS // 1000, np.float32)
        self._stream = _Stream(rate_hz, "output", self._exchange)
        self.counts = self._stream.counts
        self.counts.update(slipped_samples=0)

    def start(self) -> None:
        self.origin = self._stream.now()
        self._align()

    def stamp(self) -> Stamp | None:
        """For a session without a microphone."""
        return self._stream.stamp(self.origin)

    def sync(self, end: int) -> None:
        ahead = self._stream.now() - self.origin - end
        self._apart_edges = self._apart_edges + 1 if abs(ahead) > self._slip else 0
        if self._apart_edges >= LOST_EDGES:
            self.counts["slipped_samples"] += abs(ahead)
            self.origin += ahead
        self._align()

    def close(self) -> None:
        """Stop the device."""
        self._stream.close()

    def _align(self) -> None:
        if self._microphone is None:
            self.heard_origin = self.origin  # a file hears nothing, so there is nothing to be simultaneous with
        else:
            # Within 20 samples of a loopback through PulseAudio; it changes when a device runs empty.
            apart_s = self._microphone.stream.zero_s() - self._stream.zero_s()
            self.heard_origin = self._microphone.origin + round(apart_s * self._rate_hz)

    def _exchange(self, position: int, captured: bytes | None) -> bytes:
        self.take(self._out)
        return self._out.tobytes()


def available() -> tuple[bool, bool]:
    """Whether this machine has a default microphone, and a default speaker."""
    try:
        with _quiet():
            portaudio = _pyaudio().PyAudio()
    except AudioDeviceError:
        return False, False
    try:
        return _succeeds(portaudio.get_default_input_device_info), _succeeds(portaudio.get_default_output_device_info)
    finally:
        with _quiet():
            portaudio.terminate()


def _succeeds(query: Callable[[], object]) -> bool:
    try:
        query()
    except OSError:  # PyAudio's way to say that there is none
        return False
    return True


def _pyaudio() -> Any:
    try:
        import pyaudio
    except ImportError as error:
        raise AudioDeviceError(
            f"PyAudio is not usable here ({error}); install the extra 'board', or name files with --mic and --speaker"
        ) from error
    return pyaudio


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ALSA and JACK write dozens of lines to standard error while PortAudio looks for devices."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
