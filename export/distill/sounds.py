"""The sound of a room: words that people say in it, changed as rooms and microphones change them, noise, and the speaker's echo."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft

from device.config import ModelConfig
from export.distill.corpus import COMMANDS, RATE_HZ, Clip, Corpus

# The words that ask for an act, and for which; the other COMMANDS ask for none.
ACT_OF_WORD = {"up": "look_up", "down": "look_down", "left": "look_left", "right": "look_right", "on": "light_on", "off": "light_off"}
_OTHER_LABEL = len(COMMANDS) + 1


class Chance:
    """The probabilities that shape the sound of a scene."""

    # what is heard
    only_negatives, silent_room, babble, no_echo = 0.12, 0.10, 0.15, 0.2
    # one spoken word: with what is left over it is one of "others"
    command, bystander, mangled = 0.55, 0.20, 0.05
    synthetic_word, synthetic_other = 0.15, 0.30
    # how it sounds
    noise_clip, reverb, clipped, cropped = 0.45, 0.35, 0.04, 0.4


class Sound(NamedTuple):
    """An augmented clip; the word itself lies in samples[onset:end]."""

    samples: np.ndarray  # f32[n] at 16 kHz
    onset: int
    end: int
    label: int  # 1..10 COMMANDS, 11 another word
    name: str  # the clip's word, "" for a mangled one


class Spoken(NamedTuple):
    """A word spoken in the room: `name` and `label` as in `Sound`, times from captured sample 0, powers as from `power`."""

    name: str
    label: int
    onset_s: float
    end_s: float
    power: float
    noise_power: float  # of everything else in the room during the word


def room_sound(corpus: Corpus, rng: np.random.Generator, ticks: int, c: ModelConfig) -> tuple[np.ndarray, list[Spoken]]:
    """The room without the companion: f32[C + T*S] at 16 kHz (captured sample 0 at C), and the words spoken in it, in order."""
    mic = background_noise(corpus, rng, c.context_samples + ticks * c.tick_samples)
    length_s = ticks * c.tick_ms / 1000
    if rng.random() < Chance.babble:
        _add_babble(mic, corpus, rng)
    spoken: list[Spoken] = []
    if rng.random() < Chance.silent_room:
        return mic, spoken
    only_negatives = rng.random() < Chance.only_negatives
    room, level_db, overdriven = random_room(rng), rng.uniform(-37, -17), rng.random() < Chance.clipped
    free = rng.uniform(0.2, 1.5)
    pause_s = rng.uniform(0.8, 2.6)  # on average; 4 to 7 words in 16 s
    while True:
        sound = augment_word(pick_word(corpus, rng, only_negatives), rng, room, np.clip(level_db + rng.normal(0, 2.5), -40, -14))
        onset_s = free
        end_s = onset_s + (sound.end - sound.onset) / RATE_HZ
        if end_s > length_s - 0.05:
            break
        start = c.context_samples + round(onset_s * RATE_HZ) - sound.onset
        if overdriven:
            sound = sound._replace(samples=np.clip(sound.samples * 3, -0.5, 0.5))
        noise_power = mix(mic, sound, start)
        spoken.append(Spoken(sound.name, sound.label, onset_s, end_s, power(sound.samples[sound.onset : sound.end]), noise_power))
        free = end_s + 0.25 + rng.exponential(pause_s)
    return mic, spoken


def pick_word(corpus: Corpus, rng: np.random.Generator, only_negatives: bool) -> Clip:
    """A clip by the table of probabilities; a mangled one is named "" and sounds like no word."""
    kind = rng.random()
    if only_negatives:
        kind = Chance.command + kind * (1 - Chance.command)
    if kind < Chance.command:
        return _word_clip(corpus, rng, str(rng.choice(list(ACT_OF_WORD))))
    if kind < Chance.command + Chance.bystander:
        return _word_clip(corpus, rng, str(rng.choice([word for word in COMMANDS if word not in ACT_OF_WORD])))
    if kind < Chance.command + Chance.bystander + Chance.mangled:
        return _mangled(corpus, rng)
    return _other_clip(corpus, rng)


def _word_clip(corpus: Corpus, rng: np.random.Generator, word: str) -> Clip:
    synthetic = corpus.synthetic_words[word] and rng.random() < Chance.synthetic_word
    clips = corpus.synthetic_words[word] if synthetic else corpus.words[word]
    return clips[rng.integers(len(clips))]


def _other_clip(corpus: Corpus, rng: np.random.Generator) -> Clip:
    clips = corpus.synthetic_others if corpus.synthetic_others and rng.random() < Chance.synthetic_other else corpus.others
    return clips[rng.integers(len(clips))]


def _mangled(corpus: Corpus, rng: np.random.Generator) -> Clip:
    """A clip backwards, or the first half of a command's word with the second half of another: nothing anybody meant."""
    words = [word for word in COMMANDS if word != "no"]  # "no" backwards is nearly "on"
    clip = _word_clip(corpus, rng, str(rng.choice(words)))
    if rng.random() < 0.5:
        n = len(clip.samples)
        return Clip("", clip.samples[::-1], clip.speaker, n - clip.end, n - clip.onset)
    other = _other_clip(corpus, rng)
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
    speed = rng.uniform(0.88, 1.15)
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
    knots_hz = np.array([60.0, 200.0, 600.0, 1600.0, 4000.0, 8000.0])
    gains_db = rng.normal(0, 2.5, 6) + rng.normal(0, 3.0) * np.linspace(-1, 1, 6)
    if rng.random() < 0.25:
        gains_db[0] -= rng.uniform(5, 25)  # small loudspeaker, high-passed microphone
    coarse = 10 ** (np.interp(np.log(np.linspace(30, 8000, 257)), np.log(knots_hz), gains_db) / 20)
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
        size = 1 << 16
        spectrum = rfft(rng.standard_normal(size, dtype=np.float32))
        colour = rng.choice((0.0, 0.5, 1.0))  # white, pink, brown: amplitude falls as 1 / f**colour
        loop = irfft(spectrum / np.maximum(np.arange(size // 2 + 1), 64).astype(np.float32) ** np.float32(colour), size)
    loop = np.roll(loop, rng.integers(len(loop)))
    noise = np.tile(loop, -(-samples // len(loop)))[:samples].astype(np.float32)
    return noise * np.float32(10 ** (rng.uniform(-65, -36) / 20) / max(_rms(loop), 1e-6))


def _add_babble(mic: np.ndarray, corpus: Corpus, rng: np.random.Generator) -> None:
    """Other people in the background: overlapping other words, low."""
    level_db = rng.uniform(-52, -34)
    at = 0
    while at < len(mic):
        sound = augment_word(_other_clip(corpus, rng), rng, None, level_db + rng.normal(0, 3))
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
