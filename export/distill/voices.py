"""Voices made from what there is: espeak-ng's, and real speakers reshaped into other people by WORLD."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np

from export.distill.clips import COMMANDS, EQUALISER_HZ, RATE_HZ, Clip, Split, equaliser, word_span
from export.espeak import speak

# Synthetic voices, split like people. The first of a pair is espeak's dialect, the second its variant.
_DIALECTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
_VARIANTS: dict[Split, tuple[str, ...]] = {
    "train": tuple(
        "m1 m2 m3 m4 m5 m8 f1 f2 f3 Alex Alicia Annie belinda boris david Denis Gene Jacky Lee linda Marco max Michael pablo paul rob "
        "sandro steph travis victor zac".split()
    ),
    "dev": ("m6", "f4", "Andy", "anika", "Mario"),
    "test": ("m7", "f5", "adam", "Andrea", "edward", "quincy"),
}
_VOICES: dict[Split, int] = {"train": 160, "dev": 8, "test": 16}
_OTHERS: dict[Split, int] = {"train": 1600, "dev": 60, "test": 120}
# The first fifty or so sound like a command and are none.
_OTHER_WORDS = (
    "town gown brown drown noun dawn cup pup cut what but lift laugh lend lap leaf write rate ride rat bright wrong alright an own in "
    "of often cough loft awful aunt song gone none know now nope new yet yeah guess mess us top stock step store goat grow ghost cold "
    "dough app apple upper under zero one two three four five six seven eight nine ten eleven twelve twenty hundred ok okay hello "
    "please thanks sorry good morning evening night light lamp door window table chair kitchen garden water coffee tea bread sugar "
    "music radio phone book paper pencil picture camera robot computer mother father sister brother baby children people doctor teacher "
    "Anna Peter Maria James Sarah Thomas Emma Oliver Sophie Daniel happy tired hungry ready maybe always never today tomorrow yesterday "
    "monday friday summer winter rain snow sunny cloud mountain river street city house school red green blue yellow black white orange "
    "big small open close start wait listen look see hear speak talk walk run sleep eat drink play count because without another "
    "question answer number minute second hour here there where when who why how"
).split()


RESHAPED_PER_CLIP = 3
_MARGIN = round(0.1 * RATE_HZ)  # samples around a word that are reshaped with it


def synthetic_clips(cache: Path, split: Split) -> list[Clip]:
    """espeak's words for one split, speaker "espeak-<voice>-<words per minute>-<pitch>", kept in `cache`."""
    recipes = _recipes(split)

    def make() -> Iterable[Clip | None]:
        with ThreadPoolExecutor(2) as pool:
            yield from pool.map(_synthesise, recipes)

    return _cached(cache, split, recipes, make)


