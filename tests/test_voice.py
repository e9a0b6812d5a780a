"""The companion's voice: its words, their mel, and the vocoder's promises (streaming, silence, exact phase)."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the voice is trained with PyTorch (extra 'distill')")

from export import voice_tables as tables  # noqa: E402
from export.distill import voice  # noqa: E402
from export.distill.voice import HOP_SAMPLES, SILENCE, State, Vocoder, speech_mel  # noqa: E402
from export.spoken_words import render_words  # noqa: E402

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
TICK_SAMPLES = voice.TICK_FRAMES * HOP_SAMPLES


def speechlike(frames: int, seed: int = 0) -> torch.Tensor:
    """f32[1, frames, 80]: bursts of 30 loud frames with 20 silent ones between."""
    mel = torch.randn(1, frames, 80, generator=torch.Generator().manual_seed(seed)) * 0.5
    mel[:, torch.arange(frames) % 50 >= 30] = SILENCE
    return mel


@pytest.fixture
def vocoder() -> Vocoder:
    torch.manual_seed(0)
    model = Vocoder(32).eval()
    with torch.no_grad():
        model.out.weight.mul_(10.0)
    return model


def test_mel_frame_is_centred_and_calibrated() -> None:
    samples = np.zeros(3150, np.float32)
    samples[1100] = 0.5  # the centre of frame 5
    mel = speech_mel(samples)
    assert mel.shape == (16, 80)
    loudness = mel.mean(1)
    assert loudness.argmax() == 5
    np.testing.assert_allclose(loudness[4], loudness[6], atol=1e-5)
    assert np.all(mel[:3] == np.float32(SILENCE))
    np.testing.assert_allclose(speech_mel(2 * samples)[5] - mel[5], np.log(2) / tables.MEL_STD, atol=1e-5)


def test_mel_is_librosas() -> None:
    librosa = pytest.importorskip("librosa")
    samples = np.random.default_rng(0).normal(0, 0.1, 3200).astype(np.float32)
    padded = np.pad(samples, 412)  # librosa centres the window of 800 in its frame of 1024
    reference = librosa.feature.melspectrogram(
        y=padded, sr=16000, n_fft=1024, win_length=800, hop_length=200, center=False, n_mels=80, power=1.0
    )
    ours = speech_mel(samples) * tables.MEL_STD + tables.MEL_MEAN
    np.testing.assert_allclose(ours, np.log(reference.T), atol=1e-4)


@needs_espeak
def test_words_are_trimmed_and_level() -> None:
    words = render_words(("", "three", "nine", "ok"))
    assert set(words) == {"three", "nine", "ok"}
    for word, samples in words.items():
        assert 0.3 < len(samples) / tables.RATE_HZ <= 0.8, word
        assert abs(np.sqrt(np.mean(samples.astype(np.float64) ** 2)) - 0.1) < 1e-3
        assert samples[0] == 0 and samples[-1] == 0 and np.abs(samples).max() < 1
        assert np.abs(samples[:800]).max() > 1e-3, f"{word} begins late"


@needs_espeak
def test_word_mels_are_whole_ticks_and_end_silent() -> None:
    for mel in voice.word_mels(("three", "nine", "ok")).values():
        assert mel.dtype == np.float32 and mel.shape[0] % voice.TICK_FRAMES == 0 and mel.shape[1] == 80
        assert np.all(mel[-2:] == np.float32(SILENCE))
        assert 0.5 < mel[mel.mean(1) > SILENCE + 0.5].std() < 1.5 and mel.max() < tables.MEL_TOP


def test_sequence_equals_tick_by_tick(vocoder: Vocoder) -> None:
    ticks = 12
    mel, noise = speechlike(ticks * voice.TICK_FRAMES), torch.randn(1, ticks * TICK_SAMPLES)
    with torch.no_grad():
        whole, last = vocoder(mel, noise, vocoder.zero_state(1))
        state, pieces = vocoder.zero_state(1), []
        for tick_mel, tick_noise in zip(mel.split(voice.TICK_FRAMES, 1), noise.split(TICK_SAMPLES, 1), strict=True):
            speech, state = vocoder(tick_mel, tick_noise, state)
            pieces.append(speech)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=0)
    for name, one, other in zip(State._fields, last, state, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0, msg=name)
    assert whole.abs().max() > 0.01


def test_speech_follows_its_mel_by_the_delay(vocoder: Vocoder) -> None:
    mel = torch.full((1, 32, 80), SILENCE)
    mel[:, 10:12] = 0.0
    with torch.no_grad():
        speech, _ = vocoder(mel, torch.randn(1, 6400), vocoder.zero_state(1))
    heard = torch.nonzero(speech[0].abs() > 1e-7)
    assert heard.min() >= 10 * HOP_SAMPLES and heard.max() < 13 * HOP_SAMPLES + tables.FIR_SAMPLES
    centre = (speech[0] ** 2 * torch.arange(6400)).sum() / (speech[0] ** 2).sum()
    assert abs(centre - (11 * HOP_SAMPLES + tables.DELAY_SAMPLES)) < 60


def test_silence_is_exactly_silent(vocoder: Vocoder) -> None:
    """Also with the error that a flow head leaves on a silent mel, and from the all-zero state of a session's start."""
    mel = torch.full((1, 64, 80), SILENCE) + 0.1 * torch.randn(1, 64, 80)
    with torch.no_grad():
        speech, state = vocoder(mel, torch.randn(1, 64 * HOP_SAMPLES), vocoder.zero_state(1))
    assert not speech.any() and not state.tail.any() and not state.phase.any()


