"""The device's own speech in its microphone: the canceller in front, rooms that return it, and who reacts to himself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from test_scoreboard import CONFIG, RATE_HZ, Recorder
from test_sources import TICK, noise

from device.audio import Canceller, Line, Samples, Source, VirtualPlayout
from device.echo_canceller import CancellerMissing, WebRtcCanceller
from export.distill.behaviours import WORDS
from export.distill.corpus import Corpus
from export.distill.scenes import Scene, make_scene
from export.scoreboard import echo
from export.scoreboard.echo import CONDITIONS, LEVELS_DB, Heard, echo_path, hear, markdown, monologue, reactions_to_itself, summarise
from export.scoreboard.play import Reaction, Run
from export.scoreboard.systems import oracle
from export.spoken_words import render_words

needs_livekit = pytest.mark.skipif(importlib.util.find_spec("livekit") is None, reason="livekit is not installed (extra 'echo')")
needs_rooms = pytest.mark.skipif(importlib.util.find_spec("pyroomacoustics") is None, reason="pyroomacoustics is not installed")


@needs_livekit
def test_the_canceller_takes_the_echo_out_and_leaves_a_person_in() -> None:
    rng = np.random.default_rng(0)
    played = 0.1 * rng.standard_normal(5 * RATE_HZ).astype(np.float32)
    path = np.zeros(900, np.float32)
    path[[320, 360, 700]] = 0.3, -0.1, 0.05
    returned = np.convolve(played, path)[: played.size].astype(np.float32)
    person = np.zeros_like(played)
    person[-RATE_HZ // 2 :] = 0.1 * np.sin(2 * np.pi * 300 * np.arange(RATE_HZ // 2) / RATE_HZ)
    played[-RATE_HZ // 2 - 4000 :] = 0
    returned[-RATE_HZ // 2 - 3000 :] = 0
    mic, canceller = returned + person, WebRtcCanceller(RATE_HZ)
    for at in range(0, mic.size, TICK):
        canceller(mic[at : at + TICK], played[at : at + TICK])
    second = slice(3 * RATE_HZ, 4 * RATE_HZ)
    assert 20 * np.log10(np.std(mic[second]) / np.std(returned[second])) < -20
    tail = slice(-RATE_HZ // 4, None)
    assert 20 * np.log10(np.std(mic[tail]) / np.std(person[tail])) > -6


def test_without_its_library_the_canceller_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "livekit.rtc", None)
    with pytest.raises(CancellerMissing, match=r"pip install 'copresence\[echo\]'"):
        WebRtcCanceller(RATE_HZ)


class Steady(Source):
    def __init__(self, sound: Samples) -> None:
        super().__init__()
        self._sound = sound

    def read(self, start: int, out: Samples) -> None:
        out[...] = 0
        first = max(0, -start)
        out[first:] = self._sound[start + first : start + out.size]


def test_a_line_gives_the_canceller_each_sample_once_and_the_model_what_comes_out() -> None:
    sound, given = noise(5 * TICK), []

    def halve(mic: Samples, voice: Samples) -> None:
        given.append(mic.copy())
        assert voice.shape == mic.shape
        mic *= 0.5

    canceller: Canceller = halve
    line = Line(CONFIG, Steady(sound), VirtualPlayout(RATE_HZ, lambda: 0), 0, canceller)
    context = CONFIG.context_samples
    for tick in range(4):
        line.gather(tick, 0)
        np.testing.assert_array_equal(line.mic[context:], 0.5 * sound[tick * TICK : (tick + 1) * TICK])
        before = 0.5 * sound[tick * TICK - context : tick * TICK] if tick else np.zeros(context)
        np.testing.assert_array_equal(line.mic[:context], before, "and its context is clean as well")
    np.testing.assert_array_equal(np.concatenate(given), sound[: 4 * TICK])


@needs_rooms
@pytest.mark.parametrize("level_db", LEVELS_DB)
def test_a_room_returns_speech_late_and_at_its_level_with_reflections(level_db: int) -> None:
    for seed in range(3):
        path = echo_path(np.random.default_rng(seed), level_db)
        first_s = float(np.argmax(np.abs(path) > 0.05 * np.abs(path).max())) / RATE_HZ
        assert 0.010 <= first_s <= 0.083
        assert 10 * np.log10(np.sum(path.astype(np.float64) ** 2)) == pytest.approx(level_db, abs=0.1)
        tail = path[round((first_s + 0.02) * RATE_HZ) :]
        assert np.count_nonzero(np.abs(tail) > 1e-3 * np.abs(path).max()) > 200, "it goes on, as in a room"


@pytest.fixture(scope="module")
def scene(corpus: Corpus) -> Scene:
    rng = np.random.default_rng(5)
    return make_scene(corpus, render_words(WORDS), rng, CONFIG, 96, flawless=True, stage=monologue)


def test_in_a_monologue_a_perfect_companion_speaks_a_lot_and_not_to_itself(scene: Scene) -> None:
    run = oracle(scene, CONFIG)
    assert sum(reaction.kind == "say" for reaction in run.reactions) >= 10
    assert reactions_to_itself(scene, run, []) == []


def test_a_reaction_is_to_itself_where_its_own_sound_and_no_persons_word_came_before(scene: Scene) -> None:
    word = scene.world.script.words[0]
    voice = np.zeros(96 * TICK, np.float32)
    own = (word.end_s + 3.0, word.end_s + 3.4)
    voice[round(own[0] * RATE_HZ) : round(own[1] * RATE_HZ)] = 0.1
    at = {"to a person": word.end_s + 0.3, "to itself": own[1] + 0.3, "to nothing": own[1] + 2.0}
    false = [Reaction("act", name, at_s, 0.0) for name, at_s in at.items()]
    assert [reaction.value for reaction in reactions_to_itself(scene, Run(false, voice, RATE_HZ), false)] == ["to itself"]


def test_conditions_take_and_give_what_they_say(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shouter(Recorder):
        def run(self) -> None:
            super().run()
            self.outputs["speech"][...] = 0.1

    cleaned: list[bool] = []
    monkeypatch.setattr(echo, "WebRtcCanceller", lambda _: lambda mic, voice: cleaned.append(bool(voice.any())))
    returned = np.zeros(400, np.float32)
    returned[320] = 0.5
    loud = scene.__class__(**{**vars(scene), "world": scene.world._replace(echo=returned), "room": np.zeros_like(scene.room)})
    for name, given in CONDITIONS.items():
        engine = Shouter()
        cleaned.clear()
        assert hear(loud, name, -6, CONFIG, engine, 0).condition == name
        assert engine.seen["mic"].any() == given.echo, name
        assert engine.seen["voice"].any() == given.voice, name
        assert bool(cleaned) == given.canceller, name
        assert given.canceller is False or cleaned[-1], "the canceller is given the voice even where the model is not"


def test_what_an_echo_does_can_be_told_from_what_lacking_the_voice_does() -> None:
    given = set(CONDITIONS.values())
    assert {condition._replace(echo=False) for condition in given if not condition.canceller} <= given


def test_the_table_has_all_conditions_and_levels() -> None:
    heard = [Heard(name, level, 19.2, 10, int(name == "nothing"), 2, 6, 8) for name in CONDITIONS for level in LEVELS_DB]
    rows = summarise(heard)
    assert rows["nothing"]["itself"] == 10.0 and rows["voice"]["itself"] == 0.0
    assert rows["voice"]["hit"] == 75.0 and rows["voice"]["false_per_minute"] == pytest.approx(6.25)
    text = markdown(rows, "a heading")
    assert all(f"| {name} |" in text for name in CONDITIONS) and "at −30 dB" in text


def test_the_command_is_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from export.cli import main

    assert main(["echo", str(tmp_path / "absent"), "--data", str(tmp_path)]) == 2
    assert "absent" in capsys.readouterr().err
