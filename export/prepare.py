"""Before a board's companion starts: its engine is built, or the one that is there is checked; every step is a line of the journal.

Runs as root (device/boot/copresence-engine.service), so that the companion can run its engine and not change it. Needs what `compile`
needs; on a machine without TensorRT, ONNX Runtime.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from device.bundle import Bundle
from device.engine import Engine, EngineFailure, OnnxRuntimeEngine, StaleEngine
from device.engine.record import RECORD_NAME
from device.field import board
from device.field.settings import Settings
from device.signature import Trust
from device.tensors import TensorMismatch
from export.errors import ExportError
from export.ticks import CHOICES, TICKS_NAME, difference, run_ticks

CHECK_TICKS = 50  # ten seconds of scene; half a second on the slowest board
AGREEMENT = 0.99  # as `compile` asks of an engine
PROGRESS_S = 5.0  # between two lines while TensorRT builds


class PrepareError(ExportError):
    """This board has no engine that may run. Remedy: in the text."""


def prepare(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """What was verified, which is also left in $RUNTIME_DIRECTORY (or /run/copresence-engine) until the next boot.

    Raises PrepareError, BundleError, EngineError and what else `compile` raises. What was verified since the boot is not verified again.
    """
    trust = Trust.of_machine(settings["bundle.keys"] or None, settings["bundle.state"])
    bundle = Bundle.open(settings["bundle.path"], trust, settings["bundle.unproven"])
    folder = settings.engine_folder()
    what = {
        "bundle": bundle.name,
        "bundle_sha256": bundle.digest,
        "release": board.release(),
        "engine": "onnxruntime" if folder is None else str(folder),
    }
    known = board.read_json(_verified())
    if what.items() <= known.items() and (folder is None or (folder / RECORD_NAME).is_file()):
        say(f"{bundle.name}: verified since the boot")
        return known
    _verified().unlink(missing_ok=True)
    say(f"{bundle.name}: whole, signature {bundle.signature}")
    if folder is None:
        found = _measure(OnnxRuntimeEngine(bundle.graph, bundle.config), bundle)
    else:
        found = _tensorrt(bundle, folder, settings["engine.target"], trust, say)
    _judge(found, bundle, what["engine"])
    agrees = ", ".join(f"{name} {share:.1%}" for name, share in found.get("agreement", {}).items()) or "nothing is stored to compare with"
    say(f"{what['engine']}: {found['p50_ms']:.1f} ms a tick, p99 {found['p99_ms']:.1f}; as stored: {agrees}")
    verified = {**what, **found}
    board.write_json(_verified(), verified)
    return verified


def _tensorrt(bundle: Bundle, folder: Path, target: str, trust: Trust, say: Callable[[str], None]) -> dict[str, Any]:
    from device.engine.tensorrt import TensorRtEngine
    from export.compile import compile_engine

    try:
        if (folder / RECORD_NAME).is_file():
            with TensorRtEngine(folder, bundle.config, bundle.digest) as engine:
                return _measure(engine, bundle)
        say(f"{folder}: there is no engine yet")
    except (StaleEngine, TensorMismatch, EngineFailure) as error:
        say(str(error))
    if not target:
        raise PrepareError("the configuration does not name the board that an engine is to be built for; give 'engine.target'")
    begun_s = time.monotonic()
    compile_engine(bundle.path, target, folder, progress(say), trust)
    say(f"{folder}: built in {time.monotonic() - begun_s:.0f} s")
    with TensorRtEngine(folder, bundle.config, bundle.digest) as engine:
        return _measure(engine, bundle)


def _measure(engine: Engine, bundle: Bundle) -> dict[str, Any]:
    """Times, and the share of ticks with the stored choices where the bundle carries some."""
    engine_ns: list[int] = []

    class Timed:
        inputs, outputs, memory = engine.inputs, engine.outputs, engine.memory

        def run(self) -> None:
            begun_ns = time.perf_counter_ns()
            engine.run()
            engine_ns.append(time.perf_counter_ns() - begun_ns)

    outputs = run_ticks(Timed(), bundle.config, CHECK_TICKS)
    p50_ms, p99_ms = np.percentile(np.array(engine_ns) / 1e6, (50, 99))
    found: dict[str, Any] = {"p50_ms": round(float(p50_ms), 2), "p99_ms": round(float(p99_ms), 2)}
    if TICKS_NAME in bundle.manifest["files"]:
        with np.load(bundle.path / TICKS_NAME) as arrays:
            stored = {name: arrays[name][:CHECK_TICKS] for name in arrays.files}
        agreement = difference({name: outputs[name][: len(stored[name])] for name in stored}, stored)
        found["agreement"] = {name: round(agreement[name], 4) for name in CHOICES}
    return found


def _judge(found: dict[str, Any], bundle: Bundle, engine: str) -> None:
    for name, share in found.get("agreement", {}).items():
        if share < AGREEMENT:
            raise PrepareError(
                f"{engine}: its '{name}' is the one stored in {bundle.name} in {share:.1%} of {CHECK_TICKS} ticks, below {AGREEMENT:.0%}; "
                "export the bundle again, or install the libraries that it was made with"
            )
    if found["p50_ms"] >= bundle.config.tick_ms:
        raise PrepareError(
            f"{engine}: a tick of {bundle.config.tick_ms} ms takes {found['p50_ms']:.0f} ms here; this board needs a smaller model"
        )


def progress(say: Callable[[str], None], now_s: Callable[[], float] = time.monotonic) -> Callable[[str, int, int], None]:
    """TensorRT's progress as lines: each phase when it begins, and where it stands every few seconds."""
    told_phase, told_s = "", 0.0

    def show(phase: str, done: int, steps: int) -> None:
        nonlocal told_phase, told_s
        at_s = now_s()
        if phase != told_phase or at_s - told_s >= PROGRESS_S:
            told_phase, told_s = phase, at_s
            say(f"building: {phase} {done}/{steps}")

    return show


def _verified() -> Path:
    folder = os.environ.get("RUNTIME_DIRECTORY")
    return Path(folder) / board.VERIFIED.name if folder else board.VERIFIED
