"""The scoreboard: what a perfect companion does is all right, everything else is blamed for what it did, systems differ as they should."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from ticks import SMALL

from device.audio import Samples
from device.config import ModelConfig, TextConfig
from device.engine import HostMemory, allocate
from export.distill.behaviours import ACTS, WORDS
from export.distill.corpus import Corpus
from export.distill.scenes import Scene, make_scene
from export.scoreboard import systems
from export.scoreboard.board import RECALL, SCENE_S, SILENCE, STOPPED, Entry, Player, Task, stage
from export.scoreboard.detector import Turn, turns
from export.scoreboard.play import Reaction, Run, SceneMicrophone, heard_words
from export.scoreboard.report import BEHAVIOURS, markdown, summarise
from export.scoreboard.score import HIT, MISSED, WRONG, Verdict, judge
from export.scoreboard.systems import ABLATIONS, ORACLE, TELEPHONE, MaskedEngine, WalkieTalkie, oracle
from export.spoken_words import render_words

# It remembers for a minute, as who is asked `last` must.
CONFIG = dataclasses.replace(SMALL, text=TextConfig(WORDS, ACTS), trunk=dataclasses.replace(SMALL.trunk, present_window=320))
RATE_HZ = 16000
GROUPS = ("mixture", "recite", "timer", "count", "recall", "weave", "listen", "quiet", "nothing", STOPPED, SILENCE, f"{RECALL}5")


@pytest.fixture(scope="module")
def words() -> dict[str, Samples]:
    return render_words(WORDS)


def scene_of(group: str, number: int, corpus: Corpus, words: dict[str, Samples], c: ModelConfig = CONFIG) -> Scene:
    rng = np.random.default_rng([3, *group.encode(), number])
    return make_scene(corpus, words, rng, c, c.ticks_in(SCENE_S), flawless=True, stage=stage(group))


@pytest.fixture(scope="module")
def played(corpus: Corpus, words: dict[str, Samples]) -> list[tuple[Scene, Run]]:
    scenes = [scene_of(group, number, corpus, words) for group in GROUPS for number in range(4)]
    return [(scene, oracle(scene, CONFIG)) for scene in scenes]


def test_a_perfect_companion_meets_everything_and_does_nothing_else(played: list[tuple[Scene, Run]]) -> None:
    asked = set()
    for scene, run in played:
        verdict = judge(scene, run)
        assert [outcome for outcome in verdict.outcomes if outcome.result != HIT] == []
        assert verdict.false == []
        assert all(abs(truth - last) == 0 for truth, last in verdict.episodes)
        asked |= {outcome.trial.behaviour for outcome in verdict.outcomes}
    assert asked >= set(BEHAVIOURS)


def time_to_ok(tick_ms: int, corpus: Corpus, words: dict[str, Samples]) -> tuple[float, float]:
    """From a word's end to a perfect companion's "ok" with ticks of that length: median and 90th percentile, s; all are hits."""
    c = dataclasses.replace(CONFIG, tick_ms=tick_ms)
    times = []
    for number in range(12):
        scene = scene_of("act", number, corpus, words, c)
        outcomes = [outcome for outcome in judge(scene, oracle(scene, c)).outcomes if outcome.trial.behaviour == "ok"]
        assert all(outcome.result == HIT for outcome in outcomes)
        times += [outcome.reaction_s for outcome in outcomes if outcome.reaction_s is not None]
    assert len(times) > 30
    return float(np.median(times)), float(np.quantile(times, 0.9))


def test_what_the_length_of_a_tick_allows(corpus: Corpus, words: dict[str, Samples]) -> None:
    """The aim is a reaction to a word's end within 0.30 s in the median, and 0.45 s in nine of ten: 400 ms do not allow it."""
    quick, ours, slow = (time_to_ok(tick_ms, corpus, words) for tick_ms in (100, 200, 400))
    assert quick[0] < ours[0] < 0.30 < slow[0]
    assert quick[1] < ours[1] < 0.45 < slow[1]


