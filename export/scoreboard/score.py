"""Judges what a system did in a scene by what a perfect companion would have been asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from export.distill.behaviours import DIGITS, Check, Trial
from export.distill.scenes import Scene
from export.distill.script import TALK_PAUSE_S
from export.scoreboard.play import BLOCK_S, Reaction, Run

HIT, WRONG, MISSED = "hit", "wrong", "missed"
# The behaviours that are judged by words which belong to another trial as well.
SHARING = ("hold",)
# Those whose reaction is the silence itself.
SILENCING = ("yield", "quiet")
# Those that ask for something of what is under way: to go on with it, or to stop.
OF_WHAT_IS_UNDER_WAY = ("yield", "hold")
# What comes so much too late is the missed reaction, not one that nobody asked for.
LATE_S = 1.0
_STEP_S = 1.5  # from one number of a recitation to the next, at most


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    trial: Trial
    scene: int
    result: str
    # From `trial.at_s` to the first thing asked for, as it could be heard or was done, too late included; where silence was asked for
    # to the end of what still sounded. None where there was none.
    reaction_s: float | None
    under_way: bool  # whether there was something to go on with or to stop; false for all but OF_WHAT_IS_UNDER_WAY


@dataclass(frozen=True)
class Verdict:
    """What became of a scene."""

    outcomes: list[Outcome]
    false: list[Reaction]  # that nobody asked for
    talk_s: float  # how long people nearby were talking
    cut_in: int  # words begun meanwhile that did not answer a trial in time
    episodes: list[tuple[int, int]]  # of counting: how often the hand closed, and the last number said
    held: list[bool]  # whether it went on reciting, for each word of others (but stop and go) while it was


def judge(scene: Scene, run: Run, number: int = 0) -> Verdict:
    """Every reaction is used by one trial at most, the earliest that it fits; what no trial uses and nothing excuses is false."""
    matcher = _Matcher(run)
    met = {id(trial): matcher.match(trial) for trial in scene.trials}
    in_time, length_s = set(matcher.used), len(run.voice) / run.rate_hz
    outcomes = []
    for trial in scene.trials:
        times = met[id(trial)]
        if any(check.after is None and check.until_s > length_s for check in trial.checks if check.kind != "silence"):
            matcher.blame(trial, times)
            continue  # the scene was over before it could be answered
        silent = all(matcher.silent(check) for check in trial.checks if check.kind == "silence")
        reacted_s = times[0] if times else None
        result = HIT
        if None in times or not silent:
            result, late_s = matcher.blame(trial, times)
            reacted_s = reacted_s if reacted_s is not None else late_s
        if trial.behaviour in SILENCING:
            reacted_s = matcher.fell_silent(trial) if silent else None
        reaction_s = None if reacted_s is None else reacted_s - trial.at_s
        outcomes.append(Outcome(trial, number, result, reaction_s, _under_way(trial, run)))
    false = [reaction for i, reaction in enumerate(run.reactions) if i not in matcher.used and not _excused(scene, reaction)]
    talk = _talk(scene)
    cut_in = sum(
        reaction.kind == "say" and i not in in_time and any(since_s <= reaction.at_s <= until_s for since_s, until_s in talk)
        for i, reaction in enumerate(run.reactions)
    )
    return Verdict(outcomes, false, sum(until_s - since_s for since_s, until_s in talk), cut_in, _episodes(scene, run), _held(scene, run))


def _excused(scene: Scene, reaction: Reaction) -> bool:
    chosen_s = reaction.at_s - reaction.choice
    return any(excuse.kind == reaction.kind and excuse.since_s <= chosen_s <= excuse.until_s for excuse in scene.excuses)


def _talk(scene: Scene) -> list[tuple[float, float]]:
    """When people nearby were talking, short pauses included."""
    spans: list[tuple[float, float]] = []
    for word in sorted(scene.world.script.words, key=lambda word: word.onset_s):
        if spans and word.onset_s - spans[-1][1] <= TALK_PAUSE_S:
            spans[-1] = (spans[-1][0], word.end_s)
        else:
            spans.append((word.onset_s, word.end_s))
    return spans


def _episodes(scene: Scene, run: Run) -> list[tuple[int, int]]:
    """(how often the hand closed, the last number said) of each time that closings were to be counted."""
    episodes: list[list[Trial]] = []
    for trial in scene.trials:
        if trial.behaviour == "count":
            if trial.checks[0].value == DIGITS[1]:
                episodes.append([])
            episodes[-1].append(trial)
    found = []
    for trials in episodes:
        until_s = trials[-1].checks[0].until_s
        said = [r.value for r in run.reactions if r.kind == "say" and r.value in DIGITS and trials[0].at_s <= r.at_s <= until_s]
        found.append((len(trials), DIGITS.index(said[-1]) if said else 0))
    return found


def _held(scene: Scene, run: Run) -> list[bool]:
    """Whether the next number of a recitation came, late or not, for each time that somebody spoke after the one before."""
    held = []
    for trial in scene.trials:
        if trial.behaviour == "hold":
            following = trial.checks[0].value
            before = DIGITS[DIGITS.index(following) - 1]
            said = {word: [r.at_s for r in run.reactions if (r.kind, r.value) == ("say", word)] for word in (before, following)}
            under_way = [at_s for at_s in said[before] if trial.at_s - _STEP_S <= at_s <= trial.at_s]
            if under_way:
                held.append(any(under_way[-1] < at_s <= under_way[-1] + _STEP_S for at_s in said[following]))
    return held


def _under_way(trial: Trial, run: Run) -> bool:
    """Whether it began a word, a number where it is to go on reciting, at most _STEP_S before it was to go on, or to stop."""
    if trial.behaviour not in OF_WHAT_IS_UNDER_WAY:
        return False
    recites = trial.behaviour == "hold"
    until_s = trial.at_s if recites else trial.checks[0].since_s
    begun = [r.at_s for r in run.reactions if r.kind == "say" and (r.value in DIGITS or not recites)]
    return any(until_s - _STEP_S <= at_s <= until_s for at_s in begun)


class _Matcher:
    """Gives a run's reactions to trials."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.used: dict[int, Trial] = {}
        self._audible = run.audible()

    def match(self, trial: Trial) -> list[float | None]:
        """When each of the checks that ask for a reaction was met, in s; None where none was."""
        times: list[float | None] = []
        for check in trial.checks:
            if check.kind == "silence":
                continue
            base_s = 0.0 if check.after is None else times[check.after]
            found = None if base_s is None else self._find(trial, check, base_s)
            if found is not None and trial.behaviour not in SHARING:
                self.used[found] = trial
            times.append(None if found is None else self.run.reactions[found].at_s)
        return times

    def blame(self, trial: Trial, times: list[float | None]) -> tuple[str, float | None]:
        """Why a trial was not met: something else was done within its time, or nothing; and when its first reaction came too late.

        What is to blame is used up by it.
        """
        wanted = [check for check in trial.checks if check.kind != "silence"]
        result, late_s = MISSED, None
        for n, (check, time_s) in enumerate(zip(wanted, times, strict=True)):
            base_s = 0.0 if check.after is None else times[check.after]
            if time_s is not None or base_s is None or trial.behaviour in SHARING:
                continue
            since_s, until_s = base_s + check.since_s, base_s + check.until_s
            for i, reaction in enumerate(self.run.reactions):
                if i in self.used or reaction.kind != check.kind:
                    continue
                if reaction.value != check.value and since_s <= reaction.at_s <= until_s:
                    self.used[i], result = trial, WRONG
                    break
                if reaction.value == check.value and until_s < reaction.at_s <= until_s + LATE_S:
                    self.used[i] = trial
                    late_s = reaction.at_s if n == 0 else late_s
                    break
        return result, late_s

    def silent(self, check: Check) -> bool:
        """Whether nothing sounds in the span but words that another trial asked for and that began within it; or not that word."""
        if check.value:
            said = [r.at_s for r in self.run.reactions if (r.kind, r.value) == ("say", check.value)]
            return not any(check.since_s <= at_s <= check.until_s for at_s in said)
        return not self._sounding(check.since_s, check.until_s).any()

    def fell_silent(self, trial: Trial) -> float | None:
        """When the voice fell silent, in s; None if it was silent already at the trial's time."""
        until_s = min(check.since_s for check in trial.checks if check.kind == "silence")
        sounding = np.flatnonzero(self._sounding(trial.at_s, until_s))
        return trial.at_s + float(sounding[-1] + 1) * BLOCK_S if sounding.size else None

    def _sounding(self, since_s: float, until_s: float) -> np.ndarray:
        first = round(since_s / BLOCK_S)
        sounding = self._audible[first : round(until_s / BLOCK_S)].copy()
        asked = [self.run.reactions[i] for i in self.used]
        for word in asked:
            if word.kind == "say" and word.at_s >= since_s:
                sounding[round(word.at_s / BLOCK_S) - first :][: round(1.0 / BLOCK_S)] = False
        return sounding

    def _find(self, trial: Trial, check: Check, base_s: float) -> int | None:
        since_s, until_s = base_s + check.since_s, base_s + check.until_s
        for i, reaction in enumerate(self.run.reactions):
            free = i not in self.used or trial.behaviour in SHARING
            if free and (reaction.kind, reaction.value) == (check.kind, check.value) and since_s <= reaction.at_s <= until_s:
                return i
        return None
