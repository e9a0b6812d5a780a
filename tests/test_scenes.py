"""The training scenes: people stay on their side of the split, the past is what a session would remember, and nothing gives itself away."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import tone
from scipy.signal import fftconvolve

from device.config import ModelConfig, TextConfig
from export.distill import scenes as scenes_module
from export.distill.behaviours import ACT_OF_WORD, ACTS, DIGITS, WORDS
from export.distill.clips import COMMANDS, RATE_HZ, belongs, split_of, word_span
from export.distill.corpus import Corpus, CorpusMissing, load_corpus
from export.distill.pictures import Thing
from export.distill.scenes import WINDOW_S, Scene, Stage, chatter, hand_frames, lesson, make_scene, mixture, only, replay, word_windows
from export.distill.script import REACTION_S, Script
from export.distill.sounds import ABOVE_NOISE, Chance, power
from export.hands import draw_hand
from export.scoreboard.report import BEHAVIOURS

CONFIG = ModelConfig(text=TextConfig(WORDS, ACTS))
TICK_S = CONFIG.tick_ms / 1000
TICKS = 80


@pytest.fixture(scope="module")
def voice_words() -> dict[str, np.ndarray]:
    return {word: np.full(6000, 0.1, np.float32) for word in WORDS[1:]}


@pytest.fixture(scope="module")
def scenes(corpus: Corpus, voice_words: dict[str, np.ndarray]) -> list[Scene]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes_module.Chance, "lost_ticks", 0.3)
        return [make_scene(corpus, voice_words, np.random.default_rng(seed), CONFIG, TICKS) for seed in range(40)]


def test_shapes(scenes: list[Scene]) -> None:
    c = CONFIG
    for scene in scenes[:5]:
        assert scene.mic.shape == scene.voice.shape == scene.room.shape == (c.context_samples + TICKS * c.tick_samples,)
        assert scene.mic.dtype == scene.voice.dtype == scene.frame_age.dtype == scene.say_weight.dtype == np.float32
        assert scene.frames.shape == (TICKS, 2, c.video.height, c.video.width, 3) and scene.frames.dtype == np.uint8
        assert scene.frame_age.shape == (TICKS, 1) and scene.said.shape == (TICKS, c.text.say) and scene.acted.shape == (TICKS, 1)
        assert scene.text_in.shape == (TICKS, c.text.text_in)
        assert np.abs(scene.mic).max() <= 1


def test_same_seed_same_scene(corpus: Corpus, voice_words: dict[str, np.ndarray]) -> None:
    one, again, other = (make_scene(corpus, voice_words, np.random.default_rng(seed), CONFIG, TICKS) for seed in (3, 3, 4))
    assert all(np.array_equal(value, again.arrays[name]) for name, value in one.arrays.items())
    assert again.trials == one.trials
    assert not np.array_equal(one.mic, other.mic)


def test_all_behaviours_are_asked_for(scenes: list[Scene], corpus: Corpus, voice_words: dict[str, np.ndarray]) -> None:
    more = [make_scene(corpus, voice_words, np.random.default_rng(seed), CONFIG, TICKS) for seed in range(len(scenes), 60)]
    asked = {trial.behaviour for scene in (*scenes, *more) for trial in scene.trials}
    assert asked >= set(BEHAVIOURS) - {"cancel"}  # which takes a timer that is stopped


def test_the_past_is_what_a_session_remembers(scenes: list[Scene]) -> None:
    """Of a lost tick nothing is left: the tick after it is told what was chosen before."""
    lost = 0
    for scene in scenes:
        said, acted = np.zeros(CONFIG.text.say, int), np.zeros(1, int)
        for tick in range(TICKS):
            assert np.array_equal(scene.said[tick], said) and np.array_equal(scene.acted[tick], acted)
            if not scene.lost[tick]:
                said, acted = scene.say_now[tick], scene.act_now[tick]
        assert not scene.say_now[scene.lost].any() and not scene.say_weight[scene.lost].any() and not scene.act_weight[scene.lost].any()
        lost += int(scene.lost.sum())
    assert lost > 3


def test_lost_ticks_swallow_no_event(scenes: list[Scene]) -> None:
    for scene in scenes:
        for moment in scene.world.moments:
            assert not (scene.lost[moment.tick] and (moment.heard or moment.appeared or moment.text))


def test_a_word_belongs_to_the_first_edge_after_it(scenes: list[Scene]) -> None:
    heard = 0
    for scene in scenes:
        for moment in scene.world.moments:
            for word in moment.heard:
                assert moment.edge_s - TICK_S < word.end_s + REACTION_S <= moment.edge_s + 1e-9
                assert scene.word_label[moment.tick] == moment.heard[-1].label or scene.lost[moment.tick]
                heard += 1
    assert heard > 200


def test_acts_answer_words_at_once(scenes: list[Scene]) -> None:
    on_time = 0
    for scene in scenes:
        for moment in scene.world.moments:
            wanted = [ACT_OF_WORD[word.name] for word in moment.heard if word.name in ACT_OF_WORD]
            if len(wanted) == 1 and scene.act_weight[moment.tick]:
                assert ACTS[scene.act_target[moment.tick]] == wanted[0]
                on_time += 1
    assert on_time > 20


@pytest.mark.parametrize("tick_ms", [100, 400])
def test_at_another_tick_the_same_is_wanted_at_the_same_time(corpus: Corpus, voice_words: dict[str, np.ndarray], tick_ms: int) -> None:
    """The tick is a property of the bundle: a reaction is due in the first tick that can know, however long a tick is."""
    config, tick_s = dataclasses.replace(CONFIG, tick_ms=tick_ms), tick_ms / 1000
    ticks, on_time = round(TICKS * TICK_S / tick_s), 0
    for seed in range(12):
        scene = make_scene(corpus, voice_words, np.random.default_rng(seed), config, ticks, flawless=True, stage=only("act"))
        assert scene.mic.shape == (config.context_samples + ticks * config.tick_samples,)
        for moment in scene.world.moments:
            assert moment.edge_s == pytest.approx((moment.tick + 1) * tick_s)
            assert all(moment.edge_s - tick_s < word.end_s + REACTION_S <= moment.edge_s + 1e-9 for word in moment.heard)
            wanted = [ACT_OF_WORD[word.name] for word in moment.heard if word.name in ACT_OF_WORD]
            if len(wanted) == 1 and scene.act_weight[moment.tick]:
                assert ACTS[scene.act_target[moment.tick]] == wanted[0]
                on_time += 1
    assert on_time > 20


def test_mistakes_in_the_past_are_masked(scenes: list[Scene]) -> None:
    mistakes = 0
    for scene in scenes:
        for now, target, weight in (
            (scene.say_now[:, 0], scene.say_target, scene.say_weight),
            (scene.act_now[:, 0], scene.act_target, scene.act_weight),
        ):
            assert not weight[(now != target) & ~scene.lost].any()
            mistakes += int(((now != target) & ~scene.lost).sum())
    assert mistakes > 5


def test_who_speaks_keeps_above_noise_and_echo(corpus: Corpus, voice_words: dict[str, np.ndarray]) -> None:
    words = 0
    for seed in range(15):
        scene = make_scene(corpus, voice_words, np.random.default_rng(seed), CONFIG, TICKS, flawless=True)
        echo = fftconvolve(scene.voice, scene.world.echo)[: len(scene.voice)]
        for word in scene.world.script.words:
            at = CONFIG.context_samples + round(word.onset_s * RATE_HZ)
            span = slice(at, at + word.sound.end - word.sound.onset)
            spoken = power(scene.room[span] - scene.world.noise[span])
            # Only its own: a reverberant neighbour can add to it.
            assert spoken > 0.8 * ABOVE_NOISE * (power(scene.world.noise[span]) + power(echo[span]))
            words += 1
    assert words > 50


def test_the_microphone_is_the_room_and_the_echo_of_the_voice(scenes: list[Scene]) -> None:
    spoke = 0
    for scene in scenes:
        echo = fftconvolve(scene.voice, scene.world.echo)[: len(scene.voice)]
        assert np.allclose(scene.mic, np.clip(scene.room + echo, -1, 1), atol=1e-5)
        spoken = np.flatnonzero(scene.say_now[:, 0])
        assert len(spoken) or not scene.voice.any()
        if len(spoken) and spoken[0] < TICKS - 1 and not scene.lost.any():
            first_heard = int(np.flatnonzero(scene.voice)[0]) - CONFIG.context_samples
            assert 0.020 * RATE_HZ <= first_heard - CONFIG.tick_samples * (spoken[0] + 1) <= 0.120 * RATE_HZ
            spoke += 1
    assert spoke > 10


def test_what_is_broken_off_stops_sounding(corpus: Corpus, voice_words: dict[str, np.ndarray]) -> None:
    cuts = 0
    for seed in range(20):
        scene = make_scene(corpus, voice_words, np.random.default_rng(seed), CONFIG, TICKS, flawless=True, stage=only("recite"))
        for tick in np.flatnonzero(scene.cut):
            start = CONFIG.context_samples + CONFIG.tick_samples * (tick + 1) + scene.world.playout_offset
            assert not scene.voice[start : start + CONFIG.tick_samples].any()
            cuts += 1
    assert cuts > 2


def test_numbers_of_ticks_only_jump_between_things(scenes: list[Scene]) -> None:
    jumps, window = [], CONFIG.trunk.present_window
    for scene in scenes:
        gaps = np.diff(scene.tick)
        assert (gaps >= 1).all() and (gaps > 1).sum() <= 1
        at, skipped = scene.world.jump
        if skipped:
            assert gaps[at - 1] == skipped + 1 and scene.world.moments[at].talk_s == 0
            jumps.append(skipped)
    assert len(jumps) > 3
    # Whatever is still in memory can have been that long ago, and is not gone at once.
    assert min(jumps) >= 10 and 0.7 * window < max(jumps) <= window - 10


def test_lessons_ask_for_what_was_long_ago(corpus: Corpus) -> None:
    """The mixture hardly ever does: hands are shown all the time."""
    config = dataclasses.replace(CONFIG, trunk=dataclasses.replace(CONFIG.trunk, present_window=320))
    ages: dict[Stage, list[float]] = {mixture: [], lesson: []}
    for stage, found in ages.items():
        for seed in range(40):
            script = Script(corpus, np.random.default_rng(seed), config, ticks=336)
            stage(script)
            for asked_s in (delivery.at_s for delivery in script.deliveries if delivery.tokens == ("last",)):
                shown = [showing.full_s for showing in script.showings if showing.digit is not None and showing.full_s < asked_s]
                found += [asked_s - max(shown)] if shown else []
    assert 45 < max(ages[lesson]) < 64  # s; 320 ticks
    assert sum(age > 30 for age in ages[lesson]) > 5 > sum(age > 30 for age in ages[mixture])


def test_lessons_contradict_what_was_said_of_a_hand(corpus: Corpus) -> None:
    """In the mixture a word soon after a hand has appeared, while it is up, is above all *go*: a timer's."""
    said: dict[Stage, Counter[str]] = {mixture: Counter(), lesson: Counter()}
    for stage, counts in said.items():
        for seed in range(40):
            script = Script(corpus, np.random.default_rng(seed), CONFIG, ticks=336)
            stage(script)
            for showing in script.showings:
                if showing.digit is not None:
                    soon = [word for word in script.words if 0.9 < word.onset_s - showing.full_s < 2.2 and word.onset_s < showing.gone_s]
                    counts.update(word.name for word in soon)
    assert said[mixture]["go"] > 5 * said[mixture]["no"]
    assert 2 * said[lesson]["no"] > said[lesson]["go"]