def test_a_wild_mel_stays_bounded(vocoder: Vocoder) -> None:
    with torch.no_grad():
        limit, _ = vocoder(torch.full((1, 16, 80), tables.MEL_TOP), torch.zeros(1, 3200), vocoder.zero_state(1))
        wild, _ = vocoder(torch.full((1, 16, 80), 1e6), torch.zeros(1, 3200), vocoder.zero_state(1))
    assert torch.equal(limit, wild)


def test_a_shut_gate_holds_whatever_the_network_says(vocoder: Vocoder) -> None:
    with torch.no_grad():
        vocoder.out.bias.fill_(100.0)
        speech, _ = vocoder(speechlike(64), torch.randn(1, 64 * HOP_SAMPLES), vocoder.zero_state(1))
    assert torch.isfinite(speech).all() and not speech[0, 33 * HOP_SAMPLES : 49 * HOP_SAMPLES].any()


def test_phase_is_exact_integer_arithmetic() -> None:
    frames = 40 * voice.TICK_FRAMES
    units = voice.hz_to_units(torch.empty(1, frames).uniform_(70.0, 400.0, generator=torch.Generator().manual_seed(0)))
    assert torch.all(units % tables.PITCH_STEP == 0) and units.max() * TICK_SAMPLES < 2**24
    phases, phase = Vocoder(8).phases(units, torch.ones(1, 2 + frames, 80), torch.tensor([[1234.0]]))
    exact = 1234 + np.cumsum(np.repeat(units[0].numpy().astype(np.int64), HOP_SAMPLES))
    np.testing.assert_array_equal(phases.flatten().numpy().astype(np.int64) % 65536, exact % 65536)
    assert int(phase) % 65536 == exact[-1] % 65536 and -32768 <= float(phase) < 32768


def test_phase_restarts_after_silence_only() -> None:
    units, height = torch.full((1, 16), 700.0), torch.ones(1, 18, 80)
    assert float(Vocoder(8).phases(units, height, torch.zeros(1, 1))[1]) == (700 * 3200 + 32768) % 65536 - 32768
    height[:, -1] = 0.0
    assert float(Vocoder(8).phases(units, height, torch.zeros(1, 1))[1]) == 0.0


@pytest.mark.parametrize("pitch_hz", [70.0, 172.0, 400.0])
def test_pulses_have_unit_power_at_every_pitch(pitch_hz: float) -> None:
    units = voice.hz_to_units(torch.full((1, 160), pitch_hz))
    phases, _ = Vocoder(8).phases(units, torch.ones(1, 162, 80), torch.zeros(1, 1))
    assert abs(float(voice.pulses(phases, units).square().mean()) - 1) < 0.02


def test_the_filter_bank_is_a_true_convolution() -> None:
    """Each frame, filtered by DFT matrices and added up, equals the whole source filtered in time; gains crossfade to one."""
    gains = np.random.default_rng(0).uniform(0, 1, tables.BANDS) @ tables.bands_to_spectrum()
    source = np.random.default_rng(1).normal(size=(4, HOP_SAMPLES))
    faded_out, faded_in = np.split(source @ tables.analysis(), 2, axis=1)
    frames = torch.from_numpy(((faded_out + faded_in) * gains) @ tables.synthesis())[None]
    speech, tail = voice.overlap_add(frames, torch.zeros(1, tables.FIR_SAMPLES, dtype=frames.dtype))
    filter_ = np.fft.irfft(gains[: tables.BINS] * np.fft.rfft(tables.dispersion()), tables.DFT)
    response = np.roll(filter_, tables.REACH_SAMPLES)[: tables.FIR_SAMPLES + 1]
    np.testing.assert_allclose(torch.cat([speech, tail], 1)[0].numpy(), np.convolve(source.ravel(), response), atol=1e-5)


def test_the_dispersion_keeps_magnitudes() -> None:
    ripple_db = 20 * np.log10(np.abs(np.fft.rfft(tables.dispersion())))
    assert np.abs(ripple_db).max() < 1.1


def test_training_saves_what_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = 128
    mel = speechlike(frames)[0]
    material = voice.Training(mel, 0.1 * torch.randn(frames * HOP_SAMPLES), torch.where(mel[:, 0] > SILENCE, 170.0, 0.0))
    monkeypatch.setattr(voice, "training_material", lambda words: material)
    path = tmp_path / "vocoder.safetensors"
    voice.train_vocoder(path, ("one",), minutes=0.02, seed=1, width=16)
    trained = voice.load_vocoder(path)
    assert trained.width == 16
    assert all(torch.isfinite(weight).all() for weight in trained.state_dict().values())


def test_spectral_loss_is_zero_for_equal_signals_only() -> None:
    signal = 0.1 * torch.randn(2, 6400)
    assert float(voice.spectral_loss(signal, signal)) == 0
    assert float(voice.spectral_loss(2 * signal, signal)) > 0.5
