"""Makes scenes: some seconds of a room in which people talk, hold up hand signs and send text, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.signal import fftconvolve

from device.config import ModelConfig
from export.distill.behaviours import ACTS, BEHAVIOURS, DIGITS, WORDS, Answer, Behaviour, Conduct, Excuse, Free, Recall, Trial
from export.distill.clips import COMMANDS, RATE_HZ
from export.distill.corpus import Corpus
from export.distill.pictures import IGNORE, Camera, Thing, camera_pictures, no_pictures
from export.distill.script import Moment, Script
from export.distill.sounds import Placed, echo_response, room_noise, room_sound


class Chance:
    """The probabilities that shape what happens to the companion; `script`, `sounds` and `pictures` have tables of their own."""

    lost_ticks, stray_text, told, session_start, jump = 0.04, 0.10, 0.7, 0.3, 0.5
    remembering, contradicted, overheard = 0.25, 0.25, 0.3  # a share of all scenes, a share of the rest, a share of what is left then
    # the companion's own mistakes in the scene's past
    late, wrong_digit, spurious = 0.12, 0.06, 0.3
    # words alone: a word is a command, a window one in which the companion speaks
    command, speaking = 0.6, 0.4
    # any words: a tick breaks one off
    broken_off = 0.015


SHORTEST_GAP = 10  # ticks left out of a scene in which time passes; behind the longest gap as many of the memory are left

WINDOW_S = 2.4  # of sound for learning words alone, in whole ticks

Stage = Callable[[Script], object]  # fills a script; what it returns is not looked at


class World(NamedTuple):
    """What a scene is made of before the companion does anything."""

    script: Script
    moments: list[Moment]
    noise: np.ndarray  # f32[C + T*S]
    echo: np.ndarray  # f32[n], impulse response from speaker to microphone
    lost: np.ndarray  # bool[T]
    jump: tuple[int, int]  # (tick, how many tick numbers are left out before it)
    playout_offset: int  # samples from an edge to the speech of its tick
    word_ticks: Mapping[str, int]
    voice_words: Mapping[str, np.ndarray]


@dataclass
class Scene:
    """T ticks; S samples a tick, C samples of context before the first: audio[C + i] is captured sample i."""

    room: np.ndarray  # f32[C + T*S], all that sounds but the companion
    mic: np.ndarray  # f32[C + T*S], `room` with the echo of `voice`
    voice: np.ndarray  # f32[C + T*S], what the speaker played
    frames: np.ndarray  # u8[T, 2, H, W, 3], newest last
    frame_age: np.ndarray  # f32[T, 1], s
    lost: np.ndarray  # bool[T]
    text_in: np.ndarray  # i32[T, text_in]
    say_now: np.ndarray  # i32[T, say], what was chosen in the scene's past, mistakes included
    act_now: np.ndarray  # i32[T, 1]
    said: np.ndarray  # i32[T, say], say_now of the last tick before that was not lost
    acted: np.ndarray  # i32[T, 1]
    say_target: np.ndarray  # i32[T]
    act_target: np.ndarray  # i32[T]
    say_weight: np.ndarray  # f32[T], 0 where the loss is masked
    act_weight: np.ndarray  # f32[T]
    cut: np.ndarray  # bool[T], speech that sounds is broken off with this tick
    word_label: np.ndarray  # i32[T], 0 none, 1..10 COMMANDS, 11 another word, -1 ignore; on the tick whose edge the act would belong to
    hand_label: np.ndarray  # i32[T], 0 none, digit + 1, -1 ignore
    tick: np.ndarray  # i64[T], session ticks
    world: World
    trials: list[Trial]  # what a perfect companion was asked for, in order
    excuses: list[Excuse]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All of it that a model is trained on."""
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray) and name != "room"}


def mixture(script: Script, since_s: float = 0.0) -> None:
    """Fill the script with behaviours one after the other, by their shares, from `since_s` on."""
    _one_after_the_other(script, BEHAVIOURS, [behaviour.share for behaviour in BEHAVIOURS], since_s)


