"""How long it takes from the speaker to the microphone, and how loud: measured with a chirp, as the loop would play and hear it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from device.audio import Samples
from device.live_audio import LiveMicrophone, LiveSpeaker, open_sound
from device.portaudio import AudioDeviceError
from device.steering import Steering
from device.ticker import RealtimeTicker

CHIRP_S, FROM_HZ, TO_HZ, AMPLITUDE = 0.1, 300.0, 5000.0, 0.5  # what small speakers give and rooms return
EVERY_TICKS = 5  # a chirp, so that a room's echo of the one before is gone
CHIRPS, FIRST_TICK = 8, 5
MATCH = 0.25  # correlation coefficient of what is taken for the chirp; noise of the same length stays under 0.1
SPREAD_MS = 5.0  # between the chirps: more is no measurement


class LoopbackError(RuntimeError):
    """The chirp was not heard, or not at one time. Remedy: volume, cable or place; the text says which."""


@dataclass(frozen=True)
class Loopback:
    """What was measured, and what it makes of a reaction."""

    heard: int  # chirps, of CHIRPS
    hardware_ms: float  # from when speech is due to its arrival in what the loop hears: converters, buffers and air
    spread_ms: float  # between the chirps
    level_db: float  # of what is heard, beside what was played
    voice_ms: float  # what is heard comes so long after what `voice` says is being played: the air, if the stamps are right
    tick_ms: int
    offset_ms: int

    @property
    def floor_ms(self) -> float:
        """The reaction floor: what is heard at the beginning of a tick is answered no sooner."""
        return self.tick_ms + self.offset_ms + self.hardware_ms


def measure_loopback(rate_hz: int, tick_ms: int, offset_ms: int, mic: str = "", speaker: str = "") -> Loopback:
    """Play chirps and listen for them, for some seconds. Raises AudioDeviceError, LoopbackError."""
    with ExitStack() as stack:
        ears, mouth = open_sound(rate_hz, rate_hz * tick_ms // 1000, mic, speaker, "audio", stack)
        if ears is None or mouth is None:
            raise AudioDeviceError("a loopback needs a microphone and a speaker; attach both")
        heard, voice, due = _play(rate_hz, tick_ms, offset_ms, ears, mouth, stack)
    return evaluate(rate_hz, tick_ms, offset_ms, heard, voice, due)


def chirp(rate_hz: int) -> Samples:
    """f32[CHIRP_S]: from low to high, faded in and out."""
    at_s = np.arange(round(CHIRP_S * rate_hz)) / rate_hz
    phase = 2 * np.pi * (FROM_HZ * at_s + (TO_HZ - FROM_HZ) / (2 * CHIRP_S) * at_s**2)
    return (AMPLITUDE * np.sin(phase) * np.hanning(at_s.size)).astype(np.float32)


def evaluate(rate_hz: int, tick_ms: int, offset_ms: int, heard: Samples, voice: Samples, due: list[int]) -> Loopback:
    """From what was heard and played over the same samples, and where in them each chirp was due. Raises LoopbackError."""
    sound, span = chirp(rate_hz), EVERY_TICKS * rate_hz * tick_ms // 1000
    late, apart, level = [], [], []
    for start in due:
        there, played = _find(heard[start : start + span], sound), _find(voice[start : start + span], sound)
        if there is not None:
            late.append(there[0])
            level.append(there[1])
        if there is not None and played is not None:
            apart.append(there[0] - played[0])
    if len(late) <= len(due) // 2:
        raise LoopbackError(f"{len(late)} of {len(due)} chirps were heard; turn the speaker up, unmute the microphone, or go closer")
    ms = 1000 / rate_hz
    spread_ms = float(np.percentile(late, 90) - np.percentile(late, 10)) * ms
    return Loopback(
        len(late),
        float(np.median(late)) * ms,
        spread_ms,
        20 * float(np.log10(np.median(level))),
        float(np.median(apart)) * ms if apart else float("nan"),
        tick_ms,
        offset_ms,
    )


def render(loopback: Loopback) -> str:
    """As text, the last line the number that is asked for."""
    doubt = "" if loopback.spread_ms <= SPREAD_MS else "; that is too much for a measurement: is the machine busy?"
    return "\n".join(
        (
            f"chirps heard       {loopback.heard} of {CHIRPS}, within {loopback.spread_ms:.1f} ms of each other{doubt}",
            f"level              {loopback.level_db:+.1f} dB from speaker to microphone",
            f"`voice` is early   {loopback.voice_ms:.1f} ms: sound in air, 0.3 m a ms, and what the device's time stamps are off",
            f"hardware           {loopback.hardware_ms:.1f} ms from due to heard",
            f"reaction floor     {loopback.floor_ms:.0f} ms = tick {loopback.tick_ms} + offset {loopback.offset_ms}"
            f" + hardware {loopback.hardware_ms:.0f}",
        )
    )


def _play(
    rate_hz: int, tick_ms: int, offset_ms: int, ears: LiveMicrophone, mouth: LiveSpeaker, stack: ExitStack
) -> tuple[Samples, Samples, list[int]]:
    size, ticks = rate_hz * tick_ms // 1000, FIRST_TICK + (CHIRPS + 1) * EVERY_TICKS
    heard, voice = np.zeros(ticks * size, np.float32), np.zeros(ticks * size, np.float32)
    ticker, steering = RealtimeTicker(tick_ms * 1_000_000), Steering(tick_ms * 1_000_000, ears, "audio")
    stack.callback(ticker.close)
    sound = chirp(rate_hz)
    due: list[int] = []
    ears.start()
    mouth.start()
    ticker.start()
    edge = ticker.wait(0)
    while edge.tick < ticks:
        start, end = edge.tick * size, (edge.tick + 1) * size
        edge_ns = ticker.origin_ns + edge.edge_ns
        ears.sync(end)
        mouth.sync(end, edge_ns)
        ticker.steer(steering.shift_ns(ticker.origin_ns, edge.edge_ns))
        ears.read(start, heard[start:end])
        mouth.heard(start, voice[start:end])
        if edge.tick >= FIRST_TICK + len(due) * EVERY_TICKS and len(due) < CHIRPS:
            at = end + rate_hz * offset_ms // 1000
            if not mouth.put(at, sound):
                due.append(at)
        edge = ticker.wait(edge.tick + 1)
    return heard, voice, due


def _find(part: Samples, sound: Samples) -> tuple[int, float] | None:
    """Where the sound is in a part, and how loud beside itself."""
    if part.size < sound.size:
        return None
    match = np.correlate(part, sound, "valid")
    energy = np.convolve(part.astype(np.float64) ** 2, np.ones(sound.size), "valid")
    norm = float(np.linalg.norm(sound))
    likeness = match / (norm * np.sqrt(np.maximum(energy, 1e-9)))
    best = int(np.argmax(match))
    return (best, float(match[best]) / norm**2) if likeness[best] > MATCH else None
