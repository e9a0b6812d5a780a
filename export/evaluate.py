"""Closed-loop evaluation: the device's own loop plays scenes with people it never met, and every reaction is counted."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device.audio import Line, Samples, Source, VirtualPlayout
from device.bundle import Bundle
from device.engine import OnnxRuntimeEngine
from device.loop import Loop, NoActuator, TextQueue
from device.session import Session
from device.ticker import SimulatedTicker
from export.distill.corpus import Split, load_corpus
from export.distill.scenes import Event, Scene, make_scene

SCENE_TICKS = 80
PLAYOUT_OFFSET_MS = 60
ACT_WINDOW_S = 0.6  # after the word's true end
SHOW_WINDOW_S = 1.0  # from the hand's appearance
EXCUSED_S = 1.6  # around an event that nobody could tell: neither a hit nor a false response


class SceneMicrophone(Source):
    """A scene's room, with the echo of what the speaker really plays."""

    ends = True

    def __init__(self, scene: Scene, context: int, playout: VirtualPlayout) -> None:
        super().__init__()
        self._room, self._echo, self._playout = scene.mic[context:], scene.echo.astype(np.float32), playout
        self.length: int | None = len(self._room)

    def read(self, start: int, out: Samples) -> None:
        first = max(0, -start)
        out[...] = 0
        part = self._room[start + first : start + len(out)]
        out[first : first + len(part)] = part
        played = np.zeros(len(out) + len(self._echo) - 1, np.float32)
        self._playout.heard(start - len(self._echo) + 1, played)
        if played.any():
            out += np.convolve(played, self._echo, "valid")


class SceneCamera:
    """A scene's frames."""

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


class EventList:
    """Keeps the tick events of a run."""

    dropped = 0

    def __init__(self) -> None:
        self.ticks: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        if event["event"] == "tick":
            self.ticks.append(event)


@dataclass
class Score:
    """Counts of one kind of event over all scenes; `reaction_s` runs from the word's end or the hand's appearance to the edge."""

    hit: int = 0
    wrong: int = 0
    missed: int = 0
    reaction_s: list[float] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.hit + self.wrong + self.missed


@dataclass
class Result:
    """What `evaluate` found."""

    scores: dict[str, Score]
    false_responses: int
    minutes: float
    scenes: int
    split: str

    @property
    def false_per_minute(self) -> float:
        return self.false_responses / self.minutes

    def table(self) -> str:
        """As text; the intervals are 95 % Wilson."""
        lines = [f"{self.scenes} scenes, {self.minutes:.1f} minutes, people of the {self.split} split, closed loop", ""]
        lines.append(f"{'':6}{'events':>8}{'hit':>9}{'(95 %)':>16}{'wrong':>8}{'missed':>8}{'median s':>10}{'p90 s':>8}")
        for name, s in self.scores.items():
            low, high = wilson(s.hit, s.total)
            p50, p90 = np.percentile(s.reaction_s, (50, 90)) if s.reaction_s else (np.nan, np.nan)
            rate, interval = f"{100 * s.hit / max(s.total, 1):.1f} %", f"{100 * low:.1f}–{100 * high:.1f}"
            lines.append(f"{name:6}{s.total:8}{rate:>9}{interval:>16}{s.wrong:8}{s.missed:8}{p50:10.2f}{p90:8.2f}")
        return "\n".join([*lines, "", f"false responses: {self.false_responses}, {self.false_per_minute:.2f} per minute"])


def evaluate(bundle: Bundle, data: Path, split: Split, scenes: int, seed: int) -> Result:
    """Run `scenes` closed-loop scenes of the split's people through the bundle and the device's loop."""
    corpus = load_corpus(data, split)  # real people only
    engine = OnnxRuntimeEngine(bundle.graph, bundle.config)
    silent = {word: np.zeros(0, np.float32) for word in bundle.config.text.words}  # the loop speaks for itself
    scores: dict[str, Score] = {"act": Score(), "show": Score()}
    false_responses = 0
    for number in range(scenes):
        scene = make_scene(corpus, silent, np.random.default_rng([seed, number]), bundle.config, SCENE_TICKS, closed_loop=True)
        scene = dataclasses.replace(scene, lost=np.zeros_like(scene.lost))
        ticks = play(scene, bundle, engine, seed=number)
        false_responses += score(scene.events, ticks, scores)
    minutes = scenes * SCENE_TICKS * bundle.config.tick_ms / 60_000
    return Result(scores, false_responses, minutes, scenes, split)


def play(scene: Scene, bundle: Bundle, engine: OnnxRuntimeEngine, seed: int) -> list[dict[str, Any]]:
    """The tick events of one scene, run on a simulated clock."""
    c = bundle.config
    ticker = SimulatedTicker(c.tick_ms * 1_000_000)
    playout = VirtualPlayout(c.audio.sample_rate_hz, ticker.now_ns)
    line = Line(c, SceneMicrophone(scene, c.context_samples, playout), playout, PLAYOUT_OFFSET_MS * c.audio.sample_rate_hz // 1000)
    events = EventList()
    loop = Loop(
        config=c,
        session=Session(c, engine, seed),
        ticker=ticker,
        line=line,
        camera=SceneCamera(scene, c.tick_ms / 1000),
        text=TextQueue([], c.text.text_in),
        actuator=NoActuator(),
        events=events,  # type: ignore[arg-type]
        recording=None,
        seconds=None,
        stop=threading.Event(),
    )
    loop.run({"event": "header"})
    return events.ticks


def score(events: list[Event], ticks: list[dict[str, Any]], scores: dict[str, Score]) -> int:
    """Match reactions to events, each at most once; adds to `scores` and returns the number of false responses."""
    reactions = deque(
        (t["t_s"], kind, what) for t in ticks for kind, what in [("act", t["act"]), *(("show", w) for w in t["say"])] if what != "none"
    )
    left = list(reactions)
    for event in events:
        if not event.clear:
            continue
        since = event.onset_s
        until = event.end_s + ACT_WINDOW_S if event.kind == "act" else event.onset_s + SHOW_WINDOW_S
        near = [r for r in left if r[1] == event.kind and since <= r[0] <= until]
        right = [r for r in near if r[2] == event.expected]
        mine = scores[event.kind]
        if right:
            mine.hit += 1
            mine.reaction_s.append(right[0][0] - (event.end_s if event.kind == "act" else event.onset_s))
        elif near:
            mine.wrong += 1
        else:
            mine.missed += 1
        for used in (right or near)[:1]:
            left.remove(used)
    excused = [e for e in events if not e.clear]
    return sum(not any(e.kind == r[1] and e.onset_s <= r[0] <= e.end_s + EXCUSED_S for e in excused) for r in left)


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    if total == 0:
        return 0.0, 1.0
    p = hits / total
    centre = p + z * z / (2 * total)
    reach = z * float(np.sqrt(p * (1 - p) / total + z * z / (4 * total * total)))
    scale = 1 + z * z / total
    return (centre - reach) / scale, (centre + reach) / scale