def test_the_oracle_can_be_played_on_the_board(companion_bundle: Path, data_root: Path) -> None:
    """Among others scene 105, in which a timer is stopped and another one ends soon after."""
    player = Player(companion_bundle, data_root, "test", 0, [ORACLE])
    asked = set()
    for task in [Task(STOPPED, number, SCENE_S) for number in range(100, 110)] + [Task("mixture", number, SCENE_S) for number in range(10)]:
        (entry,) = player.play(task)
        assert entry.system == "oracle" and entry.verdict.false == []
        assert [outcome for outcome in entry.verdict.outcomes if outcome.result != HIT] == []
        asked |= {outcome.trial.behaviour for outcome in entry.verdict.outcomes}
    assert asked >= {"act", "show", "answer", "timer", "cancel"}


def test_who_does_nothing_is_silent_and_misses_the_rest(played: list[tuple[Scene, Run]]) -> None:
    for scene, run in played:
        verdict = judge(scene, Run([], np.zeros_like(run.voice), RATE_HZ))
        assert all((outcome.result == HIT) == (outcome.trial.behaviour in ("quiet", "cancel")) for outcome in verdict.outcomes)
        assert not any(outcome.result == WRONG for outcome in verdict.outcomes)


def first_with(behaviour: str, played: list[tuple[Scene, Run]]) -> tuple[Scene, Run]:
    """A scene in which a trial of that behaviour comes first and was met, with the reaction that met it."""
    return next(
        (scene, run) for scene, run in played if any(o.trial.behaviour == behaviour and o.result == HIT for o in judge(scene, run).outcomes)
    )


def outcome_of(behaviour: str, verdict: Verdict) -> list[str]:
    return [outcome.result for outcome in verdict.outcomes if outcome.trial.behaviour == behaviour]


def test_another_word_is_wrong_a_late_one_missed_and_neither_is_false(played: list[tuple[Scene, Run]]) -> None:
    scene, run = first_with("show", played)
    trial = next(o.trial for o in judge(scene, run).outcomes if o.trial.behaviour == "show" and o.result == HIT)
    check = trial.checks[0]
    place = next(i for i, r in enumerate(run.reactions) if r.value == check.value and check.since_s <= r.at_s <= check.until_s)

    def with_reaction(reaction: Reaction) -> list[str]:
        others = [r for i, r in enumerate(run.reactions) if i != place]
        verdict = judge(scene, Run(sorted([*others, reaction], key=lambda r: r.at_s), run.voice, RATE_HZ))
        assert verdict.false == []
        return [o.result for o in verdict.outcomes if o.trial is trial]

    said = run.reactions[place]
    assert with_reaction(said._replace(value="sorry")) == [WRONG]
    assert with_reaction(said._replace(at_s=check.until_s + 0.05)) == [MISSED]
    others = [r for i, r in enumerate(run.reactions) if i != place]
    late = judge(scene, Run(sorted([*others, said._replace(at_s=check.until_s + 0.05)], key=lambda r: r.at_s), run.voice, RATE_HZ))
    assert next(o.reaction_s for o in late.outcomes if o.trial is trial) == pytest.approx(check.until_s + 0.05 - trial.at_s)
    twice = judge(scene, Run(sorted([*run.reactions, said._replace(at_s=said.at_s + 0.01)], key=lambda r: r.at_s), run.voice, RATE_HZ))
    assert [(r.kind, r.value) for r in twice.false] == [("say", check.value)]


def test_yield_is_measured_in_the_sound(played: list[tuple[Scene, Run]]) -> None:
    scene, run = first_with("yield", played)
    trial = next(o.trial for o in judge(scene, run).outcomes if o.trial.behaviour == "yield")
    humming = run.voice.copy()
    start = round(trial.at_s * RATE_HZ)
    humming[start : start + 2 * RATE_HZ] += 0.1 * np.sin(np.arange(len(humming[start : start + 2 * RATE_HZ])))
    assert MISSED in outcome_of("yield", judge(scene, Run(run.reactions, humming, RATE_HZ)))


def test_what_was_never_begun_was_not_under_way(played: list[tuple[Scene, Run]]) -> None:
    asked = set()
    for scene, run in played:
        nothing = Run([], np.zeros_like(run.voice), RATE_HZ)
        for ours, silent in zip(judge(scene, run).outcomes, judge(scene, nothing).outcomes, strict=True):
            asked |= {ours.trial.behaviour} if ours.under_way else set()
            assert ours.under_way or ours.trial.behaviour != "hold"
            assert not silent.under_way
    assert asked == {"yield", "hold"}


