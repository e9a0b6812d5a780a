"""A bundle to an engine, on the board that will run it: built, read back, warmed up, compared, and put in place in one step.

Needs tensorrt, pycuda and numpy (and tomli where Python has no tomllib), and neither torch nor onnx.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from device.bundle import Bundle
from device.engine.cuda import Gpu
from device.engine.record import PLAN_NAME, RECORD_NAME, REPORT_NAME, TIMING_CACHE_NAME, describe
from device.engine.tensorrt import TensorRtEngine, import_tensorrt
from device.signature import Trust
from export.replacing import replacing
from export.targets import Target, find_target
from export.tensorrt_builder import Built, CompileError, build_plan, show_bar
from export.ticks import CHOICES, TICKS_NAME, difference, run_ticks

QUANTIZATION_NAME = "quantization.json"  # what `quantize` writes: which nodes were to run in which precision
AGREEMENT = 0.99  # share of ticks in which `say` and `act` must be those of ONNX Runtime
WARM_UP_TICKS = 50
# Bits of the narrowest input that a layer of each precision must have.
BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int8-weights": 16, "int4-weights": 16, "fp8": 8, "nvfp4": 4}
# How the inspector calls the types, in its own many words ("Row major linear FP16 format", "Half", "Float").
_WIDTHS = ((4, r"int4|fp4"), (8, r"int8|fp8"), (16, r"fp16|half|bf16|bfloat16"), (32, r"fp32|float|int32"))


def compile_engine(
    path: Path,
    target_name: str,
    out: Path | None = None,
    show: Callable[[str, int, int], None] = show_bar,
    trust: Trust | None = None,
) -> Path:
    """The engine folder; an engine that was there stays until the new one has proven itself.

    Raises CompileError, TargetError, BundleError or EngineError.
    """
    bundle = Bundle.open(path, trust or Trust.of_machine())  # a board with keys compiles what it would run, and nothing else
    target, precision = find_target(target_name), str(bundle.manifest.get("quantized", {}).get("precision", "fp32"))
    target.require(precision)
    out = out or path.with_name(f"{path.name}.{target.name}.engine")
    if out.exists() and not (out / RECORD_NAME).is_file():
        raise CompileError(f"{out}: exists and is not an engine; give another --out, it will not be overwritten")
    old_cache = out / TIMING_CACHE_NAME
    timing_cache = old_cache.read_bytes() if old_cache.is_file() else b""
    gpu = Gpu()
    try:
        _require_board(target, gpu)
        built = build_plan(bundle.graph.read_bytes(), precision, timing_cache, show)
    finally:
        gpu.close()
    layers = require_precisions(built, wanted_precisions(bundle))
    try:
        with replacing(out) as folder:
            _write(bundle, target, precision, built, layers, folder)
    except OSError as error:
        raise CompileError(f"{out}: cannot be written ({error.strerror}); free space there or give another --out") from error
    return out


def _require_board(target: Target, gpu: Gpu) -> None:
    if gpu.sm != target.sm:
        raise CompileError(
            f"this is {gpu.name} (SM {gpu.sm}), and {target.board} has SM {target.sm}; compile on that board, or name this one"
        )


def _write(bundle: Bundle, target: Target, precision: str, built: Built, layers: list[dict[str, str]], folder: Path) -> None:
    files = {PLAN_NAME: built.plan, TIMING_CACHE_NAME: built.timing_cache}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    version = str(import_tensorrt().__version__)

    def record() -> None:
        values = describe(bundle.digest, bundle.config, version, target.sm, files)
        values |= {"bundle": bundle.name, "target": target.name, "precision": precision}
        (folder / RECORD_NAME).write_text(json.dumps(values, indent=1) + "\n")

    record()  # for the device's own reader, through which the engine proves itself
    report = {"tensorrt": version, "target": target.name, "precision": precision, "layers": layers, **_prove(bundle, folder)}
    files[REPORT_NAME] = (json.dumps(report, indent=1) + "\n").encode()
    (folder / REPORT_NAME).write_bytes(files[REPORT_NAME])
    record()


def _prove(bundle: Bundle, folder: Path) -> dict[str, Any]:
    """Launch times after a warm-up, and the difference from what ONNX Runtime put out; raises CompileError."""
    stored = bundle.path / TICKS_NAME
    with TensorRtEngine(folder, bundle.config, bundle.digest) as engine:
        times_ms = []
        for tick in range(2 * WARM_UP_TICKS):
            engine.run()
            if tick >= WARM_UP_TICKS:
                times_ms.append(engine.device_ms)
        p50, p99 = np.percentile(times_ms, (50, 99))
        proof: dict[str, Any] = {"device_ms": {"p50": float(p50), "p99": float(p99)}, "graph_captured": engine.captured}
        if TICKS_NAME not in bundle.manifest["files"]:
            return proof | {"difference": None}
        with np.load(stored) as arrays:
            reference = dict(arrays)
        found = difference(run_ticks(engine, bundle.config, len(reference["say"])), reference)
    for name in CHOICES:
        if found[name] < AGREEMENT:
            raise CompileError(
                f"{bundle.name}: '{name}' of the engine is ONNX Runtime's in {found[name]:.1%} of {len(reference['say'])} ticks, "
                f"below {AGREEMENT:.0%}; keep more layers in floating point and export again"
            )
    return proof | {"difference": found, "ticks": len(reference["say"])}


def wanted_precisions(bundle: Bundle) -> dict[str, str]:
    """Precision by node name; only what was quantized is in it."""
    if QUANTIZATION_NAME not in bundle.manifest["files"]:
        return {}
    layers = json.loads((bundle.path / QUANTIZATION_NAME).read_text(encoding="utf-8"))["layers"]
    return {node: layer["precision"] for layer in layers for node in layer["nodes"] if layer["precision"] in BITS}


def require_precisions(built: Built, wanted: dict[str, str]) -> list[dict[str, str]]:
    """Name, type and narrowest input of every layer; raises CompileError for a node that came out wider than it was to."""
    rows: list[dict[str, str]] = []
    bits_of: dict[str, int] = {}
    for layer in built.layers:
        if not isinstance(layer, dict):
            raise CompileError("the engine inspector tells no precisions; compile again with a TensorRT that does")
        kinds = [str(tensor.get("Format/Datatype", "")) for tensor in layer.get("Inputs", ())]
        bits = min((b for b in map(_bits, kinds) if b), default=0)
        rows.append({"name": str(layer.get("Name", "")), "type": str(layer.get("LayerType", "")), "bits": str(bits or "?")})
        for node in _nodes(layer):
            bits_of[node] = min(bits or 64, bits_of.get(node, 64))
    for node, precision in wanted.items():
        if node not in bits_of:
            raise CompileError(
                f"'{node}' was to run in {precision}, and the engine does not tell what became of it; keep it in floating point"
            )
        if bits_of[node] > BITS[precision]:
            raise CompileError(
                f"'{node}' was to run in {precision} and came out with {bits_of[node]} bits; keep it in floating point, or update JetPack"
            )
    return rows


def _bits(kind: str) -> int:
    return next((bits for bits, pattern in _WIDTHS if re.search(pattern, kind, re.IGNORECASE)), 0)


def _nodes(layer: dict[str, Any]) -> set[str]:
    """Names of the ONNX nodes that a layer was made from."""
    told = re.findall(r"\[ONNX Layer: ([^\]]+)\]", str(layer.get("Metadata", "")))
    return {*told, *str(layer.get("Name", "")).split(" + ")}
