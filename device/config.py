"""The model configuration: every size that the tick graph, its tensors and the loop depend on.

It travels as JSON in the checkpoint's safetensors metadata and in the bundle's manifest, so that tick length,
window and vocabulary are properties of the artefact and never constants in code.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

_T = TypeVar("_T")

# Beyond any model for a board, and small enough that a size read from a file can neither hang nor exhaust who computes with it.
LARGEST_SIZE = 1 << 20
MOST_LAYERS = 1 << 10


class ConfigError(ValueError):
    """A configuration that does not describe a model; the text names the field and the remedy (re-export)."""


@dataclass(frozen=True)
class AudioConfig:
    """dMel front end as in transformers' Inkling (`InklingAudioConfig`); the level range belongs to the checkpoint."""

    sample_rate_hz: int = 16000
    hop_samples: int = 800
    window_samples: int = 1600  # also the DFT length
    mel_channels: int = 80  # Slaney scale and norm, 0 Hz to half the sample rate
    levels: int = 16
    # Inkling publishes [-7, 2] for log10 magnitudes; with samples in ±1 speech lies in about -4.1 … 0.8.
    level_low: float = -7.0
    level_high: float = 2.0


@dataclass(frozen=True)
class VideoConfig:
    """Camera frames and the hMLP patch embedding (Touvron et al. 2022, arXiv 2203.09795; folds as in Inkling)."""

    frames: int = 2  # newest last, about half a tick apart; folded into one token per patch
    height: int = 120
    width: int = 160
    patch: int = 40
    # Output widths of the 5x5, 2x2 and 4x4 folds; the temporal fold ends at the trunk's width.
    hmlp_widths: tuple[int, ...] = (32, 128, 256)


@dataclass(frozen=True)
class TextConfig:
    """The closed vocabularies. Entry 0 of each is "nothing"."""

    words: tuple[str, ...] = ("",)
    acts: tuple[str, ...] = ("none",)
    text_in: int = 4  # tokens that can be delivered in one tick; one per summary token at most
    say: int = 2  # words that can begin in one tick


@dataclass(frozen=True)
class TrunkConfig:
    """Block-causal transformer with two spans of memory (design: perceiving layers below, present layers above)."""

    width: int = 256
    heads: int = 4
    mlp: int = 768
    perceive_layers: int = 4
    present_layers: int = 2
    perceive_window: int = 8  # past ticks in the ring, beside the tick itself
    present_window: int = 64
    summary_tokens: int = 4
    rope_wavelengths_ticks: tuple[float, float] = (2.0, 800.0)
    clock_periods_s: tuple[float, ...] = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0)


@dataclass(frozen=True)
class VoiceConfig:
    """Flow head (Lipman et al. 2022, arXiv 2210.02747) and source-filter vocoder."""

    hop_samples: int = 200  # one mel frame of speech
    mel_channels: int = 80
    flow_width: int = 384
    flow_blocks: int = 2
    flow_steps: int = 4  # Euler steps, unrolled in the graph
    vocoder_width: int = 128
    vocoder_bands: int = 64  # bands of the harmonic and of the noise filter
    fir_samples: int = 312  # length of the per-frame filters beyond the frame itself


