"""The dMel front end against the published one, number by number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from device.config import AudioConfig
from export.cli import main
from export.features import FrontEnd

HOP, WINDOW = 800, 1600
RATE_HZ = 16000
# A value may fall on the other side of a level's border only where float32 cannot tell: an FFT's rounding is some
# 2**-24 of the frame's strongest magnitude, and grows with the logarithm of its length.
ROUNDING = 8 * 2.0**-24
ALLOWED = 1e-5


@pytest.fixture(scope="module")
def front_end() -> FrontEnd:
    return FrontEnd()


class Inkling:
    """The levels of transformers' feature extractor and processor."""

    def __init__(self) -> None:
        from transformers.models.inkling.feature_extraction_inkling import InklingFeatureExtractor
        from transformers.models.inkling.processing_inkling import InklingProcessor

        self.extract = InklingFeatureExtractor()
        # The processor's own quantiser, without the tokenizer that a whole processor needs.
        self.processor = InklingProcessor.__new__(InklingProcessor)
        self.processor.dmel_min_value, self.processor.dmel_max_value = -7.0, 2.0
        self.processor.bin_centers = torch.linspace(-7.0, 2.0, 16, dtype=torch.float64).to(torch.float32)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        features = self.extract(samples, sampling_rate=RATE_HZ, return_tensors="pt")["input_features"]
        return self.processor._extract_dmel_bins(features)[0].numpy()


@pytest.fixture(scope="module")
def inkling() -> Inkling:
    return Inkling()


