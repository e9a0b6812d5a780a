"""The systems on the board: the companion as it is, with something masked, and taking turns behind a voice activity detector."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from device.audio import Samples
from device.config import ModelConfig
from device.engine import Buffers, Engine
from device.positions import clock_features
from device.session import Session
from export.distill.scenes import Scene
from export.scoreboard.detector import turns
from export.scoreboard.play import PLAYOUT_OFFSET_MS, Reaction, Run, System, deliveries, heard_words, play

Mask = Callable[[ModelConfig, Buffers], None]


def _no_video(_: ModelConfig, inputs: Buffers) -> None:
    inputs["frames"][...] = 0  # what the loop gives without a camera
    inputs["frame_age"][...] = 1e4


def _no_voice(_: ModelConfig, inputs: Buffers) -> None:
    inputs["voice"][...] = 0


def _no_clock(c: ModelConfig, inputs: Buffers) -> None:
    inputs["clock"][...] = clock_features(c, 0)


def _no_text(_: ModelConfig, inputs: Buffers) -> None:
    inputs["text_in"][...] = 0


def _one_frame(_: ModelConfig, inputs: Buffers) -> None:
    inputs["frames"][0] = inputs["frames"][1]


def _no_video_no_clock(c: ModelConfig, inputs: Buffers) -> None:
    _no_video(c, inputs)
    _no_clock(c, inputs)


# What is taken from the model before every launch; nothing is trained again for that.
TELEPHONE: Mask = _no_video_no_clock  # positions of ticks stay, relative to each other
ABLATIONS: dict[str, Mask] = {
    "no video": _no_video,
    "no own voice": _no_voice,
    "no clock": _no_clock,
    "no text": _no_text,
    "one frame": _one_frame,
}


ORACLE = "oracle"


class MaskedEngine:
    """An engine whose inputs are masked before every launch."""

    def __init__(self, engine: Engine, c: ModelConfig, mask: Mask) -> None:
        self._engine, self._config, self._mask = engine, c, mask
        self.inputs, self.outputs, self.memory = engine.inputs, engine.outputs, engine.memory

    def run(self) -> None:
        self._mask(self._config, self.inputs)
        self._engine.run()


def systems(c: ModelConfig, engine: Engine) -> dict[str, System]:
    """All of them by name, on one engine."""

    def masked(mask: Mask) -> System:
        return lambda scene, seed: play(scene, c, MaskedEngine(engine, c, mask), seed)

    return {
        "presence": lambda scene, seed: play(scene, c, engine, seed),
        "telephone": masked(TELEPHONE),
        "walkie-talkie": lambda scene, seed: WalkieTalkie(c, engine).play(scene, seed),
        ORACLE: lambda scene, _: oracle(scene, c),
    } | {name: masked(mask) for name, mask in ABLATIONS.items()}


def oracle(scene: Scene, c: ModelConfig) -> Run:
    """What a scene that was made flawless wants, each in the first tick that can know it: the most that ticks of this length allow."""
    tick_s, rate_hz, voice = c.tick_ms / 1000, c.audio.sample_rate_hz, scene.voice[c.context_samples :]
    said = [(c.text.words[word], (tick + 1) * tick_s) for tick, word in enumerate(scene.say_now[:, 0]) if word]
    acts = [Reaction("act", c.text.acts[act], (tick + 1) * tick_s, 0.0) for tick, act in enumerate(scene.act_now[:, 0]) if act]
    heard = heard_words(said, voice, rate_hz, scene.world.playout_offset / rate_hz)
    return Run(sorted(acts + heard, key=lambda reaction: reaction.at_s), voice, rate_hz)


class WalkieTalkie:
    """The same model behind a voice activity detector.

    It is given a turn when the detector says it is over: the turn's ticks run at once, in no time, and what they say and do comes
    out then. It goes on in real time, with a quiet microphone and the last picture, until it has begun no word for 1.2 s and all
    is said; speech of others cuts it off. Between turns nothing is heard or seen, and time does not pass: its ticks are numbered
    without gaps. Text is a turn of its own when nobody speaks. A perfect echo canceller keeps its own voice from the detector; the
    model hears what it says in its own time, as if it were played while a turn is computed.
    """

    PATIENCE_S = 1.2
    HISS = 10 ** (-65 / 20)  # RMS of the quiet microphone

    def __init__(self, c: ModelConfig, engine: Engine) -> None:
        self._config, self._engine = c, engine
        self._rate_hz, self._tick_s = c.audio.sample_rate_hz, c.tick_ms / 1000

    def play(self, scene: Scene, seed: int) -> Run:
        """What it does in a scene."""
        c = self._config
        self._scene, self._session, self._tick = scene, Session(c, self._engine, seed), 0
        self._room = scene.room[c.context_samples :]
        self._hiss = self.HISS * np.random.default_rng(seed).standard_normal(c.context_samples + c.tick_samples).astype(np.float32)
        self._voice = np.zeros(len(self._room), np.float32)
        self._reactions: list[Reaction] = []
        self._text = deliveries(scene, self._tick_s)
        spoken, now_s, length_s = turns(self._room), 0.0, len(self._room) / self._rate_hz
        while True:
            turn = next((turn for turn in spoken if turn.fired_s >= now_s), None)
            text_s = max(self._text[0][0], now_s) if self._text else np.inf  # while it is at something, text waits
            if turn is not None and text_s >= turn.fired_s:
                heard = self._room[max(round(turn.start_s * self._rate_hz), 0) : round(turn.over_s * self._rate_hz)]
                now_s = self._respond(heard, turn.over_s, next((t.fired_s for t in spoken if t.fired_s > turn.fired_s), length_s))
            elif text_s < length_s:
                heard = np.zeros(0, np.float32)
                now_s = self._respond(heard, text_s, length_s if turn is None else turn.fired_s)
            else:
                break
        return Run(sorted(self._reactions, key=lambda reaction: reaction.at_s), self._voice, self._rate_hz)

    def _respond(self, heard: Samples, start_s: float, until_s: float) -> float:
        """Answer a turn that was over at `start_s`, until the next one begins at `until_s`; returns when it is done."""
        size, rate_hz = self._config.tick_samples, self._rate_hz
        ticks = max(-(-len(heard) // size), 1)
        self._own = np.zeros(self._config.context_samples + 2 * size + PLAYOUT_OFFSET_MS * rate_hz // 1000, np.float32)
        sound = np.concatenate((np.resize(self._hiss, self._config.context_samples + ticks * size - len(heard)), heard))
        said: list[tuple[str, float]] = []
        acts: list[Reaction] = []
        offset_s = PLAYOUT_OFFSET_MS / 1000
        cursor, last_word_s, now_s, k = -1, start_s, start_s, 0
        while k < ticks or now_s < last_word_s + self.PATIENCE_S or cursor > round(now_s * rate_hz):
            now_s = start_s + max(k + 1 - ticks, 0) * self._tick_s
            if now_s >= until_s:
                break
            seen_s = start_s - max(ticks - 1 - k, 0) * self._tick_s
            mic = sound[k * size : (k + 1) * size + self._config.context_samples] if k < ticks else self._hiss
            words, act, speech = self._step(mic, seen_s, now_s, text=k >= ticks - 1)
            if act != "none":
                acts.append(Reaction("act", act, now_s, 0.0))
            if cursor >= 0 or words:
                cursor = max(cursor, round((now_s + offset_s) * rate_hz))
                said += [(word, cursor / rate_hz - offset_s) for word in words]
                room = self._voice[cursor : cursor + size]
                room[...] = speech[: len(room)]
                cursor += size
            last_word_s = now_s if words else last_word_s
            k += 1
        self._voice[round(until_s * rate_hz) :] = 0
        words_heard = heard_words(said, self._voice, rate_hz, offset_s)
        self._reactions += acts + [word for word in words_heard if word.at_s < until_s]
        return max(min(now_s, until_s), start_s)

    def _step(self, mic: Samples, seen_s: float, now_s: float, text: bool) -> tuple[list[str], str, Samples]:
        """One tick that sees what the camera saw at `seen_s`, with the text that had arrived by `now_s`."""
        c, scene = self._config, self._scene
        seen = min(max(round(seen_s / self._tick_s) - 1, 0), len(scene.frames) - 1)
        ids: list[int] = []
        if text and self._text and self._text[0][0] <= now_s:
            ids = self._text.pop(0)[1]
        decision = self._session.step(self._tick, mic, self._own[: len(mic)], scene.frames[seen], float(scene.frame_age[seen, 0]), ids)
        self._own[-c.tick_samples :] = decision.speech
        self._own = np.concatenate((self._own[c.tick_samples :], np.zeros(c.tick_samples, np.float32)))
        self._tick += 1
        return [c.text.words[word] for word in decision.say if word], c.text.acts[decision.act], decision.speech
