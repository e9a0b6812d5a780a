"""The recordings that scenes are made of: real words, noise and hand signs, split by person, and espeak's voices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import soundfile

from export.distill.clips import COMMANDS, FRAME, RATE_HZ, Clip, Split, belongs, split_of, word_span
from export.distill.voices import reshaped_clips, synthetic_clips
from export.errors import ExportError

_SERIES_PER_BLOCK = 6  # neighbouring series may be one person (data README), so they share a side of the split


class CorpusMissing(ExportError):
    """The recordings are not where they were expected; the text says where. Remedy: point to the data folder."""


class CorpusDamaged(ExportError):
    """A recording or photograph that cannot be used; the text names the file. Remedy: fetch or convert it."""


class Voices(NamedTuple):
    """Spoken words from one source."""

    words: dict[str, list[Clip]]  # the ten COMMANDS are the keys
    others: list[Clip]

    @classmethod
    def none(cls) -> Voices:
        """Nobody."""
        return cls.of(())

    @classmethod
    def of(cls, clips: Iterable[Clip]) -> Voices:
        voices = cls({word: [] for word in COMMANDS}, [])
        for clip in clips:
            voices.words.get(clip.word, voices.others).append(clip)
        return voices


@dataclass(frozen=True)
class Corpus:
    """All material of one side of the split."""

    real: Voices
    noise: list[np.ndarray]  # f32[n] at 16 kHz
    hands: dict[int, list[tuple[np.ndarray, str]]]  # digit 0..9 to (u8[100, 100, 3] RGB, person)
    reshaped: Voices = field(default_factory=Voices.none)  # for training: real people's words with another larynx and vocal tract
    synthetic: Voices = field(default_factory=Voices.none)

    @property
    def voices(self) -> tuple[Voices, ...]:
        """All sources of voices."""
        return self.real, self.reshaped, self.synthetic


def load_corpus(root: Path, split: Split, cache: Path | None = None, people: float = 1.0) -> Corpus:
    """Load one side of the split from the data folder `root` (a few seconds), or that share of its `people`, as `belongs` chooses them.

    With `cache`, a folder for their recordings, the made voices are added; the first call makes them, which takes minutes.
    Raises CorpusMissing when a folder is not there, or nobody among so few people who says a word or shows a digit.
    """
    clips = [clip for word in COMMANDS for clip in _read_clips(root / "words" / word, split, people)]
    clips += [clip for folder in _folders(root / "other_words") for clip in _read_clips(folder, split, people)]
    noise = [_read_audio(path) for path in _files(root / "noise", ".flac") if split_of(path.stem) == split]
    corpus = Corpus(Voices.of(clips), noise, _read_hands(root / "signs", split, people))
    if people < 1:
        _check_complete(corpus, root, people)
    if cache is None:
        return corpus
    return replace(
        corpus,
        reshaped=Voices.of(reshaped_clips(cache, split, clips)),
        synthetic=Voices.of(synthetic_clips(cache, split)),
    )


def _check_complete(corpus: Corpus, root: Path, people: float) -> None:
    missing = [word for word, clips in corpus.real.words.items() if not clips]
    missing += [] if corpus.real.others else ["another word"]
    missing += [f"the sign {digit}" for digit, hands in corpus.hands.items() if not hands]
    if missing:
        raise CorpusMissing(f"{root}: nobody in {people:g} of its people has {', '.join(missing)}; ask for a larger share (people)")


def _read_clips(folder: Path, split: Split, people: float) -> list[Clip]:
    clips = []
    for path in _files(folder, ".flac"):
        speaker = path.stem.split("_nohash_")[0]
        if belongs(speaker, split, people):
            samples = _read_audio(path)
            onset, end = word_span(samples)
            if not _cut_off(samples, onset, end):
                clips.append(Clip(folder.name, samples, speaker, onset, end))
    return clips


def _cut_off(samples: np.ndarray, onset: int, end: int) -> bool:
    """Whether the recording stopped within the word, or holds no word that stands out of its noise (under 3 % of the clips)."""
    last = int(np.flatnonzero(np.abs(samples) > 1e-4)[-1]) if np.abs(samples).max() > 1e-4 else 0
    seconds = (end - onset) / RATE_HZ
    return seconds < 0.1 or seconds > 0.95 or (seconds < 0.25 and end > last - FRAME)


def _read_audio(path: Path) -> np.ndarray:
    samples, rate_hz = soundfile.read(path, dtype="float32")
    if rate_hz != RATE_HZ or samples.ndim != 1:
        raise CorpusDamaged(f"{path}: expected {RATE_HZ} Hz mono, found {rate_hz} Hz, shape {samples.shape}; convert the file or remove it")
    return np.asarray(samples)


def _read_hands(root: Path, split: Split, people: float) -> dict[int, list[tuple[np.ndarray, str]]]:
    paths = {digit: _files(root / str(digit), ".JPG") for digit in range(10)}
    person_of = _hand_people(_series(path, digit) for digit in paths for path in paths[digit])
    hands: dict[int, list[tuple[np.ndarray, str]]] = {digit: [] for digit in paths}
    for digit in paths:
        for path in paths[digit]:
            person = person_of[_series(path, digit)]
            if belongs(person, split, people):
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
