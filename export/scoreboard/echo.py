"""How often the companion reacts to itself, in rooms that return its own speech: with and without `voice` and a canceller in front."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.signal import butter, sosfilt

from device.audio import Canceller, Samples
from device.bundle import Bundle
from device.config import ModelConfig
from device.echo_canceller import WebRtcCanceller
from device.engine import Engine, OnnxRuntimeEngine
from export.distill.behaviours import DIGITS
from export.distill.clips import RATE_HZ, Split
from export.distill.corpus import load_corpus
from export.distill.scenes import Scene, make_scene
from export.distill.script import Script
from export.errors import ExportError
from export.scoreboard.board import SCENE_S
from export.scoreboard.play import BLOCK_S, Reaction, Run, play
from export.scoreboard.score import HIT, judge
from export.scoreboard.systems import ABLATIONS, MaskedEngine
from export.spoken_words import render_words

LEVELS_DB = (-6, -12, -18, -24, -30)  # of the echo beside what the speaker played
DELAY_S = (0.010, 0.080)  # from the speaker's converter to the microphone's
DECAY_S = (0.2, 0.6)  # a furnished room's reverberation time
BECAUSE_S = 1.2  # so long after its own sound a reaction can be one to it, and so long after a person's word one to that


class Condition(NamedTuple):
    """What the companion is given against its echo."""

    echo: bool
    voice: bool
    canceller: bool


CONDITIONS = {
    "no echo": Condition(echo=False, voice=True, canceller=False),
    # What lacking its own voice does by itself: only what "nothing" is beyond this is the echo's work.
    "no echo, no voice": Condition(echo=False, voice=False, canceller=False),
    "nothing": Condition(echo=True, voice=False, canceller=False),
    "voice": Condition(echo=True, voice=True, canceller=False),
    "AEC3": Condition(echo=True, voice=False, canceller=True),
    "voice and AEC3": Condition(echo=True, voice=True, canceller=True),
}


@dataclass(frozen=True)
class Heard:
    """What became of one scene."""

    condition: str
    level_db: int
    seconds: float
    words: int  # that it said
    itself: int  # reactions to itself
    false: int  # reactions that nobody asked for, those included
    hits: int
    trials: int


def echo_path(rng: np.random.Generator, level_db: float) -> Samples:
    """Impulse response from speaker to microphone, f32[n] at 16 kHz, by the image sources of a furnished room and a small loudspeaker."""
    try:
        import pyroomacoustics
    except ImportError as error:
        raise ExportError(f"the rooms need pyroomacoustics ({error}); run: pip install 'copresence[scoreboard]'") from error
    size = rng.uniform((3.0, 2.5, 2.3), (6.0, 5.0, 3.0))
    absorption, order = pyroomacoustics.inverse_sabine(rng.uniform(*DECAY_S), size)
    room = pyroomacoustics.ShoeBox(size, fs=RATE_HZ, materials=pyroomacoustics.Material(absorption), max_order=min(order, 30))
    speaker = rng.uniform((0.5, 0.5, 0.6), size - (0.5, 0.5, 1.0))
    aside = rng.standard_normal(3)
    room.add_source(speaker)
    room.add_microphone(speaker + aside / np.linalg.norm(aside) * rng.uniform(0.04, 0.20))
    room.compute_rir()
    response = room.rir[0][0]
    response = response[int(np.argmax(np.abs(response) > 0.1 * np.abs(response).max())) :]
    response = sosfilt(butter(2, (250, 7000), "bandpass", fs=RATE_HZ, output="sos"), response)
    response *= 10 ** (level_db / 20) / np.sqrt(np.sum(response**2))
    return np.concatenate((np.zeros(round(rng.uniform(*DELAY_S) * RATE_HZ)), response)).astype(np.float32)


def monologue(script: Script) -> None:
    """One person who lets it speak: it counts aloud, then says what it is shown and told."""
    rng = script.rng
    at_s = script.say("go", float(rng.uniform(0.3, 0.8))) + 10.5
    while at_s < script.length_s - 2.0:
        script.show(int(rng.integers(len(DIGITS))), at_s, 1.2)
        script.deliver(at_s + 1.6, "tell", str(rng.choice(DIGITS)))
        at_s += 3.0


def reactions_to_itself(scene: Scene, run: Run, false: list[Reaction]) -> list[Reaction]:
    """Those that nobody asked for and that were chosen while it sounded, or just after, when no person had said a word just before."""
    audible = run.audible()
    found = []
    for reaction in false:
        chosen_s = reaction.at_s - reaction.choice
        sounded = audible[max(round((chosen_s - BECAUSE_S) / BLOCK_S), 0) : round(chosen_s / BLOCK_S)].any()
        spoken = any(word.onset_s <= chosen_s <= word.end_s + BECAUSE_S for word in scene.world.script.words)
        if sounded and not spoken:
            found.append(reaction)
    return found


def hear(scene: Scene, condition: str, level_db: int, c: ModelConfig, engine: Engine, number: int) -> Heard:
    """Play a scene, whose world has the echo path of that level, under a condition."""
    given = CONDITIONS[condition]
    if not given.echo:
        scene = replace(scene, world=scene.world._replace(echo=np.zeros(1, np.float32)))
    canceller: Canceller | None = WebRtcCanceller(c.audio.sample_rate_hz) if given.canceller else None
    run = play(scene, c, engine if given.voice else MaskedEngine(engine, c, ABLATIONS["no own voice"]), number, canceller=canceller)
    verdict = judge(scene, run, number)
    return Heard(
        condition,
        level_db,
        len(run.voice) / run.rate_hz,
        sum(reaction.kind == "say" for reaction in run.reactions),
        len(reactions_to_itself(scene, run, verdict.false)),
        len(verdict.false),
        sum(outcome.result == HIT for outcome in verdict.outcomes),
        len(verdict.outcomes),
    )


def listen(bundle: Path, data: Path, split: Split, numbers: range, seed: int, progress: Callable[[str], None]) -> list[Heard]:
    """Every condition in each of the scenes of those numbers, which have a room of their own, the levels in turn."""
    opened = Bundle.open(bundle, unproven=True)
    c, engine = opened.config, OnnxRuntimeEngine(opened.graph, opened.config)
    corpus, words = load_corpus(data, split), render_words(c.text.words)
    heard = []
    for number in numbers:
        rng = np.random.default_rng([seed, number])
        scene = make_scene(corpus, words, rng, c, c.ticks_in(SCENE_S), flawless=True, stage=monologue)
        level_db = LEVELS_DB[number % len(LEVELS_DB)]
        scene = replace(scene, world=scene.world._replace(echo=echo_path(rng, level_db)))
        heard += [hear(scene, condition, level_db, c, engine, number) for condition in CONDITIONS]
        progress(f"{number + 1} of {numbers.stop} scenes played")
    return heard


def measure(bundle: Path, data: Path, split: Split, scenes: int, seed: int, out: Path | None, progress: Callable[[str], None]) -> str:
    """The Markdown of so many scenes; it and the JSON are written to `out`."""
    rows = summarise(listen(bundle, data, split, range(scenes), seed, progress))
    text = markdown(rows, f"{bundle.name}: {scenes} scenes of {SCENE_S} s, people of the {split} split, closed loop, seed {seed}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "echo.json").write_text(json.dumps(rows, indent=1) + "\n")
        (out / "echo.md").write_text(text)
    return text


def summarise(heard: list[Heard]) -> dict[str, dict[str, Any]]:
    """By condition: reactions to itself for 100 words of its own, in all and by level; false reactions a minute; hits in %."""
    rows: dict[str, dict[str, Any]] = {}
    for condition in CONDITIONS:
        mine = [entry for entry in heard if entry.condition == condition]
        rows[condition] = {
            "words": sum(entry.words for entry in mine),
            "itself": _per_100([*mine]),
            "by_level": {level_db: _per_100([entry for entry in mine if entry.level_db == level_db]) for level_db in LEVELS_DB},
            "false_per_minute": 60 * sum(entry.false for entry in mine) / max(sum(entry.seconds for entry in mine), 1e-9),
            "hit": 100 * sum(entry.hits for entry in mine) / max(sum(entry.trials for entry in mine), 1),
        }
    return rows


def _per_100(entries: list[Heard]) -> float:
    return 100 * sum(entry.itself for entry in entries) / max(sum(entry.words for entry in entries), 1)


def markdown(rows: dict[str, dict[str, Any]], heading: str) -> str:
    """The table."""
    levels = " | ".join(f"at {level_db} dB".replace("-", "−") for level_db in LEVELS_DB)
    lines = [heading, "", f"| given against it | its words | to itself, of 100 words | {levels} | false a minute | hits, % |"]
    lines.append("|---|" + "---:|" * (len(LEVELS_DB) + 4))
    for condition, row in rows.items():
        by_level = " | ".join(f"{value:.1f}" for value in row["by_level"].values())
        cells = f"{row['words']} | {row['itself']:.1f} | {by_level} | {row['false_per_minute']:.2f} | {row['hit']:.1f}"
        lines.append(f"| {condition} | {cells} |")
    return "\n".join(lines) + "\n"
