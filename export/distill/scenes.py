"""Makes training scenes: some seconds of a room in which people say words and hold up hand signs, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import cv2
import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.signal import fftconvolve

from device.config import ModelConfig
from export.distill.corpus import COMMANDS, RATE_HZ, Clip, Corpus
from export.hands import draw_hand

cv2.setNumThreads(1)  # one process makes scenes on one core, and OpenCV's threads do not survive a fork

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("", *DIGITS, "ok", "now", "count", "show", "quiet", "talk", "tell", "last", "ask", "sorry")
ACTS = ("none", "look_up", "look_down", "look_left", "look_right", "light_on", "light_off", "nod", "shake", "yield", "ask")
ACT_OF_WORD = {"up": "look_up", "down": "look_down", "left": "look_left", "right": "look_right", "on": "light_on", "off": "light_off"}
OTHER_LABEL = len(COMMANDS) + 1
IGNORE = -1

REACTION_S = 0.10  # an act belongs to the first tick whose edge is this long after the word's end


class Chance:
    """The probabilities that shape a scene."""

    # what happens
    only_negatives, silent_room = 0.12, 0.10
    no_camera, frozen_camera, empty_picture = 0.06, 0.06, 0.12
    babble, no_echo, lost_ticks, text, session_start = 0.15, 0.2, 0.03, 0.10, 0.3
    # one spoken word: with what is left over it is one of "others"
    command, bystander, mangled = 0.55, 0.20, 0.05
    synthetic_word, synthetic_other = 0.15, 0.30
    # one thing shown
    drawn_hand, distractor, slides = 0.12, 0.15, 0.4
    # one sound, one picture
    reverb, clipped, cropped = 0.35, 0.04, 0.4
    noise_clip, mirrored, cutout, soft_edge, fills_frame, out_of_frame = 0.45, 0.5, 0.15, 0.5, 0.12, 0.12
    moving_shapes, light_changes, background_changes = 0.25, 0.15, 0.15
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
    mic, spoken = _room(corpus, rng, ticks, c)
    frames, age, hand_label, shown = _pictures(corpus, rng, ticks, c)
    echo = _echo_response(rng)
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
        clear = word.power > word.noise_power + _power(echoed[span]) and not lost[first : last + 1].any()
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
        mic[i] = _background_noise(rng, corpus, mic.shape[1])
        kind = rng.random()
        if kind < 0.08:
            continue
        word = _pick_word(corpus, rng, only_negatives=rng.random() < 0.2)
        spoken = _augment_word(word, rng, _random_room(rng), rng.uniform(-36, -16))
        end_s = length_s - REACTION_S - rng.uniform(0, tick_s)
        if kind < 0.22:  # not over yet, or over a while ago
            end_s += rng.uniform(tick_s, 0.5) if rng.random() < 0.5 else -rng.uniform(tick_s, 0.7)
        else:
            label[i] = IGNORE
        start = round(end_s * RATE_HZ) - spoken.end
        noise_power = _mix(mic[i], spoken, start)
        if label[i] == IGNORE and _power(spoken.samples[spoken.onset : spoken.end]) > noise_power:
            label[i] = spoken.label
    return np.clip(mic, -1, 1), label, np.full(n, ticks - 1, np.int32)


def hand_frames(corpus: Corpus, rng: np.random.Generator, n: int, c: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """`n` pairs of frames for learning hands alone: u8[n, 2, H, W, 3] and label i32[n] (0 none in a quarter of them, digit + 1)."""
    size = (c.video.height, c.video.width)
    frames = np.empty((n, 2, *size, 3), np.uint8)
    label = np.zeros(n, np.int32)
    for i in range(n):
        camera = _Camera(corpus, rng, size)
        digit = None if rng.random() < 0.25 else int(rng.integers(10))
        thing = None
        if digit is not None or rng.random() < 0.6:
            thing = _Thing(corpus, rng, digit, size)
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


def _echo_response(rng: np.random.Generator) -> np.ndarray:
    """Speaker to microphone: 10..80 ms late, -32..-10 dB, a short random decay; or no echo at all (headphones)."""
    if rng.random() < Chance.no_echo:
        return np.zeros(1, np.float32)
    delay, tail = round(RATE_HZ * rng.uniform(0.010, 0.080)), round(RATE_HZ * rng.uniform(0.002, 0.060))
    decay = np.exp(-4 * np.arange(tail) / tail) * rng.standard_normal(tail) * rng.uniform(0.05, 0.4)
    decay[0] = 1
    response = np.concatenate((np.zeros(delay), decay / np.sqrt(np.sum(decay**2))))
    return np.asarray(response * 10 ** (rng.uniform(-32, -10) / 20), dtype=np.float32)


# ---- sound ----------------------------------------------------------------------------------------------------------------------


class _Sound(NamedTuple):
    """An augmented clip: f32[n], the word in [onset:end], its aux label, and the command it is ("" for all that is none)."""

    samples: np.ndarray
    onset: int
    end: int
    label: int
    name: str


class _Spoken(NamedTuple):
    name: str
    label: int
    onset_s: float
    end_s: float
    power: float
    noise_power: float  # of everything else in the room during the word


def _room(corpus: Corpus, rng: np.random.Generator, ticks: int, c: ModelConfig) -> tuple[np.ndarray, list[_Spoken]]:
    """The room without the companion: f32[C + T*S], and the words spoken in it."""
    mic = _background_noise(rng, corpus, c.context_samples + ticks * c.tick_samples)
    length_s = ticks * c.tick_ms / 1000
    if rng.random() < Chance.babble:
        _add_babble(mic, corpus, rng)
    spoken: list[_Spoken] = []
    if rng.random() < Chance.silent_room:
        return mic, spoken
    only_negatives = rng.random() < Chance.only_negatives
    room, level_db, overdriven = _random_room(rng), rng.uniform(-37, -17), rng.random() < Chance.clipped
    free = rng.uniform(0.2, 1.5)
    pause_s = rng.uniform(0.8, 2.6)  # on average; 4 to 7 words in 16 s
    while True:
        sound = _augment_word(_pick_word(corpus, rng, only_negatives), rng, room, np.clip(level_db + rng.normal(0, 2.5), -40, -14))
        onset_s = free
        end_s = onset_s + (sound.end - sound.onset) / RATE_HZ
        if end_s > length_s - 0.05:
            break
        start = c.context_samples + round(onset_s * RATE_HZ) - sound.onset
        if overdriven:
            sound = sound._replace(samples=np.clip(sound.samples * 3, -0.5, 0.5))
        noise_power = _mix(mic, sound, start)
        spoken.append(_Spoken(sound.name, sound.label, onset_s, end_s, _power(sound.samples[sound.onset : sound.end]), noise_power))
        free = end_s + 0.25 + rng.exponential(pause_s)
    return mic, spoken


def _pick_word(corpus: Corpus, rng: np.random.Generator, only_negatives: bool) -> Clip:
    """A clip by the table of probabilities; a mangled one is named "" and sounds like no word."""
    kind = rng.random()
    if only_negatives:
        kind = Chance.command + kind * (1 - Chance.command)
    if kind < Chance.command:
        return _word_clip(corpus, rng, str(rng.choice(list(ACT_OF_WORD))))
    if kind < Chance.command + Chance.bystander:
        return _word_clip(corpus, rng, str(rng.choice([word for word in COMMANDS if word not in ACT_OF_WORD])))
    if kind < Chance.command + Chance.bystander + Chance.mangled:
        return _mangled(corpus, rng)
    return _other_clip(corpus, rng)


def _word_clip(corpus: Corpus, rng: np.random.Generator, word: str) -> Clip:
    synthetic = corpus.synthetic_words[word] and rng.random() < Chance.synthetic_word
    clips = corpus.synthetic_words[word] if synthetic else corpus.words[word]
    return clips[rng.integers(len(clips))]


def _other_clip(corpus: Corpus, rng: np.random.Generator) -> Clip:
    clips = corpus.synthetic_others if corpus.synthetic_others and rng.random() < Chance.synthetic_other else corpus.others
    return clips[rng.integers(len(clips))]


def _mangled(corpus: Corpus, rng: np.random.Generator) -> Clip:
    """A clip backwards, or the first half of a command's word with the second half of another: nothing anybody meant."""
    words = [word for word in COMMANDS if word != "no"]  # "no" backwards is nearly "on"
    clip = _word_clip(corpus, rng, str(rng.choice(words)))
    if rng.random() < 0.5:
        n = len(clip.samples)
        return Clip("", clip.samples[::-1], clip.speaker, n - clip.end, n - clip.onset)
    other = _other_clip(corpus, rng)
    if rng.random() < 0.5:
        clip, other = other, clip
    cut, resume = (clip.onset + clip.end) // 2, (other.onset + other.end) // 2
    gain = _rms(clip.samples[clip.onset : clip.end]) / max(_rms(other.samples[other.onset : other.end]), 1e-5)
    tail = other.samples[resume:] * min(gain, 20.0)
    samples = np.concatenate((_faded(clip.samples[:cut], 80), _faded(tail, 80)))
    return Clip("", samples, clip.speaker, clip.onset, cut + other.end - resume)


