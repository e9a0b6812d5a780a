"""Plays all systems on the same scenes, in parallel, until every behaviour was asked for often enough."""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from device.bundle import Bundle
from device.engine import OnnxRuntimeEngine
from export.distill.behaviours import BEHAVIOURS, DIGITS, Free, Recall, Timer
from export.distill.clips import Split
from export.distill.corpus import Corpus, load_corpus
from export.distill.scenes import Scene, Stage, bystanders, make_scene, mixture, only
from export.distill.script import Script
from export.errors import ExportError
from export.scoreboard.play import System
from export.scoreboard.score import Verdict, judge
from export.scoreboard.systems import ABLATIONS, ORACLE, systems
from export.spoken_words import render_words

SYSTEMS = ("presence", "telephone", "walkie-talkie")  # by default
SCENE_S, SILENCE_S = 19.2, 30.0
AGES_S = (5, 15, 30, 60)  # of a memory
# Groups of scenes beside the behaviours' own; the last with the age.
SILENCE, SHOWCASE, DOUBTS, STOPPED, RECALL = "silence", "showcase", "doubts", "stopped timers", "recall after "
# Which group of scenes asks for a behaviour that has no stage of its own.
_STAGED_BY = {"yield": "recite", "hold": "recite", "cancel": STOPPED, "ask": DOUBTS} | dict.fromkeys(
    ("act", "ok", "show", "answer"), Free.name
)
_ROUND = 8  # scenes that are given out at once
_PATIENCE = 8  # times as many scenes of a group as are wanted: who never says a digit is never asked which it was


class Task(NamedTuple):
    """One scene to be played."""

    group: str
    number: int
    seconds: float


@dataclass(frozen=True)
class Entry:
    """What one system did in one scene."""

    system: str
    task: Task
    verdict: Verdict


class Player:
    """Makes scenes and plays them; one in every process."""

    def __init__(self, bundle: Path, data: Path, split: Split, seed: int, names: Iterable[str]) -> None:
        opened = Bundle.open(bundle, unproven=True)  # a proof is made by playing
        self.config, self.seed = opened.config, seed
        self.corpus: Corpus = load_corpus(data, split)  # real people only
        self.words = render_words(self.config.text.words)
        known = systems(self.config, OnnxRuntimeEngine(opened.graph, self.config))
        self.systems: dict[str, System] = {name: known[name] for name in names}

    def scene(self, task: Task) -> Scene:
        """The task's scene: the same for the same seed."""
        rng = np.random.default_rng([self.seed, *task.group.encode(), task.number])
        return make_scene(
            self.corpus, self.words, rng, self.config, self.config.ticks_in(task.seconds), flawless=True, stage=stage(task.group)
        )

    def play(self, task: Task) -> list[Entry]:
        """What each system did in it."""
        scene = self.scene(task)
        no_ablations = task.group.startswith((SILENCE, RECALL))
        return [
            Entry(name, task, judge(scene, system(scene, task.number), task.number))
            for name, system in self.systems.items()
            if not (no_ablations and name in ABLATIONS)
        ]


def stage(group: str) -> Stage:
    """How a group's scenes are staged."""
    if group == SILENCE:
        return bystanders
    if group == SHOWCASE:
        return showcase
    if group == DOUBTS:
        return doubts
    if group == STOPPED:
        return stopped_timers
    if group.startswith(RECALL):
        return partial(Recall.remember, age_s=float(group.removeprefix(RECALL)))
    return mixture if group == "mixture" else only(group)


def doubts(script: Script) -> None:
    """Hand signs, and a "no" soon after most of the answers."""
    rng, at_s = script.rng, float(script.rng.uniform(0.3, 1.0))
    while at_s < script.length_s - 2.5:
        over_s = script.show(int(rng.integers(len(DIGITS))), at_s, rng.uniform(1.0, 2.0))
        at_s = max(script.say("no" if rng.random() < 0.8 else "yes", at_s + rng.uniform(1.2, 3.0)), over_s) + rng.uniform(0.5, 1.5)


