"""The companion's words in the voice that it learns to speak with, made by espeak-ng."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from export.espeak import speak
from export.voice_tables import RATE_HZ

VOICE = "en-us+f2"  # low, calm, female (172 Hz), close enough to the pulse model to survive it
WORDS_PER_MINUTE = 160  # the longest words, "ok" and "seven", take 0.65 s
# In espeak's phonemes, where pocketsphinx takes its own reading for another word of the vocabulary ("one" and "nine" for "quiet"):
# a longer vowel, or a breath after the t. With them it is right 479 times of 480, without them 428 (model card).
PRONUNCIATIONS = {
    "one": "[[w'VVVn]]",
    "five": "[[f'aIIv]]",
    "eight": "[['e:It]]",
    "nine": "[[n'a#In]]",
    "now": "[[n'a:U]]",
    "talk": "[[th'O:k]]",
}


def render_words(words: Iterable[str]) -> dict[str, np.ndarray]:
    """Each word (the empty one is left out) in the companion's voice: f32[n] at 16 kHz, starting at sample 0, -20 dBFS RMS."""
    return {word: recite(PRONUNCIATIONS.get(word, word)) for word in words if word}


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
