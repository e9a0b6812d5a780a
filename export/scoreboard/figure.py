"""The picture of the board: the systems under each other in one scene, on one time axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from export.distill.scenes import Scene
from export.scoreboard.board import SCENE_S, SHOWCASE, Player, Task
from export.scoreboard.play import Run
from export.scoreboard.score import HIT, judge

INK, PALE, PEOPLE, VOICE, ACT, MISS = "#22252a", "#b8bcc2", "#2f6f9f", "#c2563a", "#3d8a5f", "#b3261e"
_TRIES = 20  # scenes; the richest is shown
_TITLES = {
    "presence": "presence: sees, hears and acts every {tick_ms} ms",
    "telephone": "telephone: the same weights without eyes or clock",
    "walkie-talkie": "walkie-talkie: the same weights behind a voice activity detector",
}


def draw_three(player: Player, path: Path) -> None:
    """Draw what the player's systems do in the scene among a few that asks for the most different things."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scene = max(
        (player.scene(Task(SHOWCASE, number, SCENE_S)) for number in range(_TRIES)),
        key=lambda scene: len({trial.behaviour for trial in scene.trials}),
    )
    context, rate_hz = player.config.context_samples, player.config.audio.sample_rate_hz
    runs = {name: system(scene, 0) for name, system in player.systems.items()}
    plt.rcParams.update({"font.size": 9, "axes.edgecolor": PALE, "text.color": INK, "font.family": "DejaVu Sans"})
    heights = [0.9, 0.8, *[1.5] * len(runs)]
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(14, 2 + 1.7 * len(runs)), sharex=True, height_ratios=heights, layout="constrained"
    )
    _draw_wave(axes[0], scene.room[context:], rate_hz, PEOPLE)
    for word in scene.world.script.words:
        label = word.name or "…"
        axes[0].text(word.onset_s, axes[0].get_ylim()[1] * 0.98, label, color=PEOPLE, va="top", size=8, clip_on=True)
    _label(axes[0], "people\nsay", PEOPLE)
    _draw_shown(axes[1], scene)
    for axis, (name, run) in zip(axes[2:], runs.items(), strict=True):
        _draw_system(axis, scene, run, _TITLES.get(name, name).format(tick_ms=player.config.tick_ms))
    axes[-1].set(xlim=(0, len(runs[name].voice) / rate_hz), xlabel="seconds", xticks=range(int(len(run.voice) / rate_hz) + 1))
    for axis in axes:
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.grid(axis="x", color="#eceef0", linewidth=0.6)
        axis.set_axisbelow(True)
    figure.suptitle("One scene, three kinds of system", weight="bold", fontsize=12)
    figure.savefig(path, dpi=115)
    plt.close(figure)


def _draw_wave(axis: Any, samples: np.ndarray, rate_hz: int, colour: str) -> None:
    envelope = np.abs(samples[: len(samples) // 80 * 80]).reshape(-1, 80).max(1)
    top = max(float(envelope.max()), 0.05)
    at_s = np.arange(len(envelope)) * 80 / rate_hz
    axis.fill_between(at_s, -envelope, envelope, color=colour, linewidth=0, alpha=0.8)
    axis.set(yticks=[], ylim=(-1.2 * top, 2.0 * top))


def _draw_shown(axis: Any, scene: Scene) -> None:
    script = scene.world.script
    for showing in script.showings:
        name = "no hand" if showing.digit is None else f"{showing.digit}"
        axis.barh(0.7, showing.gone_s - showing.appear_s, left=showing.appear_s, height=0.5, color=PEOPLE, alpha=0.25)
        axis.text(showing.appear_s + 0.08, 0.7, f"hand {name}" if showing.digit is not None else name, va="center", color=PEOPLE, size=8)
    for delivery in script.deliveries:
        axis.text(delivery.at_s, 0.12, f"text: {' '.join(delivery.tokens)}", va="center", color=INK, size=8, style="italic")
    axis.set(yticks=[], ylim=(-0.1, 1.1))
    _label(axis, "and\nshow", PEOPLE)


def _draw_system(axis: Any, scene: Scene, run: Run, title: str) -> None:
    verdict = judge(scene, run)
    _draw_wave(axis, run.voice, run.rate_hz, VOICE)
    top = axis.get_ylim()[1]
    for reaction in run.reactions:
        if reaction.kind == "say":
            axis.text(reaction.at_s, top * 0.62, reaction.value, color=VOICE, weight="bold", va="center", clip_on=True)
        else:
            axis.plot([reaction.at_s] * 2, [-top * 0.55, top * 0.3], color=ACT, linewidth=1)
            again = any(0 < reaction.at_s - other.at_s < 0.5 and other.value == reaction.value for other in run.reactions)
            label = "" if again else reaction.value
            axis.text(reaction.at_s + 0.04, -top * 0.45, label, color=ACT, weight="bold", va="center", size=8, clip_on=True)
    for outcome in verdict.outcomes:
        if outcome.result != HIT:
            axis.plot(outcome.trial.at_s, top * 0.35, marker="x", color=MISS, markersize=6, markeredgewidth=1.6)
    met = sum(outcome.result == HIT for outcome in verdict.outcomes)
    axis.set_title(f"{title}: {met} of {len(verdict.outcomes)} met, × missed", loc="left", fontsize=9, pad=2)
    _label(axis, "it\nsays, does", VOICE)


def _label(axis: Any, text: str, colour: str) -> None:
    axis.set_ylabel(text, rotation=0, ha="right", va="center", weight="bold", color=colour)
