"""How far one engine's ticks are from another's on the same inputs: choices, probabilities, speech, memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from device.config import ModelConfig
from device.dmel import hann, mel_filters
from device.engine import Buffers, Engine, HostMemory, Memory, allocate
from device.engine.onnx_runtime import open_session
from device.tensors import tensor_table
from export.scoreboard.play import AUDIBLE

KEPT = ("say", "act", "say_prob", "act_prob", "speech")
_WINDOW, _HOP = 800, 200  # 50 ms every 12.5 ms at 16 kHz, as the voice's own mel
_FLOOR = 1e-6  # power, so that silence beneath hearing is no difference

Ticks = dict[str, np.ndarray]  # KEPT outputs, [ticks, …]


class ProbeEngine:
    """A graph on ONNX Runtime that also shows tensors from within; `probes` holds those of the last launch."""

    def __init__(self, model: onnx.ModelProto, config: ModelConfig, probes: Iterable[str] = ()) -> None:
        self._probes = list(dict.fromkeys(probes))
        shown = onnx.ModelProto()
        shown.CopyFrom(model)
        entering = {row.name for row in tensor_table(config) if row.enters}
        inside = [name for name in self._probes if name not in entering]
        shown.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in inside)
        self._session = open_session(shown.SerializeToString())
        self.inputs, self.outputs = allocate(config)
        self.memory: Memory = HostMemory(config, self.inputs, self.outputs)
        self._names, self.probes = [*self.outputs, *inside], dict[str, np.ndarray]()

    def run(self) -> None:
        values = dict(zip(self._names, self._session.run(self._names, self.inputs), strict=True))
        for name, array in self.outputs.items():
            array[...] = values[name]
        self.probes = {name: values[name] if name in values else self.inputs[name] for name in self._probes}


@dataclass(frozen=True)
class Difference:
    """Of one engine from a reference, over the same ticks."""

    ticks: int
    say_agreement: float  # share of ticks with the same words
    act_agreement: float
    moved: float  # mean share of probability that went elsewhere: half the sum of |p - q|, the larger of say and act
    mel_db: float  # mean |difference| of the log mel spectra where the reference speaks
    spoken_frames: int

    def row(self) -> str:
        return (
            f"say {100 * self.say_agreement:.2f} %, act {100 * self.act_agreement:.2f} % of {self.ticks} ticks alike, "
            f"{100 * self.moved:.3f} % of probability moved, speech {self.mel_db:.2f} dB apart"
        )


def collect(engine: Engine, launches: Iterable[int]) -> Ticks:
    """The KEPT outputs of all launches."""
    kept: dict[str, list[np.ndarray]] = {name: [] for name in KEPT}
    for _ in launches:
        for name, values in kept.items():
            values.append(engine.outputs[name].copy())
    return {name: np.stack(values) for name, values in kept.items()}


def compare(reference: Ticks, other: Ticks, c: ModelConfig) -> Difference:
    """Both over the same ticks."""
    moved = [0.5 * np.abs(reference[name].astype(np.float64) - other[name]).sum(axis=-1).mean() for name in ("say_prob", "act_prob")]
    mel_db, frames = mel_distortion(reference["speech"].ravel(), other["speech"].ravel(), c)
    return Difference(
        len(reference["say"]),
        float((reference["say"] == other["say"]).all(axis=1).mean()),
        float((reference["act"] == other["act"]).all(axis=1).mean()),
        float(max(moved)),
        mel_db,
        frames,
    )


def mel_distortion(reference: NDArray[np.float32], other: NDArray[np.float32], c: ModelConfig) -> tuple[float, int]:
    """(mean |difference| in dB of the log mel spectra of f32[n] waveforms, over how many frames in which the reference speaks)."""
    starts = range(0, len(reference) - _WINDOW + 1, _HOP)
    framed = [np.stack([w[s : s + _WINDOW] for s in starts]) if len(starts) else np.zeros((0, _WINDOW)) for w in (reference, other)]
    spoken = np.sqrt(np.square(framed[0]).mean(axis=1)) > AUDIBLE if len(starts) else np.zeros(0, bool)
    if not spoken.any():
        return 0.0, 0
    filters = mel_filters(c.audio.sample_rate_hz, _WINDOW // 2 + 1, 80)
    mels = [10 * np.log10(np.square(np.abs(np.fft.rfft(f[spoken] * hann(_WINDOW)))) @ filters.T + _FLOOR) for f in framed]
    return float(np.abs(mels[0] - mels[1]).mean()), int(spoken.sum())


def memory_error(reference: Buffers, other: Buffers) -> tuple[float, float]:
    """(squared error, squared size) of the keys and values that one launch of each put out."""
    names = [name for name in reference if name.startswith(("new_key_", "new_value_"))]
    error = sum(float(np.square(reference[n] - other[n], dtype=np.float64).sum()) for n in names)
    return error, sum(float(np.square(reference[n], dtype=np.float64).sum()) for n in names)