def test_lessons_have_people_who_talk_to_each_other(corpus: Corpus) -> None:
    """In the mixture somebody who says more than a few words addresses the companion sooner or later."""
    longest: dict[Stage, list[int]] = {mixture: [], lesson: []}
    for stage, found in longest.items():
        for seed in range(80):
            script = Script(corpus, np.random.default_rng(seed), CONFIG, ticks=336)
            stage(script)
            for_it = [word.onset_s for word in script.words if word.command]
            for_it += [showing.full_s for showing in script.showings if showing.digit is not None]
            for_it += [delivery.at_s for delivery in script.deliveries]
            edges = sorted([0.0, *for_it, script.length_s])
            talk = [sum(since_s < word.onset_s < until_s for word in script.words) for since_s, until_s in itertools.pairwise(edges)]
            found.append(max(talk))
    assert sum(words > 20 for words in longest[lesson]) > 5 > sum(words > 20 for words in longest[mixture])


def test_a_replay_with_its_own_choices_is_the_same_scene(scenes: list[Scene]) -> None:
    for scene in scenes[:10]:
        again = replay(scene, CONFIG, scene.say_now[:, 0], scene.act_now[:, 0], np.random.default_rng(0))
        for name in ("say_now", "act_now", "said", "acted", "say_target", "act_target", "frames", "text_in", "cut"):
            assert np.array_equal(getattr(again, name), getattr(scene, name)), name
        assert again.say_weight.sum() >= scene.say_weight.sum()


