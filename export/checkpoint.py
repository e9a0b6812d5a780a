"""Checkpoints: a folder with `model.safetensors` (weights, the configuration in its metadata) and `reference.safetensors`.

The reference holds a few ticks, inputs and outputs, as PyTorch computed them; a bundle is proven against it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from device.config import ModelConfig
from device.tensors import tensor_table
from export import voice_tables
from export.constants import HMLP_FOLDS
from export.errors import ExportError
from export.filters import split_dft

WEIGHTS_NAME = "model.safetensors"
REFERENCE_NAME = "reference.safetensors"
_CONFIG_KEY = "config"


class CheckpointError(ExportError):
    """A checkpoint that cannot be exported; the text names the file, the field and the remedy (train or save it again)."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights by name, the configuration, and reference ticks: {tensor name: array with a leading tick axis}."""

    name: str
    config: ModelConfig
    weights: dict[str, NDArray[np.float32]]
    reference: dict[str, NDArray[np.generic]]


def weight_table(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the model and its shape."""
    a, v, k, s, t = c.audio, c.video, c.trunk, c.voice, c.text
    width, words = k.width, len(t.words)
    table: dict[str, tuple[int, ...]] = {}
    for stream in ("heard", "played"):
        table[f"audio.{stream}.weight"] = (a.mel_channels * a.levels, width)
        table[f"audio.{stream}_norm.weight"] = (width,)
    table["audio.position"] = (c.audio_tokens, width)
    widths = (3, *v.hmlp_widths, width)
    for i, (time, side) in enumerate(HMLP_FOLDS):
        table[f"video.hmlp.projections.{i}.weight"] = (widths[i + 1], widths[i] * time * side * side)
        if i < len(v.hmlp_widths):
            table[f"video.hmlp.norms.{i}.weight"] = (widths[i + 1],)
    table |= {"video.hmlp.final_norm.weight": (width,), "video.position": (c.video_tokens, width), "video.age": (width,)}
    table |= {"text.text_in.weight": (words, width), "text.said.weight": (words, width), "text.acted.weight": (len(t.acts), width)}
    table |= {"text.clock.weight": (width, 2 * len(k.clock_periods_s)), "text.slot": (k.summary_tokens, width)}
    for module in (*(f"perceive.{i}" for i in range(k.perceive_layers)), *(f"present.{i}" for i in range(k.present_layers))):
        table |= {f"{module}.norm1.weight": (width,), f"{module}.norm2.weight": (width,)}
        table |= {f"{module}.qkv.weight": (3 * width, width), f"{module}.out.weight": (width, width)}
        table |= {f"{module}.up.weight": (k.mlp, width), f"{module}.down.weight": (width, k.mlp)}
    table["norm.weight"] = (width,)
    table |= _linear("say", words, width) | _linear("act", len(t.acts), width)
    f = s.flow_width
    table |= _linear("flow.condition", f, width) | _linear("flow.enter", f, c.flow_dim) | _linear("flow.leave", c.flow_dim, f)
    table |= {f"flow.chosen.{i}.weight": (words, width) for i in range(t.say)}
    table |= {"flow.chosen_act.weight": (len(t.acts), width), "flow.past.weight": (f, voice_tables.PAST_FRAMES * s.mel_channels)}
    table |= {"flow.place": (k.summary_tokens, width), "flow.step.weight": (s.flow_steps, f), "flow.final_norm.weight": (f,)}
    for i in range(s.flow_blocks):
        table |= {f"flow.norms.{i}.weight": (f,)} | _linear(f"flow.ups.{i}", 2 * f, f) | _linear(f"flow.downs.{i}", f, 2 * f)
    w, bands = s.vocoder_width, voice_tables.BANDS
    return (
        table
        | _linear("vocoder.first", w, 3 * s.mel_channels)
        | _linear("vocoder.second", w, 2 * w)
        | _linear("vocoder.out", 1 + 2 * bands, w)
    )


def _linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and check the checkpoint folder (or the path of its `model.safetensors`); raises CheckpointError."""
    path = path.parent if path.name == WEIGHTS_NAME else path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder; give the folder that holds {WEIGHTS_NAME} and {REFERENCE_NAME}")
    weights, metadata = _read(path / WEIGHTS_NAME)
    config = _config(path / WEIGHTS_NAME, metadata)
    _check_weights(path / WEIGHTS_NAME, config, weights)
    reference, _ = _read(path / REFERENCE_NAME)
    _check_reference(path / REFERENCE_NAME, config, reference)
    return Checkpoint(path.resolve().name, config, {k: v.astype(np.float32) for k, v in weights.items()}, reference)


def read_config(path: Path) -> ModelConfig:
    """The configuration of the checkpoint at `path`, without its weights."""
    file = path if path.name == WEIGHTS_NAME else path / WEIGHTS_NAME
    return _config(file, _open(file)[1])


def write_checkpoint(
    path: Path, config: ModelConfig, weights: dict[str, NDArray[np.float32]], reference: dict[str, NDArray[np.generic]]
) -> None:
    """Write both files of a checkpoint folder."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / WEIGHTS_NAME, metadata={_CONFIG_KEY: json.dumps(config.to_dict(), sort_keys=True)})
    save_file(reference, path / REFERENCE_NAME)


def _open(file: Path) -> tuple[list[str], dict[str, str]]:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; a checkpoint folder holds {WEIGHTS_NAME} and {REFERENCE_NAME}: copy both")
    try:
        with safe_open(file, framework="numpy") as f:
            return list(f.keys()), f.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}); copy it again or save it again") from error


def _read(file: Path) -> tuple[dict[str, NDArray[np.generic]], dict[str, str]]:
    names, metadata = _open(file)
    with safe_open(file, framework="numpy") as f:
        try:
            return {name: f.get_tensor(name) for name in names}, metadata
        except (SafetensorError, TypeError, AttributeError, ValueError) as error:  # a type that NumPy lacks, such as bfloat16
            raise CheckpointError(f"{file}: holds a tensor that cannot be read ({error}); save all as float32 or float16") from error


def _config(file: Path, metadata: dict[str, str]) -> ModelConfig:
    if _CONFIG_KEY not in metadata:
        raise CheckpointError(f"{file}: its metadata have no '{_CONFIG_KEY}'; save the checkpoint with write_checkpoint")
    try:
        config = ModelConfig.from_dict(json.loads(metadata[_CONFIG_KEY]))
    # ConfigError, text that is no JSON, numbers of thousands of digits; thousands of brackets.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    require_buildable(file, config)
    return config


def require_buildable(file: Path, config: ModelConfig) -> None:
    """Raise CheckpointError, naming `file`, if the graph's fixed matrices are not made for this configuration."""
    # What the graph's fixed matrices are made for; anything else would be ignored or break later.
    fixed = {
        "audio.sample_rate_hz": (config.audio.sample_rate_hz, voice_tables.RATE_HZ),
        "voice.hop_samples": (config.voice.hop_samples, voice_tables.HOP_SAMPLES),
        "voice.mel_channels": (config.voice.mel_channels, voice_tables.MEL_CHANNELS),
        "voice.vocoder_bands": (config.voice.vocoder_bands, voice_tables.BANDS),
        "voice.fir_samples": (config.voice.fir_samples, voice_tables.FIR_SAMPLES),
    }
    for field, (value, wanted) in fixed.items():
        if value != wanted:
            raise CheckpointError(f"{file}: config field '{field}' is {value} and must be {wanted}, the vocoder's; train with that")
    try:
        split_dft(config.audio.window_samples)
    except ValueError as error:
        raise CheckpointError(f"{file}: config field 'audio.window_samples': {error}; train with that") from error


def _check_weights(file: Path, c: ModelConfig, weights: dict[str, NDArray[np.generic]]) -> None:
    table = weight_table(c)
    remedy = "save the checkpoint again with the configuration it was trained with"
    for name in sorted(set(table) - set(weights)):
        raise CheckpointError(f"{file}: weight '{name}' of shape {table[name]} is missing; {remedy}")
    for name in sorted(set(weights) - set(table)):
        raise CheckpointError(f"{file}: weight '{name}' is none of this model's; {remedy}")
    for name, shape in table.items():
        value = weights[name]
        if value.shape != shape:
            raise CheckpointError(f"{file}: weight '{name}' has shape {value.shape}, its configuration says {shape}; {remedy}")
        if value.dtype not in (np.float32, np.float16):
            raise CheckpointError(f"{file}: weight '{name}' is {value.dtype}; save it as float32 or float16")
        if not np.isfinite(value).all():
            raise CheckpointError(f"{file}: weight '{name}' holds NaN or infinity; go back to a checkpoint from before training diverged")


def _check_reference(file: Path, c: ModelConfig, reference: dict[str, NDArray[np.generic]]) -> None:
    # State is not stored: it follows from the empty memory that the ticks begin with.
    wanted = {t.name: t for t in tensor_table(c) if t.role in ("input", "output")}
    ticks = len(reference["mic"]) if "mic" in reference and reference["mic"].ndim else 0
    for name, row in wanted.items():
        if name not in reference:
            raise CheckpointError(f"{file}: reference tensor '{name}' is missing; write the reference again")
        value = reference[name]
        if value.shape != (ticks, *row.shape) or value.dtype != np.dtype(row.dtype) or ticks == 0:
            found, listed = f"{value.dtype}{value.shape}", f"{row.dtype}{(ticks, *row.shape)}"
            raise CheckpointError(f"{file}: reference tensor '{name}' is {found}, the table says {listed}; write the reference again")
