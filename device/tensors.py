"""The tensor table: every tensor that enters or leaves the tick graph, once.

The exporter builds the graph from it, the engines bind by it, and a bundle whose graph disagrees is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from device.config import ModelConfig

Role = Literal["input", "output", "state", "update"]


@dataclass(frozen=True)
class Tensor:
    """One row. `state` enters and is owned by the session between ticks; `update` is what this tick adds to it."""

    name: str
    role: Role
    dtype: str  # numpy's name
    shape: tuple[int, ...]
    units: str
    meaning: str

    @property
    def enters(self) -> bool:
        return self.role in ("input", "state")


class TensorMismatch(ValueError):
    """A graph or engine whose tensors are not those of the table. Remedy: export the bundle again."""


def tensor_table(c: ModelConfig) -> tuple[Tensor, ...]:
    """All rows for one configuration, in binding order."""
    audio = c.tick_samples + c.context_samples
    k, v, s, t = c.trunk, c.video, c.voice, c.text
    rows = [
        Tensor("mic", "input", "float32", (audio,), "full scale ±1", "the tick's microphone samples and the context before them"),
        Tensor("voice", "input", "float32", (audio,), "full scale ±1", "what the speaker really played over the same samples"),
        Tensor("frames", "input", "uint8", (v.frames, v.height, v.width, 3), "RGB 0..255", "newest camera frames, newest last"),
        Tensor("frame_age", "input", "float32", (1,), "s", "from the newest frame's exposure to the edge"),
        Tensor("text_in", "input", "int32", (t.text_in,), "word id", "text delivered in this tick; 0 = none"),
        Tensor("said", "input", "int32", (t.say,), "word id", "`say` of the tick before"),
        Tensor("acted", "input", "int32", (1,), "act id", "`act` of the tick before"),
        Tensor("clock", "input", "float32", (2 * len(k.clock_periods_s),), "1", "sin and cos of the session time at the edge, per period"),
        Tensor("rope", "input", "float32", (c.tokens, 2, c.head_dim // 2), "1", "cos and sin of each token's absolute position"),
        Tensor(
            "noise", "input", "float32", (k.summary_tokens * c.flow_dim + c.tick_samples,), "1", "normal noise: flow head, then vocoder"
        ),
        Tensor(
            "perceive_valid", "input", "float32", (k.perceive_window,), "0 or 1", "which ring slots of the perceiving layers hold a tick"
        ),
        Tensor("present_valid", "input", "float32", (k.present_window,), "0 or 1", "which ring slots of the present layers hold a tick"),
    ]
    for layer in range(c.layers):
        tokens, window = layer_tokens(c, layer), layer_window(c, layer)
        for what, meaning in (("key", "rotated keys"), ("value", "values")):
            rows.append(
                Tensor(
                    f"{what}_{layer}",
                    "state",
                    "float32",
                    (k.heads, window * tokens, c.head_dim),
                    "1",
                    f"ring of past {meaning}, slot by slot",
                )
            )
    rows += [
        Tensor("vocoder_mel", "state", "float32", (2, s.mel_channels), "normalised log mel", "the two mel frames before this tick"),
        Tensor("vocoder_hidden", "state", "float32", (2, s.vocoder_width), "1", "hidden frames before this tick"),
        Tensor("vocoder_phase", "state", "float32", (1,), "2**-16 cycle", "phase of the pulse train; 0 after silence"),
        Tensor("vocoder_tail", "state", "float32", (s.fir_samples,), "full scale ±1", "filter ringing that falls into this tick"),
        Tensor("speech", "output", "float32", (c.tick_samples,), "full scale ±1", "the tick's speech"),
        Tensor("say", "output", "int32", (t.say,), "word id", "words that begin in this tick's speech; 0 = none"),
        Tensor("act", "output", "int32", (1,), "act id", "control token; 0 = none"),
        Tensor("say_prob", "output", "float32", (t.say, len(t.words)), "probability", "over all words, for each place of `say`"),
        Tensor("act_prob", "output", "float32", (len(t.acts),), "probability", "over all acts"),
    ]
    for layer in range(c.layers):
        for what in ("key", "value"):
            rows.append(
                Tensor(
                    f"new_{what}_{layer}",
                    "update",
                    "float32",
                    (k.heads, layer_tokens(c, layer), c.head_dim),
                    "1",
                    f"this tick's slice of {what}_{layer}",
                )
            )
    for name in ("vocoder_mel", "vocoder_hidden", "vocoder_phase", "vocoder_tail"):
        old = next(r for r in rows if r.name == name)
        rows.append(Tensor(f"new_{name}", "update", old.dtype, old.shape, old.units, f"{name} for the next tick"))
    return tuple(rows)


def layer_tokens(c: ModelConfig, layer: int) -> int:
    """Tokens per tick that layer `layer` keeps: all of them below, the summary tokens above."""
    return c.tokens if layer < c.trunk.perceive_layers else c.trunk.summary_tokens


def layer_window(c: ModelConfig, layer: int) -> int:
    """Past ticks that layer `layer` can see."""
    return c.trunk.perceive_window if layer < c.trunk.perceive_layers else c.trunk.present_window
