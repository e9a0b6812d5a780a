"""What the board adds up to: hit rates with intervals over people, the field's rows, as JSON and as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from export.scoreboard.board import AGES_S, RECALL, SILENCE, Entry
from export.scoreboard.score import HIT, MISSED, OF_WHAT_IS_UNDER_WAY, WRONG, Outcome
from export.scoreboard.systems import ABLATIONS

BEHAVIOURS = tuple("act ok show recite yield hold timer cancel answer ask listen count weave quiet recall".split())
CUES, TIMED = ("act", "answer", "show", "listen", "weave"), ("recite", "timer")
RESAMPLES = 1000


class Row(NamedTuple):
    """One of the field's rows: what it means here, and what the authors of its definition report for their own tests."""

    meaning: str
    published: str


# The tests behind them are this project's own. Published: interaction model against GPT-Realtime-2 (Thinking Machines, 2026), and a
# full-duplex system against its half-duplex version (Seeduplex, ByteDance, 2026); self-reported.
ROWS = {
    "turn-taking latency, s": Row(
        "from the end of a person's word to the audible reply, median, late ones included (FD-Bench v1's definition)", "0.40 against 1.18"
    ),
    "cue, %": Row(f"the right meaning in the right window (CueSpeak's): mean of the hit rates of {', '.join(CUES)}", "81.7 against 2.9"),
    "time, %": Row(f"at the right second (TimeSpeak's): mean of the hit rates of {', '.join(TIMED)}", "64.7 against 4.3"),
    "count, %": Row("the last number said is within 1 of the truth (RepCount's)", "35.4 against 1.3"),
    "false interruption, %": Row("somebody says another word while it recites, and the next number does not come", "50 % less"),
    "cutting in, per minute": Row("words that it begins while people talk and that nobody waits for, per minute of talking", "40 % less"),
    "stop latency, s": Row("from the end of *stop* to silence in the waveform, median of those where it still sounded then", "–"),
    "silence, per hour": Row("reactions in rooms with other people talking that nobody asked for", "–"),
}

KINDS = (
    "All have the same weights; nothing is trained again for what is masked. The telephone's pictures are black, its clock stands still."
    " The walkie-talkie is given a turn when silero-vad says that it is over (threshold 0.5, 0.3 s of sound before it, 0.5 s of silence"
    " after it), computes in no time, sees nothing between turns, and is cut off by other voices; a perfect echo canceller keeps its own"
    " from the detector."
)


def summarise(entries: list[Entry]) -> dict[str, Any]:
    """Everything, for JSON; rates in %, times in s."""
    names = list(dict.fromkeys(entry.system for entry in entries))
    return {
        "systems": {name: _system([entry for entry in entries if entry.system == name]) for name in names},
        "definitions": {name: row.meaning for name, row in ROWS.items()},
    }


def _system(entries: list[Entry]) -> dict[str, Any]:
    staged = [entry for entry in entries if not entry.task.group.startswith((SILENCE, RECALL))]
    silence = [entry for entry in entries if entry.task.group == SILENCE]
    by_behaviour: dict[str, list[tuple[Entry, Outcome]]] = defaultdict(list)
    for entry in staged:
        for outcome in entry.verdict.outcomes:
            by_behaviour[outcome.trial.behaviour].append((entry, outcome))
    behaviours = {name: _behaviour(by_behaviour[name]) for name in BEHAVIOURS if by_behaviour[name]}
    under_way = {name: [one for one in by_behaviour[name] if one[1].under_way] for name in OF_WHAT_IS_UNDER_WAY}
    minutes = sum(entry.task.seconds for entry in staged) / 60
    hours = sum(entry.task.seconds for entry in silence) / 3600
    false = sum(len(entry.verdict.false) for entry in silence)
    kinds: dict[str, int] = defaultdict(int)
    for entry in entries:
        for reaction in entry.verdict.false:
            kinds[f"{reaction.kind} {reaction.value}"] += 1
    return {
        "behaviours": behaviours,
        "under_way": {name: _behaviour(found) for name, found in under_way.items() if found},
        "minutes": minutes,
        "false_per_minute": sum(len(entry.verdict.false) for entry in staged) / max(minutes, 1e-9),
        "silence_hours": hours,
        "silence_false": false,
        "false_reactions": dict(sorted(kinds.items(), key=lambda kind: -kind[1])),
        "rows": _rows(behaviours, entries, hours, false),
        "recall": {age: found for age in AGES_S if (found := _recalled(entries, age))},
    }


def _behaviour(found: list[tuple[Entry, Outcome]]) -> dict[str, Any]:
    results = [outcome.result for _, outcome in found]
    times = [outcome.reaction_s for _, outcome in found if outcome.result == HIT and outcome.reaction_s is not None]
    low, high = _interval(found)
    return {
        "scenes": len({entry.task for entry, _ in found}),
        "people": len({outcome.trial.person for _, outcome in found if outcome.trial.person}),
        "trials": len(results),
        "hit": 100 * results.count(HIT) / len(results),
        "low": low,
        "high": high,
        "wrong": results.count(WRONG),
        "missed": results.count(MISSED),
        "median_s": float(np.median(times)) if times else None,
        "p90_s": float(np.percentile(times, 90)) if times else None,
    }


def _interval(found: Iterable[tuple[Entry, Outcome]]) -> tuple[float, float]:
    """95 % of the hit rate when people are drawn again; trials in which nobody in particular takes part, by scene."""
    groups: dict[Any, list[bool]] = defaultdict(list)
    for entry, outcome in found:
        groups[outcome.trial.person or entry.task].append(outcome.result == HIT)
    hits, totals = np.array([(sum(group), len(group)) for group in groups.values()]).T
    drawn = np.random.default_rng(0).integers(len(hits), size=(RESAMPLES, len(hits)))
    low, high = np.percentile(100 * hits[drawn].sum(1) / totals[drawn].sum(1), (2.5, 97.5))
    return float(low), float(high)


