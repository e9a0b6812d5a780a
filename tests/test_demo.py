"""The demonstration's scene and its report, and how reactions are counted."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from ticks import FULL

from device.audio import VirtualPlayout
from export.demo import EVENTS, LENGTH_S, OUT_WAV, PICTURE, RATE_HZ, SCENE_VIDEO, SCENE_WAV, draw_timeline, make_scene, report
from export.distill.corpus import Corpus
from export.distill.scenes import Event
from export.distill.scenes import make_scene as make_training_scene
from export.evaluate import SceneMicrophone, Score, score, wilson


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demonstration in which the first cue was answered, the second too late, and one word was said for nothing."""
    path = tmp_path_factory.mktemp("demo")
    cues = make_scene(path)
    word, hand = (next(cue for cue in cues if cue.kind == kind and cue.expected) for kind in ("word", "hand"))
    ticks = [{"event": "tick", "tick": k, "t_s": round(0.2 * (k + 1), 1), "say": [], "act": "none", "engine_ms": 5.0} for k in range(100)]
    next(t for t in ticks if t["t_s"] > word.end_s)["act"] = word.expected
    next(t for t in ticks if t["t_s"] > hand.start_s + 1.0)["say"] = [hand.expected]
    lines = [{"event": "header"}, *ticks, {"event": "summary"}]
    (path / EVENTS).write_text("\n".join(map(json.dumps, lines)) + "\n")
    soundfile.write(path / OUT_WAV, np.zeros(int(LENGTH_S * RATE_HZ)), RATE_HZ)
    return path


def test_the_scene_is_whole_and_always_the_same(folder: Path, tmp_path: Path) -> None:
    cues = make_scene(tmp_path)
    assert (tmp_path / SCENE_WAV).read_bytes() == (folder / SCENE_WAV).read_bytes()
    assert soundfile.info(folder / SCENE_WAV).duration == LENGTH_S
    with av.open(str(folder / SCENE_VIDEO)) as video:
        assert sum(1 for _ in video.decode(video=0)) == LENGTH_S * 10
    assert {cue.kind for cue in cues} == {"word", "hand"} and any(not cue.expected for cue in cues)


def test_the_report_tells_what_was_answered(folder: Path) -> None:
    cues = make_scene(folder)
    wanted = sum(bool(cue.expected) for cue in cues)
    assert f"1 of {wanted} cues answered, 1 other reactions in 100 ticks" in report(folder)


def test_the_timeline_is_drawn(folder: Path) -> None:
    assert draw_timeline(folder) == folder / PICTURE
    assert (folder / PICTURE).stat().st_size > 50_000


def tick(t_s: float, act: str = "none", say: tuple[str, ...] = ()) -> dict[str, object]:
    return {"t_s": t_s, "act": act, "say": list(say)}


def test_reactions_are_counted_once_and_in_their_window() -> None:
    events = [
        Event("act", 1.0, 1.5, "look_up"),
        Event("act", 4.0, 4.5, "look_down"),
        Event("show", 6.0, 9.0, "three"),
        Event("act", 12.0, 12.5, "look_up", clear=False),
    ]
    ticks = [
        tick(1.8, "look_up"),  # right
        tick(2.0, "look_up"),  # again: false
        tick(4.8, "look_up"),  # wrong
        tick(6.4, say=("three",)),  # right
        tick(7.2, say=("three",)),  # again: false
        tick(12.8, "look_up"),  # nobody could tell: excused
        tick(15.0, "nod"),  # false
    ]
    scores = {"act": Score(), "show": Score()}
    assert score(events, ticks, scores) == 3  # type: ignore[arg-type]
    assert (scores["act"].hit, scores["act"].wrong, scores["act"].missed) == (1, 1, 0)
    assert (scores["show"].hit, scores["show"].total) == (1, 1)
    assert scores["act"].reaction_s == pytest.approx([0.3])
    assert score(events[:1], [], scores) == 0
    assert scores["act"].missed == 1


def test_wilson() -> None:
    low, high = wilson(80, 100)
    assert (low, high) == pytest.approx((0.7112, 0.8666), abs=1e-3)


def test_a_scenes_microphone_returns_the_echo_of_what_was_played(corpus: Corpus) -> None:
    words = {word: np.zeros(0, np.float32) for word in FULL.text.words}
    scene = make_training_scene(corpus, words, np.random.default_rng(0), FULL, 10, closed_loop=True)
    scene.echo = np.zeros(400, np.float32)
    scene.echo[399] = 0.5
    now_ns = [0]
    playout = VirtualPlayout(RATE_HZ, lambda: now_ns[0])
    microphone = SceneMicrophone(scene, FULL.context_samples, playout)
    speech = np.ones(3200, np.float32)
    playout.put(3200, speech)
    now_ns[0] = 10**9
    playout.sync(16000)
    heard = np.zeros(16000, np.float32)
    microphone.read(0, heard)
    room = scene.mic[FULL.context_samples :][:16000]
    expected = np.zeros(16000, np.float32)
    expected[3200 + 399 : 6400 + 399] = 0.5
    assert np.allclose(heard - room, expected, atol=1e-5)
