"""What an engine promises: arrays to write to and to read from, one launch, and a memory between ticks."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from device.config import ModelConfig
from device.tensors import layer_tokens, layer_window, tensor_table

Buffers = dict[str, np.ndarray]


class EngineError(RuntimeError):
    """An engine that cannot be used; the text ends with the remedy."""


class NoAccelerator(EngineError):
    """No GPU, or a library for it is missing. Remedy: install it, or run without --engine."""


class StaleEngine(EngineError):
    """An engine that is not what was compiled here for this bundle. Remedy: compile again on this board."""


class OutOfDeviceMemory(EngineError):
    """Remedy: stop other programs on the GPU, or a smaller model."""


class EngineFailure(EngineError):
    """The GPU or TensorRT reported a fault. Remedy: start again; if it stays, compile again."""


class Memory(Protocol):
    """The tensor table's `state` rows between ticks, wherever the engine keeps them."""

    def clear(self) -> None:
        """Nothing remembered, the vocoder silent."""

    def absorb(self, tick: int) -> None:
        """Take over what the launch of `tick` put out; slot `tick mod window` of a ring takes the tick's keys and values."""

    def break_voice(self) -> None:
        """The vocoder's state is that of silence."""

    def copy_updates(self, into: Buffers) -> None:
        """What the last launch put out: the rows of role `update` that are in `into`."""

    def restore(self, state: Buffers) -> None:
        """Remember just this: the rows of role `state`."""


class Engine(Protocol):
    """One array for each row of the tensor table that enters from (`inputs`) or is read by (`outputs`) the host each tick.

    `run` reads the one and fills the other. The rows of role `state` and `update` are the memory's; an engine whose memory is the
    host's has them in `inputs` and `outputs` too.
    """

    inputs: Buffers
    outputs: Buffers
    memory: Memory

    def run(self) -> None: ...


class Ring(NamedTuple):
    """One ring of the perceiving or present layers, [heads, window · tokens, head_dim], and the update that it takes."""

    name: str
    heads: int
    window: int
    slot: int  # values of one head in one slot: tokens · head_dim


def rings(config: ModelConfig) -> list[Ring]:
    """All of them, in the tensor table's order; the update of ring `name` is called `new_name`."""
    return [
        Ring(f"{what}_{layer}", config.trunk.heads, layer_window(config, layer), layer_tokens(config, layer) * config.head_dim)
        for layer in range(config.layers)
        for what in ("key", "value")
    ]


def vocoder_states(config: ModelConfig) -> list[str]:
    """Names of the vocoder's state rows; the update of `name` is called `new_name`."""
    return [row.name for row in tensor_table(config) if row.role == "state" and row.name.startswith("vocoder_")]


def allocate(config: ModelConfig) -> tuple[Buffers, Buffers]:
    """Zeroed arrays for every tensor that enters the tick graph, and for every one that leaves it."""
    rows = tensor_table(config)
    return (
        {row.name: np.zeros(row.shape, row.dtype) for row in rows if row.enters},
        {row.name: np.zeros(row.shape, row.dtype) for row in rows if not row.enters},
    )


class HostMemory:
    """Memory that lives in an engine's own input arrays; during a launch a ring holds the `window` ticks before it."""

    def __init__(self, config: ModelConfig, inputs: Buffers, outputs: Buffers) -> None:
        self._inputs, self._outputs = inputs, outputs
        self._slots = []  # (ring [heads, window, slot], this tick's slice [heads, slot])
        for ring in rings(config):
            new = outputs[f"new_{ring.name}"].reshape(ring.heads, ring.slot)
            self._slots.append((inputs[ring.name].reshape(ring.heads, ring.window, ring.slot), new))
        self._vocoder = [(inputs[name], outputs[f"new_{name}"]) for name in vocoder_states(config)]

    def clear(self) -> None:
        for ring, _ in self._slots:
            ring[...] = 0
        self.break_voice()

    def absorb(self, tick: int) -> None:
        for ring, new in self._slots:
            ring[:, tick % ring.shape[1]] = new
        for state, new in self._vocoder:
            state[...] = new

    def break_voice(self) -> None:
        for state, _ in self._vocoder:
            state[...] = 0

    def copy_updates(self, into: Buffers) -> None:
        for name, array in into.items():
            array[...] = self._outputs[name]

    def restore(self, state: Buffers) -> None:
        for name, array in state.items():
            self._inputs[name][...] = array