def test_a_word_that_nobody_can_hear_was_not_said() -> None:
    voice = np.zeros(RATE_HZ, np.float32)
    voice[8000:12000] = 0.1
    assert heard_words([("one", 0.44), ("two", 0.8)], voice, RATE_HZ, 0.06) == [Reaction("say", "one", 0.5, pytest.approx(0.06))]


class Mirror:
    """A playout that played one click."""

    def heard(self, start: int, out: Samples) -> None:
        out[...] = 0
        if start <= 5000 < start + out.size:
            out[5000 - start] = 1.0


def test_the_microphone_hears_the_room_and_the_echo_of_what_was_played(corpus: Corpus, words: dict[str, Samples]) -> None:
    scene = scene_of("mixture", 0, corpus, words)
    room, echo = scene.room[CONFIG.context_samples :], scene.world.echo
    mic = SceneMicrophone(scene, CONFIG.context_samples, Mirror())  # type: ignore[arg-type]
    heard = np.zeros(16000, np.float32)
    mic.read(0, heard)
    expected = room[:16000].copy()
    expected[5000 : 5000 + len(echo)] += echo[: 16000 - 5000]
    assert np.allclose(heard, np.clip(expected, -1, 1), atol=1e-5)
    assert mic.length == len(room)


class Recorder:
    """An engine that remembers what it was given."""

    def __init__(self) -> None:
        self.inputs, self.outputs = allocate(CONFIG)
        self.memory = HostMemory(CONFIG, self.inputs, self.outputs)
        self.seen: dict[str, np.ndarray] = {}

    def run(self) -> None:
        self.seen = {name: value.copy() for name, value in self.inputs.items()}


@pytest.mark.parametrize(("name", "changed"), [
    ("no video", {"frames", "frame_age"}), ("no own voice", {"voice"}), ("no clock", {"clock"}), ("no text", {"text_in"}),
    ("one frame", {"frames"}), ("telephone", {"frames", "frame_age", "clock"}),
])  # fmt: skip
def test_a_mask_takes_what_it_says_and_nothing_else(name: str, changed: set[str]) -> None:
    recorder = Recorder()
    rng = np.random.default_rng(0)
    for array in recorder.inputs.values():
        array[...] = rng.integers(1, 9, array.shape)
    before = {key: value.copy() for key, value in recorder.inputs.items()}
    MaskedEngine(recorder, CONFIG, TELEPHONE if name == "telephone" else ABLATIONS[name]).run()
    assert {key for key, value in recorder.seen.items() if not np.array_equal(value, before[key])} == changed


class Talker(Recorder):
    """An engine that says "ok" in the first tick that it is given, and whose voice never stops."""

    def run(self) -> None:
        first = not self.seen
        super().run()
        self.outputs["say"][0] = WORDS.index("ok") if first else 0
        self.outputs["speech"][...] = 0.1