def lesson(script: Script) -> None:
    """The mixture; sometimes a good part of the scene, or of what the memory holds, lies between a hand and `last`.

    Sometimes it begins with people who contradict what is said of their hands, or with people who talk to each other.
    """
    since_s = 0.0
    if script.rng.random() < Chance.remembering:
        memory_s = script.config.trunk.present_window * script.tick_s
        since_s = Recall.remember(script, min(script.length_s, memory_s) * script.rng.uniform(0.4, 0.95))
    elif script.rng.random() < Chance.contradicted:
        since_s = Answer.contradict(script, script.length_s * script.rng.uniform(0.3, 0.7))
    elif script.rng.random() < Chance.overheard:
        since_s = bystanders(script, script.length_s * script.rng.uniform(0.4, 1.0))
    mixture(script, since_s)


def bystanders(script: Script, until_s: float | None = None) -> float:
    """Rooms with other people talking, things that are no hands, and nothing that calls for more than a nod; returns when it is over."""
    rng, until_s = script.rng, script.length_s if until_s is None else until_s
    at_s = float(rng.uniform(0.2, 1.5))
    while at_s < until_s - 1.0:
        kind = rng.random()
        if kind < 0.4:
            at_s = script.talk(at_s, rng.uniform(0.5, 6.0))
        elif kind < 0.8:
            at_s = script.say_other(at_s)
        if kind > 0.7:
            script.show(None, at_s, rng.uniform(0.8, 3.0))
        at_s += rng.uniform(0.2, 2.5)
    return at_s


def only(name: str) -> Stage:
    """A stage for one behaviour of the table over and over, with free time between."""
    chosen = [behaviour for behaviour in BEHAVIOURS if behaviour.name in (name, Free.name)]
    return lambda script: _one_after_the_other(script, chosen, [3.0 if behaviour.name == name else 1.0 for behaviour in chosen])


def _one_after_the_other(script: Script, behaviours: Sequence[Behaviour], weights: Sequence[float], since_s: float = 0.0) -> None:
    shares = np.array(weights) / sum(weights)
    at_s = since_s + float(script.rng.uniform(0.2, 1.5))
    while at_s < script.length_s - 1.5:
        behaviour = behaviours[script.rng.choice(len(behaviours), p=shares)]
        # Not at once where the last thing could still be seen or heard.
        at_s = max(behaviour.stage(script, at_s), at_s) + script.rng.uniform(0.3, 1.0)
        script.breaks.append(at_s)


def make_scene(
    corpus: Corpus,
    voice_words: Mapping[str, np.ndarray],
    rng: np.random.Generator,
    c: ModelConfig,
    ticks: int = 96,
    flawless: bool = False,
    stage: Stage = lesson,
) -> Scene:
    """One scene, the same for the same state of `rng`.

    `voice_words`: the companion's own recordings, f32[n] at 16 kHz from sample 0, of all words of the vocabulary.
    `flawless`: no lost ticks, no missing tick numbers, no mistakes of the companion: for an evaluation that plays its part itself.
    `stage` fills the script.
    """
    script = Script(corpus, rng, c, ticks)
    stage(script)
    if not flawless:
        _stray_text(script)
    if script.has_camera:
        frames, age, hand_label, whole = camera_pictures(corpus, rng, ticks, c, script.showings, script.freeze)
    else:
        frames, age = no_pictures(ticks, rng, c)
        hand_label, whole = np.zeros(ticks, np.int32), [None] * ticks
    moments = script.moments(whole)
    world = World(
        script=script,
        moments=moments,
        noise=room_noise(corpus, rng, c.context_samples + ticks * c.tick_samples),
        echo=echo_response(rng),
        lost=np.zeros(ticks, bool) if flawless else _lost_ticks(rng, moments, script),
        jump=(0, 0) if flawless else _jump(rng, script, moments),
        playout_offset=round(RATE_HZ * rng.triangular(0.020, 0.060, 0.120)),
        word_ticks={word: max(round(len(voice_words[word]) / c.tick_samples), 1) for word in voice_words},
        voice_words=voice_words,
    )
    word_label = _word_labels(moments)
    for label in (word_label, hand_label):
        label[world.lost] = IGNORE
    past = _Past(world, c, None if flawless else rng)
    room, voice, echo = _sound(world, past, c, rng)
    start = 0 if rng.random() < Chance.session_start else int(10 ** rng.uniform(0, 7))
    at, skipped = world.jump
    return Scene(
        room=room,
        mic=np.clip(room + echo, -1, 1),
        voice=voice,
        frames=frames,
        frame_age=age,
        text_in=script.text_in(),
        word_label=word_label,
        hand_label=hand_label,
        tick=start + np.arange(ticks) + skipped * (np.arange(ticks) >= at),
        world=world,
        lost=world.lost,
        **past.arrays(),
        trials=sorted(past.conduct.trials, key=lambda trial: trial.at_s),
        excuses=past.conduct.excuses,
    )


