"""The training scenes: people stay on their side of the split, targets come when they are due, and drawn hands differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import tone

from device.config import ModelConfig, TextConfig
from export.distill.corpus import COMMANDS, RATE_HZ, Corpus, CorpusMissing, load_corpus, split_of, word_span
from export.distill.scenes import (
    ACT_OF_WORD,
    ACTS,
    DIGITS,
    IGNORE,
    REACTION_S,
    WORDS,
    Scene,
    hand_frames,
    make_scene,
    word_windows,
)
from export.distill.sounds import Chance
from export.hands import draw_hand

CONFIG = ModelConfig(text=TextConfig(WORDS, ACTS))
TICK_S = CONFIG.tick_ms / 1000


@pytest.fixture(scope="module")
def voice_words() -> dict[str, np.ndarray]:
    return {word: np.full(6000, 0.1, np.float32) for word in WORDS[1:]}


@pytest.fixture(scope="module")
def scenes(corpus: Corpus, voice_words: dict[str, np.ndarray]) -> list[Scene]:
    return [make_scene(corpus, voice_words, np.random.default_rng(seed), CONFIG) for seed in range(30)]


def test_shapes(scenes: list[Scene]) -> None:
    c, ticks = CONFIG, 80
    for scene in scenes[:5]:
        assert scene.mic.shape == scene.voice.shape == (c.context_samples + ticks * c.tick_samples,)
        assert scene.mic.dtype == scene.voice.dtype == scene.frame_age.dtype == scene.say_weight.dtype == np.float32
        assert scene.frames.shape == (ticks, 2, c.video.height, c.video.width, 3) and scene.frames.dtype == np.uint8
        assert scene.frame_age.shape == (ticks, 1) and scene.said.shape == (ticks, c.text.say) and scene.acted.shape == (ticks, 1)
        assert scene.text_in.shape == (ticks, c.text.text_in)
        assert np.abs(scene.mic).max() <= 1


def test_same_seed_same_scene(corpus: Corpus, voice_words: dict[str, np.ndarray], scenes: list[Scene]) -> None:
    again = make_scene(corpus, voice_words, np.random.default_rng(3), CONFIG)
    for name, value in vars(scenes[3]).items():
        assert np.array_equal(value, getattr(again, name)) if isinstance(value, np.ndarray) else value == getattr(again, name), name
    assert not np.array_equal(scenes[3].mic, scenes[4].mic)


def test_history_is_what_was_chosen_a_tick_earlier(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert np.array_equal(scene.said[1:], scene.say_now[:-1]) and not scene.said[0].any() and not scene.acted[0].any()
        assert not scene.say_now[scene.lost].any() and not scene.say_weight[scene.lost].any() and not scene.act_weight[scene.lost].any()


def test_targets_come_at_the_first_edge_after_the_event(scenes: list[Scene]) -> None:
    on_time = {"act": 0, "show": 0}
    for scene in scenes:
        for event in scene.events:
            if not event.clear or scene.lost.any():
                continue
            target, choice = (scene.act_target, ACTS.index(event.expected)) if event.kind == "act" else (scene.say_target, -1)
            if event.kind == "act":
                tick = next(k for k in range(81) if (k + 1) * TICK_S >= event.end_s + REACTION_S - 1e-9)
            else:
                choice = WORDS.index(event.expected)
                oldest_s = TICK_S * np.arange(1, 81) - scene.frame_age[:, 0] - TICK_S / 2
                tick = int(np.argmax(oldest_s >= event.onset_s)) if event.onset_s > 0 else int(np.argmax(scene.hand_label > 0))
            if tick >= 80:
                continue
            weight = scene.act_weight if event.kind == "act" else scene.say_weight
            if weight[tick]:
                assert target[tick] == choice, event
                on_time[event.kind] += 1
            else:  # late by up to three ticks, wrong, or never before the hand went
                assert target[tick : tick + 5].max() in (0, choice)
    assert min(on_time.values()) > 40


def test_every_answer_has_a_cause(scenes: list[Scene]) -> None:
    for scene in scenes:
        expected = [event.expected for event in scene.events]
        for tick in np.flatnonzero(scene.act_target):
            assert ACTS[scene.act_target[tick]] in expected
        for tick in np.flatnonzero(scene.say_target):
            assert scene.hand_label[tick] == scene.say_target[tick] - WORDS.index("zero") + 1
        assert np.count_nonzero(scene.say_target) <= sum(event.kind == "show" for event in scene.events)


def test_speech_is_in_the_voice_and_its_echo_in_the_microphone(
    corpus: Corpus, voice_words: dict[str, np.ndarray], scenes: list[Scene]
) -> None:
    c = CONFIG
    checked = 0
    for seed, scene in enumerate(scenes):
        spoken = np.flatnonzero(scene.say_now[:, 0])
        if not len(spoken):
            assert not scene.voice.any()
            continue
        first_heard = int(np.flatnonzero(scene.voice)[0]) - c.context_samples
        edge = c.tick_samples * (spoken[0] + 1)
        if not scene.lost.any():
            assert 0.020 * RATE_HZ <= first_heard - edge <= 0.120 * RATE_HZ
        alone = make_scene(corpus, voice_words, np.random.default_rng(seed), c, closed_loop=True)
        assert not alone.voice.any() and not alone.say_now.any() and np.array_equal(alone.frames, scene.frames)
        if np.abs(alone.mic).max() < 0.9 and np.abs(scene.mic).max() < 0.9:
            echo = np.convolve(scene.voice, alone.echo)[: len(scene.mic)]
            assert np.allclose(scene.mic - alone.mic, echo, atol=1e-5)
            checked += 1
    assert checked > 10


def test_mistakes_in_the_past_are_masked(scenes: list[Scene]) -> None:
    for scene in scenes:
        wrong = scene.say_now[:, 0] != scene.say_target
        assert not scene.say_weight[wrong].any()


def test_stale_pictures_are_black(scenes: list[Scene]) -> None:
    ages = np.concatenate([scene.frame_age[:, 0] for scene in scenes])
    assert ages.max() > 1.0
    for scene in scenes:
        assert not scene.frames[scene.frame_age[:, 0] > 1.0].any()
        if scene.frames.any():  # not a scene without a camera
            assert scene.frames[scene.frame_age[:, 0] <= 1.0].any(axis=(1, 2, 3, 4)).all()


def test_word_windows_end_with_the_word(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    mic, label, end_tick = word_windows(corpus, np.random.default_rng(0), 200, CONFIG)
    assert mic.shape == (200, 7 * CONFIG.tick_samples + CONFIG.context_samples) and (end_tick == 6).all()
    assert set(np.unique(label)) <= set(range(IGNORE, 12)) and 0.1 < np.mean(label == 0) < 0.35
    monkeypatch.setattr(Chance, "reverb", 0.0)
    mic, label, _ = word_windows(corpus, np.random.default_rng(0), 60, CONFIG)
    tick = CONFIG.tick_samples
    for window in mic[(label > 0) & (label < 11)]:
        loud = np.sqrt(np.mean(window.reshape(-1, 160) ** 2, axis=1))
        if loud.max() < 5 * np.median(loud):  # a word in loud noise: its end cannot be measured this simply
            continue
        end = 160 * (int(np.flatnonzero(loud > 0.5 * loud.max())[-1]) + 1)
        assert len(window) - tick - 0.12 * RATE_HZ <= end <= len(window) - 0.08 * RATE_HZ


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


def test_nobody_is_on_two_sides_of_the_split(data_root: Path) -> None:
    seen: dict[str, str] = {}
    for side in ("dev", "test", "train"):
        corpus = load_corpus(data_root, side)
        clips = [clip for word in COMMANDS for clip in corpus.words[word]] + corpus.others
        people = {clip.speaker for clip in clips} | {person for digit in corpus.hands for _, person in corpus.hands[digit]}
        assert all(seen.setdefault(person, side) == side for person in people)
        assert all(0 <= clip.onset < clip.end <= len(clip.samples) for clip in clips)
        assert (
            min(len(corpus.words[word]) for word in ACT_OF_WORD) > 15 and min(len(corpus.hands[digit]) for digit in range(len(DIGITS))) > 15
        )
