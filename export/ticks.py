"""300 ticks that every engine of a bundle can be compared on: inputs that follow from the tick number, outputs stored in the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device.config import ModelConfig
from device.engine import Engine
from device.session import Session
from device.tensors import tensor_table

TICKS_NAME = "ticks.npz"
TICKS = 300  # a minute: the longest ring of companion-nano but for a few slots
CHOICES = ("say", "act")


def run_ticks(engine: Engine, config: ModelConfig, ticks: int = TICKS) -> dict[str, NDArray[Any]]:
    """Outputs of a session, [ticks, …] by name: tones that come and go, patches of colour, text now and then."""
    session = Session(config, engine)
    kept: dict[str, list[NDArray[Any]]] = {row.name: [] for row in tensor_table(config) if row.role == "output"}
    audio = np.arange(-config.context_samples, config.tick_samples)
    t, v = config.text, config.video
    for tick in range(ticks):
        at_s = (tick * config.tick_samples + audio) / config.audio.sample_rate_hz
        loudness = 0.2 * (0.5 + 0.5 * np.sin(0.7 * tick)) ** 2
        mic = loudness * np.sin(2 * np.pi * (200 + 37 * (tick // 5 % 40)) * at_s)
        voice = 0.1 * (tick // 10 % 2) * np.sin(2 * np.pi * 150 * at_s)
        rows, columns = np.indices((v.height, v.width)) // v.patch
        shade = (rows * 53 + columns * 31 + tick // 7 * 17)[..., None] * np.array([1, 2, 3]) % 256
        frames = np.broadcast_to(shade.astype(np.uint8), (v.frames, v.height, v.width, 3))
        text = [1 + tick // 20 % (len(t.words) - 1)] if tick % 20 == 0 else []
        session.step(tick, mic.astype(np.float32), voice.astype(np.float32), frames, 0.05 * (tick % 3), text)
        for name, values in kept.items():
            values.append(engine.outputs[name].copy())
    return {name: np.stack(values) for name, values in kept.items()}


def store_ticks(engine: Engine, config: ModelConfig, file: Path, ticks: int = TICKS) -> None:
    """What this engine puts out, for `difference` to be measured against."""
    np.savez_compressed(file, **run_ticks(engine, config, ticks))  # type: ignore[arg-type]


def difference(found: dict[str, NDArray[Any]], stored: dict[str, NDArray[Any]]) -> dict[str, float]:
    """By output: share of ticks with the same choice, or the largest error relative to the largest value."""
    result = {}
    for name, values in stored.items():
        if name in CHOICES:
            result[name] = float((found[name] == values).all(axis=1).mean())
        else:
            scale = max(float(np.abs(values).max()), 1e-2)
            result[name] = float(np.abs(found[name].astype(np.float64) - values).max() / scale)
    return result
