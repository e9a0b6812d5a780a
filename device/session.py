"""A session: everything the model remembers between ticks, and the step from one tick to the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from device.config import ModelConfig
from device.engine import Buffers, Engine, Memory
from device.positions import clock_features, rope_table, tick_noise
from device.tensors import tensor_table

VALID = ("perceive_valid", "present_valid")
CHOSEN = {"said": "say", "acted": "act"}  # an input, and the output of the last launch that it repeats


class Decision(NamedTuple):
    """What the model chose in one tick; the arrays are views of the engine's outputs, good until the next step."""

    say: NDArray[np.int32]  # [say] word ids, 0 = none
    act: int  # act id, 0 = none
    say_prob: NDArray[np.float32]  # [say, words]
    act_prob: NDArray[np.float32]  # [acts]
    speech: NDArray[np.float32]  # [tick_samples], full scale ±1
    engine_ns: int  # how long the launch took


class Remembering(Protocol):
    """An engine, or what stands for one where nothing is launched."""

    inputs: Buffers
    outputs: Buffers
    memory: Memory


class Rings:
    """Which ticks the engine's memory holds: what it took over, and what was lost."""

    def __init__(self, config: ModelConfig, engine: Remembering) -> None:
        self._memory = engine.memory
        self._valid = [engine.inputs[name] for name in VALID]
        self._memory.clear()
        for valid in self._valid:
            valid[...] = 0
        self.longest = max(valid.size for valid in self._valid)  # ticks

    def absorb(self, tick: int) -> None:
        """Take over what the launch of `tick` put out."""
        self._memory.absorb(tick)
        for valid in self._valid:
            valid[tick % valid.size] = 1

    def lose(self, tick: int) -> None:
        """`tick` was not run: its slots are absent until a later tick takes them, and the voice has broken off."""
        for valid in self._valid:
            valid[tick % valid.size] = 0
        self._memory.break_voice()


class Past:
    """What a session knows of the ticks before: the rings, what was chosen last, and which tick is next."""

    def __init__(self, config: ModelConfig, engine: Remembering) -> None:
        self._engine, self._rings = engine, Rings(config, engine)
        self._rows = [row.name for row in tensor_table(config) if row.role == "state"]
        for name in CHOSEN:
            engine.inputs[name][...] = 0
        self.next: int | None = None  # the tick that follows the last one launched or lost

    def catch_up(self, tick: int) -> None:
        """Mark what is missing before `tick` as lost. Raises ValueError for a tick that is not later."""
        first = tick if self.next is None else self.next
        if tick < first:
            raise ValueError(f"tick {tick} came after tick {first - 1}; ticks only go forward")
        for lost in range(max(first, tick - self._rings.longest), tick):
            self._rings.lose(lost)
        self.next = tick

    def absorb(self, tick: int) -> None:
        """Take over what the launch of `tick` put out."""
        self._rings.absorb(tick)
        # After lost ticks these are the last choices there were, so that the model knows what it has said already.
        for name, output in CHOSEN.items():
            self._engine.inputs[name][...] = self._engine.outputs[output]
        self.next = tick + 1

    def lose(self, tick: int) -> None:
        """`tick` was not run, nor was what is missing before it."""
        self.catch_up(tick)
        self._rings.lose(tick)
        self.next = tick + 1

    def restore(self, state: Buffers, next_tick: int | None) -> None:
        """Know just this: the rows of role `state`, VALID and CHOSEN, all before `next_tick`."""
        self._engine.memory.restore({name: state[name] for name in self._rows})
        for name in (*VALID, *CHOSEN):
            self._engine.inputs[name][...] = state[name]
        self.next = next_tick


class Session:
    """Steps an engine from tick to tick. A session may begin at any tick number; `record` is shown the inputs of every launch."""

    def __init__(self, config: ModelConfig, engine: Engine, seed: int = 0, record: Callable[[int, Buffers], None] | None = None) -> None:
        self._config, self._engine, self._seed, self._record = config, engine, seed, record
        self.past = Past(config, engine)
        self.memory = engine.memory
        tick_noise(config, seed, 0)  # the first call imports NumPy's generators

    def skip(self, tick: int) -> None:
        """Mark `tick` as lost, and what is missing before it."""
        self.past.lose(tick)

    def step(
        self,
        tick: int,
        mic: NDArray[np.float32],
        voice: NDArray[np.float32],
        frames: NDArray[np.uint8],
        frame_age_s: float,
        text: Sequence[int] = (),
    ) -> Decision:
        """Run tick `tick`; arrays and units as in the tensor table, `text` up to `text_in` word ids.

        Ticks between the last one and this are marked as lost. Raises ValueError for a tick that is not later.
        """
        self._fill(tick, text, mic=mic, voice=voice, frames=frames, frame_age=frame_age_s)
        if self._record is not None:
            self._record(tick, self._engine.inputs)
        engine_ns = self._launch()
        self.past.absorb(tick)
        outputs = self._engine.outputs
        return Decision(outputs["say"], int(outputs["act"][0]), outputs["say_prob"], outputs["act_prob"], outputs["speech"], engine_ns)

    def probe(self, tick: int, mic: NDArray[np.float32], voice: NDArray[np.float32], frames: NDArray[np.uint8], frame_age_s: float) -> int:
        """Launch `tick` only to see how long it takes, in ns: what comes out is not looked at, and the tick is a lost one."""
        self._fill(tick, mic=mic, voice=voice, frames=frames, frame_age=frame_age_s)
        engine_ns = self._launch()
        self.past.lose(tick)
        return engine_ns

    def _fill(self, tick: int, text: Sequence[int] = (), **senses: NDArray[Any] | float) -> None:
        """The inputs of a launch; `senses` by the names of the tensor table."""
        self.past.catch_up(tick)
        config, inputs = self._config, self._engine.inputs
        for name, value in senses.items():
            inputs[name][...] = value
        inputs["text_in"][...] = 0
        inputs["text_in"][: len(text)] = text
        inputs["clock"][...] = clock_features(config, tick)
        inputs["rope"][...] = rope_table(config, tick)
        inputs["noise"][...] = tick_noise(config, self._seed, tick)

    def _launch(self) -> int:
        start_ns = time.perf_counter_ns()
        self._engine.run()
        return time.perf_counter_ns() - start_ns