def test_a_replay_of_silence_is_asked_again_and_has_nothing_in_its_voice(scenes: list[Scene]) -> None:
    nothing = np.zeros(TICKS, int)
    again = [replay(scene, CONFIG, nothing, nothing, np.random.default_rng(0)) for scene in scenes]
    assert not any(scene.voice.any() or scene.said.any() for scene in again)
    assert sum(int((a.say_target > 0).sum()) for a in again) > sum(int((b.say_target > 0).sum()) for b in scenes)


def test_a_chatter_says_every_word_and_breaks_some_off(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    chatters = [chatter(scene, CONFIG, rng) for scene in 4 * scenes]
    said = np.concatenate([scene.say_now[:, 0] for scene in chatters])
    assert set(said) == set(range(len(WORDS)))
    assert 0.1 < (said > 0).mean() < 0.3
    assert any(scene.cut.any() for scene in chatters)
    for scene, other in zip(4 * scenes, chatters, strict=True):
        assert np.array_equal(other.frames, scene.frames) and np.array_equal(other.text_in, scene.text_in)
        assert other.voice.any()


def test_without_flaws_nothing_is_lost_or_mistaken(corpus: Corpus, voice_words: dict[str, np.ndarray]) -> None:
    for seed in range(10):
        scene = make_scene(corpus, voice_words, np.random.default_rng(seed), CONFIG, TICKS, flawless=True, stage=mixture)
        assert not scene.lost.any() and (np.diff(scene.tick) == 1).all()
        assert np.array_equal(scene.say_now[:, 0], scene.say_target) and np.array_equal(scene.act_now[:, 0], scene.act_target)


def test_the_same_hand_opens_and_closes(corpus: Corpus) -> None:
    rng = np.random.default_rng(0)
    open_hand = Thing(corpus, rng, 5, (CONFIG.video.height, CONFIG.video.width))
    closed = Thing(corpus, rng, 0, (CONFIG.video.height, CONFIG.video.width), like=open_hand)
    assert closed.person == open_hand.person


def test_stale_pictures_are_black(scenes: list[Scene]) -> None:
    ages = np.concatenate([scene.frame_age[:, 0] for scene in scenes])
    assert ages.max() > 1.0
    for scene in scenes:
        assert not scene.frames[scene.frame_age[:, 0] > 1.0].any()
        if scene.frames.any():  # not a scene without a camera
            assert scene.frames[scene.frame_age[:, 0] <= 1.0].any(axis=(1, 2, 3, 4)).all()


def test_word_windows_hold_people_and_the_companion_itself(corpus: Corpus, voice_words: dict[str, np.ndarray]) -> None:
    mic, voice, label = word_windows(corpus, voice_words, np.random.default_rng(0), 200, CONFIG)
    assert mic.shape == voice.shape == (200, round(WINDOW_S * RATE_HZ) + CONFIG.context_samples)
    assert label.shape == (200, round(WINDOW_S * 1000 / CONFIG.tick_ms)) and set(np.unique(label)) == set(range(12))
    assert 0.5 < np.mean(label[label > 0] < 11) < 0.7, "commands and other words"
    assert 1.2 < np.mean((label > 0).sum(1)) < 3, "words come soon after each other"
    speaks = voice.any(1)
    assert 0.3 < speaks.mean() < 0.5 and np.abs(voice).max() < 1
    assert (label[speaks] > 0).mean() > 0.1, "people talk while it speaks"


@pytest.mark.parametrize("tick_ms", [100, 400])
def test_word_windows_are_as_long_at_another_tick(corpus: Corpus, voice_words: dict[str, np.ndarray], tick_ms: int) -> None:
    config = dataclasses.replace(CONFIG, tick_ms=tick_ms)
    mic, _, label = word_windows(corpus, voice_words, np.random.default_rng(0), 50, config)
    assert mic.shape[1] - config.context_samples == round(WINDOW_S * RATE_HZ) and label.shape[1] * tick_ms == round(1000 * WINDOW_S)
    assert 1 < np.mean((label > 0).sum(1)) < 3


def test_a_word_window_labels_the_tick_in_which_its_word_is_over(
    corpus: Corpus, voice_words: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Chance, "reverb", 0.0)
    monkeypatch.setattr(Chance, "gated", 1.0)
    monkeypatch.setattr(scenes_module.Chance, "speaking", 0.0)
    windows = word_windows(corpus, voice_words, np.random.default_rng(0), 150, CONFIG)
    seen = 0
    for mic, _, label in zip(*windows, strict=True):
        if (label > 0).sum() != 1 or label.max() > 10:  # the end of a mangled word cannot be measured this simply
            continue
        loud = np.sqrt(np.mean(mic[: len(mic) // 160 * 160].reshape(-1, 160) ** 2, axis=1))
        over_s = (160 * (int(np.flatnonzero(loud > 0.5 * loud.max())[-1]) + 1) - CONFIG.context_samples) / RATE_HZ
        edge_s = (int(np.flatnonzero(label)[0]) + 1) * TICK_S
        assert edge_s - TICK_S - REACTION_S - 0.02 < over_s <= edge_s - REACTION_S + 0.02
        seen += 1
    assert seen > 15


def test_hand_frames(corpus: Corpus) -> None:
    frames, label = hand_frames(corpus, np.random.default_rng(0), 100, CONFIG)
    assert frames.shape == (100, 2, 120, 160, 3) and frames.dtype == np.uint8
    assert set(label) == set(range(11)) and 0.15 < np.mean(label == 0) < 0.35


def test_word_span_finds_the_word() -> None:
    onset, end = word_span(tone("up", 500.0).samples)
    assert abs(onset - 4000) <= 320 and abs(end - 12000) <= 320


def test_drawn_hands_differ_by_digit_and_repeat_by_seed() -> None:
    hands = [draw_hand(digit, np.random.default_rng(7)) for digit in range(10)]
    assert all(hand.shape == (100, 100, 3) and hand.dtype == np.uint8 for hand in hands)
    for digit, hand in enumerate(hands):
        assert np.array_equal(hand, draw_hand(digit, np.random.default_rng(7)))
        for other in hands[:digit]:
            assert np.mean(np.abs(hand.astype(int) - other) > 30) > 0.004  # a little finger is 0.8 % of the picture
    assert draw_hand(3, np.random.default_rng(0), size=64).shape == (64, 64, 3)
    with pytest.raises(ValueError, match="0 to 9"):
        draw_hand(10, np.random.default_rng(0))


def test_missing_recordings_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusMissing, match=str(tmp_path)):
        load_corpus(tmp_path, "dev")


def test_split_is_about_70_10_20() -> None:
    sides = [split_of(f"person {i}") for i in range(2000)]
    assert [round(sides.count(side) / 2000, 1) for side in ("train", "dev", "test")] == [0.7, 0.1, 0.2]


def test_a_share_of_the_people_is_part_of_every_larger_one() -> None:
    people = [f"person {i}" for i in range(2000)]
    for side in ("train", "dev", "test"):
        everybody, half, quarter = ([who for who in people if belongs(who, side, share)] for share in (1.0, 0.5, 0.25))
        assert everybody == [who for who in people if split_of(who) == side]
        assert set(quarter) < set(half) < set(everybody)
        assert abs(len(half) / len(everybody) - 0.5) < 0.1 and abs(len(quarter) / len(everybody) - 0.25) < 0.1


def test_recordings_of_fewer_people(data_root: Path) -> None:
    def people(corpus: Corpus) -> tuple[set[str], set[str]]:
        clips = [clip for voices in (*corpus.real.words.values(), corpus.real.others) for clip in voices]
        return {clip.speaker for clip in clips}, {person for hands in corpus.hands.values() for _, person in hands}

    everybody, half = people(load_corpus(data_root, "train")), people(load_corpus(data_root, "train", people=0.5))
    assert all(few < many for few, many in zip(half, everybody, strict=True))
    with pytest.raises(CorpusMissing, match=r"nobody in 0.001 of its people has yes, .*another word.*the sign 9; ask for a larger share"):
        load_corpus(data_root, "train", people=0.001)


def test_nobody_is_on_two_sides_of_the_split(data_root: Path) -> None:
    seen: dict[str, str] = {}
    for side in ("dev", "test", "train"):
        corpus = load_corpus(data_root, side)
        clips = [clip for word in COMMANDS for clip in corpus.real.words[word]] + corpus.real.others
        people = {clip.speaker for clip in clips} | {person for digit in corpus.hands for _, person in corpus.hands[digit]}
        assert all(seen.setdefault(person, side) == side for person in people)
        assert all(0 <= clip.onset < clip.end <= len(clip.samples) for clip in clips)
        assert (
            min(len(corpus.real.words[word]) for word in ACT_OF_WORD) > 15
            and min(len(corpus.hands[digit]) for digit in range(len(DIGITS))) > 15
        )
