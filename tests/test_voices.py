"""People who never were: what WORLD makes of real voices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.distill import voices
from export.distill.clips import RATE_HZ, Clip
from export.distill.voices import RESHAPED_PER_CLIP, reshaped_clips

PITCH_HZ = 170


@pytest.fixture(scope="module")
def loud() -> Clip:
    """Half a second of a voice at full scale, its overtones spread over the period."""
    time_s = np.arange(RATE_HZ // 2) / RATE_HZ
    voice = sum(np.cos(2 * np.pi * PITCH_HZ * n * time_s + 0.2 * n * n) / np.sqrt(n) for n in range(1, 30))
    samples = 1e-3 * np.random.default_rng(0).standard_normal(RATE_HZ)
    samples[4000:12000] += voice / np.abs(voice).max()
    return Clip("go", samples.clip(-1, 1).astype(np.float32), "somebody", 4000, 12000)


def pitch_hz(samples: np.ndarray) -> float:
    pyworld = pytest.importorskip("pyworld")
    pitch, _ = pyworld.dio(samples.astype(np.float64), RATE_HZ)
    return float(np.median(pitch[pitch > 0]))


def test_reshaped_people_have_another_pitch_and_are_not_clipped(loud: Clip, tmp_path: Path) -> None:
    made = reshaped_clips(tmp_path, "train", [loud])
    assert len(made) == RESHAPED_PER_CLIP and {clip.word for clip in made} == {"go"}
    for clip in made:
        factor = float(clip.speaker.rsplit("-", 1)[1])
        assert pitch_hz(clip.samples[clip.onset : clip.end]) == pytest.approx(PITCH_HZ * factor, rel=0.05)
        assert np.mean(np.abs(clip.samples) > 0.99 * np.abs(clip.samples).max()) < 0.005, "flat tops"
        assert clip.end - clip.onset == pytest.approx(loud.end - loud.onset, abs=RATE_HZ // 100)


def test_reshaped_people_are_kept(loud: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = reshaped_clips(tmp_path, "train", [loud])
    monkeypatch.delattr(voices, "_reshape")
    again = reshaped_clips(tmp_path, "train", [loud])
    assert [clip.speaker for clip in again] == [clip.speaker for clip in made]
    assert all(np.array_equal(one.samples, other.samples) for one, other in zip(made, again, strict=True))