def _recipes(split: Split) -> list[tuple[str, str, int, int]]:
    """(word, espeak voice, words per minute, pitch) of every synthetic clip of a split."""
    rng = np.random.default_rng(("train", "dev", "test").index(split))
    names = [f"{dialect}+{variant}" for dialect, variant in product(_DIALECTS, _VARIANTS[split])]

    def voice(name: str) -> tuple[str, int, int]:
        return name, int(rng.integers(110, 200)), int(rng.integers(15, 85))

    voices = [voice(str(name)) for name in rng.choice(names, _VOICES[split], replace=False)]
    strangers = [(str(rng.choice(_OTHER_WORDS)), *voice(str(rng.choice(names)))) for _ in range(_OTHERS[split])]
    talk = [(" ".join(rng.choice(_OTHER_WORDS, rng.integers(2, 9))), *voice(str(rng.choice(names)))) for _ in range(_OTHERS[split] // 2)]
    return [(word, *who) for word, who in product(COMMANDS, voices)] + strangers + talk


def _synthesise(recipe: tuple[str, str, int, int]) -> Clip | None:
    word, voice, words_per_minute, pitch = recipe
    samples = speak(word, voice, words_per_minute, pitch)
    if len(samples) < RATE_HZ // 10 or np.abs(samples).max() < 0.01:  # a few whispering variants leave a word out
        return None
    samples = (0.7 * samples / np.abs(samples).max()).astype(np.float32)
    if " " in word:  # several words without a pause
        loud = np.flatnonzero(np.abs(samples) > 0.02)
        return Clip(word, samples, f"espeak-{voice}-{words_per_minute}-{pitch}", int(loud[0]), int(loud[-1]) + 1)
    # A second of faint noise after it stands for the room that espeak does not have: the word fills its clip.
    onset, end = word_span(np.concatenate((samples, 1e-4 * np.random.default_rng(0).standard_normal(RATE_HZ))))
    end = min(end, len(samples))
    return Clip(word, samples, f"espeak-{voice}-{words_per_minute}-{pitch}", onset, end)


def reshaped_clips(cache: Path, split: Split, clips: list[Clip]) -> list[Clip]:
    """RESHAPED_PER_CLIP people that never were for each of `clips`: the same words with another larynx and vocal tract.

    Pitch and the spectral envelope are moved by WORLD (Morise et al. 2016, doi 10.1587/transinf.2015EDP7457), and each is recorded by
    a microphone of its own; kept in `cache`.
    """

    def make() -> Iterable[Clip | None]:
        with ProcessPoolExecutor(2) as pool:
            for made in pool.map(_reshape, clips, range(len(clips)), chunksize=16):
                yield from made

    recipe = (RESHAPED_PER_CLIP, "unclipped", "microphones", [(clip.word, clip.speaker, len(clip.samples)) for clip in clips])
    return _cached(cache, f"{split}-reshaped", recipe, make)


def _reshape(clip: Clip, seed: int) -> list[Clip]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pyworld's import of pkg_resources
        import pyworld
    first, last = max(clip.onset - _MARGIN, 0), min(clip.end + _MARGIN, len(clip.samples))
    samples, onset, end = clip.samples[first:last].astype(np.float64), clip.onset - first, clip.end - first
    pitch, times = pyworld.dio(samples, RATE_HZ)
    pitch = pyworld.stonemask(samples, pitch, times, RATE_HZ)
    envelope, aperiodicity = pyworld.cheaptrick(samples, pitch, times, RATE_HZ), pyworld.d4c(samples, pitch, times, RATE_HZ)
    rng, made = np.random.default_rng([seed, len(samples)]), []
    bins = np.arange(envelope.shape[1])
    for _ in range(RESHAPED_PER_CLIP):
        # A shorter tract goes with a higher voice, as from men over women to children; the rest is chance.
        size = rng.uniform(-1, 1)
        warp, factor = np.exp(0.16 * size + rng.normal(0, 0.03)), np.exp(0.35 * size + rng.normal(0, 0.15))
        shifted = [np.array([np.interp(bins / warp, bins, frame) for frame in table]) for table in (envelope, aperiodicity)]
        changed = pyworld.synthesize(pitch * factor, *shifted, RATE_HZ)[: len(samples)]
        changed = _recorded(changed, slice(onset, end), rng).astype(np.float32)
        peak = np.abs(changed).max()  # up to three times the recording's: WORLD gathers in a pulse what the recording has spread
        if peak > 0.005:
            changed /= max(peak, 1)
            made.append(Clip(clip.word, changed, f"{clip.speaker}-{warp:.2f}-{factor:.2f}", onset, min(end, len(changed))))
    return made


def _recorded(samples: np.ndarray, word: slice, rng: np.random.Generator) -> np.ndarray:
    """[n] at 16 kHz as a random microphone gives it, worse than those of scenes: what gets through, its rumble and its hiss."""
    n = len(samples)
    hz = np.maximum(np.fft.rfftfreq(n, 1 / RATE_HZ), 1)
    gains_db = rng.normal(0, 4, len(EQUALISER_HZ)) + rng.normal(0, 4) * np.linspace(-1, 1, len(EQUALISER_HZ))
    response = equaliser(gains_db, hz)
    if rng.random() < 0.4:  # nothing deep
        response /= np.sqrt(1 + (rng.uniform(100, 500) / hz) ** (2 * rng.integers(1, 4)))
    if rng.random() < 0.3:  # nothing high
        response /= np.sqrt(1 + (hz / rng.uniform(2500, 7000)) ** (2 * rng.integers(1, 4)))
    heard = np.fft.irfft(np.fft.rfft(samples) * response, n)
    level = np.sqrt(np.mean(heard[word] ** 2))
    for below_hz, low_db, high_db in ((rng.uniform(60, 200), -15, 6), (np.inf, -35, -12)):
        if rng.random() < 0.3:
            noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) / (1 + (hz / below_hz) ** 4), n)
            heard += noise * level * 10 ** (rng.uniform(low_db, high_db) / 20) / np.sqrt(np.mean(noise**2))
    return heard


def _cached(cache: Path, name: str, recipe: object, make: Callable[[], Iterable[Clip | None]]) -> list[Clip]:
    """The clips that `make` gives, kept in one file whose name says what they were made from."""
    path = cache / f"{name}-{hashlib.sha1(repr(recipe).encode()).hexdigest()[:12]}.npz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        made = [clip for clip in make() if clip is not None]
        part = path.with_suffix(".part.npz")
        np.savez(
            part,
            samples=(np.concatenate([clip.samples for clip in made]).clip(-1, 1) * 32767).astype(np.int16),
            table=np.array([(clip.word, clip.speaker, str(len(clip.samples)), str(clip.onset), str(clip.end)) for clip in made]),
        )
        part.replace(path)
    with np.load(path) as saved:
        samples, table = saved["samples"].astype(np.float32) / 32767, saved["table"]
    pieces = np.split(samples, np.cumsum(table[:, 2].astype(int))[:-1])
    return [Clip(str(word), piece, str(who), int(onset), int(end)) for piece, (word, who, _, onset, end) in zip(pieces, table, strict=True)]
