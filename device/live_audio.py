"""The microphone and the speaker of this machine, as the loop uses them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

from device.audio import Playout, Ring, Samples, Source
from device.estimator import RATE_MAX, ClockEstimator
from device.portaudio import AWAY_S, Stream, Track, find_all
from device.resampling import LOOK_AHEAD, ChangingRatio, FixedRatio
from device.steering import Stamp

MARGIN_MS = 25  # captured beyond the tick at its edge: one period is under way, the rest is jitter; PulseAudio hands over two at a time
LOST_EDGES = 3  # what is missing at so many in a row was lost; before, it is late, and will be in its place
BURST_MS = 100  # beyond this the oldest samples are dropped, for a backlog is reaction time
SLIP_MS = 20  # a speaker this far off the session's time is set right at once; it takes a stall, for crystals are followed
CAPTURE_S = 4  # of microphone kept for a loop that stalls
GAIN = 1 / 32  # of the speaker's phase error is corrected per tick: a jump of the estimate by 0.3 ms changes the pitch by 50 ppm
BEND = 2 * RATE_MAX  # the most that the ratio is off the nominal one: two crystals at their worst; nobody hears it


LIVE = "live"


def is_live(choice: str | None) -> bool:
    """Whether 'live' or 'live:DEVICE' was chosen."""
    return live_device(choice) is not None


def live_device(choice: str | None) -> str | None:
    """The index or name in 'live:DEVICE', "" for the default device; None for what is not live."""
    if choice == LIVE:
        return ""
    return choice.removeprefix(f"{LIVE}:") if choice is not None and choice.startswith(f"{LIVE}:") else None


class LiveMicrophone(Source):
    """A microphone as a `Source`, and a master clock.

    The loop keeps the ticker's time. What is late is silence for the tick that misses it, and in its place when it comes. What
    the device lost is made up for by silence of the same length; where it delivers too much, the oldest is dropped. All is counted.
    """

    def __init__(self, rate_hz: int, tick_samples: int, wanted: str = "") -> None:
        super().__init__()
        self._rate_hz, self._tick_samples = rate_hz, tick_samples
        self._margin, self._burst = rate_hz * MARGIN_MS // 1000, rate_hz * BURST_MS // 1000
        self._captured = Ring(CAPTURE_S * rate_hz)
        self._written = 0  # session samples in the ring, by the callback
        self._convert = FixedRatio()
        self._silent_until = 0  # in session samples: what the device lost ends there
        self._missing_edges = self._synced = 0
        self._away = False
        self.origin = 0  # session sample i is the stream's sample origin + i
        self.track = Track("input", wanted, rate_hz, self._block)
        self.counts = self.track.counts
        self.counts.update(late_samples=0, inserted_samples=0, dropped_samples=0)

    @property
    def position(self) -> int:
        """How far it is captured, at the session's rate; a little less where that is not the device's."""
        at = self._session(self.track.position)
        return at if self.track.device.rate_hz == self._rate_hz else at - LOOK_AHEAD

    def start(self) -> None:
        self._synced = self.position
        self.origin = self._synced - self._margin

    def sync(self, end: int) -> None:
        position = self.position
        surplus = position - self.origin - end
        self._missing_edges = self._missing_edges + 1 if surplus < 0 else 0
        away = self.track.elapsed_ns() > AWAY_S * 1e9
        if away and surplus < 0:  # its count goes on by the time, and so do the samples that come when it is back
            self.counts["inserted_samples"] += min(-surplus, self._tick_samples if self._away else -surplus)
        elif self._missing_edges >= LOST_EDGES:
            # What came since the last edge belongs at the tick's end: the device was silent first.
            self._silent_until = end - min(position - self._synced, self._tick_samples)
            self.counts["inserted_samples"] -= surplus
            self.origin += surplus
        elif surplus < 0:
            self.counts["late_samples"] += min(-surplus, self._tick_samples)
        elif surplus > self._margin + self._burst:
            self.counts["dropped_samples"] += surplus - self._margin
            self.origin += surplus - self._margin
        self._synced, self._away = position, away

    def stamp(self) -> Stamp | None:
        """Session time is where its margin begins."""
        return self.track.stamp((self.origin + self._margin) * 1_000_000_000 // self._rate_hz)

    def zero_ns(self) -> int:
        """CLOCK_MONOTONIC when session sample 0 passed the converter."""
        return self.track.zero_ns() + self.origin * 1_000_000_000 // self._rate_hz

    def read(self, start: int, out: Samples) -> None:
        self._captured.read(self.origin + start, out)
        out[: max(0, self._silent_until - start)] = 0
        out[max(0, self.position - self.origin - start) :] = 0  # not there yet

    def _session(self, position: int) -> int:
        return position * self._rate_hz // self.track.device.rate_hz

    def _block(self, lost: int, at: int, samples: Samples, seen_ns: int) -> None:
        if lost:
            self._convert.reset()
            start, self._written = self._written, self._session(at)
            self._captured.clear(start, self._written - start)
        if self.track.device.rate_hz != self._rate_hz:
            samples = self._convert(samples, self._rate_hz / self.track.device.rate_hz)
        self._captured.write(self._written, samples)
        self._written += samples.size


class _Place(NamedTuple):
    """After a callback that was seen at `seen_ns`, `frames` of the speaker's own samples had taken `reached` of the playout's."""

    seen_ns: int
    frames: int
    reached: float


class LiveSpeaker(Playout):
    """A speaker, whose crystal may be another one than the session's: then the ratio of resampling follows what lies between them.

    Where it is in time is known from the device's own stamps of it and of the microphone, if that is live.
    """

    def __init__(self, rate_hz: int, microphone: LiveMicrophone | None, wanted: str = "", follows: bool = True) -> None:
        """`follows`: its crystal is neither the session's master nor the microphone's."""
        super().__init__(rate_hz)
        self._rate_hz, self._microphone, self._follows = rate_hz, microphone, follows
        self._slip, self._apart_edges = rate_hz * SLIP_MS // 1000, 0
        self._bend = 0.0  # of the ratio, from the nominal one
        self._estimator = ClockEstimator()
        self._end = self._newest_ns = 0
        self._held: float | None = None  # the phase in which it was when the rate became known, in samples
        self._convert = ChangingRatio(self.take)
        self.track = Track("output", wanted, rate_hz, self._block)
        self.counts = self.track.counts
        self.counts.update(slipped_samples=0, unplayed_samples=0)
        self._place = _Place(0, 0, 0.0)  # one object, read by the loop

    @property
    def ratio(self) -> float:
        """Of its own samples for one of the session's."""
        return self.track.device.rate_hz / self._rate_hz * (1 + self._bend)

    def reached(self, elapsed_ns: int) -> float:
        """The position that is given to the device so long after the newest callback."""
        return self._place.reached + elapsed_ns * 1e-9 * self._rate_hz

    def start(self) -> None:
        self.origin = round(self.reached(self.track.elapsed_ns()))
        self._align()

    def stamp(self) -> Stamp | None:
        """For a session without a microphone."""
        place = self._place
        return Stamp(place.seen_ns, round((place.reached - self.origin) * 1e9 / self._rate_hz), self.origin) if place.seen_ns else None

    def sync(self, end: int, edge_ns: int) -> None:
        place, tick_samples, self._end = self._place, end - self._end, end
        if edge_ns - place.seen_ns > AWAY_S * 1e9:
            self.counts["unplayed_samples"] += tick_samples
        elif self._follows and place.seen_ns > self._newest_ns:
            self._newest_ns = place.seen_ns
            self._follow(place, end, edge_ns, tick_samples)
        ahead = round(self.reached(edge_ns - place.seen_ns)) - self.origin - end
        self._apart_edges = self._apart_edges + 1 if abs(ahead) > self._slip else 0
        if self._apart_edges >= LOST_EDGES:
            self.counts["slipped_samples"] += abs(ahead)
            self.origin += ahead
            self._held = 0.0
        self._align()

    def advance(self, lost: int, frames: int, seen_ns: int) -> tuple[int, float]:
        """So many of its own samples were lost, and so many are asked for; returns the position of the first, and the ratio."""
        reached, ratio = self._place.reached, self.ratio
        if lost:
            reached = round(reached + lost / ratio)
        self._place = _Place(seen_ns, self.track.position + frames, reached + frames / ratio)
        return int(reached), ratio

    def _follow(self, place: _Place, end: int, edge_ns: int, tick_samples: int) -> None:
        """Bend the ratio so that the playout stays where it is in session time, once the speaker's rate is known."""
        end_ns, device_ns = end * 1_000_000_000 // self._rate_hz, self.track.ns(place.frames)
        self._estimator.add(end_ns - (edge_ns - place.seen_ns), device_ns)
        if not self._estimator.locked:
            return
        since_s = (end_ns - self._estimator.offset_ns(end_ns) - device_ns) * 1e-9
        phase = place.reached + since_s * self._rate_hz - self.origin - end
        if self._held is None:
            self._held = phase
        bend = self._estimator.ppm * 1e-6 + GAIN * (phase - self._held) / tick_samples
        self._bend = max(-BEND, min(bend, BEND))

    def _align(self) -> None:
        if self._microphone is None:
            self.heard_origin = self.origin  # a file hears nothing, so there is nothing to be simultaneous with
        else:
            place = self._place
            zero_ns = self.track.zero_ns() + self.track.ns(place.frames) - round(place.reached * 1e9 / self._rate_hz)
            # It changes when a device runs empty.
            self.heard_origin = round((self._microphone.zero_ns() - zero_ns) * 1e-9 * self._rate_hz)

    def _block(self, lost: int, at: int, samples: Samples, seen_ns: int) -> None:
        start = int(self._place.reached)
        position, ratio = self.advance(lost, samples.size, seen_ns)
        if lost:
            self.skip(start, position)
            self._convert.reset()
        if self._follows or self.track.device.rate_hz != self._rate_hz:
            samples[...] = self._convert(samples.size, ratio)
        else:
            self.take(samples)


def open_sound(
    rate_hz: int, tick_samples: int, mic: str | None, speaker: str | None, master: str, stack: ExitStack
) -> tuple[LiveMicrophone | None, LiveSpeaker | None]:
    """The microphone and the speaker that are wanted: index, name or "" for the default; None for none. `stack` closes them.

    One card that serves both has one stream, and one clock. Raises AudioDeviceError.
    """
    microphone = None if mic is None else LiveMicrophone(rate_hz, tick_samples, mic)
    one = False
    if mic is not None and speaker is not None:
        ears, mouth = find_all(rate_hz, (("input", mic), ("output", speaker)))
        one = ears == mouth and ears.hardware
    follows = not one and (mic is not None or master != "audio")
    player = None if speaker is None else LiveSpeaker(rate_hz, microphone, speaker, follows)
    tracks = [device.track for device in (microphone, player) if device is not None]
    for together in [tracks] if one else [[track] for track in tracks]:
        stack.callback(Stream(*together).close)
    return microphone, player