def _rows(behaviours: dict[str, Any], entries: list[Entry], hours: float, false: int) -> dict[str, float | None]:
    def mean(names: Iterable[str]) -> float | None:
        rates = [behaviours[name]["hit"] for name in names if name in behaviours]
        return float(np.mean(rates)) if rates else None

    episodes = [episode for entry in entries for episode in entry.verdict.episodes]
    talk_s = sum(entry.verdict.talk_s for entry in entries)
    held = [went_on for entry in entries for went_on in entry.verdict.held]
    times: dict[str, list[float]] = defaultdict(list)
    for entry in entries:
        for outcome in entry.verdict.outcomes:
            if outcome.reaction_s is not None:
                times[outcome.trial.behaviour].append(outcome.reaction_s)
    values = (
        float(np.median(times["ok"])) if times["ok"] else None,
        mean(CUES),
        mean(TIMED),
        100 * float(np.mean([abs(truth - last) <= 1 for truth, last in episodes])) if episodes else None,
        100 * (1 - float(np.mean(held))) if held else None,
        60 * sum(entry.verdict.cut_in for entry in entries) / talk_s if talk_s else None,
        float(np.median(times["yield"])) if times["yield"] else None,
        false / hours if hours else None,
    )
    return dict(zip(ROWS, values, strict=True))


def _recalled(entries: list[Entry], age_s: int) -> dict[str, Any] | None:
    mine = [entry for entry in entries if entry.task.group == f"{RECALL}{age_s}"]
    found = [(e, outcome) for e in mine for outcome in e.verdict.outcomes if outcome.trial.behaviour == "recall"]
    return _behaviour(found) if found else None


# --- as text --------------------------------------------------------------------------------------------------------------


def markdown(summary: dict[str, Any], heading: str) -> str:
    """The tables."""
    systems = summary["systems"]
    first = next(iter(systems))
    rivals = [name for name in systems if name not in ABLATIONS]
    ablations = [name for name in systems if name in ABLATIONS]
    parts = [heading, "", f"**{first}**", "", *_detail(systems[first])]
    if len(rivals) > 1:
        parts += ["", "**Kinds of system**, hits in %", "", *_side_by_side(systems, rivals)]
    if {"telephone", "walkie-talkie"} & set(rivals):
        parts += ["", KINDS]
    parts += [
        "",
        "**The field's rows**: the definitions are theirs, the tests are not; published figures are their authors' own",
        "",
        *_field(systems, rivals),
    ]
    if ablations:
        parts += ["", "**Without**, hits in %", "", *_side_by_side(systems, [first, *ablations])]
    return "\n".join(parts) + "\n"


def _detail(system: dict[str, Any]) -> list[str]:
    lines = ["| | scenes | trials | hit | 95 % | wrong | missed | reaction, median | p90 |", "|---|" + "---:|" * 8]
    parts = {f"{name} while it speaks": b for name, b in system["under_way"].items()}
    parts |= {f"recall after {age} s": b for age, b in system["recall"].items()}
    for name, b in (system["behaviours"] | parts).items():
        times = [_number(b[field], 2, " s") for field in ("median_s", "p90_s")]
        counts = [b["scenes"], b["trials"], f"**{b['hit']:.1f} %**", f"{b['low']:.0f}–{b['high']:.0f}", b["wrong"], b["missed"]]
        lines.append(f"| {name} | {' | '.join(str(cell) for cell in (*counts, *times))} |")
    lines.append(f"| nothing | {system['false_per_minute']:.2f} false reactions a minute in {system['minutes']:.0f} minutes |" + " |" * 7)
    return lines


def _side_by_side(systems: dict[str, Any], names: list[str]) -> list[str]:
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for behaviour in BEHAVIOURS:
        cells = [systems[name]["behaviours"].get(behaviour, {}).get("hit") for name in names]
        lines.append(f"| {behaviour} | {' | '.join(_number(cell, 1) for cell in cells)} |")
    for age in AGES_S:
        cells = [systems[name]["recall"].get(age, {}).get("hit") for name in names]
        if any(cell is not None for cell in cells[1:]):
            lines.append(f"| recall after {age} s | {' | '.join(_number(cell, 1) for cell in cells)} |")
    false = [_number(systems[name]["false_per_minute"], 2) for name in names]
    return [*lines, f"| false reactions a minute | {' | '.join(false)} |"]


def _field(systems: dict[str, Any], names: list[str]) -> list[str]:
    lines = [f"| | {' | '.join(names)} | published, other tests | |", "|---|" + "---:|" * (len(names) + 1) + "---|"]
    for row, (meaning, published) in ROWS.items():
        cells = [_number(systems[name]["rows"][row], 2) for name in names]
        lines.append(f"| {row} | {' | '.join(cells)} | {published} | {meaning} |")
    ours, theirs = (systems.get(name, {}).get("rows", {}) for name in ("presence", "walkie-talkie"))
    for row in ("false interruption, %", "cutting in, per minute"):
        if ours.get(row) is not None and theirs.get(row):
            change = 100 * (ours[row] / theirs[row] - 1)
            than = f"{abs(change):.0f} % {'more' if change > 0 else 'less'} than the walkie-talkie"
            lines += ["", f"{row.split(',')[0].capitalize()}: {than}."]
    return lines


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}{unit}"  # no minus before a zero
