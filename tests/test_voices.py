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


def test_each_of_them_is_recorded_by_another_microphone() -> None:
    """White noise in the middle of silence shows what gets through, and what is added."""
    word = slice(4000, 12000)
    samples = np.zeros(RATE_HZ)
    samples[word] = np.random.default_rng(0).standard_normal(8000)

    def level_db(recorded: np.ndarray, low_hz: int, high_hz: int) -> float:
        spectrum, hz = np.fft.rfft(recorded), np.fft.rfftfreq(len(recorded), 1 / RATE_HZ)
        return float(10 * np.log10(np.mean(np.abs(spectrum[(hz >= low_hz) & (hz < high_hz)]) ** 2)))

    heard = [voices._recorded(samples, word, np.random.default_rng(seed)) for seed in range(100)]
    assert all(recorded.shape == samples.shape and np.isfinite(recorded).all() for recorded in heard)
    deep, high = (
        [level_db(recorded[word], *band) - level_db(recorded[word], 700, 1500) for recorded in heard] for band in ((100, 200), (6000, 7500))
    )
    assert np.std(deep) > 5 and np.std(high) > 5
    quiet = [10 * np.log10(np.mean(recorded[:3000] ** 2) / np.mean(recorded[word] ** 2)) for recorded in heard]
    noisy = np.mean([level > -40 for level in quiet])
    assert 0.3 < noisy < 0.7, "rumble, hiss or both, in half of them"
