"""The checkpoint that ships: it does what the demonstration promises, and a recogniser nobody here wrote understands its voice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from device.cli import main as run
from export.build import build
from export.demo import EVENTS, OUT_WAV, RATE_HZ, SCENE_VIDEO, SCENE_WAV, make_scene, read_events, report, write_hands

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHOWN_S, PERIOD_S = 1.5, 2.5


@pytest.fixture(scope="module")
def bundle(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "companion-nano"
    build(repository / "export" / "checkpoints" / "companion-nano", path)
    return path


def companion(bundle: Path, folder: Path, mic: str) -> None:
    files = ("--camera", str(folder / SCENE_VIDEO), "--speaker", str(folder / OUT_WAV), "--events", str(folder / EVENTS))
    assert run(["run", "--bundle", str(bundle), "--mic", mic, *files, "--clock", "simulated"]) == 0


def test_it_answers_the_demonstration(bundle: Path, tmp_path: Path) -> None:
    make_scene(tmp_path)
    companion(bundle, tmp_path, str(tmp_path / SCENE_WAV))
    summary = next(line for line in report(tmp_path).splitlines() if "cues answered" in line)
    hits, wanted, others = (int(word) for word in summary.replace(",", "").split() if word.isdigit() and word != "100")
    assert hits >= wanted - 1 and others <= 1, summary


def test_its_voice_is_understood(bundle: Path, tmp_path: Path) -> None:
    from pocketsphinx import Decoder

    grammar = tmp_path / "digits.gram"
    grammar.write_text(f"#JSGF V1.0;\ngrammar digits;\npublic <digit> = {' | '.join(DIGITS)};\n")
    decoder = Decoder(jsgf=str(grammar), loglevel="FATAL")
    shown = np.repeat(np.arange(10), 2)
    write_hands(
        tmp_path / SCENE_VIDEO, [(i * PERIOD_S + 0.5, i * PERIOD_S + 0.5 + SHOWN_S, int(d)) for i, d in enumerate(shown)], 20 * PERIOD_S
    )
    companion(bundle, tmp_path, "none")
    sound, _ = soundfile.read(tmp_path / OUT_WAV, dtype="float32")
    noise = np.random.default_rng(0)
    said = [(event["t_s"], word) for event in read_events(tmp_path / EVENTS) if event["event"] == "tick" for word in event["say"]]
    assert 18 <= len(said) <= 22, "once per showing"
    understood = 0
    for at_s, word in said:
        start = int(at_s * RATE_HZ)
        piece = np.pad(sound[start : start + RATE_HZ], 4800) + 1e-3 * noise.standard_normal(RATE_HZ + 9600)  # −60 dBFS
        decoder.start_utt()
        decoder.process_raw((piece * 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        understood += decoder.hyp() is not None and decoder.hyp().hypstr == word
    assert understood >= 0.95 * len(said)
