"""The script of a scene: which words are spoken when, which hands are held up, which text arrives, and what of it a tick can know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from device.config import ModelConfig
from export.distill.clips import COMMANDS, RATE_HZ, Clip
from export.distill.corpus import Corpus
from export.distill.pictures import Showing, Thing
from export.distill.sounds import Sound, augment_word, mangled_clip, other_clip, random_room, word_clip

REACTION_S = 0.10  # a reaction belongs to the first tick whose edge is this long after the word's end
TALK_PAUSE_S = 0.7  # a longer pause ends a talk


class Chance:
    """The probabilities of a scene's people and devices; `sounds` and `pictures` have tables of their own."""

    mangled, same_talker, overdriven = 0.08, 0.5, 0.04
    no_camera, frozen_camera = 0.05, 0.05


@dataclass(frozen=True)
class Spoken:
    """A word in the room; the times are the word's own, in s from captured sample 0."""

    name: str  # the clip's word, "" for a mangled one
    label: int  # 1..10 COMMANDS, 11 another word
    speaker: str
    onset_s: float
    end_s: float
    sound: Sound = field(repr=False)

    @property
    def command(self) -> str:
        """The word, if it is one of COMMANDS."""
        return self.name if self.name in COMMANDS else ""


class Delivery(NamedTuple):
    """Text tokens that arrive in one tick."""

    at_s: float
    tokens: tuple[str, ...]


class Sign(NamedTuple):
    """A hand sign that was held up and could be seen whole from full_s on."""

    digit: int
    person: str
    full_s: float


class Moment(NamedTuple):
    """What the world brings to one tick, as far as a perfect observer could know it at the tick's edge."""

    tick: int
    edge_s: float
    heard: tuple[Spoken, ...]  # words that ended at least REACTION_S before this edge, and not before the last one
    hand: Sign | None  # the sign in view, when both frames show it whole
    appeared: bool  # this is the first tick that sees it
    text: tuple[str, ...]
    talk_s: float  # how long somebody nearby has been talking on, short pauses included; 0 when nobody is
    pause_s: float  # since the last word nearby was over; 0 while one sounds


