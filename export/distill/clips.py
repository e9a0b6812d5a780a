"""One recorded word, where it lies in its recording, what a microphone makes of it, and the side of the split that its speaker is on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.signal import butter, lfilter, sosfilt

RATE_HZ = 16000
COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")  # the recorded words; aux label = index + 1

Split = Literal["train", "dev", "test"]
_SIDES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.7), "dev": (0.7, 0.8), "test": (0.8, 1.0)}  # of `_place`

FRAME = RATE_HZ // 100  # 10 ms
EQUALISER_HZ = np.array([60.0, 200.0, 600.0, 1600.0, 4000.0, 8000.0])  # where random microphones get their gains


@dataclass(frozen=True)
class Clip:
    """One recorded word: f32[n] at 16 kHz; the word itself lies in samples[onset:end]."""

    word: str
    samples: np.ndarray
    speaker: str
    onset: int
    end: int


def split_of(person: str) -> Split:
    """The side of the split that a person (or a noise file) belongs to: 70 % train, 10 % dev, 20 % test, by sha1."""
    place = _place(person)
    return next(split for split, (_, end) in _SIDES.items() if place < end)


def belongs(person: str, split: Split, share: float = 1.0) -> bool:
    """Whether somebody is on that side of the split and in that `share` of its people; a larger share has all those of a smaller one."""
    first, end = _SIDES[split]
    return split_of(person) == split and (_place(person) - first) / (end - first) <= share


def _place(person: str) -> float:
    return int(hashlib.sha1(person.encode()).hexdigest()[:8], 16) / 2**32


def word_span(samples: np.ndarray) -> tuple[int, int]:
    """Onset and end of the loudest word in a clip, as sample indexes, from its energy in 10 ms frames.

    Taken from 100 Hz up (rumble is no speech) and pre-emphasised (the "f" of "off" is weak and high). The threshold follows the
    clip's own noise; pauses up to 150 ms (the closure before the last consonant of "up", "right", "stop") are inside the word.
    """
    filtered = lfilter((1, -0.85), (1,), sosfilt(butter(2, 100, "highpass", fs=RATE_HZ, output="sos"), samples))
    frames = filtered[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
    power = np.convolve(np.mean(frames**2, axis=1), (0.25, 0.5, 0.25), "same")
    level_db = 10 * np.log10(power + 1e-12)
    audible = level_db[level_db > -100]  # clips may end in digital silence, which says nothing about their noise
    peak_db = float(level_db.max())
    floor_db = float(np.percentile(audible, 15)) if len(audible) else -100.0
    threshold_db = min(max(floor_db + 8, peak_db - 30), peak_db - 10)
    loud = np.flatnonzero(level_db > threshold_db)
    runs = np.split(loud, np.flatnonzero(np.diff(loud) > 15) + 1)
    best = max(runs, key=lambda run: float(power[run].sum()))
    return int(best[0]) * FRAME, min((int(best[-1]) + 1) * FRAME, len(samples))


def equaliser(gains_db: np.ndarray, hz: np.ndarray) -> np.ndarray:
    """Amplitude at each of `hz` of a microphone with gains [6] at EQUALISER_HZ, straight over log frequency between them."""
    return np.asarray(10 ** (np.interp(np.log(hz), np.log(EQUALISER_HZ), gains_db) / 20))
