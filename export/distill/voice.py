"""The companion's own voice: its words as recordings and as mel, and the small causal vocoder that makes samples of mel."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from device.dmel import mel_filters
from export import voice_tables as tables
from export.spoken_words import recite, render_words
from export.voice_tables import DELAY_SAMPLES, HOP_SAMPLES, MEL_CHANNELS, MEL_MEAN, MEL_STD, PAST_FRAMES, RATE_HZ, SILENCE

MEL_WINDOW, MEL_DFT = 800, 1024
TICK_FRAMES = 16  # of a tick of 200 ms, unless the model's configuration says otherwise


class State(NamedTuple):
    """The vocoder's past, for one batch row as in the tensor table; all zeros is silence.

    mel: f32[B, 2, 80], the last frames, as height above SILENCE; hidden: f32[B, 2, W]; phase: f32[B, 1], 2**-16 cycle;
    tail: f32[B, 312], full scale ±1.
    """

    mel: Tensor
    hidden: Tensor
    phase: Tensor
    tail: Tensor


def above_silence(mel: Tensor) -> Tensor:
    """The height of normalised mel above silence, as the vocoder takes it: none below, and no wild frame's."""
    return mel.clamp(SILENCE, tables.MEL_TOP) - SILENCE


class Vocoder(nn.Module):
    """Source-filter vocoder in the manner of DDSP (Engel et al. 2020, arXiv 2001.04643): pulses and noise, two filters a frame.

    Two causal layers over mel frames give the pitch and, per band, how much of the mel's energy is pulses and how much noise.
    Frame j of mel is heard around sample 200j + 100 + DELAY_SAMPLES of the speech. Where the mel is under the gate the
    speech is exactly zero. Only operators that ONNX has; the matrices are those of export.voice_tables.
    """

    mel_to_bands: Tensor
    bands_to_spectrum: Tensor
    analysis: Tensor
    synthesis: Tensor

    def __init__(self, width: int = 128, tick_frames: int = TICK_FRAMES) -> None:
        super().__init__()
        self.width, self.tick_frames = width, tick_frames
        self.first = nn.Linear(3 * MEL_CHANNELS, width)  # frames j-2, j-1, j
        self.second = nn.Linear(2 * width, width)  # frames j-1, j: the state then reaches back to the filter of frame -1
        self.out = nn.Linear(width, 1 + 2 * tables.BANDS)
        for name in ("mel_to_bands", "bands_to_spectrum", "analysis", "synthesis"):
            self.register_buffer(name, torch.from_numpy(getattr(tables, name)()), persistent=False)
        with torch.no_grad():
            self.out.weight.mul_(0.1)
            self.out.bias.zero_()

    def zero_state(self, batch: int) -> State:
        """The state before anything was said."""
        sizes = ((PAST_FRAMES, MEL_CHANNELS), (2, self.width), (1,), (tables.FIR_SAMPLES,))
        return State(*(torch.zeros(batch, *size) for size in sizes))

    def forward(self, mel: Tensor, noise: Tensor, state: State, pitch_hz: Tensor | None = None) -> tuple[Tensor, State]:
        """mel f32[B, F, 80] normalised, noise f32[B, 200 F] normal -> (speech f32[B, 200 F], full scale ±1, new state).

        F is a multiple of 16 (a tick). `pitch_hz` f32[B, F] replaces the pitch where it is not zero (training).
        """
        height, hidden, pitch, pulse_gain, noise_gain = self.filters(mel, state)
        units = pitch_units(pitch)
        if pitch_hz is not None:
            units = torch.where(pitch_hz > 0, hz_to_units(pitch_hz), units)
        phases, phase = self.phases(units, height, state.phase)
        source = torch.stack([pulses(phases, units), noise.unflatten(1, (-1, HOP_SAMPLES))], 1)  # [B, 2, F, 200]
        gains = torch.stack([pulse_gain, noise_gain], 1) @ self.bands_to_spectrum  # [B, 2, F+1, 514]
        faded_out, faded_in = (source @ self.analysis).chunk(2, -1)
        spectrum = (faded_out * gains[:, :, :-1] + faded_in * gains[:, :, 1:]).sum(1)
        speech, tail = overlap_add(spectrum @ self.synthesis, state.tail)
        return speech, State(height[:, -PAST_FRAMES:], hidden[:, -2:], phase, tail)

    def filters(self, mel: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(height [B, 2+F, 80] above silence, hidden [B, 2+F, W], pitch logit [B, F], gains [B, 1+F, 64] of pulses and of noise).

        The gains begin with those of the frame before.
        """
        height = torch.cat([state.mel, above_silence(mel)], 1)
        new = F.gelu(self.first(torch.cat([height[:, :-2], height[:, 1:-1], height[:, 2:]], 2)))
        hidden = torch.cat([state.hidden, new], 1)
        out = self.out(F.gelu(self.second(torch.cat([hidden[:, :-1], hidden[:, 1:]], 2))))
        magnitude = torch.exp(height[:, 1:] @ self.mel_to_bands * MEL_STD + tables.LOG_FLOOR)
        open_gain = F.relu(magnitude - tables.GATE)
        share = torch.exp(out[..., 1:].clamp(max=tables.SHARE_TOP))
        return height, hidden, out[:, 1:, 0], open_gain * share[..., : tables.BANDS], open_gain * share[..., tables.BANDS :]

    def phases(self, units: Tensor, height: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
        """Pulse phase after each sample, f32[B, F, 200] in 2**-16 cycle, and the phase [B, 1] that the next tick begins with.

        Integers below 2**24 throughout, so every float32 runtime gets the same bits; a tick that ends in silence leaves
        phase 0, so that two runtimes that once rounded a pitch differently meet again at the next pause.
        """
        steps = torch.arange(1, HOP_SAMPLES + 1, dtype=torch.float32, device=units.device)
        silent = height[:, 2:].mean(2) < tables.SILENT_ABOVE
        ticks = []
        for start in range(0, units.shape[1], self.tick_frames):
            tick = units[:, start : start + self.tick_frames]
            after = HOP_SAMPLES * tick.cumsum(1)
            before = phase + after - HOP_SAMPLES * tick
            ticks.append(wrap(before[..., None] + tick[..., None] * steps))
            phase = torch.where(silent[:, start + self.tick_frames - 1, None], torch.zeros_like(phase), wrap(phase + after[:, -1:]))
        return torch.cat(ticks, 1), phase


def wrap(phase: Tensor) -> Tensor:
    """Into [-2**15, 2**15): whole cycles taken off, exactly."""
    return phase - tables.PHASE_UNITS * torch.floor(phase * (1 / tables.PHASE_UNITS) + 0.5)


def hz_to_units(pitch_hz: Tensor) -> Tensor:
    """Phase per sample, a whole multiple of PITCH_STEP."""
    return tables.PITCH_STEP * torch.round(pitch_hz * (tables.PHASE_UNITS / RATE_HZ / tables.PITCH_STEP))


def logit_to_hz(logit: Tensor) -> Tensor:
    """70 to 400 Hz, a sigmoid on the log scale."""
    return torch.exp(torch.sigmoid(logit) * math.log(tables.PITCH_HIGH_HZ / tables.PITCH_LOW_HZ) + math.log(tables.PITCH_LOW_HZ))


def pitch_units(logit: Tensor) -> Tensor:
    """Phase per sample; no gradient: the pitch learns from measured pitch, since a spectral loss cannot tell it where to go."""
    return hz_to_units(logit_to_hz(logit.detach()))


def pulses(phases: Tensor, units: Tensor) -> Tensor:
    """f32[B, F, 200] of mean power 1: exp(k (cos(phase) - 1)) with k for a bandwidth of PULSE_HZ at every pitch.

    Written with sin(phase/2)**2, which keeps its precision at the pulse, where cos is flat.
    """
    k = (tables.PULSE_HZ / RATE_HZ * tables.PHASE_UNITS / units[..., None]) ** 2
    half = torch.sin(phases * (math.pi / tables.PHASE_UNITS))
    return torch.exp(-2.0 * k * half * half) * (4.0 * math.pi * k) ** 0.25


def overlap_add(frames: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """f32[B, F, 512] at 200-sample steps onto the tail f32[B, 312] -> (f32[B, 200 F], new tail): three pieces, shifted by rows."""
    piece = HOP_SAMPLES
    rows = (
        F.pad(frames[..., :piece], (0, 0, 0, 2))
        + F.pad(frames[..., piece : 2 * piece], (0, 0, 1, 1))
        + F.pad(frames[..., 2 * piece :], (0, 3 * piece - tables.DFT, 2, 0))
    )
    samples = rows.flatten(1)
    samples = samples + F.pad(tail, (0, samples.shape[1] - tables.FIR_SAMPLES))
    end = frames.shape[1] * piece
    return samples[:, :end], samples[:, end : end + tables.FIR_SAMPLES]


def load_vocoder(path: str | Path) -> Vocoder:
    """A vocoder as `train_vocoder` saved it; its width is read off the weights."""
    weights = load_file(path)
    vocoder = Vocoder(weights["first.bias"].shape[0])
    vocoder.load_state_dict(weights)
    return vocoder.eval()


def speech_mel(samples: np.ndarray) -> np.ndarray:
    """f32[n] at 16 kHz -> f32[ceil(n / 200), 80], normalised; frame j is centred on sample 200j + 100.

    Periodic Hann 800, DFT 1024, Slaney mels 0-8000 Hz, natural log of the magnitude floored at 1e-5, (x - MEL_MEAN) / MEL_STD:
    speech has about unit variance, a silent frame is SILENCE in every channel.
    """
    frames = -(-len(samples) // HOP_SAMPLES)
    before = MEL_WINDOW // 2 - HOP_SAMPLES // 2
    padded = np.zeros(frames * HOP_SAMPLES + MEL_WINDOW, np.float32)
    padded[before : before + len(samples)] = samples
    window = 0.5 - 0.5 * np.cos(2 * np.pi / MEL_WINDOW * np.arange(MEL_WINDOW))
    views = np.lib.stride_tricks.sliding_window_view(padded, MEL_WINDOW)[: frames * HOP_SAMPLES : HOP_SAMPLES]
    magnitude = np.abs(np.fft.rfft(views * window, MEL_DFT)) @ mel_filters(RATE_HZ, MEL_DFT // 2 + 1, MEL_CHANNELS).T
    return ((np.log(np.maximum(magnitude, 1e-5)) - MEL_MEAN) / MEL_STD).astype(np.float32)


def word_mels(words: Iterable[str], tick_frames: int = TICK_FRAMES) -> dict[str, np.ndarray]:
    """Normalised mel of each rendered word, f32[ticks · tick_frames, 80]: begins with the word, ends in at least two silent frames."""
    mels = {}
    for word, samples in render_words(words).items():
        # The window reaches 300 samples past a frame, so the word's own mel ends two frames after it.
        frames = -(-len(samples) // HOP_SAMPLES) + 4
        ticks = -(-frames // tick_frames)
        mels[word] = speech_mel(np.pad(samples, (0, ticks * tick_frames * HOP_SAMPLES - len(samples))))
    return mels


class Training(NamedTuple):
    """Recordings of the voice in a row: mel f32[N, 80], speech f32[200 N] delayed as the vocoder's, pitch f32[N] Hz (0 = none)."""

    mel: Tensor
    speech: Tensor
    pitch: Tensor


# Harvard sentences (IEEE 1969, lists 1 and 2): every sound of English in everyday proportion.
_SENTENCES = (
    "The birch canoe slid on the smooth planks.",
    "Glue the sheet to the dark blue background.",
    "It's easy to tell the depth of a well.",
    "These days a chicken leg is a rare dish.",
    "Rice is often served in round bowls.",
    "The juice of lemons makes fine punch.",
    "The box was thrown beside the parked truck.",
    "The hogs were fed chopped corn and garbage.",
    "Four hours of steady work faced us.",
    "A large size in stockings is hard to sell.",
    "The boy was there when the sun rose.",
    "A rod is used to catch pink salmon.",
    "The source of the huge river is the clear spring.",
    "Kick the ball straight and follow through.",
    "Help the woman get back to her feet.",
    "A pot of tea helps to pass the evening.",
    "Smoky fires lack flame and heat.",
    "The soft cushion broke the man's fall.",
    "The salt breeze came across from the sea.",
    "The girl at the booth sold fifty bonds.",
)


def training_material(words: Iterable[str]) -> Training:
    """The words four times over and the sentences at three pitches, with pauses between; about four minutes."""
    import librosa

    spoken = [samples for samples in render_words(words).values() for _ in range(4)]
    spoken += [recite(text, pitch) for text in _SENTENCES for pitch in (42, 50, 58)]
    pause = np.zeros(RATE_HZ // 4, np.float32)
    speech = np.concatenate([part for samples in spoken for part in (pause, samples)])
    speech = speech[: len(speech) // HOP_SAMPLES * HOP_SAMPLES]
    # Pitch is measured around sample 200 j: there, in the delayed recording, the pulses of frame j are heard.
    pitch, voiced, _ = librosa.pyin(
        speech, fmin=tables.PITCH_LOW_HZ, fmax=tables.PITCH_HIGH_HZ, sr=RATE_HZ, frame_length=1024, hop_length=HOP_SAMPLES
    )
    frames = len(speech) // HOP_SAMPLES
    delayed = np.concatenate([np.zeros(DELAY_SAMPLES, np.float32), speech[:-DELAY_SAMPLES]])
    known = np.where(voiced, pitch, 0.0)[:frames].astype(np.float32)
    return Training(torch.from_numpy(speech_mel(speech)), torch.from_numpy(delayed), torch.from_numpy(known))


def _batch(data: Training, rows: int, frames: int) -> Training:
    """Random stretches of the material, [rows, frames, ...], up to 6 dB louder or softer, the mel as inexact as a flow head's."""
    at = torch.randint(0, len(data.mel) - frames, (rows, 1)) + torch.arange(frames)
    mel, speech = data.mel[at], data.speech.unflatten(0, (-1, HOP_SAMPLES))[at].flatten(1)
    log_gain = (torch.rand(rows, 1) * 2 - 1) * math.log(2.0)
    mel = torch.where(mel > SILENCE + 0.01, mel + log_gain[..., None] / MEL_STD, mel)  # silence stays on its floor
    mel = mel + torch.randn_like(mel) * (0.15 * torch.rand(rows, 1, 1))
    return Training(mel, speech * log_gain.exp(), data.pitch[at])


def spectral_loss(speech: Tensor, target: Tensor) -> Tensor:
    """Log magnitude and spectral convergence at four resolutions (Yamamoto et al. 2020, arXiv 1910.11480), of f32[B, n]."""
    loss = speech.new_zeros(())
    for size in (2048, 1024, 512, 256):
        window = torch.hann_window(size)
        ours, theirs = (torch.stft(x, size, size // 4, window=window, return_complex=True).abs().clamp_min(1e-7) for x in (speech, target))
        floor = 1e-3 * math.sqrt(size / 256)  # about -80 dBFS
        loss = loss + (torch.log(ours + floor) - torch.log(theirs + floor)).abs().mean()
        loss = loss + torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs).clamp_min(1.0)
    return loss / 4


def train_vocoder(out_path: str | Path, words: Iterable[str], minutes: float = 10.0, seed: int = 0, width: int = 128) -> None:
    """Train on this machine's CPU for `minutes` and save the weights as safetensors; prints a line every 200 steps."""
    torch.manual_seed(seed)
    data = training_material(words)
    vocoder = Vocoder(width)
    peak = 3e-3
    optimizer = torch.optim.AdamW(vocoder.parameters(), peak, betas=(0.9, 0.99), weight_decay=0.01)
    batch, frames, settle = 8, 4 * TICK_FRAMES, 6  # the first frames miss their past: no loss there
    start, step, mean_loss, mean_error = time.monotonic(), 0, 0.0, 0.0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))) * min(1.0, (step + 1) / 100)
        mel, target, pitch = _batch(data, batch, frames)
        state = vocoder.zero_state(batch)
        speech, _ = vocoder(mel, torch.randn(batch, frames * HOP_SAMPLES), state, pitch)
        _, _, logit, pulse_gain, noise_gain = vocoder.filters(mel, state)
        # A spectral loss likes pulses in place of noise, because their magnitudes do not scatter: "six" would buzz.
        voiced = (pulse_gain / (pulse_gain + noise_gain + tables.GATE))[:, 1:].mean(2)
        buzz_loss = (voiced * (pitch == 0))[:, settle:].mean()
        error = torch.log(logit_to_hz(logit) / pitch.clamp_min(1.0)).abs()
        pitch_loss = (error * (pitch > 0))[:, settle:].sum() / (pitch > 0)[:, settle:].sum().clamp_min(1)
        loss = spectral_loss(speech[:, settle * HOP_SAMPLES :], target[:, settle * HOP_SAMPLES :])
        optimizer.zero_grad()
        (loss + 5.0 * pitch_loss + 0.4 * buzz_loss).backward()
        torch.nn.utils.clip_grad_norm_(vocoder.parameters(), 1.0)
        optimizer.step()
        step += 1
        share = max(1 / step, 0.01)
        mean_loss += share * (loss.item() - mean_loss)
        mean_error += share * (pitch_loss.item() - mean_error)
        if step % 200 == 0:
            print(f"step {step}, {100 * done:.0f} %: spectral {mean_loss:.3f}, pitch {100 * mean_error:.2f} %", flush=True)
    save_file({name: weight.contiguous() for name, weight in vocoder.state_dict().items()}, out_path)