class Script:
    """Staged by the behaviours one after the other; `length_s` seconds long. The same for the same state of `rng`."""

    def __init__(self, corpus: Corpus, rng: np.random.Generator, c: ModelConfig, ticks: int) -> None:
        self.corpus, self.rng, self.config, self.ticks = corpus, rng, c, ticks
        self.tick_s = c.tick_ms / 1000
        self.length_s = ticks * self.tick_s
        self.words: list[Spoken] = []
        self.showings: list[Showing] = []
        self.deliveries: list[Delivery] = []
        self.breaks: list[float] = []  # times between two things, in s, at which much more time could pass
        self._room, self._level_db = random_room(rng), rng.uniform(-37, -17)
        self._overdriven = rng.random() < Chance.overdriven
        kind = rng.random()
        self.has_camera = kind >= Chance.no_camera
        self.freeze = (np.inf, np.inf)
        if self.has_camera and kind < Chance.no_camera + Chance.frozen_camera:
            start_s = rng.uniform(2, self.length_s)
            self.freeze = (start_s, start_s + rng.uniform(0.4, 6))

    # ---- what people do; each returns when it is over, in s, or `at_s` where it could not be -----------------------------------

    def say(self, word: str, at_s: float) -> float:
        """One of COMMANDS, begun at `at_s`."""
        return self._speak(word_clip(self.corpus, self.rng, word), at_s)

    def say_other(self, at_s: float) -> float:
        """Another word, or nothing anybody meant."""
        mangled = self.rng.random() < Chance.mangled
        return self._speak(mangled_clip(self.corpus, self.rng) if mangled else other_clip(self.corpus, self.rng), at_s)

    def talk(self, at_s: float, seconds: float, pauses_s: tuple[float, float] = (0.03, 0.5)) -> float:
        """Somebody nearby talks on: other words with short pauses."""
        next_clip = self._talker()
        end_s = at_s
        while end_s < at_s + seconds:
            over_s = self._speak(next_clip(), end_s if end_s == at_s else end_s + self.rng.uniform(*pauses_s))
            if over_s <= end_s:
                break
            end_s = over_s
        return end_s

    def show(self, digit: int | None, at_s: float, seconds: float, slides: bool = True, like: Thing | None = None) -> float:
        """A hand sign, or with None something that is none; `like` is another sign of the same hand."""
        end_s = at_s + seconds
        frozen = at_s - 1.0 < self.freeze[1] and end_s + 0.3 > self.freeze[0]
        if not self.has_camera or frozen or at_s >= self.length_s:
            return at_s
        size = (self.config.video.height, self.config.video.width)
        thing = Thing(self.corpus, self.rng, digit, size, like)
        full_s = at_s + (self.rng.uniform(0.1, 0.2) if slides and self.rng.random() < 0.4 else 0.0)
        self.showings.append(Showing(digit, thing, at_s, full_s, end_s))
        return end_s

    def deliver(self, at_s: float, *tokens: str) -> float:
        """Text arrives."""
        if at_s < self.length_s:
            self.deliveries.append(Delivery(at_s, tokens))
        return at_s + self.tick_s

    def _speak(self, clip: Clip, at_s: float) -> float:
        level_db = float(np.clip(self._level_db + self.rng.normal(0, 2.5), -40, -14))
        sound = augment_word(clip, self.rng, self._room, level_db)
        if self._overdriven:
            sound = sound._replace(samples=np.clip(sound.samples * 3, -0.5, 0.5))
        end_s = at_s + (sound.end - sound.onset) / RATE_HZ
        overlaps = any(at_s < word.end_s + 0.03 and word.onset_s - 0.1 < end_s for word in self.words)
        if overlaps or end_s > self.length_s - 0.05:
            return at_s
        self.words.append(Spoken(clip.word, sound.label, clip.speaker, at_s, end_s, sound))
        return end_s

    def _talker(self) -> Callable[[], Clip]:
        """Where a talk takes its words from: one person where there is one with enough of them, else anybody."""
        first = other_clip(self.corpus, self.rng)
        if self.rng.random() < Chance.same_talker:
            group = next(voices for voices in self.corpus.voices if any(clip is first for clip in voices.others))
            mine = [clip for clip in group.others if clip.speaker == first.speaker]
            if len(mine) >= 3:
                return lambda: mine[self.rng.integers(len(mine))]
        return lambda: other_clip(self.corpus, self.rng)

    # ---- what a tick can know of it ----------------------------------------------------------------------------------------------

    def tick_at(self, time_s: float) -> int:
        """The first tick whose edge is at or after `time_s` (edges of tick k: (k + 1) * tick_s)."""
        return int(np.ceil(round(time_s / self.tick_s, 6))) - 1

    def text_in(self) -> np.ndarray:
        """i32[T, text_in], the ids of the text that arrives; text that finds no room is not delivered."""
        c = self.config.text
        text = np.zeros((self.ticks, c.text_in), np.int32)
        for at_s, tokens in self.deliveries:
            tick = self.tick_at(at_s)
            if tick < self.ticks and not text[tick].any():
                text[tick, : len(tokens)] = [c.words.index(token) for token in tokens]
        return text

    def moments(self, whole: list[Showing | None]) -> list[Moment]:
        """One per tick; `whole` is the sign that each tick sees whole, as the camera gave it."""
        words = sorted(self.words, key=lambda word: word.onset_s)
        heard: list[list[Spoken]] = [[] for _ in range(self.ticks)]
        for word in words:
            tick = self.tick_at(word.end_s + REACTION_S)
            if tick < self.ticks:
                heard[tick].append(word)
        text = self.text_in()
        known, moments, seen = self.config.text.words, [], set()
        for tick, showing in enumerate(whole):
            edge_s = (tick + 1) * self.tick_s
            hand = None
            if showing is not None and showing.digit is not None:
                hand = Sign(showing.digit, showing.thing.person, max(showing.full_s, 0.0))
            talk_s, pause_s = _talk(words, edge_s)
            tokens = tuple(known[token] for token in text[tick] if token)
            moments.append(
                Moment(tick, edge_s, tuple(heard[tick]), hand, hand is not None and id(showing) not in seen, tokens, talk_s, pause_s)
            )
            seen.add(id(showing))
        return moments


def _talk(words: list[Spoken], now_s: float) -> tuple[float, float]:
    """(how long somebody has been talking on at `now_s`, how long the last word has been over); a command is no talk."""
    past = [word for word in words if word.onset_s < now_s]
    if not past:
        return 0.0, np.inf
    over_s = max(word.end_s for word in past)
    pause_s = max(now_s - over_s, 0.0)
    since_s, until_s = None, now_s
    for word in reversed(past):
        if word.command or until_s - word.end_s > TALK_PAUSE_S:
            break
        since_s, until_s = word.onset_s, word.onset_s
    return (0.0 if since_s is None else now_s - since_s), pause_s
