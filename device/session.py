"""A session: everything the model remembers between ticks, and the step from one tick to the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from device.config import ModelConfig
from device.engine import Buffers, Engine
from device.positions import clock_features, rope_table, tick_noise


class Decision(NamedTuple):
    """What the model chose in one tick; the arrays are views of the engine's outputs, good until the next step."""

    say: NDArray[np.int32]  # [say] word ids, 0 = none
    act: int  # act id, 0 = none
    say_prob: NDArray[np.float32]  # [say, words]
    act_prob: NDArray[np.float32]  # [acts]
    speech: NDArray[np.float32]  # [tick_samples], full scale ±1
    engine_ns: int  # how long the launch took


class Rings:
    """Which ticks the engine's memory holds: what it took over, and what was lost."""

    def __init__(self, config: ModelConfig, engine: Engine) -> None:
        self._memory = engine.memory
        self._valid = (engine.inputs["perceive_valid"], engine.inputs["present_valid"])
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


class Session:
    """Steps an engine from tick to tick. A session may begin at any tick number; `record` is shown the inputs of every launch."""

    def __init__(self, config: ModelConfig, engine: Engine, seed: int = 0, record: Callable[[int, Buffers], None] | None = None) -> None:
        self._config, self._engine, self._seed, self._record = config, engine, seed, record
        self._rings = Rings(config, engine)
        self._next: int | None = None  # the tick that follows the last one run or lost
        for name in ("said", "acted"):
            engine.inputs[name][...] = 0
        tick_noise(config, seed, 0)  # the first call imports NumPy's generators

    def skip(self, tick: int) -> None:
        """Mark `tick` as lost."""
        self._rings.lose(tick)
        self._next = tick + 1

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
        self._catch_up(tick)
        config, inputs, outputs = self._config, self._engine.inputs, self._engine.outputs
        inputs["mic"][...] = mic
        inputs["voice"][...] = voice
        inputs["frames"][...] = frames
        inputs["frame_age"][0] = frame_age_s
        inputs["text_in"][...] = 0
        inputs["text_in"][: len(text)] = text
        inputs["clock"][...] = clock_features(config, tick)
        inputs["rope"][...] = rope_table(config, tick)
        inputs["noise"][...] = tick_noise(config, self._seed, tick)
        if self._record is not None:
            self._record(tick, inputs)
        start_ns = time.perf_counter_ns()
        self._engine.run()
        engine_ns = time.perf_counter_ns() - start_ns
        self._rings.absorb(tick)
        # After lost ticks these are the last choices there were, so that the model knows what it has said already.
        inputs["said"][...] = outputs["say"]
        inputs["acted"][...] = outputs["act"]
        self._next = tick + 1
        return Decision(outputs["say"], int(outputs["act"][0]), outputs["say_prob"], outputs["act_prob"], outputs["speech"], engine_ns)

    def _catch_up(self, tick: int) -> None:
        first = tick if self._next is None else self._next
        if tick < first:
            raise ValueError(f"tick {tick} came after tick {first - 1}; ticks only go forward")
        for lost in range(max(first, tick - self._rings.longest), tick):
            self.skip(lost)
