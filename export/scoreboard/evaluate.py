"""The scoreboard from bundle to page: plays, adds up, and writes JSON, Markdown and the picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from export.distill.clips import Split
from export.scoreboard.board import Player, Progress, run
from export.scoreboard.figure import draw_three
from export.scoreboard.report import markdown, summarise


def evaluate(bundle: Path, data: Path, split: Split, scenes: int, seed: int, names: list[str], jobs: int, out: Path | None) -> str:
    """Play the systems of `names`, at least `scenes` scenes per behaviour; returns the Markdown and writes everything to `out`."""
    entries = run(bundle, data, split, scenes, seed, names, jobs, Progress())
    if sys.stderr.isatty():
        print(file=sys.stderr)
    summary = summarise(entries)
    minutes = sum(entry.task.seconds for entry in entries) / len(names) / 60
    heading = f"{bundle.name}: {minutes:.0f} minutes of scenes with people of the {split} split, closed loop, seed {seed}"
    text = markdown(summary, heading)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "scoreboard.json").write_text(json.dumps({"heading": heading} | summary, indent=1) + "\n")
        (out / "scoreboard.md").write_text(text)
        if len(names) > 1:
            draw_three(Player(bundle, data, split, seed, names[:3]), out / "three.png")
    return text
