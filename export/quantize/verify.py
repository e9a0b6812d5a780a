"""The proof that a quantized bundle still behaves: both graphs live through the same scenes, and the gates decide."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from device.bundle import GRAPH_NAME, MANIFEST_NAME, Bundle
from device.calibration import RECORDED
from device.config import ModelConfig
from device.engine import Buffers, Engine, OnnxRuntimeEngine
from device.positions import clock_features, rope_table, tick_noise
from device.session import Rings
from export.distill.clips import Split
from export.distill.corpus import Corpus
from export.errors import ExportError
from export.quantize.closed_loop import Board, Pair, live, tasks
from export.quantize.compare import KEPT, Difference, compare, memory_error
from export.quantize.gates import judge
from export.scoreboard.board import SCENE_S, Player, Task
from export.scoreboard.play import play

_LONG_RUN_FROM = 100_000  # its scenes are none of those of the closed loop
_NAMED = 3  # behaviours that a refusal names


class ProofFailed(ExportError):
    """The quantized graph does not behave like the float one; the text has every gate and the remedy."""


class _Couple:
    """The two graphs and the scenes; one in every process."""

    def __init__(self, reference: Path, quantized: Path, data: Path, split: Split, seed: int) -> None:
        self.player = Player(reference, data, split, seed, ())
        bundles = [Bundle.open(path, unproven=True) for path in (reference, quantized)]
        self.graphs = [bundle.graph for bundle in bundles]
        self.engines = [OnnxRuntimeEngine(bundle.graph, bundle.config) for bundle in bundles]

    def live(self, task: Task) -> Pair:
        scene = self.player.scene(task)
        reference, quantized = (live(scene, self.player.config, engine, task.number) for engine in self.engines)
        return Pair(task, (reference, quantized))


class _LongRun:
    """Both graphs on the same inputs for very long: each keeps its own memory, and none decides what comes next."""

    def __init__(self, config: ModelConfig, engines: Iterable[Engine], seed: int) -> None:
        self._config, self._engines, self._seed = config, list(engines), seed
        self._rings = [Rings(config, engine) for engine in self._engines]
        self._kept: list[dict[str, list[np.ndarray]]] = [{name: [] for name in KEPT} for _ in self._engines]
        self._memory: list[tuple[float, float]] = []

    def __len__(self) -> int:
        return len(self._memory)

    def step(self, inputs: Buffers) -> None:
        """One tick with these RECORDED inputs, whatever tick they come from."""
        c, tick = self._config, len(self)
        follows = {"clock": clock_features(c, tick), "rope": rope_table(c, tick), "noise": tick_noise(c, self._seed, tick)}
        for engine, rings, kept in zip(self._engines, self._rings, self._kept, strict=True):
            for name in RECORDED:
                engine.inputs[name][...] = inputs[name]
            for name, value in follows.items():
                engine.inputs[name][...] = value
            engine.run()
            rings.absorb(tick)
            for name, values in kept.items():
                values.append(engine.outputs[name].copy())
        self._memory.append(memory_error(self._engines[0].outputs, self._engines[1].outputs))

    def difference(self) -> Difference:
        reference, other = ({name: np.stack(values) for name, values in kept.items()} for kept in self._kept)
        return compare(reference, other, self._config)

    def memory(self) -> tuple[float, float]:
        """Relative RMS error of the keys and values in the first and in the last tenth, in %."""
        memory, tenth = np.array(self._memory), max(len(self) // 10, 1)
        first, last = (100 * float(np.sqrt(part[:, 0].sum() / max(part[:, 1].sum(), 1e-30))) for part in (memory[:tenth], memory[-tenth:]))
        return first, last


def verify(bundle: Path, against: Path, data: Path, split: Split, scenes: int, ticks: int, seed: int, jobs: int) -> dict[str, Any]:
    """Prove `bundle` against the float bundle it was made from, and write the proof into its manifest; returns the proof.

    In closed loop at least `scenes` that ask for each behaviour, `ticks` in the long run. Raises ProofFailed, with nothing
    written, when a gate is not passed, and ExportError or BundleError when the two bundles do not belong together.
    """
    quantized, reference = Bundle.open(bundle, unproven=True), Bundle.open(against)
    _require_pair(quantized, reference)
    arguments = (against, bundle, data, split, seed)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, arguments) as pool:
        pairs: list[Pair] = []
        while todo := tasks(pairs, scenes):
            pairs += _progress(pool.map(_live, todo), len(todo), "closed loop", "scene")
    couple = _Couple(*arguments)
    run = _long_run(couple, reference.config, ticks, seed)
    values, details = _measure(pairs, run)
    precision = quantized.manifest["quantized"]["precision"]
    proof = {
        "against": reference.digest,
        "graph_sha256": quantized.manifest["files"][GRAPH_NAME]["sha256"],
        "data": {"split": split, "sha256": corpus_digest(couple.player.corpus)},
        "seed": seed,
        "gates": judge(values, precision),
        **details,
        "tools": {name: importlib.metadata.version(name) for name in ("copresence", "numpy", "onnxruntime")}
        | {"python": platform.python_version(), "machine": platform.machine()},
    }
    if not all(gate["passed"] for gate in proof["gates"]):
        raise ProofFailed(f"{bundle} is not proven: {_refusal(proof)}")
    _write(quantized, proof)
    return proof


def _require_pair(quantized: Bundle, reference: Bundle) -> None:
    if "quantized" not in quantized.manifest:
        raise ExportError(
            f"{quantized.path} is not quantized: there is nothing to prove; give a bundle made by 'copresence-export quantize'"
        )
    made_from = quantized.manifest["quantized"]["of"]
    if reference.manifest["files"][GRAPH_NAME]["sha256"] != made_from["graph_sha256"]:
        raise ExportError(
            f"{quantized.path} was not made from {reference.path}: its float graph was {made_from['graph_sha256'][:16]} "
            f"('{made_from['name']}'); give that bundle as --against, or quantize {reference.path} anew"
        )


def _long_run(couple: _Couple, config: ModelConfig, ticks: int, seed: int) -> _LongRun:
    """The float graph lives through scenes, and what it met goes to both."""
    engines = [OnnxRuntimeEngine(path, config) for path in couple.graphs]
    run = _LongRun(config, engines, seed)
    with tqdm(total=ticks, desc="long run", unit="tick", leave=False, disable=not sys.stderr.isatty()) as bar:

        def step(_: int, inputs: Buffers) -> None:
            if len(run) < ticks:
                run.step(inputs)
                bar.update()

        number = _LONG_RUN_FROM
        while len(run) < ticks:
            scene = couple.player.scene(Task("mixture", number, SCENE_S))
            play(scene, config, couple.engines[0], number, step)
            number += 1
    return run


def _measure(pairs: list[Pair], run: _LongRun) -> tuple[dict[str, float], dict[str, Any]]:
    """The values of the gates, and what else is worth keeping."""
    board = Board(pairs)
    loss, low, high = board.loss()
    say, act = ([np.concatenate([getattr(pair.lives[i], name) for pair in pairs]) for i in (0, 1)] for name in ("say", "act"))
    same_say, same_act = (say[0] == say[1]).all(axis=1), act[0] == act[1]
    active = say[0].any(axis=1) | say[1].any(axis=1) | (act[0] != 0) | (act[1] != 0)
    difference, (first, last) = run.difference(), run.memory()
    minutes = sum(pair.task.seconds for pair in pairs) / 60
    values = {
        "scenes": float(len(pairs)),
        "scoreboard loss": loss,
        "say agreement": 100 * float(same_say.mean()),
        "act agreement": 100 * float(same_act.mean()),
        "long run": float(len(run)),
        "mel distortion": difference.mel_db,
        "memory error": last,
        "memory drift": last / max(first, 1e-9),
    }
    details = {
        "closed_loop": {
            "scenes": len(pairs),
            "ticks": len(same_say),
            "score": dict(zip(("float", "quantized"), board.scores(), strict=True)),
            "loss_interval_95": [low, high],
            "behaviours": board.behaviours(),
            "trials": board.trials(),
            "agreement_where_either_reacts": 100 * float((same_say & same_act)[active].mean()) if active.any() else 100.0,
            "false_per_minute": {
                name: sum(len(pair.lives[i].verdict.false) for pair in pairs) / minutes for i, name in enumerate(("float", "quantized"))
            },
        },
        "long_run": asdict(difference) | {"memory_error_first_tenth": first, "memory_error_last_tenth": last},
    }
    return values, details


def corpus_digest(corpus: Corpus) -> str:
    """SHA-256 over every recording and photograph of one side of the split."""
    digest = hashlib.sha256()
    voices = corpus.real
    for clip in [*(clip for word in sorted(voices.words) for clip in voices.words[word]), *voices.others]:
        digest.update(clip.samples.tobytes())
    for noise in corpus.noise:
        digest.update(noise.tobytes())
    for hand in sorted(corpus.hands):
        for picture, _ in corpus.hands[hand]:
            digest.update(picture.tobytes())
    return digest.hexdigest()


def table(proof: dict[str, Any]) -> str:
    """The gates, as Markdown."""
    low, high = proof["closed_loop"]["loss_interval_95"]
    lines = ["| gate | measured | limit | |", "|---|---:|---:|---|"]
    for gate in proof["gates"]:
        sign = "≤" if gate["at_most"] else "≥"
        beside = f" ({low:.2f} … {high:.2f})" if gate["gate"] == "scoreboard loss" else ""
        verdict = "passed" if gate["passed"] else "failed"
        lines.append(f"| {gate['gate']}, {gate['unit']} | {gate['value']:.3f}{beside} | {sign} {gate['limit']:g} | {verdict} |")
    return "\n".join(lines)


def _refusal(proof: dict[str, Any]) -> str:
    """Which gates were not passed, all of them with their values, which behaviours lost most, and what to do."""
    loop = proof["closed_loop"]
    names = ", ".join(gate["gate"] for gate in proof["gates"] if not gate["passed"])
    low, high = loop["loss_interval_95"]
    lost = sorted(loop["behaviours"].items(), key=lambda rates: rates[1][1] - rates[1][0])
    most = [
        f"{name} {before:.1f} → {after:.1f} % of {loop['trials'][name]} trials" for name, (before, after) in lost[:_NAMED] if after < before
    ]
    return (
        f"{names}. {'; '.join(map(_line, proof['gates']))}. "
        f"Scoreboard loss, 95 %: {low:.2f} … {high:.2f}; most in {', '.join(most) or 'none'}. "
        "No proof was written; quantize with --budget or another --precision, or give more --scenes and --ticks where those are few"
    )


def _line(gate: dict[str, Any]) -> str:
    return f"{gate['gate']} {gate['value']:.3f} {gate['unit']} ({'at most' if gate['at_most'] else 'at least'} {gate['limit']:g})"


def _write(bundle: Bundle, proof: dict[str, Any]) -> None:
    scratch = bundle.path / f".{MANIFEST_NAME}"
    scratch.write_text(json.dumps(bundle.manifest | {"proof": proof}, indent=1) + "\n")
    scratch.replace(bundle.path / MANIFEST_NAME)
    Bundle.open(bundle.path)  # what was written can be read back, proof and all


def _progress(items: Iterable[Pair], total: int, what: str, unit: str) -> Iterable[Pair]:
    return tqdm(items, what, total, unit=unit, leave=False, disable=not sys.stderr.isatty())


_couple: list[_Couple] = []


def _begin(*arguments: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    _couple.append(_Couple(*arguments))


def _live(task: Task) -> Pair:
    return _couple[0].live(task)
