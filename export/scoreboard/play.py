"""Plays scenes to a system on a simulated clock; what came out of it is a list of reactions and a waveform."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.signal import fftconvolve

from device.audio import Canceller, Line, Samples, Source, VirtualPlayout
from device.config import ModelConfig
from device.engine import Buffers, Engine
from device.loop import Loop, NoActuator, NoThinker, TextQueue, Thinker
from device.session import Session
from device.steering import Steering
from device.ticker import SimulatedTicker
from export.distill.scenes import Scene

PLAYOUT_OFFSET_MS = 60  # the loop's own on files
AUDIBLE = 10 ** (-50 / 20)  # RMS of what can be heard
BLOCK_S = 0.01
_ONSET_WITHIN_S = 0.3  # a word that is not to be heard by then was not said


class Reaction(NamedTuple):
    """A word, from when it could be heard, or an act."""

    kind: Literal["say", "act"]
    value: str
    at_s: float
    choice: float  # s from the edge of the tick that chose it to when it took place


@dataclass(frozen=True)
class Run:
    """What a system did in a scene."""

    reactions: list[Reaction]  # by time
    voice: Samples  # f32[T*S], what the speaker played
    rate_hz: int
    thoughts: list[dict[str, Any]] = field(default_factory=list)  # what the log says of the background model

    def audible(self) -> NDArray[np.bool_]:
        """Per BLOCK_S, whether the voice sounds."""
        block = round(BLOCK_S * self.rate_hz)
        blocks = self.voice[: len(self.voice) // block * block].reshape(-1, block)
        return np.sqrt(np.square(blocks).mean(1)) > AUDIBLE


System = Callable[[Scene, int], Run]  # a scene and a seed for the voice's noise


class SceneMicrophone(Source):
    """A scene's room, with the echo of what the speaker really plays."""

    ends = True

    def __init__(self, scene: Scene, context: int, playout: VirtualPlayout) -> None:
        super().__init__()
        self._room, self._echo, self._playout = scene.room[context:], scene.world.echo.astype(np.float32), playout
        self.length: int | None = len(self._room)

    def read(self, start: int, out: Samples) -> None:
        first = max(0, -start)
        out[...] = 0
        part = self._room[start + first : start + len(out)]
        out[first : first + len(part)] = part
        played = np.zeros(len(out) + len(self._echo) - 1, np.float32)
        self._playout.heard(start - len(self._echo) + 1, played)
        if played.any():
            out += fftconvolve(played, self._echo, "valid")
        np.clip(out, -1, 1, out)


class SceneCamera:
    """A scene's frames."""

    resting = False
    exposed_ns: int | None = None
    fault: str | None = None
    end_s: float | None = None

    def __init__(self, scene: Scene, tick_s: float) -> None:
        self._scene, self._tick_s = scene, tick_s
        self.counts: dict[str, int] = {}

    def frames_at(self, edge_s: float) -> tuple[NDArray[np.uint8], float]:
        tick = round(edge_s / self._tick_s) - 1
        return self._scene.frames[tick], float(self._scene.frame_age[tick, 0])

    def close(self) -> None:
        """Nothing to close."""


class _Events:
    """Keeps the tick events of a run, and what it says of the background model."""

    dropped = 0

    def __init__(self) -> None:
        self.ticks: list[dict[str, Any]] = []
        self.thoughts: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        if event["event"] == "tick":
            self.ticks.append(event)
        if event["event"] == "think":
            self.thoughts.append(event)


class _Played:
    """Keeps the waveform of a run."""

    dropped = 0

    def __init__(self) -> None:
        self.pieces: list[Samples] = []

    def put(self, _: int, samples: Samples) -> None:
        self.pieces.append(samples)

    def finish(self, _: int) -> None:
        """All of it is here."""


def play(
    scene: Scene,
    c: ModelConfig,
    engine: Engine,
    seed: int,
    record: Callable[[int, Buffers], None] | None = None,
    thinker: Thinker | None = None,
    canceller: Canceller | None = None,
) -> Run:
    """A scene through the device's own loop: its microphone hears the room and the echo of what the speaker really played."""
    rate_hz, tick_s = c.audio.sample_rate_hz, c.tick_ms / 1000
    ticker = SimulatedTicker(c.tick_ms * 1_000_000)
    playout = VirtualPlayout(rate_hz, ticker.now_ns)
    line = Line(c, SceneMicrophone(scene, c.context_samples, playout), playout, PLAYOUT_OFFSET_MS * rate_hz // 1000, canceller)
    events, played = _Events(), _Played()
    loop = Loop(
        config=c,
        session=Session(c, engine, seed, record),
        ticker=ticker,
        steering=Steering(c.tick_ms * 1_000_000),
        line=line,
        camera=SceneCamera(scene, tick_s),
        text=TextQueue(deliveries(scene, tick_s), c.text.text_in),
        actuator=NoActuator(),
        events=events,
        recording=played,  # type: ignore[arg-type]
        seconds=None,
        stop=threading.Event(),
        thinker=thinker or NoThinker(),
    )
    loop.run({"event": "header"})
    voice = np.concatenate(played.pieces)
    said = [(word, tick["t_s"]) for tick in events.ticks for word in tick["say"]]
    reactions = [Reaction("act", tick["act"], tick["t_s"], 0.0) for tick in events.ticks if tick["act"] != "none"]
    reactions += heard_words(said, voice, rate_hz, PLAYOUT_OFFSET_MS / 1000)
    return Run(sorted(reactions, key=lambda reaction: reaction.at_s), voice, rate_hz, events.thoughts)


def deliveries(scene: Scene, tick_s: float) -> list[tuple[float, list[int]]]:
    """The scene's text as the loop's queue takes it: for the tick in which the scene delivers it."""
    return [((tick + 0.5) * tick_s, [int(token) for token in ids if token]) for tick, ids in enumerate(scene.text_in) if ids.any()]


def heard_words(said: list[tuple[str, float]], voice: Samples, rate_hz: int, offset_s: float) -> list[Reaction]:
    """Words that were chosen at an edge and can be heard from `offset_s` later on; one that stays inaudible was not said."""
    words = []
    for word, edge_s in said:
        start = round((edge_s + offset_s) * rate_hz)
        block = round(BLOCK_S * rate_hz)
        for at in range(start, min(start + round(_ONSET_WITHIN_S * rate_hz), len(voice) - block), block):
            if np.sqrt(np.square(voice[at : at + block]).mean()) > AUDIBLE:
                words.append(Reaction("say", word, at / rate_hz, at / rate_hz - edge_s))
                break
    return words