def near_a_border(front_end: FrontEnd, samples: np.ndarray, where: np.ndarray) -> bool:
    """Whether each value at `where` (frame, channel) lies within float32 rounding of a level's border, by float64 arithmetic."""
    from device.dmel import hann, level_thresholds, mel_filters

    padded = np.concatenate([np.zeros(WINDOW - HOP), samples, np.zeros(-len(samples) % HOP)])
    views = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    magnitude = np.abs(np.fft.rfft(views * hann(WINDOW).astype(np.float64)))
    filters = mel_filters(RATE_HZ, WINDOW // 2 + 1, 80).astype(np.float64)
    mel = np.maximum(magnitude, 1e-5) @ filters.T
    slack = ROUNDING * magnitude.max(axis=1, keepdims=True) * filters.sum(axis=1) + 2.0**-22 * mel
    borders = level_thresholds(front_end.config.audio).astype(np.float64)
    distance = np.abs(mel[..., None] - borders).min(axis=-1)
    return bool((distance <= slack)[where].all())


def compare(front_end: FrontEnd, inkling: Inkling, recordings: list[np.ndarray]) -> tuple[int, int]:
    """(values that differ, values compared); fails on a difference that rounding does not explain."""
    differing = total = 0
    for samples in recordings:
        ours, theirs = front_end.levels(samples), inkling(samples)
        assert ours.shape == theirs.shape
        differ = ours != theirs
        total += differ.size
        if differ.any():
            differing += int(differ.sum())
            assert np.abs(ours[differ].astype(int) - theirs[differ]).max() == 1
            assert near_a_border(front_end, samples, differ)
    return differing, total


def report(capsys: pytest.CaptureFixture[str], what: str, differing: int, total: int) -> None:
    with capsys.disabled():
        print(f"\ndMel of {what}: {differing} of {total:,} levels lie within float32 rounding of a border and differ", end=" ")


def test_levels_are_inklings_on_every_clip(
    data_root: Path, front_end: FrontEnd, inkling: Inkling, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = [soundfile.read(path, dtype="float32")[0] for path in sorted((data_root / "words").glob("*/*.flac"))]
    assert len(clips) > 3000
    differing, total = compare(front_end, inkling, clips)
    report(capsys, f"{len(clips):,} recorded words", differing, total)
    assert differing < ALLOWED * total


def test_levels_are_inklings_on_made_signals(front_end: FrontEnd, inkling: Inkling, capsys: pytest.CaptureFixture[str]) -> None:
    rng, n = np.random.default_rng(0), 20 * RATE_HZ
    t = np.arange(n) / RATE_HZ
    signals = [
        np.zeros(n),
        np.ones(n),
        1e-6 * rng.standard_normal(n),
        *(level * rng.standard_normal(n) for level in (0.001, 0.01, 0.1, 0.3)),
        np.sign(rng.standard_normal(n)),
        np.clip(rng.standard_normal(n), -1, 1),
        np.sin(2 * np.pi * 440 * t),
        np.sign(np.sin(2 * np.pi * 217.3 * t)),
        np.where(np.arange(n) % 2, 1.0, -1.0),
        (np.arange(n) % 5000 == 0).astype(float),
        rng.standard_normal(12345),  # no whole number of hops
        np.zeros(1),
    ]
    differing, total = compare(front_end, inkling, [s.astype(np.float32) for s in signals])
    report(capsys, "silence, noise and full-scale signals", differing, total)
    assert differing < ALLOWED * total


def test_the_command_writes_levels_of_any_sound_file(tmp_path: Path, front_end: FrontEnd) -> None:
    samples = (0.1 * np.random.default_rng(0).standard_normal((RATE_HZ, 2))).astype(np.float32)
    soundfile.write(tmp_path / "in.wav", samples, RATE_HZ, subtype="FLOAT")
    assert main(["features", str(tmp_path / "in.wav"), "--out", str(tmp_path / "levels.npy")]) == 0
    levels = np.load(tmp_path / "levels.npy")
    assert levels.dtype == np.uint8 and levels.shape == (20, 80)
    assert np.array_equal(levels, front_end.levels(samples.mean(axis=1)))
    soundfile.write(tmp_path / "fast.wav", np.repeat(samples, 3, axis=0), 3 * RATE_HZ)
    assert main(["features", str(tmp_path / "fast.wav"), "--out", str(tmp_path / "fast.npy")]) == 0
    assert np.load(tmp_path / "fast.npy").shape == (20, 80)


def test_the_range_is_the_checkpoints(front_end: FrontEnd) -> None:
    samples = (0.1 * np.random.default_rng(0).standard_normal(RATE_HZ)).astype(np.float32)
    narrow = FrontEnd(AudioConfig(level_low=-4.5, level_high=1.2)).levels(samples)
    centres = {"published": np.linspace(-7, 2, 16), "narrow": np.linspace(-4.5, 1.2, 16)}
    published = front_end.levels(samples)
    inside = (narrow > 0) & (narrow < 15)
    assert inside.any()
    # Both say the same magnitude, each to half a step of its own.
    assert np.abs(centres["narrow"][narrow] - centres["published"][published])[inside].max() <= 0.5 * (0.6 + 0.38) + 1e-6


def test_what_is_no_sound_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.wav").write_text("not sound")
    assert main(["features", str(tmp_path / "text.wav"), "--out", str(tmp_path / "levels.npy")]) == 2
    assert "text.wav: cannot be read as sound" in capsys.readouterr().err
    assert main(["features", str(tmp_path / "nothing.wav"), "--out", str(tmp_path / "levels.npy")]) == 2
    assert "nothing.wav: no such file" in capsys.readouterr().err
    assert not (tmp_path / "levels.npy").exists()


def test_the_levels_to_look_at_are_those_of_the_graph() -> None:
    """Of noise of many loudnesses, to float32 rounding at the borders of levels."""
    from device.dmel import DMel

    front_end = FrontEnd()
    rng = np.random.default_rng(5)
    samples = (rng.standard_normal(RATE_HZ * 4) * np.repeat(10.0 ** rng.uniform(-4, 0, 80), HOP)).astype(np.float32)
    levels = DMel(front_end.config.audio).levels(np.concatenate([np.zeros(WINDOW - HOP, np.float32), samples]))
    differ = levels != front_end.levels(samples)
    assert np.unique(levels).size >= 8
    assert differ.mean() < 1e-3 and (not differ.any() or near_a_border(front_end, samples, differ))
