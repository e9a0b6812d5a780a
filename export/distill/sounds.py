"""The sound of a room: words that people say in it, changed as rooms and microphones change them, noise, and the speaker's echo."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft

from export.distill.clips import COMMANDS, RATE_HZ, Clip, equaliser
from export.distill.corpus import Corpus, Voices

ABOVE_NOISE = 10**0.2  # power: every word keeps 2 dB above noise and echo
_OTHER_LABEL = len(COMMANDS) + 1


class Chance:
    """The probabilities that shape the sound of a scene."""

    # what is heard
    babble, no_echo, gated = 0.18, 0.2, 0.05
    # one spoken word
    reshaped = 0.4
    synthetic = 0.25  # commands as often as other words, or synthetic would be a sign of the latter
    # how it sounds
    noise_clip, reverb, clipped, cropped, muffled = 0.45, 0.35, 0.04, 0.4, 0.25


class Sound(NamedTuple):
    """An augmented clip; the word itself lies in samples[onset:end]."""

    samples: np.ndarray  # f32[n] at 16 kHz
    onset: int
    end: int
    label: int  # 1..10 COMMANDS, 11 another word
    name: str  # the clip's word, "" for a mangled one


class Placed(NamedTuple):
    """A sound in a scene, and the sample of the scene at which its word begins."""

    sound: Sound
    at: int


def room_sound(placed: Iterable[Placed], echo: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The microphone without the echo of the speaker: f32[n] of `noise` and words, with who speaks keeping above noise and `echo`."""
    mic = noise.copy()
    for sound, at in placed:
        word = sound.samples[sound.onset : sound.end]
        span = slice(max(at, 0), at + len(word))
        # Who is not heard speaks up (Lombard), so that every word could be understood.
        loud = (power(noise[span]) + power(echo[span])) * ABOVE_NOISE / max(power(word), 1e-12)
        mix(mic, sound._replace(samples=sound.samples * np.float32(np.sqrt(max(loud, 1.0)))), at - sound.onset)
    return mic


def room_noise(corpus: Corpus, rng: np.random.Generator, samples: int) -> np.ndarray:
    """Noise, sometimes with other people talking far away; none where a microphone's gate keeps it out: f32[samples] at 16 kHz."""
    if rng.random() < Chance.gated:
        return np.zeros(samples, np.float32)
    noise = background_noise(corpus, rng, samples)
    if rng.random() < Chance.babble:
        _add_babble(noise, corpus, rng)
    return noise


def word_clip(corpus: Corpus, rng: np.random.Generator, word: str) -> Clip:
    """One of COMMANDS, spoken by anybody."""
    clips = _source(corpus, rng, lambda voices: voices.words[word])
    return clips[rng.integers(len(clips))]


def other_clip(corpus: Corpus, rng: np.random.Generator) -> Clip:
    """Another word, spoken by anybody."""
    clips = _source(corpus, rng, lambda voices: voices.others)
    return clips[rng.integers(len(clips))]


def _source(corpus: Corpus, rng: np.random.Generator, clips: Callable[[Voices], list[Clip]]) -> list[Clip]:
    """Real people's clips, or made ones where there are any."""
    kind = rng.random()
    made: list[Clip] = []
    if kind < Chance.reshaped:
        made = clips(corpus.reshaped)
    elif kind < Chance.reshaped + Chance.synthetic:
        made = clips(corpus.synthetic)
    return made or clips(corpus.real)


def mangled_clip(corpus: Corpus, rng: np.random.Generator) -> Clip:
    """A clip backwards, or the first half of a command's word with the second half of another: nothing anybody meant."""
    words = [word for word in COMMANDS if word != "no"]  # "no" backwards is nearly "on"
    clip = word_clip(corpus, rng, str(rng.choice(words)))
    if rng.random() < 0.5:
        n = len(clip.samples)
        return Clip("", clip.samples[::-1], clip.speaker, n - clip.end, n - clip.onset)
    other = other_clip(corpus, rng)
    if rng.random() < 0.5:
        clip, other = other, clip
    cut, resume = (clip.onset + clip.end) // 2, (other.onset + other.end) // 2
    gain = _rms(clip.samples[clip.onset : clip.end]) / max(_rms(other.samples[other.onset : other.end]), 1e-5)
    tail = other.samples[resume:] * min(gain, 20.0)
    samples = np.concatenate((_faded(clip.samples[:cut], 80), _faded(tail, 80)))
    return Clip("", samples, clip.speaker, clip.onset, cut + other.end - resume)


def random_room(rng: np.random.Generator) -> np.ndarray | None:
    """Synthetic reverberation: an impulse response f32[n] at 16 kHz (direct sound first), or None for a dry room."""
    if rng.random() >= Chance.reverb:
        return None
    decay_s = rng.uniform(0.08, 0.45)
    n = round(decay_s * RATE_HZ)
    tail = rng.standard_normal(n) * np.exp(-6.9 * np.arange(n) / n)  # -60 dB at the end
    response = tail * rng.uniform(0.1, 0.6) / np.sqrt(np.sum(tail**2))
    response[: round(0.002 * RATE_HZ)] = 0
    response[0] = 1
    return np.asarray(response, dtype=np.float32)


