"""The checkpoint that ships: it does what the demonstration promises, and a recogniser nobody here wrote understands its voice."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import soundfile

from device.cli import main as run
from device.reach.tools import INSTRUCTIONS
from export.demo import EVENTS, OUT_WAV, RATE_HZ, SCENE_VIDEO, SCENE_WAV, TEXT, make_scene, read_events, report, write_hands
from export.distill.behaviours import WORDS
from export.spoken_words import render_words

DIGITS = WORDS[1:11]
TOLD = 2 * tuple(word for word in WORDS[1:] if word not in INSTRUCTIONS)
SHOWN_S, PERIOD_S = 1.5, 2.5


@pytest.fixture(scope="module")
def bundle(companion_bundle: Path) -> Path:
    return companion_bundle


def companion(bundle: Path, folder: Path, mic: str, text: tuple[str, ...] = ()) -> None:
    files = ("--camera", str(folder / SCENE_VIDEO), "--speaker", str(folder / OUT_WAV), "--events", str(folder / EVENTS))
    assert run(["run", "--bundle", str(bundle), "--mic", mic, *files, *(("--text", *text) if text else ()), "--clock", "simulated"]) == 0


@pytest.fixture(scope="module")
def answered(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, int, int]:
    """Of the demonstration: cues answered, cues that call for something, other reactions."""
    folder = tmp_path_factory.mktemp("demonstration")
    make_scene(folder)
    companion(bundle, folder, str(folder / SCENE_WAV), tuple((folder / TEXT).read_text().splitlines()))
    summary = next(line for line in report(folder).splitlines() if "cues answered" in line)
    hits, wanted, others = (int(word) for word in summary.replace(",", "").split() if word.isdigit() and word != "200")
    return hits, wanted, others


def test_it_answers_most_of_the_demonstration(answered: tuple[int, int, int]) -> None:
    hits, wanted, others = answered
    assert hits >= 0.8 * wanted and others <= 4, answered


@pytest.mark.xfail(reason="14 of 15 cues, and 3 other reactions (model card)")
def test_it_answers_the_demonstration(answered: tuple[int, int, int]) -> None:
    hits, wanted, others = answered
    assert hits >= wanted - 1 and others <= 1, answered


Spoken = tuple[list[tuple[float, str]], np.ndarray]


@pytest.fixture(scope="module")
def spoken(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    """What it says to twenty hands, one after the other: (edge in s, word), and the sound."""
    folder = tmp_path_factory.mktemp("hands")
    shown = np.repeat(np.arange(10), 2)
    write_hands(
        folder / SCENE_VIDEO, [(i * PERIOD_S + 0.5, i * PERIOD_S + 0.5 + SHOWN_S, int(d)) for i, d in enumerate(shown)], 20 * PERIOD_S
    )
    companion(bundle, folder, "none")
    return what_it_said(folder)


def what_it_said(folder: Path) -> Spoken:
    sound, _ = soundfile.read(folder / OUT_WAV, dtype="float32")
    ticks = [event for event in read_events(folder / EVENTS) if event["event"] == "tick"]
    return [(event["t_s"], word) for event in ticks for word in event["say"]], sound


def misheard(spoken: Spoken, words: tuple[str, ...], folder: Path) -> list[tuple[str, str | None]]:
    """What pocketsphinx, with a grammar of `words`, takes for another: (the word, what it understood)."""
    from pocketsphinx import Decoder

    grammar = folder / "words.gram"
    grammar.write_text(f"#JSGF V1.0;\ngrammar words;\npublic <word> = {' | '.join(words)};\n")
    decoder = Decoder(jsgf=str(grammar), loglevel="FATAL")
    said, sound = spoken
    noise, wrong = np.random.default_rng(0), []
    for at_s, word in said:
        start = int(at_s * RATE_HZ)
        piece = np.pad(sound[start : start + RATE_HZ], 4800) + 1e-3 * noise.standard_normal(RATE_HZ + 9600)  # −60 dBFS
        decoder.start_utt()
        decoder.process_raw((piece * 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        if decoder.hyp() is None or decoder.hyp().hypstr != word:
            wrong.append((word, decoder.hyp() and decoder.hyp().hypstr))
    return wrong


def test_the_voice_that_it_learned_is_understood(tmp_path: Path) -> None:
    """The recordings themselves, of all words, each in ten noises and beginnings."""
    words = 10 * WORDS[1:]
    recordings = render_words(WORDS[1:])
    sound, rng = np.zeros(int((len(words) + 1) * PERIOD_S * RATE_HZ), np.float32), np.random.default_rng(0)
    said = [(i * PERIOD_S, word) for i, word in enumerate(words)]
    for at_s, word in said:
        begins = int(at_s * RATE_HZ) + int(rng.integers(RATE_HZ // 10))
        sound[begins : begins + len(recordings[word])] = recordings[word]
    wrong = misheard((said, sound), WORDS[1:], tmp_path)
    assert len(wrong) <= 0.01 * len(said), wrong


def test_its_voice_is_understood(spoken: Spoken, tmp_path: Path) -> None:
    said, _ = spoken
    assert 18 <= len(said) <= 22, "once per showing"
    wrong = misheard(spoken, DIGITS, tmp_path)
    assert len(wrong) <= 0.05 * len(said), wrong


@pytest.fixture(scope="module")
def told(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    """What it says when it is told every word that is no command to it, twice."""
    folder = tmp_path_factory.mktemp("told")
    write_hands(folder / SCENE_VIDEO, [], len(TOLD) * PERIOD_S)
    companion(bundle, folder, "none", tuple(f"{i * PERIOD_S + 0.5}:tell {word}" for i, word in enumerate(TOLD)))
    return what_it_said(folder)


def test_it_says_every_word_that_it_is_told(told: Spoken) -> None:
    said, _ = told
    assert [word for _, word in said] == [*TOLD]


def test_every_word_that_it_is_told_is_understood(told: Spoken, tmp_path: Path) -> None:
    said, _ = told
    wrong = misheard(told, WORDS[1:], tmp_path)
    assert len(wrong) <= 0.05 * len(said), wrong


@pytest.fixture(scope="module")
def mouthed(repository: Path) -> Spoken:
    """Every word put into its mouth, twice and then in six other orders: also commands to it, which it is never told to say."""
    pytest.importorskip("torch", reason="only the model as it was trained can be made to say what it did not choose (extra 'distill')")
    import torch

    from export.checkpoint import WEIGHTS_NAME, read_config
    from export.distill.finish import reference_ticks
    from export.distill.model import TickModel
    from export.distill.teacher import load_weights

    checkpoint = repository / "export/checkpoints/companion-nano"
    model = TickModel(read_config(checkpoint)).eval()
    load_weights(model, checkpoint / WEIGHTS_NAME)
    period, decide = 12, model.decide  # ticks
    others = [str(word) for seed in range(6) for word in np.random.default_rng(seed).permutation(WORDS[1:])]
    said = [(i * period * 0.2, word) for i, word in enumerate([*2 * WORDS[1:], *others])]
    ticks = itertools.count()

    def chosen(top: torch.Tensor) -> dict[str, torch.Tensor]:
        number, phase = divmod(next(ticks), period)
        out = decide(top)
        say = torch.zeros_like(out["say"])
        say[0] = WORDS.index(said[number][1]) if phase == 0 else 0
        return out | {"say": say, "act": torch.zeros_like(out["act"])}

    model.decide = chosen  # type: ignore[method-assign]
    return said, reference_ticks(model, len(said) * period)["speech"].reshape(-1)


@pytest.mark.parametrize("times", [2, 8])
def test_every_word_of_the_vocabulary_is_understood(times: int, mouthed: Spoken, tmp_path: Path) -> None:
    said, sound = mouthed
    said = said[: times * len(WORDS[1:])]
    wrong = misheard((said, sound), WORDS[1:], tmp_path)
    assert len(wrong) <= 0.05 * len(said), wrong


def test_its_voice_does_not_click_between_ticks(spoken: Spoken) -> None:
    """Spectral flux from one 10 ms frame to the next: across the borders of ticks no larger than inside of them."""
    _, sound = spoken
    border, frame = 60 * RATE_HZ // 1000, RATE_HZ // 100  # speech of a tick begins 60 ms after an edge
    frames = sound[border : border + (len(sound) - border) // frame * frame].reshape(-1, frame)
    spectra = np.log10(np.abs(np.fft.rfft(frames * np.hanning(frame))) + 1e-3)
    voiced = np.sqrt(np.square(frames).mean(1)) > 0.01
    both = voiced[:-1] & voiced[1:]
    flux = np.maximum(np.diff(spectra, axis=0), 0).mean(1)
    at_border = (np.arange(1, len(frames)) % 20) == 0
    inside, across = flux[both & ~at_border], flux[both & at_border]
    assert len(across) > 30
    assert across.mean() < 1.15 * inside.mean() and np.percentile(across, 95) < 1.3 * np.percentile(inside, 95)