@dataclass(frozen=True)
class ModelConfig:
    """All of it. `tick_ms` is the length of a tick; every other time is counted in ticks or samples."""

    tick_ms: int = 200
    audio: AudioConfig = field(default_factory=AudioConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    text: TextConfig = field(default_factory=TextConfig)
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    voice: VoiceConfig = field(default_factory=VoiceConfig)

    def __post_init__(self) -> None:
        a, v, t, k, s = self.audio, self.video, self.text, self.trunk, self.voice
        for name, value in _numbers(self):
            size = isinstance(value, int)
            _require(not size or 0 < value <= LARGEST_SIZE, name, f"from 1 to {LARGEST_SIZE}")
            _require(size or math.isfinite(value), name, "a finite number")
        _require(max(k.perceive_layers, k.present_layers, s.flow_blocks, s.flow_steps) <= MOST_LAYERS, "layers", f"{MOST_LAYERS} at most")
        _require(min(*k.clock_periods_s, *k.rope_wavelengths_ticks) > 0, "trunk.clock_periods_s/rope_wavelengths_ticks", "above 0")
        _require(self.tick_ms > 0 and self.tick_ms * a.sample_rate_hz % 1000 == 0, "tick_ms", "a whole number of samples")
        _require(self.tick_samples % a.hop_samples == 0, "audio.hop_samples", "a divisor of the tick's samples")
        _require(a.window_samples == 2 * a.hop_samples, "audio.window_samples", "twice audio.hop_samples")
        _require(a.level_low < a.level_high and a.levels >= 2, "audio.levels", "at least 2 levels in a range that rises")
        _require(v.frames == 2, "video.frames", "2 (the temporal fold)")
        _require(v.patch == 40, "video.patch", "40 (the folds are 5x5, 2x2 and 4x4)")
        _require(v.height % v.patch == 0 and v.width % v.patch == 0, "video.height/width", "multiples of video.patch")
        _require(len(v.hmlp_widths) == 3, "video.hmlp_widths", "three widths")
        _require(len(t.words) > 1 and t.words[0] == "", "text.words", "a list that begins with the empty word")
        _require(len(t.acts) > 1 and t.acts[0] == "none", "text.acts", "a list that begins with 'none'")
        _require(len(set(t.words)) == len(t.words) and len(set(t.acts)) == len(t.acts), "text", "free of duplicates")
        _require(k.width % k.heads == 0 and (k.width // k.heads) % 2 == 0, "trunk.heads", "an even width per head")
        _require(t.text_in <= k.summary_tokens and t.say < k.summary_tokens, "trunk.summary_tokens", "enough for text and say")
        _require(self.tick_samples % (s.hop_samples * k.summary_tokens) == 0, "voice.hop_samples", "a divisor of a token's samples")

    @property
    def tick_samples(self) -> int:
        """Samples per tick."""
        return self.tick_ms * self.audio.sample_rate_hz // 1000

    def ticks_in(self, seconds: float) -> int:
        """Ticks that last so long, to the nearest."""
        return round(1000 * seconds / self.tick_ms)

    @property
    def context_samples(self) -> int:
        """Samples before the tick that the first dMel frame reaches back to."""
        return self.audio.window_samples - self.audio.hop_samples

    @property
    def audio_tokens(self) -> int:
        return self.tick_samples // self.audio.hop_samples

    @property
    def video_tokens(self) -> int:
        return (self.video.height // self.video.patch) * (self.video.width // self.video.patch)

    @property
    def tokens(self) -> int:
        """Tokens of a tick, in this order: audio, video, summary."""
        return self.audio_tokens + self.video_tokens + self.trunk.summary_tokens

    @property
    def head_dim(self) -> int:
        return self.trunk.width // self.trunk.heads

    @property
    def layers(self) -> int:
        return self.trunk.perceive_layers + self.trunk.present_layers

    @property
    def mel_frames(self) -> int:
        """Mel frames of generated speech in a tick."""
        return self.tick_samples // self.voice.hop_samples

    @property
    def flow_dim(self) -> int:
        """Values that the flow head makes for one summary token."""
        return self.mel_frames // self.trunk.summary_tokens * self.voice.mel_channels

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Read it from parsed JSON; an unknown key or a value of the wrong type raises ConfigError with the field's name."""
        return _build(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready copy; `from_dict` of it is equal to self."""
        return typing.cast("dict[str, Any]", _plain(dataclasses.asdict(self)))


def _require(ok: bool, name: str, wanted: str) -> None:
    if not ok:
        raise ConfigError(f"config field '{name}' must be {wanted}; correct the configuration and export again")


def _numbers(section: Any, path: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number of a configuration with its name."""
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{path}{f.name}.")
        else:
            yield from ((f"{path}{f.name}", v) for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, (int, float)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _build(cls: type[_T], values: Any, path: str) -> _T:
    if not isinstance(values, dict):
        raise ConfigError(f"config section '{path or '(top)'}' must be an object, not {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        first = reprlib.repr(unknown[0])[1:-1]
        raise ConfigError(
            f"unknown config key '{path}{first}'; known here: {', '.join(hints)}. Remove it, or use a copresence that knows it"
        )
    return cls(**{k: _convert(hints[k], v, f"{path}{k}") for k, v in values.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast("type[Any]", hint), value, f"{path}.")
    if typing.get_origin(hint) is tuple:
        args = typing.get_args(hint)
        if not isinstance(value, (list, tuple)) or (args[-1] is not Ellipsis and len(value) != len(args)):
            raise ConfigError(f"config field '{path}' must be a list, not {reprlib.repr(value)}")
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if hint is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"config field '{path}' must be of type {hint.__name__}, not {reprlib.repr(value)}")
    if hint is str and not value.isprintable():
        raise ConfigError(f"config field '{path}' must be printable text, not {reprlib.repr(value)}")
    return value
