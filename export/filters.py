"""The fixed matrices of the tick graph: mel filters, window and the two-stage DFT. One source for PyTorch and ONNX."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from device.config import AudioConfig


def hz_to_mel(hz: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Slaney's mel scale: linear below 1 kHz, logarithmic above (Auditory Toolbox, 1998)."""
    hz = np.asarray(hz, dtype=np.float64)
    return np.where(hz < 1000.0, hz * 3 / 200, 15.0 + 27.0 * np.log(np.maximum(hz, 1e-9) / 1000.0) / np.log(6.4))


def mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverse of `hz_to_mel`."""
    return np.where(mel < 15.0, mel * 200 / 3, 1000.0 * np.exp((mel - 15.0) * np.log(6.4) / 27.0))


def mel_filters(rate_hz: int, bins: int, channels: int) -> NDArray[np.float32]:
    """Triangular filters with Slaney scale and area norm over 0 Hz to half the rate: f32[channels, bins]."""
    edges = mel_to_hz(np.linspace(0.0, float(hz_to_mel(rate_hz / 2)), channels + 2))
    frequencies = np.linspace(0.0, rate_hz / 2, bins)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return np.asarray(triangles * (2.0 / (edges[2:] - edges[:-2]))[:, None], dtype=np.float32)


def hann(samples: int) -> NDArray[np.float32]:
    """Periodic Hann window."""
    return np.asarray(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(samples) / samples), dtype=np.float32)


def level_thresholds(a: AudioConfig) -> NDArray[np.float32]:
    """Linear magnitudes midway (in log10) between neighbouring levels: f32[levels - 1]; level = how many are exceeded."""
    centres = np.linspace(a.level_low, a.level_high, a.levels)
    return np.asarray(10.0 ** ((centres[1:] + centres[:-1]) / 2), dtype=np.float32)


def split_dft(samples: int) -> tuple[int, NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Factors of a real DFT of length n = r*r in two stages of r-point DFTs (Cooley & Tukey 1965).

    With x[r*a + b] and bin c + r*d: stage 1 sums over a, a twiddle follows, stage 2 sums over b. Returns r,
    stage 1 f32[r, 2r] (real | imaginary), the twiddles f32[2, r(b), r(c)] and stage 2 f32[2r, 2(r/2 + 1)], which maps
    (real | imaginary) over b to (real | imaginary) over d = 0 … r/2.
    """
    r = round(samples**0.5)
    if r * r != samples or r % 2:
        raise ValueError(f"the dMel window must be the square of an even number of samples, not {samples}")
    n = np.arange(r)
    stage1 = np.exp(-2j * np.pi * np.outer(n, n) / r)
    twiddle = np.exp(-2j * np.pi * np.outer(n, n) / samples)
    stage2 = np.exp(-2j * np.pi * np.outer(n, np.arange(r // 2 + 1)) / r)
    return (
        r,
        np.concatenate([stage1.real, stage1.imag], axis=1).astype(np.float32),
        np.stack([twiddle.real, twiddle.imag]).astype(np.float32),
        np.block([[stage2.real, stage2.imag], [-stage2.imag, stage2.real]]).astype(np.float32),
    )
