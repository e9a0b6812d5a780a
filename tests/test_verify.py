"""The proof: what is counted, which pairs are refused, and that only a bundle that passes gets one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized import float_bundle, float_model, lively, write_set
from ticks import SMALL

from device.bundle import MANIFEST_NAME, Bundle
from device.config import ModelConfig
from export import cli
from export.distill.behaviours import ACTS, WORDS, Trial
from export.quantize import closed_loop
from export.quantize.closed_loop import GROUPS, Board, Life, Pair, tasks
from export.quantize.compare import ProbeEngine
from export.quantize.gates import GATES, Gate, judge
from export.quantize.verify import _LongRun, _measure, _refusal, corpus_digest
from export.scoreboard.board import SCENE_S, STOPPED, Task
from export.scoreboard.report import BEHAVIOURS
from export.scoreboard.score import HIT, MISSED, Outcome, Verdict

CONFIG = ModelConfig.from_dict(SMALL.to_dict() | {"text": {"words": WORDS, "acts": ACTS}})


def _verdict(behaviour: str, hits: list[int]) -> Verdict:
    return Verdict([Outcome(Trial(behaviour, 0.0, ()), 0, HIT if hit else MISSED, None, False) for hit in hits], [], 0.0, 0, [], [])


def _pair(hits: tuple[list[int], list[int]], say: np.ndarray | None = None) -> Pair:
    """A scene in which `act` was asked for: 1 for each hit, for the float and the quantized graph."""
    verdicts = [_verdict("act", half) for half in hits]
    quiet = np.zeros((10, 2), np.int32)
    lives = [Life(verdict, quiet if i == 0 or say is None else say, np.zeros(10, np.int32)) for i, verdict in enumerate(verdicts)]
    return Pair(Task("nothing", 0, 2.0), (lives[0], lives[1]))


def test_the_loss_is_in_points_and_its_interval_comes_from_the_same_scenes_for_both() -> None:
    pairs = [_pair(([1, 1], [1, 1])) for _ in range(40)] + [_pair(([1], [0])) for _ in range(20)]
    loss, low, high = Board(pairs).loss()
    assert loss == pytest.approx(20.0) and 10 < low < 20 < high < 32
    equal = [_pair(([1, 0], [1, 0])) for _ in range(30)]
    assert Board(equal).loss() == (0.0, 0.0, 0.0)  # however varied the scenes: what both do alike is no difference


def _asked(task: Task, both: set[str], one: set[str]) -> Pair:
    """A scene in which these behaviours were asked for of both graphs, and of the float one alone."""
    halves = [Verdict([o for name in names for o in _verdict(name, [1]).outcomes], [], 0.0, 0, [], []) for names in (both | one, both)]
    lives = [Life(half, np.zeros((1, 2), np.int32), np.zeros(1, np.int32)) for half in halves]
    return Pair(task, (lives[0], lives[1]))


def test_scenes_are_played_until_each_behaviour_was_asked_of_both_graphs_often_enough() -> None:
    """Every behaviour weighs the same in the loss: with three trials, one of them would be two points of it."""
    first = tasks([], 2)
    assert Counter(task.group for task in first) == dict.fromkeys(GROUPS, 2) and len(set(first)) == len(first)
    every = set(BEHAVIOURS)
    assert tasks([_asked(task, every, set()) for task in first], 2) == []
    pairs = [_asked(task, every - {"cancel", "yield", "hold"}, {"cancel"}) for task in first]
    pairs[0] = _asked(first[0], every - {"yield"}, set())
    assert tasks(pairs, 2) == [Task("recite", number, SCENE_S) for number in (2, 3)] + [Task(STOPPED, 2, SCENE_S)]
    assert tasks([pairs[0]] * 9, 2), "the same scene again is no other scene"
    mute = [_asked(Task(group, number, SCENE_S), every - {"recall"}, set()) for group in GROUPS for number in range(15)]
    assert tasks(mute, 2) == [Task("recall", number, SCENE_S) for number in (15, 16)]
    mute.append(_asked(Task("recall", 15, SCENE_S), every - {"recall"}, set()))
    assert tasks(mute, 2) == [], "who never says a digit is never asked for the last: that ends too"


def _long_run(other: ProbeEngine, ticks: int) -> _LongRun:
    """The float graph and `other` over the same `ticks` inputs."""
    run = _LongRun(SMALL, [ProbeEngine(float_model(), SMALL), other], 0)
    for record in lively()[:ticks]:
        run.step({name: record[name] for name in record.dtype.names or ()})
    return run


def test_a_refusal_names_the_interval_and_what_was_lost() -> None:
    run = _long_run(ProbeEngine(float_model(), SMALL), 10)
    values, details = _measure([_pair(([1], [1])) for _ in range(15)] + [_pair(([1], [0])) for _ in range(5)], run)
    reason = _refusal({"gates": judge(values | {"scenes": 100.0, "long run": 3000.0}, "int8"), **details})
    assert reason.startswith("scoreboard loss. scenes 100.000") and "scoreboard loss 25.000 points (at most 1)" in reason
    low, high = details["closed_loop"]["loss_interval_95"]
    assert f"95 %: {low:.2f} … {high:.2f}; most in act 100.0 → 75.0 % of 20 trials. No proof was written" in reason


def test_every_tick_counts_in_the_agreement() -> None:
    say = np.zeros((10, 2), np.int32)
    say[3, 1] = 5
    run = _long_run(ProbeEngine(float_model(), SMALL), 10)
    values, details = _measure([_pair(([1], [1])), _pair(([1], [1]), say)], run)
    assert values["say agreement"] == pytest.approx(95.0) and values["act agreement"] == 100.0
    assert details["closed_loop"]["agreement_where_either_reacts"] == 0.0
    assert values["mel distortion"] == values["memory error"] == 0.0  # the same graph twice
    assert values["long run"] == 10 and values.keys() == GATES.keys()


def test_memory_that_drifts_apart_shows_at_the_end() -> None:
    class Drifting(ProbeEngine):
        launches = 0

        def run(self) -> None:
            super().run()
            self.launches += 1
            self.outputs["new_key_0"][...] *= 1 + 1e-3 * self.launches

    first, last = _long_run(Drifting(float_model(), SMALL), 40).memory()
    assert last > 2 * first > 0


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    data = write_set(folder / "set", [lively()])
    float_bundle(folder / "float", CONFIG)
    float_bundle(folder / "other", SMALL)
    assert (
        cli.main(["quantize", str(folder / "float"), "--precision", "fp16", "--calibration", str(data), "--out", str(folder / "fp16")]) == 0
    )
    return folder


@pytest.mark.parametrize(
    ("bundle", "against", "message"),
    [("float", "float", "nothing to prove"), ("fp16", "other", "was not made from"), ("fp16", "fp16", "no proof")],
)
def test_a_pair_that_does_not_belong_together_is_refused(
    bundles: Path, bundle: str, against: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(bundles / bundle), "--against", str(bundles / against), "--data", str(bundles)]) == 2
    assert message in capsys.readouterr().err


def test_only_what_passes_every_gate_gets_a_proof(
    bundles: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With people of the test split; a model of random weights, which does the same in both precisions."""
    monkeypatch.setattr(closed_loop, "GROUPS", ("mixture", "count"))
    monkeypatch.setattr(closed_loop, "lacking", lambda *_: {})
    arguments = ["verify", str(bundles / "fp16"), "--against", str(bundles / "float"), "--data", str(data_root), "--jobs", "1"]
    arguments += ["--scenes", "1", "--ticks", "200"]
    before = (bundles / "fp16" / MANIFEST_NAME).read_bytes()
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "not proven: scenes, long run." in error and "No proof was written" in error
    assert (bundles / "fp16" / MANIFEST_NAME).read_bytes() == before
    for name, enough in (("scenes", 2.0), ("long run", 200.0)):
        monkeypatch.setitem(GATES, name, Gate("", False, dict.fromkeys(("fp16", "int8"), enough), ""))
    assert cli.main(arguments) == 0
    assert "| say agreement, % of ticks | 100.000 | ≥ 99.5 | passed |" in capsys.readouterr().out
    proof: dict[str, Any] = Bundle.open(bundles / "fp16").manifest["proof"]
    assert proof["closed_loop"]["scenes"] == 2 and proof["long_run"]["ticks"] == 200
    assert proof["against"] == Bundle.open(bundles / "float").digest and len(proof["data"]["sha256"]) == 64
    assert cli.main(["show", str(bundles / "fp16")]) == 0
    assert "gate      say agreement: 100.000" in capsys.readouterr().out


def test_the_digest_of_the_people_depends_on_every_one(corpus) -> None:  # type: ignore[no-untyped-def]
    before = corpus_digest(corpus)
    clip = corpus.real.others[0]
    kept = clip.samples[0]
    clip.samples[0] += 0.01
    try:
        assert corpus_digest(corpus) != before
    finally:
        clip.samples[0] = kept
    assert corpus_digest(corpus) == before
