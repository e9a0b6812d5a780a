"""Makes training scenes: some seconds of a room in which people say words and hold up hand signs, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from scipy.signal import fftconvolve

from device.config import ModelConfig
from export.distill.corpus import RATE_HZ, Corpus
from export.distill.pictures import IGNORE, Camera, Thing, camera_pictures
from export.distill.sounds import (
    ACT_OF_WORD,
    augment_word,
    background_noise,
    echo_response,
    mix,
    pick_word,
    power,
    random_room,
    room_sound,
)

# What other modules take from here, wherever it is defined.
__all__ = [
    "ACTS",
    "ACT_OF_WORD",
    "DIGITS",
    "IGNORE",
    "REACTION_S",
    "WORDS",
    "Chance",
    "Event",
    "Scene",
    "hand_frames",
    "make_scene",
    "word_windows",
]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("", *DIGITS, "ok", "now", "count", "show", "quiet", "talk", "tell", "last", "ask", "sorry")
ACTS = ("none", "look_up", "look_down", "look_left", "look_right", "light_on", "light_off", "nod", "shake", "yield", "ask")

REACTION_S = 0.10  # an act belongs to the first tick whose edge is this long after the word's end


class Chance:
    """The probabilities that shape what happens; `sounds` and `pictures` have tables of their own."""

    lost_ticks, text, session_start = 0.03, 0.10, 0.3
    # the companion's own mistakes in the scene's past
    late, wrong_digit, spurious = 0.12, 0.06, 0.10


Choice = Literal["say", "act"]


class Event(NamedTuple):
    """What should happen: an act after a word, or a word said ("show") while a hand is up. `clear` is False where nobody could tell."""

    kind: Literal["act", "show"]
    onset_s: float
    end_s: float
    expected: str
    clear: bool = True


@dataclass
class Scene:
    """T ticks; S samples a tick, C samples of context before the first: audio[C + i] is captured sample i."""

    mic: np.ndarray  # f32[C + T*S], with the echo of `voice`
    voice: np.ndarray  # f32[C + T*S], what the speaker played
    frames: np.ndarray  # u8[T, 2, H, W, 3], newest last
    frame_age: np.ndarray  # f32[T, 1], s
    lost: np.ndarray  # bool[T]
    text_in: np.ndarray  # i32[T, text_in]
    say_now: np.ndarray  # i32[T, say], what was chosen in the scene's past, mistakes included
    said: np.ndarray  # i32[T, say], say_now of the tick before
    acted: np.ndarray  # i32[T, 1]
    say_target: np.ndarray  # i32[T]
    act_target: np.ndarray  # i32[T]
    say_weight: np.ndarray  # f32[T], 0 where the loss is masked
    act_weight: np.ndarray  # f32[T]
    word_label: np.ndarray  # i32[T], 0 none, 1..10 COMMANDS, 11 another word, -1 ignore; on the tick whose edge the act would belong to
    hand_label: np.ndarray  # i32[T], 0 none, digit + 1, -1 ignore
    start_tick: int  # session tick of the scene's first
    echo: np.ndarray  # f32[n], impulse response from speaker to microphone
    events: list[Event] = field(default_factory=list)


def make_scene(
    corpus: Corpus, voice_words: dict[str, np.ndarray], rng: np.random.Generator, c: ModelConfig, ticks: int = 80, closed_loop: bool = False
) -> Scene:
    """One scene, the same for the same state of `rng`.

    `voice_words`: the companion's own recordings, f32[n] at 16 kHz from sample 0; every digit must be among them.
    `closed_loop`: leave the companion's part (voice, echo, history) empty, for an evaluation that plays it itself and adds `echo`.
    """
    tick_s = c.tick_ms / 1000
    start_tick = 0 if rng.random() < Chance.session_start else int(10 ** rng.uniform(0, 7))
    text_in = _instructions(rng, ticks, c)
    lost = _lost_ticks(rng, ticks)
    mic, spoken = room_sound(corpus, rng, ticks, c)
    frames, age, hand_label, shown = camera_pictures(corpus, rng, ticks, c)
    echo = echo_response(rng)
    hand_label[lost] = IGNORE

    # What it said first, because its echo can hide a word.
    past = _Past(rng, voice_words, lost, c)
    if not closed_loop:
        for show in shown:
            if show.first_tick is not None:
                past.respond("say", show.first_tick, _tick_at(show.gone_s, tick_s), 1 + show.digit)
        past.blunder()
    voice = past.speech()
    echoed = fftconvolve(voice, echo)[: len(voice)].astype(np.float32) if voice.any() else np.zeros_like(voice)

    word_label = np.where(lost, np.int32(IGNORE), np.int32(0))
    events = [Event("show", max(show.full_s, 0.0), show.gone_s, DIGITS[show.digit], show.first_tick is not None) for show in shown]
    for word in spoken:
        tick = _tick_at(word.end_s + REACTION_S, tick_s)
        first, last = int(word.onset_s / tick_s), _tick_at(word.end_s, tick_s)
        span = slice(c.context_samples + round(word.onset_s * RATE_HZ), c.context_samples + round(word.end_s * RATE_HZ))
        clear = word.power > word.noise_power + power(echoed[span]) and not lost[first : last + 1].any()
        if tick < ticks and not lost[tick]:
            word_label[tick] = word.label if clear else IGNORE
        act = ACT_OF_WORD.get(word.name)
        if act is not None:
            events.append(Event("act", word.onset_s, word.end_s, act, clear))
            if not clear:
                past.mask("act", tick)
            elif not closed_loop:
                past.respond("act", tick, ticks, ACTS.index(act))
    return Scene(
        mic=np.clip(mic + echoed, -1, 1),
        voice=voice,
        frames=frames,
        frame_age=age,
        lost=lost,
        text_in=text_in,
        say_now=past.say_now,
        said=_delayed(past.say_now),
        acted=_delayed(past.act_now[:, None]),
        say_target=past.target["say"],
        act_target=past.target["act"],
        say_weight=past.weight["say"],
        act_weight=past.weight["act"],
        word_label=word_label,
        hand_label=hand_label,
        start_tick=start_tick,
        echo=echo,
        events=sorted(events, key=lambda event: event.end_s),
    )


def word_windows(corpus: Corpus, rng: np.random.Generator, n: int, c: ModelConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`n` short pieces of sound for learning words alone: mic f32[n, C + 7*S], label i32[n] as in `Scene.word_label`, end_tick i32[n].

    A labelled word ends within the last tick's span, REACTION_S earlier; the others are noise, or words cut off or over long before.
    """
    tick_s, ticks = c.tick_ms / 1000, 7
    length_s = ticks * tick_s + c.context_samples / RATE_HZ
    mic = np.zeros((n, ticks * c.tick_samples + c.context_samples), np.float32)
    label = np.zeros(n, np.int32)
    for i in range(n):
        mic[i] = background_noise(corpus, rng, mic.shape[1])
        kind = rng.random()
        if kind < 0.08:
            continue
        word = pick_word(corpus, rng, only_negatives=rng.random() < 0.2)
        spoken = augment_word(word, rng, random_room(rng), rng.uniform(-36, -16))
        end_s = length_s - REACTION_S - rng.uniform(0, tick_s)
        if kind < 0.22:  # not over yet, or over a while ago
            end_s += rng.uniform(tick_s, 0.5) if rng.random() < 0.5 else -rng.uniform(tick_s, 0.7)
        else:
            label[i] = IGNORE
        start = round(end_s * RATE_HZ) - spoken.end
        noise_power = mix(mic[i], spoken, start)
        if label[i] == IGNORE and power(spoken.samples[spoken.onset : spoken.end]) > noise_power:
            label[i] = spoken.label
    return np.clip(mic, -1, 1), label, np.full(n, ticks - 1, np.int32)