def test_a_walkie_talkie_answers_when_a_turn_is_over_and_is_cut_off_by_the_next(
    corpus: Corpus, words: dict[str, Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = scene_of(SILENCE, 0, corpus, words)
    monkeypatch.setattr(systems, "turns", lambda _: [Turn(1.0, 1.4, 3.0), Turn(3.6, 3.9, 6.0)])
    run = WalkieTalkie(CONFIG, Talker()).play(scene, 0)
    assert [(reaction.value, round(reaction.at_s, 2)) for reaction in run.reactions] == [("ok", 3.06)]
    sounding = np.flatnonzero(run.voice)
    assert sounding[0] == round(3.06 * RATE_HZ) and sounding[-1] < 3.9 * RATE_HZ


def test_text_that_arrives_while_a_walkie_talkie_is_cut_off_joins_the_next_turn(
    corpus: Corpus, words: dict[str, Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = scene_of(SILENCE, 0, corpus, words)
    scene.text_in[16, 0] = WORDS.index("last")  # at 3.3 s: it speaks from 3.0 s on, until a voice cuts it off at 3.9 s
    monkeypatch.setattr(systems, "turns", lambda _: [Turn(1.0, 1.4, 3.0), Turn(3.6, 3.9, 6.0)])
    engine = Talker()
    read: list[int] = []
    run = engine.run

    def listen() -> None:
        read.extend(int(token) for token in engine.inputs["text_in"] if token)
        run()

    monkeypatch.setattr(engine, "run", listen)
    WalkieTalkie(CONFIG, engine).play(scene, 0)
    assert read == [WORDS.index("last")]


def test_the_detector_finds_the_turn_of_a_voice_and_none_in_noise() -> None:
    from export.espeak import speak

    rng = np.random.default_rng(0)
    sound = 1e-3 * rng.standard_normal(4 * RATE_HZ).astype(np.float32)
    assert turns(sound) == []
    voice = speak("good morning everybody", rate_hz=RATE_HZ)
    sound[RATE_HZ : RATE_HZ + len(voice)] += voice
    (turn,) = turns(sound)
    assert turn.start_s < 1.1 < turn.fired_s + 0.1 < 1.6
    assert 0.45 < turn.over_s - (1 + len(voice) / RATE_HZ) < 0.9 or turn.over_s > 1.9


def taken_aback(scene: Scene, run: Run) -> Run:
    """Whom every word of others leaves speechless for a while."""
    ends_s = [word.end_s for word in scene.world.script.words]
    calm = [reaction for reaction in run.reactions if not any(end_s < reaction.at_s <= end_s + 1.3 for end_s in ends_s)]
    return Run(calm, run.voice, RATE_HZ)


def test_intervals_are_drawn_over_people_and_the_tables_say_it_all(played: list[tuple[Scene, Run]]) -> None:
    entries = []
    for number, (scene, run) in enumerate(played):
        task = Task("silence" if number % 7 == 6 else "mixture", number, SCENE_S)
        entries.append(Entry("presence", task, judge(scene, run, number)))
        entries.append(Entry("walkie-talkie", task, judge(scene, taken_aback(scene, run), number)))
    summary = summarise(entries)
    ours, theirs = (summary["systems"][name] for name in ("presence", "walkie-talkie"))
    assert ours["behaviours"]["act"]["hit"] == ours["behaviours"]["act"]["low"] == 100.0
    assert theirs["behaviours"]["act"]["hit"] == theirs["behaviours"]["act"]["high"] == 0.0
    assert ours["rows"]["count, %"] == 100.0
    assert ours["rows"]["false interruption, %"] == 0.0 and theirs["rows"]["false interruption, %"] == 100.0
    assert 0 < ours["rows"]["turn-taking latency, s"] < 1.0 and theirs["rows"]["turn-taking latency, s"] is None
    assert ours["rows"]["silence, per hour"] == 0.0
    text = markdown(summary, "a heading")
    assert ours["under_way"]["hold"]["hit"] == 100.0 and theirs["under_way"]["hold"]["hit"] == 0.0
    assert "| act |" in text and "| hold while it speaks |" in text and "False interruption: 100 % less than the walkie-talkie." in text
    json.dumps(summary)


def test_an_evaluation_ends_in_a_page(data_root: Path, tmp_path: Path) -> None:
    """A few scenes with real people, three systems, through the bundle of the shipped checkpoint."""
    from export.build import build
    from export.cli import main

    build(Path(__file__).resolve().parents[1] / "export/checkpoints/companion-nano", tmp_path / "bundle")
    command = ["evaluate", str(tmp_path / "bundle"), "--data", str(data_root), "--split", "dev", "--scenes", "1", "--jobs", "2"]
    assert main([*command, "--out", str(tmp_path / "board")]) == 0
    systems = json.loads((tmp_path / "board" / "scoreboard.json").read_text())["systems"]
    assert list(systems) == ["presence", "telephone", "walkie-talkie"]
    assert systems["presence"]["behaviours"]["show"]["hit"] > systems["telephone"]["behaviours"]["show"]["hit"]
    assert (tmp_path / "board" / "three.png").stat().st_size > 10_000
    assert "| presence | telephone | walkie-talkie |" in (tmp_path / "board" / "scoreboard.md").read_text()
    assert main([*command, "--systems", "parrot"]) == 2
