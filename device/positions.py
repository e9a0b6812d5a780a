"""What the host computes for a tick in float64: rotary positions, clock features and noise.

All of it follows from the absolute tick number alone, so a session of months loses no precision and any tick can be
computed again.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import ArrayLike, NDArray

from device.config import ModelConfig


def rope_table(c: ModelConfig, tick: ArrayLike) -> NDArray[np.float32]:
    """Cos and sin of every token's position (Su et al. 2021, arXiv 2104.09864): f32[..., tokens, 2, head_dim/2].

    Positions are in ticks: audio and summary tokens are spread over their tick, video tokens sit in its middle.
    """
    within, frequencies = _rope_constants(c)
    cycles = (np.asarray(tick, dtype=np.float64)[..., None] + within)[..., None] * frequencies
    angles = 2 * np.pi * (cycles - np.floor(cycles))
    return np.stack([np.cos(angles), np.sin(angles)], axis=-2).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _rope_constants(c: ModelConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each token's place within its tick [tokens], and the frequencies in cycles per tick [head_dim/2]."""
    k = c.trunk
    within = np.concatenate(
        [
            np.arange(c.audio_tokens) / c.audio_tokens,
            np.full(c.video_tokens, 0.5),
            np.arange(k.summary_tokens) / k.summary_tokens,
        ]
    )
    shortest, longest = k.rope_wavelengths_ticks
    return within, 1.0 / np.geomspace(shortest, longest, c.head_dim // 2)


def clock_features(c: ModelConfig, tick: ArrayLike) -> NDArray[np.float32]:
    """Sin, then cos, of the session time at the tick's edge for each period: f32[..., 2 * periods]."""
    elapsed_s = (np.asarray(tick, dtype=np.float64)[..., None] + 1) * (c.tick_ms / 1000)
    cycles = elapsed_s / np.asarray(c.trunk.clock_periods_s)
    angles = 2 * np.pi * (cycles - np.floor(cycles))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


def tick_noise(c: ModelConfig, seed: int, tick: int) -> NDArray[np.float32]:
    """The tick's normal noise from a counter-based generator (Philox, Salmon et al. 2011): f32[noise], same everywhere."""
    size = c.trunk.summary_tokens * c.flow_dim + c.tick_samples
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, tick]))
    return generator.standard_normal(size, dtype=np.float32)