def hand_frames(corpus: Corpus, rng: np.random.Generator, n: int, c: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """`n` pairs of frames for learning hands alone: u8[n, 2, H, W, 3] and label i32[n] (0 none in a quarter of them, digit + 1)."""
    size = (c.video.height, c.video.width)
    frames = np.empty((n, 2, *size, 3), np.uint8)
    label = np.zeros(n, np.int32)
    for i in range(n):
        camera = Camera(corpus, rng, size)
        digit = None if rng.random() < 0.25 else int(rng.integers(10))
        thing = None
        if digit is not None or rng.random() < 0.6:
            thing = Thing(corpus, rng, digit, size)
        label[i] = 0 if digit is None else 1 + digit
        at_s = rng.uniform(0, 4)
        for f in range(2):
            camera.take(frames[i, f], at_s + 0.1 * f, [(thing, 0.0)] if thing else [])
    return frames, label


# ---- time -----------------------------------------------------------------------------------------------------------------------


def _tick_at(time_s: float, tick_s: float) -> int:
    """The first tick whose edge is at or after `time_s` (edges of tick k: (k + 1) * tick_s)."""
    return int(np.ceil(round(time_s / tick_s, 6))) - 1


def _delayed(choice: np.ndarray) -> np.ndarray:
    return np.concatenate((np.zeros_like(choice[:1]), choice[:-1]))


def _lost_ticks(rng: np.random.Generator, ticks: int) -> np.ndarray:
    lost = np.zeros(ticks, bool)
    if rng.random() < Chance.lost_ticks:
        for _ in range(rng.integers(1, 4)):
            at = rng.integers(1, ticks)
            lost[at : at + rng.integers(1, 4)] = True
    return lost


def _instructions(rng: np.random.Generator, ticks: int, c: ModelConfig) -> np.ndarray:
    text = np.zeros((ticks, c.text.text_in), np.int32)
    if rng.random() < Chance.text:
        for at in rng.integers(0, ticks, rng.integers(1, 5)):
            count = rng.integers(1, c.text.text_in + 1)
            text[at, :count] = rng.integers(1, len(WORDS), count)
    return text


# ---- the companion's past -------------------------------------------------------------------------------------------------------


class _Past:
    """What the companion chose in the scene, right or wrong, and what it should choose: `target` and `weight` for "say" and "act"."""

    def __init__(self, rng: np.random.Generator, voice_words: dict[str, np.ndarray], lost: np.ndarray, c: ModelConfig) -> None:
        ticks = len(lost)
        self._rng, self._voice_words, self._lost, self._c = rng, voice_words, lost, c
        self.say_now = np.zeros((ticks, c.text.say), np.int32)
        self.act_now = np.zeros(ticks, np.int32)
        self.target = {"say": np.zeros(ticks, np.int32), "act": np.zeros(ticks, np.int32)}
        self.weight = {"say": (~lost).astype(np.float32), "act": (~lost).astype(np.float32)}
        self._now = {"say": self.say_now[:, 0], "act": self.act_now}

    def respond(self, what: Choice, tick: int, before: int, choice: int) -> None:
        """Answer at `tick`, or at the next one that is free and not lost, but before `before`; sometimes late, sometimes wrong.

        Until a late answer the loss is masked: neither waiting nor answering is wrong then.
        """
        now, target, weight = self._now[what], self.target[what], self.weight[what]
        late = int(self._rng.integers(1, 4)) if self._rng.random() < Chance.late else 0
        wrong = what == "say" and self._rng.random() < Chance.wrong_digit
        at = tick
        while at < len(now) and (at < tick + late or self._lost[at] or now[at]):
            weight[at] *= now[at] > 0
            at += 1
        if at >= min(len(now), max(before, tick + 1)):
            return
        now[at] = target[at] = choice
        if wrong:
            now[at] = 1 + (choice - 1 + self._rng.integers(1, len(DIGITS))) % len(DIGITS)
            weight[at] = 0

    def mask(self, what: Choice, tick: int) -> None:
        """Nobody could tell whether an answer is due from `tick` on: no loss for as long as one might come."""
        self.weight[what][tick : tick + 3] = 0

    def blunder(self) -> None:
        """Sometimes one word or act too many."""
        if self._rng.random() >= Chance.spurious:
            return
        what: Choice = "say" if self._rng.random() < 0.5 else "act"
        tick = int(self._rng.integers(len(self._lost)))
        if self._lost[tick] or self._now[what][max(tick - 1, 0) : tick + 2].any() or self.target[what][max(tick - 1, 0) : tick + 2].any():
            return
        known = [i for i, word in enumerate(WORDS) if word in self._voice_words]
        self._now[what][tick] = self._rng.choice(known) if what == "say" else self._rng.integers(1, len(ACTS))
        self.weight[what][tick] = 0

    def speech(self) -> np.ndarray:
        """The words as the speaker played them, f32[C + T*S]; a new word cuts the one before, a lost tick leaves a gap."""
        c, ticks = self._c, len(self._lost)
        offset = round(RATE_HZ * self._rng.triangular(0.020, 0.060, 0.120))  # playout offset of the session
        played = np.zeros(ticks * c.tick_samples, np.float32)
        loudness = 10 ** (self._rng.uniform(-2, 2) / 20)
        for tick in np.flatnonzero(self.say_now[:, 0]):
            word = self._voice_words[WORDS[self.say_now[tick, 0]]]
            start = c.tick_samples * (tick + 1) + offset
            played[start:] = 0
            room = played[start : start + len(word)]
            room += word[: len(room)] * loudness * 10 ** (self._rng.normal(0, 0.5) / 20)
        for tick in np.flatnonzero(self._lost):
            start = c.tick_samples * (tick + 1) + offset
            played[start : start + c.tick_samples] = 0
        return np.concatenate((np.zeros(c.context_samples, np.float32), played))