def augment_word(clip: Clip, rng: np.random.Generator, room: np.ndarray | None, level_db: float) -> Sound:
    """Crop, speed, equaliser, reverberation by `room` (as from `random_room`) and level (dBFS RMS over the word)."""
    samples, onset, end = clip.samples, clip.onset, clip.end
    if rng.random() < Chance.cropped:  # else the noise of the recording would announce the word
        first, last = max(onset - round(0.06 * RATE_HZ), 0), min(end + round(0.12 * RATE_HZ), len(samples))
        samples, onset, end = samples[first:last], onset - first, end - first
    samples = _faded(samples, 160)
    speed = rng.uniform(0.82, 1.22)
    count = int(len(samples) / speed)
    samples = np.interp(np.arange(count) * speed, np.arange(len(samples)), samples)
    onset, end = round(onset / speed), min(round(end / speed), count)
    total = count + (0 if room is None else len(room))
    size = next_fast_len(total, real=True)
    spectrum = rfft(samples.astype(np.float32), size) * _equaliser(rng, size // 2 + 1)
    if room is not None:
        spectrum *= rfft(room, size)
    samples = irfft(spectrum, size)[:total]
    gain = 10 ** (level_db / 20) / max(_rms(samples[onset:end]), 1e-5)
    label = COMMANDS.index(clip.word) + 1 if clip.word in COMMANDS else _OTHER_LABEL
    return Sound((samples * gain).astype(np.float32), onset, end, label, clip.word)


def _equaliser(rng: np.random.Generator, bins: int) -> np.ndarray:
    """A random microphone: six gains over log frequency (a tilt and bumps), as amplitude per DFT bin."""
    gains_db = rng.normal(0, 2.5, 6) + rng.normal(0, 3.0) * np.linspace(-1, 1, 6)
    if rng.random() < 0.25:
        gains_db[0] -= rng.uniform(5, 25)  # small loudspeaker, high-passed microphone
    if rng.random() < Chance.muffled:  # a band that does not get through
        gains_db[rng.integers(2, 6)] -= rng.uniform(6, 25)
    coarse = equaliser(gains_db, np.linspace(30, 8000, 257))
    return np.asarray(np.interp(np.linspace(0, 256, bins), np.arange(257), coarse), dtype=np.float32)


def mix(mic: np.ndarray, sound: Sound, start: int) -> float:
    """Add a sound to `mic`, f32[n], from sample `start` on; it may stick out on either side.

    Returns the power of what was there already in the span of the sound's word.
    """
    first, last = max(start, 0), min(start + len(sound.samples), len(mic))
    noise_power = power(mic[max(start + sound.onset, 0) : max(start + sound.end, 0)])
    if first < last:
        mic[first:last] += sound.samples[first - start : last - start]
    return noise_power


def background_noise(corpus: Corpus, rng: np.random.Generator, samples: int) -> np.ndarray:
    """Room noise, f32[samples] at -65..-36 dBFS: a recording, or white, pink or brown noise, looped."""
    if corpus.noise and rng.random() < Chance.noise_clip:
        loop = corpus.noise[rng.integers(len(corpus.noise))]
        loop = loop[: len(loop) // 2 * 2]
    else:
        loop = _coloured_noise(float(rng.choice((0.0, 0.5, 1.0))), int(rng.integers(16)))  # white, pink, brown
    loop = np.roll(loop, rng.integers(len(loop)))
    noise = np.tile(loop, -(-samples // len(loop)))[:samples].astype(np.float32)
    return noise * np.float32(10 ** (rng.uniform(-65, -36) / 20) / max(_rms(loop), 1e-6))


@cache
def _coloured_noise(colour: float, seed: int) -> np.ndarray:
    """Four seconds whose amplitude falls as 1 / f**colour, f32[65536] at 16 kHz."""
    size = 1 << 16
    spectrum = rfft(np.random.default_rng(seed).standard_normal(size, dtype=np.float32))
    loop = irfft(spectrum / np.maximum(np.arange(size // 2 + 1), 64).astype(np.float32) ** np.float32(colour), size)
    return np.asarray(loop, dtype=np.float32)


def _add_babble(mic: np.ndarray, corpus: Corpus, rng: np.random.Generator) -> None:
    """Other people in the background: overlapping other words, low."""
    level_db = rng.uniform(-52, -34)
    at = 0
    while at < len(mic):
        sound = augment_word(other_clip(corpus, rng), rng, None, level_db + rng.normal(0, 3))
        mix(mic, sound, at)
        at += round(RATE_HZ * rng.exponential(0.9) + 0.1 * RATE_HZ)


def echo_response(rng: np.random.Generator) -> np.ndarray:
    """Impulse response from speaker to microphone, f32[n] at 16 kHz.

    10..80 ms late, -32..-10 dB, a short random decay; or no echo at all (headphones).
    """
    if rng.random() < Chance.no_echo:
        return np.zeros(1, np.float32)
    delay, tail = round(RATE_HZ * rng.uniform(0.010, 0.080)), round(RATE_HZ * rng.uniform(0.002, 0.060))
    decay = np.exp(-4 * np.arange(tail) / tail) * rng.standard_normal(tail) * rng.uniform(0.05, 0.4)
    decay[0] = 1
    response = np.concatenate((np.zeros(delay), decay / np.sqrt(np.sum(decay**2))))
    return np.asarray(response * 10 ** (rng.uniform(-32, -10) / 20), dtype=np.float32)


def _faded(samples: np.ndarray, edge: int) -> np.ndarray:
    samples = samples.copy()
    edge = min(edge, len(samples) // 2)
    ramp = np.linspace(0, 1, edge, dtype=np.float32)
    samples[:edge] *= ramp
    samples[len(samples) - edge :] *= ramp[::-1]
    return samples


def power(samples: np.ndarray) -> float:
    """Mean square of f32[n], full scale ±1; 0 for no samples."""
    return float(np.dot(samples, samples)) / max(len(samples), 1)


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(power(samples)))
