"""What several test modules share."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.build import build
from export.distill.clips import COMMANDS, RATE_HZ, Clip
from export.distill.corpus import Corpus, Voices
from export.hands import draw_hand

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the recordings and photos of real people; COPRESENCE_DATA, or ../shared/data beside the checkout. Skips without it."""
    root = Path(os.environ.get("COPRESENCE_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (root / "words").is_dir():
        pytest.skip(f"no recordings of real people in {root}; set COPRESENCE_DATA to their folder")
    return root


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs in real time listen, and leave their dumps, where no other companion of this machine does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COPRESENCE_RUNTIME", str(tmp_path_factory.mktemp("run")))
        patch.setenv("COPRESENCE_STATE", str(tmp_path_factory.mktemp("state")))
        yield


def tone(word: str, pitch_hz: float, speaker: str = "somebody") -> Clip:
    """Half a second of tone in a second of faint noise stands for a word."""
    samples = 1e-3 * np.random.default_rng(0).standard_normal(RATE_HZ)
    samples[4000:12000] += 0.3 * np.sin(2 * np.pi * pitch_hz * np.arange(8000) / RATE_HZ)
    return Clip(word, samples.astype(np.float32), speaker, 4000, 12000)


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """A corpus that needs no recordings: tones for words, drawn hands for photographs."""
    rng = np.random.default_rng(0)
    words = {word: [tone(word, 200.0 + 100 * i)] for i, word in enumerate(COMMANDS)}
    hands = {digit: [(draw_hand(digit, rng), "nobody")] for digit in range(10)}
    return Corpus(Voices(words, [tone("bed", 1500.0)]), [], hands)


@pytest.fixture(scope="session")
def companion_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the checkpoint that ships."""
    path = tmp_path_factory.mktemp("bundles") / "companion-nano"
    build(REPOSITORY / "export" / "checkpoints" / "companion-nano", path)
    return path


@pytest.fixture
def double() -> Iterator[Any]:
    """tests/doubles in place of tensorrt, pycuda and cuda.bindings, as new; the value is the double of tensorrt.

    Ask for it before `monkeypatch`, so that a patch of theirs is undone before they are forgotten.
    """

    def forget() -> None:
        for name in [n for n in sys.modules if n.split(".")[0] in ("tensorrt", "pycuda", "cuda")]:
            del sys.modules[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "tests" / "doubles"))
        forget()
        yield importlib.import_module("tensorrt")
    forget()