def _random_room(rng: np.random.Generator) -> np.ndarray | None:
    """Synthetic reverberation: an impulse response (direct sound first) or None for a dry room."""
    if rng.random() >= Chance.reverb:
        return None
    decay_s = rng.uniform(0.08, 0.45)
    n = round(decay_s * RATE_HZ)
    tail = rng.standard_normal(n) * np.exp(-6.9 * np.arange(n) / n)  # -60 dB at the end
    response = tail * rng.uniform(0.1, 0.6) / np.sqrt(np.sum(tail**2))
    response[: round(0.002 * RATE_HZ)] = 0
    response[0] = 1
    return np.asarray(response, dtype=np.float32)


def _augment_word(clip: Clip, rng: np.random.Generator, room: np.ndarray | None, level_db: float) -> _Sound:
    """Crop, speed, equaliser, room and level (dBFS RMS over the word)."""
    samples, onset, end = clip.samples, clip.onset, clip.end
    if rng.random() < Chance.cropped:  # else the noise of the recording would announce the word
        first, last = max(onset - round(0.06 * RATE_HZ), 0), min(end + round(0.12 * RATE_HZ), len(samples))
        samples, onset, end = samples[first:last], onset - first, end - first
    samples = _faded(samples, 160)
    speed = rng.uniform(0.88, 1.15)
    count = int(len(samples) / speed)
    samples = np.interp(np.arange(count) * speed, np.arange(len(samples)), samples)
    onset, end = round(onset / speed), min(round(end / speed), count)
    total = count + (0 if room is None else len(room))
    size = next_fast_len(total, real=True)
    spectrum = rfft(samples.astype(np.float32), size) * _equaliser(rng, size // 2 + 1)
    if room is not None:
        spectrum *= rfft(room, size)
    samples = irfft(spectrum, size)[:total]
    gain = 10 ** (level_db / 20) / max(_rms(samples[onset:end]), 1e-5)
    label = COMMANDS.index(clip.word) + 1 if clip.word in COMMANDS else OTHER_LABEL
    return _Sound((samples * gain).astype(np.float32), onset, end, label, clip.word)


def _equaliser(rng: np.random.Generator, bins: int) -> np.ndarray:
    """A random microphone: six gains over log frequency (a tilt and bumps), as amplitude per DFT bin."""
    knots_hz = np.array([60.0, 200.0, 600.0, 1600.0, 4000.0, 8000.0])
    gains_db = rng.normal(0, 2.5, 6) + rng.normal(0, 3.0) * np.linspace(-1, 1, 6)
    if rng.random() < 0.25:
        gains_db[0] -= rng.uniform(5, 25)  # small loudspeaker, high-passed microphone
    coarse = 10 ** (np.interp(np.log(np.linspace(30, 8000, 257)), np.log(knots_hz), gains_db) / 20)
    return np.asarray(np.interp(np.linspace(0, 256, bins), np.arange(257), coarse), dtype=np.float32)


def _mix(mic: np.ndarray, sound: _Sound, start: int) -> float:
    """Add a sound that begins at sample `start` (it may stick out on either side); returns the power that was there during its word."""
    first, last = max(start, 0), min(start + len(sound.samples), len(mic))
    noise_power = _power(mic[max(start + sound.onset, 0) : max(start + sound.end, 0)])
    if first < last:
        mic[first:last] += sound.samples[first - start : last - start]
    return noise_power


def _background_noise(rng: np.random.Generator, corpus: Corpus, samples: int) -> np.ndarray:
    """Room noise, f32[samples] at -65..-36 dBFS: a recording, or white, pink or brown noise, looped."""
    if corpus.noise and rng.random() < Chance.noise_clip:
        loop = corpus.noise[rng.integers(len(corpus.noise))]
        loop = loop[: len(loop) // 2 * 2]
    else:
        size = 1 << 16
        spectrum = rfft(rng.standard_normal(size, dtype=np.float32))
        colour = rng.choice((0.0, 0.5, 1.0))  # white, pink, brown: amplitude falls as 1 / f**colour
        loop = irfft(spectrum / np.maximum(np.arange(size // 2 + 1), 64).astype(np.float32) ** np.float32(colour), size)
    loop = np.roll(loop, rng.integers(len(loop)))
    noise = np.tile(loop, -(-samples // len(loop)))[:samples].astype(np.float32)
    return noise * np.float32(10 ** (rng.uniform(-65, -36) / 20) / max(_rms(loop), 1e-6))


def _add_babble(mic: np.ndarray, corpus: Corpus, rng: np.random.Generator) -> None:
    """Other people in the background: overlapping other words, low."""
    level_db = rng.uniform(-52, -34)
    at = 0
    while at < len(mic):
        sound = _augment_word(_other_clip(corpus, rng), rng, None, level_db + rng.normal(0, 3))
        _mix(mic, sound, at)
        at += round(RATE_HZ * rng.exponential(0.9) + 0.1 * RATE_HZ)


def _faded(samples: np.ndarray, edge: int) -> np.ndarray:
    samples = samples.copy()
    edge = min(edge, len(samples) // 2)
    ramp = np.linspace(0, 1, edge, dtype=np.float32)
    samples[:edge] *= ramp
    samples[len(samples) - edge :] *= ramp[::-1]
    return samples


def _power(samples: np.ndarray) -> float:
    return float(np.dot(samples, samples)) / max(len(samples), 1)


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(_power(samples)))


# ---- pictures -------------------------------------------------------------------------------------------------------------------


@dataclass
class _Showing:
    """A hand (or, with digit None, a thing that is none) in front of the camera; it slides in from appear_s to full_s."""

    digit: int | None
    thing: _Thing
    appear_s: float
    full_s: float
    gone_s: float
    first_tick: int | None = None  # the first tick whose both frames show it fully

    def missing(self, at_s: float) -> float | None:
        """How far it still has to slide in, 1..0; None when it is not there."""
        if not self.appear_s <= at_s < self.gone_s:
            return None
        return 0.0 if at_s >= self.full_s else (self.full_s - at_s) / (self.full_s - self.appear_s)


class _Shown(NamedTuple):
    digit: int
    full_s: float
    gone_s: float
    first_tick: int | None


def _pictures(
    corpus: Corpus, rng: np.random.Generator, ticks: int, c: ModelConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[_Shown]]:
    """Frames u8[T, 2, H, W, 3], their age f32[T, 1], hand labels i32[T] and the signs shown."""
    size, tick_s = (c.video.height, c.video.width), c.tick_ms / 1000
    length_s = ticks * tick_s
    frames = np.zeros((ticks, 2, *size, 3), np.uint8)
    label = np.zeros(ticks, np.int32)
    edges_s = tick_s * np.arange(1, ticks + 1)
    kind = rng.random()
    if kind < Chance.no_camera:
        age = edges_s + rng.choice((0.0, 1.0, 1e4))
        return frames, age.astype(np.float32)[:, None], label, []
    freeze_s = rng.uniform(2, length_s) if kind < Chance.no_camera + Chance.frozen_camera else np.inf
    thaw_s = freeze_s + rng.uniform(0.4, 6)
    has_hands = not Chance.no_camera + Chance.frozen_camera <= kind < Chance.no_camera + Chance.frozen_camera + Chance.empty_picture
    camera = _Camera(corpus, rng, size)
    showings = _schedule(corpus, rng, length_s, size, has_hands, freeze_s, thaw_s)
    delay_s = rng.uniform(0, tick_s / 2)  # from the newest exposure to the edge
    exposed_s = (edges_s - delay_s)[:, None] + tick_s / 2 * np.array((-1.0, 0.0))
    frozen = (exposed_s > freeze_s) & (exposed_s < thaw_s)
    exposed_s[frozen] = freeze_s - 1e-3
    age = (edges_s - exposed_s[:, 1]).astype(np.float32)[:, None]
    for tick in np.flatnonzero(age[:, 0] <= 1.0):  # the runtime blacks out older pictures
        for f in range(2):
            at_s = float(exposed_s[tick, f])
            camera.take(frames[tick, f], at_s, [(s.thing, m) for s in showings if (m := s.missing(at_s)) is not None])
        for s in showings:
            if s.digit is None:
                continue
            there = [s.missing(float(at_s)) for at_s in exposed_s[tick]]
            if there == [0.0, 0.0]:
                label[tick] = 1 + s.digit
                s.first_tick = int(tick) if s.first_tick is None else s.first_tick
            elif there != [None, None]:
                label[tick] = IGNORE
    return frames, age, label, [_Shown(s.digit, s.full_s, s.gone_s, s.first_tick) for s in showings if s.digit is not None]


def _schedule(
    corpus: Corpus, rng: np.random.Generator, length_s: float, size: tuple[int, int], has_hands: bool, freeze_s: float, thaw_s: float
) -> list[_Showing]:
    """One thing after the other; none is there when a frozen camera comes back, as nobody could say whether it is a new one."""
    showings = []
    at_s = rng.uniform(-0.5, 2.0)
    digit: int | None = None
    while at_s < length_s - 1.0:
        appear_s = max(at_s, 0.0) if at_s >= 0 else -1.0  # sometimes it is there from the start
        full_s = appear_s + (rng.uniform(0.1, 0.2) if rng.random() < Chance.slides else 0.0)
        gone_s = full_s + rng.uniform(1.0, 4.0) + max(-appear_s, 0)
        at_s = gone_s + rng.uniform(0.6, 3.0)
        if gone_s > freeze_s:
            if full_s < freeze_s - 0.7:
                gone_s = freeze_s
            at_s = max(at_s, thaw_s + rng.uniform(0.3, 1.0))
            if full_s >= freeze_s - 0.7 and appear_s < thaw_s + 0.3:
                continue
        if not has_hands or rng.random() < Chance.distractor:
            digit = None
        elif digit is None or rng.random() > 0.15:  # sometimes the same sign again
            digit = int(rng.integers(10))
        showings.append(_Showing(digit, _Thing(corpus, rng, digit, size), appear_s, full_s, gone_s))
    return showings


_GRAIN_SHIFT = 40  # pixels: every frame sees another window of one field of noise, which is cheaper than new noise


class _Camera:
    """A place: background, light, sensor noise, and what moves in it."""

    def __init__(self, corpus: Corpus, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self._rng, self._size = rng, size
        self._backgrounds = [_background(corpus, rng, size)]
        self._cuts_s: list[float] = []
        if rng.random() < Chance.background_changes:
            self._backgrounds += [_background(corpus, rng, size) for _ in range(2)]
            self._cuts_s = sorted(rng.uniform(0, 16, 2))
        self._light = (rng.uniform(0.1, 0.35), rng.uniform(0.05, 0.8)) if rng.random() < Chance.light_changes else None  # depth, Hz
        self._shapes = [_Shape(rng, size) for _ in range(rng.integers(1, 4))] if rng.random() < Chance.moving_shapes else []
        grain = rng.standard_normal((size[0] + _GRAIN_SHIFT, size[1] + _GRAIN_SHIFT, 3), dtype=np.float32) * np.float32(rng.uniform(0.5, 7))
        self._plus, self._minus = cv2.convertScaleAbs(np.maximum(grain, 0)), cv2.convertScaleAbs(np.minimum(grain, 0))

    def take(self, frame: np.ndarray, at_s: float, things: list[tuple[_Thing, float]]) -> None:
        """Expose one frame (u8[H, W, 3], written in place) with the things in view, each with how far it still has to slide in."""
        frame[:] = self._backgrounds[int(np.searchsorted(self._cuts_s, at_s)) % len(self._backgrounds)]
        for shape in self._shapes:
            shape.draw(frame, at_s)
        for thing, missing in things:
            thing.paste(frame, at_s, missing)
        if self._light:
            depth, rate_hz = self._light
            cv2.convertScaleAbs(frame, frame, 1 - depth * (0.5 + 0.5 * np.sin(2 * np.pi * rate_hz * at_s)))
        y, x = self._rng.integers(0, _GRAIN_SHIFT, 2)
        window = (slice(y, y + self._size[0]), slice(x, x + self._size[1]))
        cv2.add(frame, self._plus[window], frame)
        cv2.subtract(frame, self._minus[window], frame)


class _Shape:
    """Something round or square that crosses the picture."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self._size = size
        self._colour = _any_colour(rng)
        self._at, self._speed = rng.uniform(0, 1, 2), rng.normal(0, 0.25, 2)
        self._axes = (int(rng.uniform(4, 35)), int(rng.uniform(4, 35)))
        self._square = rng.random() < 0.5

    def draw(self, frame: np.ndarray, at_s: float) -> None:
        y, x = (np.mod(self._at + self._speed * at_s, 1.3) * self._size - 15).astype(int).tolist()
        w, h = self._axes
        if self._square:
            cv2.rectangle(frame, (x - w, y - h), (x + w, y + h), self._colour, -1)
        else:
            cv2.ellipse(frame, (x, y), self._axes, 0, 0, 360, self._colour, -1, cv2.LINE_AA)


class _Thing:
    """A photographed or drawn hand, or something that is no hand, cut out once with its pose and light, and pasted frame by frame."""

    def __init__(self, corpus: Corpus, rng: np.random.Generator, digit: int | None, size: tuple[int, int]) -> None:
        if digit is None:
            picture = _no_hand(corpus, rng)
        elif rng.random() < Chance.drawn_hand:
            picture = draw_hand(digit, rng)
        else:
            photos = corpus.hands[digit]
            picture = photos[rng.integers(len(photos))][0]
        picture = _relight(picture, rng)
        fills = rng.random() < Chance.fills_frame
        # Room for the drift: the thing is cut out of a canvas larger than the frame.
        margin = 8
        canvas = (size[1] + 2 * margin, size[0] + 2 * margin)
        pose = _pose(rng, canvas, size, fills)
        border = cv2.BORDER_REPLICATE if fills else cv2.BORDER_CONSTANT
        colour = cv2.warpPerspective(picture, pose, canvas, flags=cv2.INTER_LINEAR, borderMode=border)
        if fills:
            alpha = np.full(canvas[::-1], 255, np.uint8)
        else:
            alpha = cv2.warpPerspective(_stencil(rng, picture.shape[0]), pose, canvas, flags=cv2.INTER_LINEAR)
        blur = rng.uniform(0, 1.3)
        if blur > 0.4:
            colour = cv2.GaussianBlur(colour, (0, 0), blur)
        x, y, w, h = cv2.boundingRect(alpha)
        alpha3 = cv2.merge([alpha[y : y + h, x : x + w]] * 3)
        self._size, self._at = size, (y - margin, x - margin)
        self._colour = cv2.multiply(np.ascontiguousarray(colour[y : y + h, x : x + w]), alpha3, scale=1 / 255)
        self._keep = cv2.bitwise_not(alpha3)
        self._drift = (rng.uniform(0, 1) ** 2 * margin, rng.uniform(0.1, 0.6), rng.uniform(0, 6.3, 2))  # pixels, Hz, phases
        angle = rng.uniform(0, 2 * np.pi)
        self._entry = np.array((np.sin(angle), np.cos(angle))) * rng.uniform(50, 110)

    def paste(self, frame: np.ndarray, at_s: float, missing: float) -> None:
        reach, rate_hz, phases = self._drift
        dy, dx = np.sin(2 * np.pi * rate_hz * at_s + phases) * reach + self._entry * missing
        y, x = self._at[0] + round(dy), self._at[1] + round(dx)
        top, left = max(y, 0), max(x, 0)
        bottom, right = min(y + self._keep.shape[0], self._size[0]), min(x + self._keep.shape[1], self._size[1])
        if top >= bottom or left >= right:
            return
        inside = (slice(top - y, bottom - y), slice(left - x, right - x))
        view = frame[top:bottom, left:right]
        view[:] = cv2.add(cv2.multiply(view, self._keep[inside], scale=1 / 255), self._colour[inside])


def _pose(rng: np.random.Generator, canvas: tuple[int, int], size: tuple[int, int], fills: bool) -> np.ndarray:
    """From the 100-pixel picture to the canvas: mirror, scale, turn, shear, a little perspective, place. f64[3, 3]."""
    scale = rng.uniform(1.0, 1.3) if fills else rng.uniform(0.55, 1.25)
    angle = np.radians(rng.uniform(-20, 20) * (0.5 if fills else 1.0))
    mirror = -1.0 if rng.random() < Chance.mirrored else 1.0
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    shear = np.array([(1.0, rng.uniform(-0.12, 0.12)), (0.0, rng.uniform(0.9, 1.1))])
    linear = scale * turn @ shear @ np.diag((mirror, 1.0))
    half = 50 * scale
    spare = np.maximum(np.array((size[1], size[0])) / 2 - half, 0)
    if fills:
        spare = np.array((25.0, 6.0))
    elif rng.random() < Chance.out_of_frame:
        spare = spare + 0.3 * half
    centre = np.array(canvas) / 2 + rng.uniform(-1, 1, 2) * spare
    pose = np.eye(3)
    pose[:2, :2] = linear
    pose[:2, 2] = centre - linear @ (50, 50)
    tilt = np.eye(3)
    tilt[2, :2] = rng.uniform(-6e-4, 6e-4, 2)
    to_centre, back = np.eye(3), np.eye(3)
    to_centre[:2, 2], back[:2, 2] = -centre, centre
    return np.asarray(back @ tilt @ to_centre @ pose)


def _stencil(rng: np.random.Generator, side: int) -> np.ndarray:
    """What of the picture is pasted: all of it, with hard or soft edges."""
    stencil = np.zeros((side, side), np.uint8)
    if rng.random() < Chance.soft_edge:
        edge = int(rng.integers(4, 12))
        stencil[edge:-edge, edge:-edge] = 255
        return cv2.blur(stencil, (2 * edge - 1, 2 * edge - 1))
    stencil[1:-1, 1:-1] = 255
    return stencil


def _relight(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Contrast, brightness, gamma and colour; sometimes a piece hidden."""
    ramp = np.linspace(0, 1, 256)
    gamma, contrast, brightness = np.exp(rng.normal(0, 0.25)), rng.uniform(0.65, 1.25), rng.normal(0, 0.08)
    tone = (ramp**gamma - 0.5) * contrast + 0.5 + brightness
    table = np.clip(255 * tone[:, None] * rng.uniform(0.85, 1.12, 3), 0, 255).astype(np.uint8)
    lit = cv2.LUT(picture, table[None])
    if rng.random() < Chance.cutout:
        y, x = rng.integers(0, 85, 2)
        h, w = rng.integers(5, 16, 2)
        lit[y : y + h, x : x + w] = _any_colour(rng)
    return lit


def _background(corpus: Corpus, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A wall with a gradient, a wall with things, coarse texture, or a photograph out of focus; u8[H, W, 3]."""
    h, w = size
    kind = rng.random()
    if kind < 0.3:
        photos = corpus.hands[int(rng.integers(10))]
        side = int(rng.integers(3, 8))  # so few pixels that no hand is left to recognise
        few = cv2.resize(photos[rng.integers(len(photos))][0], (side, side), interpolation=cv2.INTER_AREA)
        return _relight(cv2.resize(few, (w, h), interpolation=cv2.INTER_CUBIC), rng)
    grid = (int(rng.integers(2, 12)), int(rng.integers(2, 14)))
    contrast = rng.uniform(2, 30)
    coarse = rng.uniform(40, 235) * rng.uniform(0.85, 1.1, 3) + rng.normal(0, contrast, (*grid, 1))
    coarse += rng.normal(0, 0.25 * contrast, coarse.shape)  # less in colour than in brightness, as in rooms
    smooth = cv2.resize(coarse.astype(np.float32), (w, h), interpolation=cv2.INTER_CUBIC)
    picture: np.ndarray = np.clip(smooth, 0, 255).astype(np.uint8)
    if kind < 0.75:
        for _ in range(rng.integers(1, 8)):
            _random_shape(picture, rng)
        if rng.random() < 0.5:
            picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.5, 4))
    return picture


def _no_hand(corpus: Corpus, rng: np.random.Generator) -> np.ndarray:
    """A thing held up that is no hand: paper with shapes, or a hand sign so scrambled that it shows nothing; u8[100, 100, 3]."""
    if rng.random() < 0.3:
        photos = corpus.hands[int(rng.integers(10))]
        tiles = photos[rng.integers(len(photos))][0].reshape(4, 25, 4, 25, 3).swapaxes(1, 2).reshape(16, 25, 25, 3)
        return np.ascontiguousarray(rng.permutation(tiles).reshape(4, 4, 25, 25, 3).swapaxes(1, 2).reshape(100, 100, 3))
    picture = np.full((100, 100, 3), _any_colour(rng), np.uint8)
    for _ in range(rng.integers(0, 7)):
        _random_shape(picture, rng)
    return picture


def _random_shape(picture: np.ndarray, rng: np.random.Generator) -> None:
    h, w = picture.shape[:2]
    (xa, xb, xc), (ya, yb, yc) = rng.integers(0, w, 3).tolist(), rng.integers(0, h, 3).tolist()
    colour, kind = _any_colour(rng), rng.random()
    if kind < 0.3:
        cv2.rectangle(picture, (xa, ya), (xb, yb), colour, -1)
    elif kind < 0.6:
        cv2.ellipse(picture, (xa, ya), (2 + xb // 4, 2 + yb // 4), xc, 0, 360, colour, -1, cv2.LINE_AA)
    elif kind < 0.8:
        cv2.line(picture, (xa, ya), (xb, yb), colour, int(rng.integers(1, 12)), cv2.LINE_AA)
    else:
        cv2.fillPoly(picture, [np.array([(xa, ya), (xb, yb), (xc, yc)], np.int32)], colour, cv2.LINE_AA)


def _any_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """Any colour, one time in three that of skin: colour alone must not make a hand."""
    if rng.random() < 0.33:
        red = rng.uniform(110, 240)
        return int(red), int(red * rng.uniform(0.65, 0.82)), int(red * rng.uniform(0.48, 0.72))
    r, g, b = rng.integers(10, 246, 3).tolist()
    return r, g, b
