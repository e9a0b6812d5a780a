"""The demonstration's own input and its picture: a scene made of synthetic voices and drawn hands, and what became of it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import soundfile
from numpy.typing import NDArray

from device.config import AudioConfig
from export.espeak import speak
from export.features import FrontEnd, read_audio
from export.hands import draw_hand

RATE_HZ = 16000
FRAME_RATE_HZ = 10
WIDTH, HEIGHT = 320, 240
LENGTH_S = 40.0
SEED = 7
NOISE_RMS = 10 ** (-58 / 20)  # a quiet room
SPEECH_RMS = 10 ** (-24 / 20)
THUMBNAIL_S = LENGTH_S / 20  # wide enough for a frame of 4:3

# What is in the folder of a demonstration.
SCENE_WAV, SCENE_VIDEO, TEXT, SCRIPT = "scene.wav", "scene.mkv", "scene.txt", "scene.json"
OUT_WAV, EVENTS, PICTURE = "out.wav", "events.jsonl", "timeline.png"


@dataclass(frozen=True)
class Cue:
    """One thing that happens from `start_s` to `end_s`: a `word` is heard, a `hand` is seen, or `text` arrives.

    `expected` are the words and acts that it calls for, all until `due_s`.
    """

    kind: str
    what: str
    start_s: float
    end_s: float
    expected: tuple[str, ...]
    due_s: float


# (start in s, voice, words per minute, pitch, text, what it calls for, within so many s of its end). Voices the companion was not
# given as its own.
_SPEECH: tuple[tuple[float, str, int, int, str, tuple[str, ...], float], ...] = (
    (1.0, "en-us+m3", 150, 45, "up", ("look_up", "ok"), 1.0),
    (4.4, "en-gb+f4", 150, 55, "left", ("look_left", "ok"), 1.0),
    (7.0, "en-us+m7", 160, 40, "the weather is lovely", (), 0.0),
    (10.2, "en-gb-scotland+m1", 150, 50, "on", ("light_on", "ok"), 1.0),
    (14.4, "en-us+f5", 150, 50, "down", ("look_down",), 0.6),  # it was told to be quiet: the act alone
    (17.4, "en-us+m3", 150, 45, "go", ("one", "two", "three"), 3.4),
    (21.2, "en-us+m3", 150, 45, "stop", ("yield",), 0.6),
    (24.6, "en-gb+f4", 150, 55, "go", ("now",), 2.5),  # two fingers are up: a timer of two seconds
    (27.8, "en-us+m7", 150, 45, "yes", ("nod",), 0.6),
    (29.0, "en-us+m7", 150, 45, "no", ("shake",), 0.6),
    (30.2, "en-us+m7", 150, 40, "I went to the market and bought some apples and a loaf of bread", ("five",), 1.5),
    (37.6, "en-gb-scotland+m1", 150, 50, "off", ("light_off", "ok"), 1.0),
)
# (start, end in s, digit): each is said once, unasked, but the one that is held up after `quiet`.
_HANDS = ((2.4, 5.6, 3), (9.0, 11.4, 5), (13.4, 15.2, 1), (23.2, 26.0, 2))
_TEXT = ((12.8, "quiet"), (16.4, "talk"), (31.0, "tell five"), (35.6, "last"))
_QUIET_S = (12.8, 16.4)
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def make_scene(folder: Path) -> list[Cue]:
    """Write scene.wav, scene.mkv, scene.txt and scene.json into `folder`; always the same scene."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    cues = []
    sound = NOISE_RMS * rng.standard_normal(int(LENGTH_S * RATE_HZ)).astype(np.float32)
    for start_s, voice, speed, pitch, text, expected, within_s in _SPEECH:
        word = trimmed(speak(text, voice, speed, pitch))
        word *= SPEECH_RMS / np.sqrt(np.mean(word**2))
        first = int(start_s * RATE_HZ)
        sound[first : first + len(word)] += word
        end_s = start_s + len(word) / RATE_HZ
        cues.append(Cue("word", text, start_s, end_s, expected, end_s + within_s))
    soundfile.write(folder / SCENE_WAV, np.clip(sound, -1, 1), RATE_HZ)
    for start_s, end_s, digit in _HANDS:
        quiet = _QUIET_S[0] < start_s < _QUIET_S[1]
        cues.append(Cue("hand", str(digit), start_s, end_s, () if quiet else (_DIGITS[digit],), start_s + 1.0))
    for at_s, text in _TEXT:
        cues.append(Cue("text", text, at_s, at_s + 0.8, (_DIGITS[_HANDS[-1][2]],) if text == "last" else (), at_s + 1.2))
    write_hands(folder / SCENE_VIDEO, _HANDS, LENGTH_S)
    (folder / TEXT).write_text("".join(f"{at_s}:{text}\n" for at_s, text in _TEXT))
    cues.sort(key=lambda cue: cue.start_s)
    (folder / SCRIPT).write_text(json.dumps([asdict(cue) for cue in cues], indent=1))
    return cues


