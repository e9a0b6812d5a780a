"""The recordings that scenes are made of: real words, noise and hand signs, split by person, and espeak's voices."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import soundfile
from scipy.signal import butter, lfilter, sosfilt

from export.errors import ExportError
from export.espeak import speak

RATE_HZ = 16000
COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")  # the recorded words; aux label = index + 1

Split = Literal["train", "dev", "test"]

_SERIES_PER_BLOCK = 6  # neighbouring series may be one person (data README), so they share a side of the split
_FRAME = RATE_HZ // 100  # 10 ms

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
_VOICES: dict[Split, int] = {"train": 60, "dev": 8, "test": 16}
_OTHERS: dict[Split, int] = {"train": 450, "dev": 60, "test": 120}
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


class CorpusMissing(ExportError):
    """The recordings are not where they were expected; the text says where. Remedy: point to the data folder."""


class CorpusDamaged(ExportError):
    """A recording or photograph that cannot be used; the text names the file. Remedy: fetch or convert it."""


@dataclass(frozen=True)
class Clip:
    """One recorded word: f32[n] at 16 kHz; the word itself lies in samples[onset:end]."""

    word: str
    samples: np.ndarray
    speaker: str
    onset: int
    end: int


@dataclass(frozen=True)
class Corpus:
    """All material of one side of the split. `words` has the ten COMMANDS as keys, `hands` the digits 0..9."""

    words: dict[str, list[Clip]]
    others: list[Clip]
    synthetic_words: dict[str, list[Clip]]  # empty lists without a cache
    synthetic_others: list[Clip]
    noise: list[np.ndarray]  # f32[n] at 16 kHz
    hands: dict[int, list[tuple[np.ndarray, str]]]  # (u8[100, 100, 3] RGB, person)


def split_of(person: str) -> Split:
    """The side of the split that a person (or a noise file) belongs to: 70 % train, 10 % dev, 20 % test, by sha1."""
    share = int(hashlib.sha1(person.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if share < 0.7 else "dev" if share < 0.8 else "test"


def load_corpus(root: Path, split: Split, cache: Path | None = None) -> Corpus:
    """Load one side of the split from the data folder `root` (a few seconds).

    With `cache`, a folder for the synthetic voices' recordings, those are added, and made at the first call (about a minute).
    Raises CorpusMissing when a folder is not there.
    """
    words = {word: _read_clips(root / "words" / word, split) for word in COMMANDS}
    others = [clip for folder in _folders(root / "other_words") for clip in _read_clips(folder, split)]
    noise = [_read_audio(path) for path in _files(root / "noise", ".flac") if split_of(path.stem) == split]
    synthetic_words: dict[str, list[Clip]] = {word: [] for word in COMMANDS}
    synthetic_others: list[Clip] = []
    for clip in [] if cache is None else synthetic_clips(cache, split):
        synthetic_words.get(clip.word, synthetic_others).append(clip)
    return Corpus(words, others, synthetic_words, synthetic_others, noise, _read_hands(root / "signs", split))


def word_span(samples: np.ndarray) -> tuple[int, int]:
    """Onset and end of the loudest word in a clip, as sample indexes, from its energy in 10 ms frames.

    Taken from 100 Hz up (rumble is no speech) and pre-emphasised (the "f" of "off" is weak and high). The threshold follows the
    clip's own noise; pauses up to 150 ms (the closure before the last consonant of "up", "right", "stop") are inside the word.
    """
    filtered = lfilter((1, -0.85), (1,), sosfilt(butter(2, 100, "highpass", fs=RATE_HZ, output="sos"), samples))
    frames = filtered[: len(samples) // _FRAME * _FRAME].reshape(-1, _FRAME)
    power = np.convolve(np.mean(frames**2, axis=1), (0.25, 0.5, 0.25), "same")
    level_db = 10 * np.log10(power + 1e-12)
    audible = level_db[level_db > -100]  # clips may end in digital silence, which says nothing about their noise
    peak_db = float(level_db.max())
    floor_db = float(np.percentile(audible, 15)) if len(audible) else -100.0
    threshold_db = min(max(floor_db + 8, peak_db - 30), peak_db - 10)
    loud = np.flatnonzero(level_db > threshold_db)
    runs = np.split(loud, np.flatnonzero(np.diff(loud) > 15) + 1)
    best = max(runs, key=lambda run: float(power[run].sum()))
    return int(best[0]) * _FRAME, min((int(best[-1]) + 1) * _FRAME, len(samples))


def synthetic_clips(cache: Path, split: Split) -> list[Clip]:
    """The synthetic voices' words of one split, speaker "espeak-<voice>-<words per minute>-<pitch>", kept in `cache`/<split>.npz."""
    path = cache / f"{split}.npz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(2) as pool:
            made = [clip for clip in pool.map(_synthesise, _recipes(split)) if clip is not None]
        part = path.with_suffix(".part.npz")
        np.savez(
            part,
            samples=(np.concatenate([clip.samples for clip in made]) * 32767).astype(np.int16),
            table=np.array([(clip.word, clip.speaker, str(len(clip.samples)), str(clip.onset), str(clip.end)) for clip in made]),
        )
        part.replace(path)
    with np.load(path) as saved:
        samples, table = saved["samples"].astype(np.float32) / 32767, saved["table"]
    pieces = np.split(samples, np.cumsum(table[:, 2].astype(int))[:-1])
    return [Clip(str(word), piece, str(who), int(onset), int(end)) for piece, (word, who, _, onset, end) in zip(pieces, table, strict=True)]


