"""Two graphs in the same scenes, each in its own closed loop: what each chose and how it scored."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import NamedTuple

import numpy as np

from device.config import ModelConfig
from device.engine import Engine
from export.distill.behaviours import BEHAVIOURS
from export.distill.scenes import Scene
from export.scoreboard.board import DOUBTS, SCENE_S, STOPPED, Task, lacking
from export.scoreboard.play import play
from export.scoreboard.score import HIT, Verdict, judge

GROUPS = ("mixture", *(behaviour.name for behaviour in BEHAVIOURS), DOUBTS, STOPPED)
RESAMPLES = 2000


class Life(NamedTuple):
    """One graph in one scene: what became of it, and what was chosen in each tick, i32[ticks, say] and i32[ticks]."""

    verdict: Verdict
    say: np.ndarray
    act: np.ndarray


@dataclass(frozen=True)
class Pair:
    """One scene, lived through by the float graph and by the quantized one."""

    task: Task
    lives: tuple[Life, Life]


class _Witness:
    """An engine that remembers what was chosen."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.inputs, self.outputs, self.memory = engine, engine.inputs, engine.outputs, engine.memory
        self.said: list[np.ndarray] = []
        self.acted: list[int] = []

    def run(self) -> None:
        self._engine.run()
        self.said.append(self.outputs["say"].copy())
        self.acted.append(int(self.outputs["act"][0]))


def live(scene: Scene, config: ModelConfig, engine: Engine, number: int) -> Life:
    """Scene `number`, through the device's own loop."""
    witness = _Witness(engine)
    verdict = judge(scene, play(scene, config, witness, number), number)
    return Life(verdict, np.stack(witness.said), np.array(witness.acted))


def tasks(pairs: list[Pair], scenes: int) -> list[Task]:
    """What to play after `pairs`: so many scenes of every group, then more until each behaviour was asked for in so many; none at the end.

    Every behaviour weighs the same in the loss, so one with few trials would decide it by chance.
    """
    if not pairs:
        return [Task(group, number, SCENE_S) for group in GROUPS for number in range(scenes)]
    # Of the graph of which a behaviour was asked less often.
    missing = reduce(or_, (Counter(lacking(((pair.task, pair.lives[i].verdict) for pair in pairs), scenes)) for i in (0, 1)))
    played = Counter(pair.task.group for pair in pairs)
    return [Task(group, played[group] + number, SCENE_S) for group, few in missing.items() for number in range(few)]


class Board:
    """Hits and trials of every scene by behaviour, for both graphs."""

    def __init__(self, pairs: list[Pair]) -> None:
        outcomes = [[life.verdict.outcomes for life in pair.lives] for pair in pairs]
        self._names = sorted({outcome.trial.behaviour for pair in outcomes for half in pair for outcome in half})
        self._hits = np.zeros((len(pairs), 2, len(self._names)))
        self._asked = np.zeros_like(self._hits)
        for i, pair in enumerate(outcomes):
            for j, half in enumerate(pair):
                for outcome in half:
                    at = self._names.index(outcome.trial.behaviour)
                    self._asked[i, j, at] += 1
                    self._hits[i, j, at] += outcome.result == HIT

    def scores(self) -> tuple[float, float]:
        """Mean hit rate over the behaviours in %, float and quantized."""
        score = self._score(self._hits.sum(axis=0)[None], self._asked.sum(axis=0)[None])[0]
        return float(score[0]), float(score[1])

    def behaviours(self) -> dict[str, list[float]]:
        """Hit rates in %, float and quantized, by behaviour."""
        rates = 100 * self._hits.sum(axis=0) / np.maximum(self._asked.sum(axis=0), 1)
        return {name: [float(rate) for rate in rates[:, i]] for i, name in enumerate(self._names)}

    def trials(self) -> dict[str, int]:
        """How often each behaviour was asked for, of the graph of which it was asked less often."""
        return {name: int(asked) for name, asked in zip(self._names, self._asked.sum(axis=0).min(axis=0), strict=True)}

    def loss(self) -> tuple[float, float, float]:
        """Score lost in points, with the 95 % interval from scenes drawn again with replacement, the same for both graphs."""
        count = len(self._hits)
        drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(float)
        scores = self._score(np.tensordot(drawn, self._hits, 1), np.tensordot(drawn, self._asked, 1))
        low, high = np.percentile(scores[:, 0] - scores[:, 1], (2.5, 97.5))
        reference, quantized = self.scores()
        return reference - quantized, float(low), float(high)

    @staticmethod
    def _score(hits: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """[n, 2] from [n, 2, behaviours]; a behaviour that was not asked for does not count."""
        there = asked > 0
        return 100 * (hits / np.maximum(asked, 1)).sum(axis=2) / np.maximum(there.sum(axis=2), 1)