def trimmed(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    return samples[loud[0] : loud[-1] + 1].copy()


def write_hands(path: Path, showings: Sequence[tuple[float, float, int]], length_s: float) -> None:
    """A video of a room in which drawn hands are held up: `showings` are (start, end in s, digit)."""
    rng = np.random.default_rng(SEED)
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    room = np.stack([120 + 40 * rows / HEIGHT, 130 + 20 * columns / WIDTH, 140 - 30 * rows / HEIGHT], axis=-1)
    cv2.rectangle(room, (20, 60), (110, 150), (90, 100, 80), -1)  # a picture on the wall
    hands = [(start, end, cv2.resize(draw_hand(digit, rng, 100), (190, 190))) for start, end, digit in showings]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=FRAME_RATE_HZ)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        stream.time_base = Fraction(1, FRAME_RATE_HZ)
        stream.options = {"q:v": "3"}
        for i in range(int(length_s * FRAME_RATE_HZ)):
            picture = room + rng.normal(0, 3, room.shape)
            for start_s, end_s, hand in hands:
                if start_s <= i / FRAME_RATE_HZ < end_s:
                    x, y = (int(v + 3 * np.sin(i / 4 + v)) for v in (70, 25))
                    picture[y : y + 190, x : x + 190] = hand
            frame = av.VideoFrame.from_ndarray(np.clip(picture, 0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# --- what became of it --------------------------------------------------------------------------------------------------


def read_events(path: Path) -> list[dict[str, Any]]:
    """The objects of an events file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def report(folder: Path) -> str:
    """What the companion heard, saw, said and did, and when, as text."""
    cues = _read_cues(folder)
    ticks = [e for e in read_events(folder / EVENTS) if e["event"] == "tick"]
    lines = [(cue.start_s, f"{_SENSES[cue.kind]:6} {_described(cue)}") for cue in cues]
    for tick in ticks:
        lines += [(tick["t_s"], f"{'said':6} “{word}”") for word in tick["say"]]
        lines += [(tick["t_s"], f"{'did':6} {tick['act']}")] if tick["act"] != "none" else []
    reactions = [(tick["t_s"], what) for tick in ticks for what in (*tick["say"], tick["act"]) if what != "none"]
    answers = [_answers(cue, reactions) for cue in cues if cue.expected]
    hits, wanted = sum(None not in found for found in answers), len(answers)
    used = {reaction for found in answers for reaction in found if reaction is not None}
    engine_ms = np.array([t["engine_ms"] for t in ticks])
    text = [f"{at:6.2f} s  {what}" for at, what in sorted(lines)]
    text.append(f"\n{hits} of {wanted} cues answered, {len(reactions) - len(used)} other reactions in {len(ticks)} ticks")
    text.append(f"engine {np.median(engine_ms):.1f} ms per tick (median), {engine_ms.max():.1f} ms at most, of 200 ms")
    names = ((OUT_WAV, "what it said"), (EVENTS, "every tick"), (PICTURE, "all of it on one time axis"))
    return "\n".join([*text, *(f"{folder / name}  {what}" for name, what in names)])


_SENSES = {"word": "heard", "hand": "saw", "text": "read"}


def _read_cues(folder: Path) -> list[Cue]:
    return [Cue(**cue | {"expected": tuple(cue["expected"])}) for cue in json.loads((folder / SCRIPT).read_text())]


def _described(cue: Cue) -> str:
    return f"a hand showing {cue.what}" if cue.kind == "hand" else f"“{cue.what}”"


def _answers(cue: Cue, reactions: list[tuple[float, str]]) -> list[tuple[float, str] | None]:
    """For each thing that the cue calls for the reaction that came in time, if one did."""
    return [
        next((reaction for reaction in reactions if reaction[1] == what and cue.start_s <= reaction[0] <= cue.due_s), None)
        for what in cue.expected
    ]


def draw_timeline(folder: Path, tick_ms: int = 200) -> Path:
    """The picture: both streams as waveform and dMel, frames, words and acts on one time axis, engine time under its budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    cues = _read_cues(folder)
    ticks = [e for e in read_events(folder / EVENTS) if e["event"] == "tick"]
    mic, voice = (read_audio(folder / name, RATE_HZ) for name in (SCENE_WAV, OUT_WAV))
    length_s = len(mic) / RATE_HZ
    ink, user, self_, act_colour = "#22252a", "#2f6f9f", "#c2563a", "#3d8a5f"
    plt.rcParams.update(
        {"font.size": 9, "axes.edgecolor": "#b8bcc2", "text.color": ink, "axes.labelcolor": ink, "font.family": "DejaVu Sans"}
    )
    heights = [0.8, 1.0, 0.95, 1.5, 0.8, 1.0, 0.9]
    figure, axes = plt.subplots(len(heights), 1, figsize=(18, 9), sharex=True, height_ratios=heights, layout="constrained")
    front_end = FrontEnd(AudioConfig(level_low=-4.5, level_high=1.2))

    for wave, mel, samples, colour, name in ((axes[0], axes[1], mic, user, "hears"), (axes[4], axes[5], voice, self_, "says")):
        at = np.arange(0, len(samples), 16) / RATE_HZ
        envelope = np.abs(samples[: len(samples) // 16 * 16]).reshape(-1, 16).max(axis=1)
        wave.fill_between(at[: len(envelope)], -envelope, envelope, color=colour, linewidth=0)
        wave.set(ylim=(-max(0.2, envelope.max()) * 1.5, max(0.2, envelope.max()) * 1.5), yticks=[])
        wave.set_ylabel(name, rotation=0, ha="right", va="center", weight="bold", color=colour)
        mel.imshow(front_end.levels(samples).T, origin="lower", aspect="auto", extent=(0, length_s, 0, 80), cmap="magma", vmin=0, vmax=15)
        mel.set(yticks=[])
        mel.set_ylabel("dMel", rotation=0, ha="right", va="center")

    axes[2].set(yticks=[], ylim=(0, 1))
    axes[2].set_ylabel("sees", rotation=0, ha="right", va="center", weight="bold", color=user)
    for at_s, picture in _thumbnails(folder / SCENE_VIDEO, THUMBNAIL_S):
        axes[2].imshow(picture, extent=(at_s + 0.03, at_s + THUMBNAIL_S - 0.03, 0, 1), aspect="auto")

    happens = axes[3]
    happens.set(yticks=[0.5, 1.5, 2.5, 3.5, 4.5], yticklabels=["does", "says", "text", "hand", "word"], ylim=(0, 5))
    for cue in cues:
        row = {"word": 4, "hand": 3, "text": 2}[cue.kind]
        happens.add_patch(
            Rectangle((cue.start_s, row + 0.12), cue.end_s - cue.start_s, 0.76, color=user, alpha=0.25 if cue.expected else 0.1)
        )
        happens.text(cue.start_s + 0.06, row + 0.5, textwrap.shorten(cue.what, 26, placeholder=" …"), va="center", color=user, clip_on=True)
    for tick in ticks:
        for word in tick["say"]:
            happens.text(tick["t_s"] + 0.06, 1.5, word, va="center", color=self_, weight="bold")
        if tick["act"] != "none":
            happens.text(tick["t_s"] + 0.06, 0.5, tick["act"], va="center", color=act_colour, weight="bold")
        for row, happened, colour in ((1, tick["say"], self_), (0, tick["act"] != "none", act_colour)):
            if happened:
                happens.plot([tick["t_s"]] * 2, [row + 0.1, row + 0.9], color=colour, linewidth=2)
    for tick in ticks:
        happens.axvline(tick["t_s"], color="#e6e8ea", linewidth=0.5, zorder=0)

    engine = axes[6]
    engine.bar([t["t_s"] - tick_ms / 2000 for t in ticks], [t["engine_ms"] for t in ticks], width=0.8 * tick_ms / 1000, color="#7b828c")
    engine.axhline(tick_ms, color=self_, linestyle="--", linewidth=1)
    engine.text(0.1, tick_ms * 0.45, f"budget: one tick, {tick_ms} ms", color=self_)
    engine.set(yscale="log", ylim=(1, tick_ms * 1.6), xlim=(0, length_s), xticks=range(int(length_s) + 1), xlabel="seconds")
    engine.set_ylabel("engine\nms", rotation=0, ha="right", va="center")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("copresence: hearing, seeing, speaking and acting at once, one engine launch every 200 ms", weight="bold", fontsize=12)
    figure.savefig(folder / PICTURE, dpi=110)
    plt.close(figure)
    return folder / PICTURE


def _thumbnails(path: Path, every_s: float) -> list[tuple[float, NDArray[np.uint8]]]:
    pictures, due_s = [], 0.5 * every_s
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if frame.time is not None and frame.time >= due_s:
                picture = frame.to_ndarray(format="rgb24")[::2, ::2].astype(np.uint8)
                pictures.append((due_s - 0.5 * every_s, picture))
                due_s += every_s
    return pictures