def _recipes(split: Split) -> list[tuple[str, str, int, int]]:
    """(word, espeak voice, words per minute, pitch) of every synthetic clip of a split."""
    rng = np.random.default_rng(("train", "dev", "test").index(split))
    names = [f"{dialect}+{variant}" for dialect, variant in product(_DIALECTS, _VARIANTS[split])]

    def voice(name: str) -> tuple[str, int, int]:
        return name, int(rng.integers(110, 200)), int(rng.integers(15, 85))

    voices = [voice(str(name)) for name in rng.choice(names, _VOICES[split], replace=False)]
    strangers = [(str(rng.choice(_OTHER_WORDS)), *voice(str(rng.choice(names)))) for _ in range(_OTHERS[split])]
    return [(word, *who) for word, who in product(COMMANDS, voices)] + strangers


def _synthesise(recipe: tuple[str, str, int, int]) -> Clip | None:
    word, voice, words_per_minute, pitch = recipe
    samples = speak(word, voice, words_per_minute, pitch)
    if len(samples) < RATE_HZ // 10 or np.abs(samples).max() < 0.01:  # a few whispering variants leave a word out
        return None
    samples = (0.7 * samples / np.abs(samples).max()).astype(np.float32)
    # A second of faint noise after it stands for the room that espeak does not have: the word fills its clip.
    onset, end = word_span(np.concatenate((samples, 1e-4 * np.random.default_rng(0).standard_normal(RATE_HZ))))
    end = min(end, len(samples))
    return Clip(word, samples, f"espeak-{voice}-{words_per_minute}-{pitch}", onset, end)


def _read_clips(folder: Path, split: Split) -> list[Clip]:
    clips = []
    for path in _files(folder, ".flac"):
        speaker = path.stem.split("_nohash_")[0]
        if split_of(speaker) == split:
            samples = _read_audio(path)
            onset, end = word_span(samples)
            if not _cut_off(samples, onset, end):
                clips.append(Clip(folder.name, samples, speaker, onset, end))
    return clips


def _cut_off(samples: np.ndarray, onset: int, end: int) -> bool:
    """Whether the recording stopped within the word, or holds no word that stands out of its noise (under 3 % of the clips)."""
    last = int(np.flatnonzero(np.abs(samples) > 1e-4)[-1]) if np.abs(samples).max() > 1e-4 else 0
    seconds = (end - onset) / RATE_HZ
    return seconds < 0.1 or seconds > 0.95 or (seconds < 0.25 and end > last - _FRAME)


def _read_audio(path: Path) -> np.ndarray:
    samples, rate_hz = soundfile.read(path, dtype="float32")
    if rate_hz != RATE_HZ or samples.ndim != 1:
        raise CorpusDamaged(f"{path}: expected {RATE_HZ} Hz mono, found {rate_hz} Hz, shape {samples.shape}; convert the file or remove it")
    return np.asarray(samples)


def _read_hands(root: Path, split: Split) -> dict[int, list[tuple[np.ndarray, str]]]:
    paths = {digit: _files(root / str(digit), ".JPG") for digit in range(10)}
    person_of = _hand_people(_series(path, digit) for digit in paths for path in paths[digit])
    hands: dict[int, list[tuple[np.ndarray, str]]] = {digit: [] for digit in paths}
    for digit in paths:
        for path in paths[digit]:
            person = person_of[_series(path, digit)]
            if split_of(person) == split:
                photo = cv2.imread(str(path))
                if photo is None:
                    raise CorpusDamaged(f"{path}: not a readable photograph; fetch the data again")
                # Two of the photographs were published in camera size.
                photo = cv2.resize(photo, (100, 100), interpolation=cv2.INTER_AREA) if photo.shape[:2] != (100, 100) else photo
                hands[digit].append((cv2.cvtColor(photo, cv2.COLOR_BGR2RGB), person))
    return hands


def _series(path: Path, digit: int) -> int:
    return int(path.stem.split("_")[1]) - digit  # "IMG_<n>": n - digit is the same for one person's ten photographs


def _hand_people(series: Iterable[int]) -> dict[int, str]:
    """Series number → person id. Series less than ten numbers apart overlap (one incomplete series of one person) and count as one."""
    people: dict[int, str] = {}
    count, before = -1, -100
    for number in sorted(set(series)):
        count += number - before >= 9
        people[number] = f"hands-block-{count // _SERIES_PER_BLOCK}"
        before = number
    return people


def _files(folder: Path, suffix: str) -> list[Path]:
    return [path for path in _listing(folder) if path.suffix == suffix]


def _folders(folder: Path) -> list[Path]:
    return [path for path in _listing(folder) if path.is_dir()]


def _listing(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CorpusMissing(f"no recordings at {folder}; point to the data folder that holds words/, other_words/, noise/ and signs/")
    return sorted(folder.iterdir())
