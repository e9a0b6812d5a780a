"""The demonstration's scene and its report, and how reactions are counted."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from device.commands.run import parse_text
from device.config import TextConfig
from export.demo import EVENTS, LENGTH_S, OUT_WAV, PICTURE, RATE_HZ, SCENE_VIDEO, SCENE_WAV, TEXT, draw_timeline, make_scene, report
from export.distill.behaviours import ACTS, WORDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demonstration in which the first cue was answered, the second too late, and a third only in part."""
    path = tmp_path_factory.mktemp("demo")
    cues = make_scene(path)
    word, hand, again = (next(cue for cue in cues if cue.what == what) for what in ("up", "3", "left"))
    ticks = [{"event": "tick", "tick": k, "t_s": round(0.2 * (k + 1), 1), "say": [], "act": "none", "engine_ms": 5.0} for k in range(200)]
    next(t for t in ticks if t["t_s"] > word.end_s).update(act="look_up", say=["ok"])
    next(t for t in ticks if t["t_s"] > hand.due_s)["say"] = ["three"]
    next(t for t in ticks if t["t_s"] > again.end_s)["act"] = "look_left"
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
    assert {cue.kind for cue in cues} == {"word", "hand", "text"} and any(not cue.expected for cue in cues)
    assert [parse_text(line, TextConfig(WORDS, ACTS))[0] for line in (tmp_path / TEXT).read_text().splitlines()] == [
        cue.start_s for cue in cues if cue.kind == "text"
    ]


def test_the_report_tells_what_was_answered(folder: Path) -> None:
    cues = make_scene(folder)
    wanted = sum(bool(cue.expected) for cue in cues)
    assert f"1 of {wanted} cues answered, 1 other reactions in 200 ticks" in report(folder)


def test_the_timeline_is_drawn(folder: Path) -> None:
    assert draw_timeline(folder) == folder / PICTURE
    assert (folder / PICTURE).stat().st_size > 50_000