def stopped_timers(script: Script) -> None:
    """Timers, and a "stop" before most of them are over."""
    at_s = float(script.rng.uniform(0.3, 1.0))
    while at_s < script.length_s - 2.5:
        at_s = Timer().stage(script, at_s, stopped=0.8) + script.rng.uniform(0.3, 1.0)


def showcase(script: Script) -> None:
    """Twenty seconds with a bit of everything, for the picture."""
    rng = script.rng
    script.show(int(rng.integers(1, 10)), 0.5, 1.6)
    script.say("up", 2.6)
    script.say("go", 4.2)
    script.say_other(5.9)
    script.say("stop", 7.6)
    script.talk(9.2, 3.6, (0.03, 0.3))
    script.deliver(10.2, "tell", "five")
    script.show(2, 14.4, 2.6)
    script.say("go", 15.7)


def run(
    bundle: Path, data: Path, split: Split, scenes: int, seed: int, names: list[str], jobs: int, progress: Callable[[str], None]
) -> list[Entry]:
    """Every system of `names` on at least `scenes` scenes that ask for each behaviour, an hour of silence, and memories by age."""
    known = (*SYSTEMS, ORACLE, *ABLATIONS)
    for name in names:
        if name not in known:
            raise ExportError(f"--systems: there is no system '{name}'; choose from {', '.join(known)}")
    entries: list[Entry] = []
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (bundle, data, split, seed, names)) as pool:
        started, done = time.monotonic(), 0

        def play(tasks: list[Task], left: int) -> None:
            nonlocal done
            for played in pool.map(_play, tasks):
                entries.extend(played)
                done, left = done + 1, left - 1
                minutes = (time.monotonic() - started) / done * left / 60
                progress(f"{done} scenes played, about {left} to go, {minutes:.1f} minutes")

        hours = [Task(SILENCE, i, SILENCE_S) for i in range(round(3600 / SILENCE_S * min(scenes / 50, 1)))]
        memories = [Task(f"{RECALL}{age}", i, age + 3.0) for age in AGES_S for i in range(-(-scenes // 2))]
        count = 0
        while missing := lacking(((entry.task, entry.verdict) for entry in entries), scenes):
            groups = ["mixture", *missing]
            tasks = [Task(group, count + i, SCENE_S) for group in groups for i in range(-(-_ROUND // len(groups)))]
            count += _ROUND
            play(tasks, len(tasks) + len(hours) + len(memories) + sum(missing.values()))
        play(memories, len(memories) + len(hours))
        play(hours, len(hours))
    return entries


def lacking(played: Iterable[tuple[Task, Verdict]], scenes: int) -> dict[str, int]:
    """How many scenes of which groups are still missing before each behaviour was asked for in so many; none when there are enough.

    Some trials follow from what a companion did. A group that was played _PATIENCE times as often as is wanted is given up.
    """
    asked: dict[str, set[Task]] = defaultdict(set)
    tried: dict[str, set[Task]] = defaultdict(set)
    for task, verdict in played:
        tried[task.group].add(task)
        for outcome in verdict.outcomes:
            asked[outcome.trial.behaviour].add(task)
    missing: dict[str, int] = {}
    for name in (*(behaviour.name for behaviour in BEHAVIOURS if behaviour.name != Free.name), "ok", "ask", "cancel"):
        group = _STAGED_BY.get(name, name)
        if len(asked[name]) < scenes and len(tried[group]) < _PATIENCE * scenes:
            missing[group] = max(missing.get(group, 0), scenes - len(asked[name]))
    return missing


_player: list[Player] = []


def _begin(bundle: Path, data: Path, split: Split, seed: int, names: list[str]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    _player.append(Player(bundle, data, split, seed, names))


def _play(task: Task) -> list[Entry]:
    return _player[0].play(task)


class Progress:
    """Tells how far it is: on a terminal in one line that is replaced, in a log one line a minute."""

    EVERY_S = 60.0

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def __call__(self, line: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last_s >= self.EVERY_S:
            self._last_s = time.monotonic()
            print(line, file=sys.stderr, flush=True)