def replay(scene: Scene, c: ModelConfig, say: np.ndarray, act: np.ndarray, rng: np.random.Generator) -> Scene:
    """The same scene with another companion in it, who chose `say` and `act`, i32[T], right or wrong; the targets follow from that."""
    past = _Past(scene.world, c, rng, (say, act))
    room, voice, echo = _sound(scene.world, past, c, rng)
    return Scene(**vars(scene) | past.arrays() | {"room": room, "mic": np.clip(room + echo, -1, 1), "voice": voice})


def chatter(scene: Scene, c: ModelConfig, rng: np.random.Generator) -> Scene:
    """The same scene with a companion in it that says any word at any time, some broken off: what its voice is learned from."""
    ticks = len(scene.tick)
    say, act = np.zeros((2, ticks), np.int32)
    at = int(rng.integers(1, 6))
    while at < ticks:
        say[at] = rng.integers(1, len(WORDS))
        at += int(rng.integers(2, 9))
    act[rng.random(ticks) < Chance.broken_off] = ACTS.index("yield")
    return replay(scene, c, say, act, rng)


def word_windows(
    corpus: Corpus, voice_words: Mapping[str, np.ndarray], rng: np.random.Generator, n: int, c: ModelConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`n` short pieces of sound for learning words alone: mic and voice f32[n, C + T*S], label i32[n, T] as `Scene.word_label`.

    As in a scene people say words soon after each other, and while the companion speaks itself.
    """
    ticks = c.ticks_in(WINDOW_S)
    samples = c.context_samples + ticks * c.tick_samples
    mic, voice = np.empty((2, n, samples), np.float32)
    label = np.zeros((n, ticks), np.int32)
    for i in range(n):
        script = Script(corpus, rng, c, ticks)
        at_s = rng.uniform(0.05, 0.7)
        while at_s < script.length_s:
            over_s = script.say(str(rng.choice(COMMANDS)), at_s) if rng.random() < Chance.command else script.say_other(at_s)
            at_s = over_s + rng.uniform(0.05, 0.5) if rng.random() < 0.5 else over_s + rng.uniform(0.5, 1.5)
        voice[i] = _speech(voice_words, rng, samples) if rng.random() < Chance.speaking else 0.0
        room, echoed = _heard(script, voice[i], echo_response(rng), room_noise(corpus, rng, samples))
        mic[i] = np.clip(room + echoed, -1, 1)
        label[i] = _word_labels(script.moments([None] * ticks))
    return mic, voice, label


def _speech(voice_words: Mapping[str, np.ndarray], rng: np.random.Generator, samples: int) -> np.ndarray:
    """The companion speaking on, f32[samples]: any words, with pauses of up to a second."""
    names = sorted(voice_words)
    speech = np.zeros(samples, np.float32)
    at = int(rng.integers(RATE_HZ))
    while at < samples:
        word = voice_words[names[rng.integers(len(names))]]
        speech[at : at + len(word)] = word[: samples - at] * 10 ** (rng.uniform(-2, 2) / 20)
        at += len(word) + int(rng.integers(RATE_HZ))
    return speech


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


# ---- what happens ---------------------------------------------------------------------------------------------------------------


def _stray_text(script: Script) -> None:
    """Words that mean nothing here by themselves, and any word to tell at any time."""
    rng = script.rng
    if rng.random() < Chance.stray_text:
        words = [word for word in WORDS[1:] if word not in ("count", "show", "quiet", "talk", "tell", "last")]
        for at_s in rng.uniform(0, script.length_s, rng.integers(1, 4)):
            script.deliver(float(at_s), *(str(word) for word in rng.choice(words, rng.integers(1, 4))))
    if rng.random() < Chance.told:
        for at_s in rng.uniform(0, script.length_s, rng.integers(1, 5)):
            script.deliver(float(at_s), "tell", str(rng.choice(WORDS[1:])))


def _lost_ticks(rng: np.random.Generator, moments: list[Moment], script: Script) -> np.ndarray:
    """bool[T]: now and then some ticks are lost, but none in which something began or ended that matters later."""
    lost = np.zeros(len(moments), bool)
    if rng.random() >= Chance.lost_ticks:
        return lost
    matters = np.zeros(len(moments), bool)
    for moment in moments:
        if moment.text or moment.appeared:
            matters[moment.tick] = True
        for word in moment.heard:
            matters[int(word.onset_s / script.tick_s) : moment.tick + 1] = True
    for _ in range(rng.integers(1, 4)):
        at = rng.integers(1, len(moments))
        lost[at : at + rng.integers(1, 4)] = True
    return lost & ~matters


def _jump(rng: np.random.Generator, script: Script, moments: list[Moment]) -> tuple[int, int]:
    """Sometimes time passes between two things of which nothing is left: so that long memory is learned from short scenes."""
    breaks = (round(at_s / script.tick_s) for at_s in script.breaks)
    calm = [tick for tick in breaks if 0 < tick < len(moments) and moments[tick].talk_s == 0]
    if not calm or rng.random() >= Chance.jump:
        return 0, 0
    # Above all before the text that asks what was long ago.
    weights = np.array([5.0 if any("last" in moment.text for moment in moments[tick : tick + 8]) else 1.0 for tick in calm])
    longest = script.config.trunk.present_window - SHORTEST_GAP
    return int(rng.choice(calm, p=weights / weights.sum())), int(rng.integers(SHORTEST_GAP, max(longest, SHORTEST_GAP) + 1))


# ---- the companion's past -------------------------------------------------------------------------------------------------------


class _Past:
    """What the companion did in the scene, and what it should have done, given that.

    It does what a perfect one would, but for mistakes that `rng` makes (None: none), or it did what `chosen` says.
    """

    def __init__(
        self, world: World, c: ModelConfig, rng: np.random.Generator | None, chosen: tuple[np.ndarray, np.ndarray] | None = None
    ) -> None:
        ticks = len(world.moments)
        self._rng, self._world, self._c, self._chosen = rng, world, c, chosen
        self.say_now, self.act_now = np.zeros((ticks, c.text.say), np.int32), np.zeros((ticks, 1), np.int32)
        self.say_target, self.act_target = np.zeros(ticks, np.int32), np.zeros(ticks, np.int32)
        self.say_weight, self.act_weight = (~world.lost).astype(np.float32), (~world.lost).astype(np.float32)
        self.cut = np.zeros(ticks, bool)
        self.conduct = Conduct(world.word_ticks, c.tick_ms / 1000, c.trunk.present_window)
        spurious = rng is not None and chosen is None and rng.random() < Chance.spurious
        self._blunder = int(rng.integers(ticks)) if rng is not None and spurious else -1
        self._late = {"say": 0, "act": 0}  # ticks that an answer is still kept back
        self._asked = {"say": "", "act": "none"}
        for moment in world.moments:
            self._tick(moment)
        for kind, first, last in self.conduct.masks:
            (self.say_weight if kind == "say" else self.act_weight)[first : last + 1] = 0
        self.conduct.finish(ticks * c.tick_ms / 1000)

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields of `Scene` that follow from it."""
        names = ("say_now", "act_now", "say_target", "act_target", "say_weight", "act_weight", "cut")
        said, acted = (remembered(choice, self._world.lost) for choice in (self.say_now, self.act_now))
        return {name: getattr(self, name) for name in names} | {"said": said, "acted": acted}

    def _tick(self, moment: Moment) -> None:
        tick, conduct = moment.tick, self.conduct
        at, skipped = self._world.jump
        if tick == at and skipped:
            conduct.skip(skipped)
        spoke = conduct.speaking(tick)
        want_say, want_act = conduct.wanted(moment)
        self.say_target[tick], self.act_target[tick] = WORDS.index(want_say), ACTS.index(want_act)
        if self._world.lost[tick]:
            conduct.performed(moment, "", "none")
            return
        if self._chosen is not None:
            say, act = WORDS[self._chosen[0][tick]], ACTS[self._chosen[1][tick]]
        else:
            say, act = self._flawed("say", tick, want_say), self._flawed("act", tick, want_act)
            if tick == self._blunder and (say, act) == ("", "none") and (want_say, want_act) == ("", "none"):
                say, act = self._too_much(tick)
        conduct.performed(moment, say, act)
        self.say_now[tick, 0], self.act_now[tick, 0] = WORDS.index(say), ACTS.index(act)
        self.cut[tick] = spoke and not say and not conduct.speaking(tick)

    def _flawed(self, what: str, tick: int, want: str) -> str:
        """What is done instead of what is wanted: sometimes nothing yet, sometimes another digit; the loss is masked there.

        Until a late answer neither waiting nor answering is wrong.
        """
        nothing = "" if what == "say" else "none"
        rng, weight = self._rng, self.say_weight if what == "say" else self.act_weight
        if rng is None or want == nothing:
            self._asked[what] = nothing
            return want
        if self._asked[what] != want:
            self._asked[what] = want
            # A number of a recitation or the end of a timer has no second tick to come in.
            most = 3 if want not in ("now", "nod") and self.conduct.recitation is None else 1
            self._late[what] = int(rng.integers(1, most + 1)) if rng.random() < Chance.late else 0
        if self._late[what]:
            self._late[what] -= 1
            weight[tick] = 0
            return nothing
        self._asked[what] = nothing
        if want in DIGITS and rng.random() < Chance.wrong_digit:
            weight[tick] = 0
            return DIGITS[(DIGITS.index(want) + int(rng.integers(1, len(DIGITS)))) % len(DIGITS)]
        return want

    def _too_much(self, tick: int) -> tuple[str, str]:
        """One word or act too many."""
        assert self._rng is not None
        if self._rng.random() < 0.7:  # also practice of the words that are seldom told
            self.say_weight[tick] = 0
            return str(self._rng.choice(WORDS[1:])), "none"
        self.act_weight[tick] = 0
        return "", str(self._rng.choice(ACTS[1:]))


def remembered(choice: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """What the session gives a tick of its last choice [T, n]: that of the last tick before that was not lost."""
    before = np.zeros_like(choice)
    for tick in range(1, len(choice)):
        before[tick] = before[tick - 1] if lost[tick - 1] else choice[tick - 1]
    return before


def _sound(world: World, past: _Past, c: ModelConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(room, voice, echo of the voice), f32[C + T*S]: a new word cuts the one before, `cut` breaks it off, a lost tick leaves a gap."""
    ticks = len(world.moments)
    played = np.zeros(ticks * c.tick_samples, np.float32)
    loudness = 10 ** (rng.uniform(-2, 2) / 20)
    for tick in range(ticks):
        start = c.tick_samples * (tick + 1) + world.playout_offset
        if past.cut[tick]:
            played[start:] = 0
        if past.say_now[tick, 0]:
            word = world.voice_words[WORDS[past.say_now[tick, 0]]]
            played[start:] = 0
            room = played[start : start + len(word)]
            room += word[: len(room)] * loudness * 10 ** (rng.normal(0, 0.5) / 20)
    for lost in np.flatnonzero(world.lost):
        start = c.tick_samples * (int(lost) + 1) + world.playout_offset
        played[start : start + c.tick_samples] = 0
    voice = np.concatenate((np.zeros(c.context_samples, np.float32), played))
    room, echoed = _heard(world.script, voice, world.echo, world.noise)
    return room, voice, echoed


def _heard(script: Script, voice: np.ndarray, echo: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(room, echo of the voice) f32[C + T*S], of the script's people, a voice and a noise of that length."""
    c = script.config
    echoed = fftconvolve(voice, echo)[: len(voice)].astype(np.float32) if voice.any() else np.zeros_like(voice)
    placed = [Placed(word.sound, c.context_samples + round(word.onset_s * RATE_HZ)) for word in script.words]
    return room_sound(placed, echoed, noise), echoed


def _word_labels(moments: Sequence[Moment]) -> np.ndarray:
    """`Scene.word_label` before any tick is lost, i32[T]."""
    return np.array([moment.heard[-1].label if moment.heard else 0 for moment in moments], np.int32)
