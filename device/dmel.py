"""dMel, the published Inkling front end: its mel filters, window and level thresholds, and the levels of a tick as numbers to look at.

The engine makes dMel inside its graph. What is here is what that graph, PyTorch and the pages that show it are made from.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from device.config import AudioConfig


class DMel:
    """The levels of samples, as the model hears them; for people to look at, outside of the tick."""

    def __init__(self, audio: AudioConfig) -> None:
        self._audio = audio
        self._window = hann(audio.window_samples)
        self._filters = mel_filters(audio.sample_rate_hz, audio.window_samples // 2 + 1, audio.mel_channels)
        self._thresholds = level_thresholds(audio)

    def levels(self, samples: NDArray[np.float32]) -> NDArray[np.uint8]:
        """f32[context + n * hop], ±1, to u8[n, channels]; the context is what precedes the first hop."""
        a = self._audio
        frames = np.lib.stride_tricks.sliding_window_view(samples, a.window_samples)[:: a.hop_samples]
        magnitudes = np.abs(np.fft.rfft(frames * self._window, axis=1)) @ self._filters.T
        return np.searchsorted(self._thresholds, magnitudes).astype(np.uint8)


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
