"""The companion's words in the voice that it learns to speak with, made by espeak-ng."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from export.espeak import speak
from export.voice_tables import RATE_HZ

# Of 16 espeak-ng voices the only one whose words pocketsphinx all understood (20 of 20; the plain male en-us: 16):
# a low, calm female voice (172 Hz), close enough to the pulse model to survive it.
VOICE = "en-us+f2"
WORDS_PER_MINUTE = 160  # the longest word, "ok", takes 0.65 s


def render_words(words: Iterable[str]) -> dict[str, np.ndarray]:
    """Each word (the empty one is left out) in the companion's voice: f32[n] at 16 kHz, starting at sample 0, -20 dBFS RMS."""
    return {word: recite(word) for word in words if word}


def recite(text: str, pitch: int = 50) -> np.ndarray:
    """Any text in that voice; as `render_words` gives it."""
    return _trimmed(speak(text, VOICE, WORDS_PER_MINUTE, pitch))


def _trimmed(samples: np.ndarray, rms: float = 0.1) -> np.ndarray:
    block = RATE_HZ // 200  # 5 ms
    energy = np.square(samples[: len(samples) // block * block]).reshape(-1, block).mean(1)
    heard = np.flatnonzero(energy > energy.max() * 10**-4.5)  # 45 dB under the loudest: keeps f and th, drops espeak's padding
    word = samples[heard[0] * block : (heard[-1] + 1) * block].astype(np.float64)
    word[:block] *= np.linspace(0, 1, block)
    word[-2 * block :] *= np.linspace(1, 0, 2 * block)
    return (word * (rms / np.sqrt(np.mean(word**2)))).astype(np.float32)
