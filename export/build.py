"""Checkpoint to bundle: graph, vocabulary and manifest, proven against the checkpoint's reference ticks, written all or nothing."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from device.bundle import FORMAT, GRAPH_NAME, MANIFEST_NAME, VOCABULARY_NAME, Bundle, NotABundle
from device.engine import Engine, OnnxRuntimeEngine
from device.session import Rings
from device.tensors import tensor_table
from export.checkpoint import Checkpoint, read_checkpoint
from export.errors import ExportError
from export.graph import build_graph
from export.replacing import replacing
from export.ticks import TICKS_NAME, store_ticks

# The largest relative error against PyTorch that a bundle may have: float32 sums in another order.
PARITY_LIMIT = 1e-4
NEAR_SILENCE = 0.01  # of full scale: an error is not measured against less


class BuildError(ExportError):
    """A bundle that could not be made or did not prove itself; the text ends with the remedy."""


def build(checkpoint_path: Path, out: Path) -> dict[str, float]:
    """Build the bundle `out` from a checkpoint folder; the parity numbers, the largest relative error per output.

    Raises CheckpointError, BuildError or OSError; whatever was at `out` before stays until the new bundle is whole.
    """
    checkpoint = read_checkpoint(checkpoint_path)
    if out.exists() and not (out / MANIFEST_NAME).is_file():
        raise BuildError(f"{out}: exists and is not a bundle; give another --out, it will not be overwritten")
    model = build_graph(checkpoint.config, checkpoint.weights)
    try:
        parity = _write(checkpoint, model, out)
    except OSError as error:
        raise BuildError(f"{out}: cannot be written ({error.strerror}); free space there or give another --out") from error
    Bundle.open(out)  # what was written can be read back
    return parity


def _write(checkpoint: Checkpoint, model: onnx.ModelProto, out: Path) -> dict[str, float]:
    with replacing(out) as folder:
        onnx.save(model, folder / GRAPH_NAME)
        text = checkpoint.config.text
        (folder / VOCABULARY_NAME).write_text(json.dumps({"words": text.words, "acts": text.acts}, indent=1) + "\n")
        engine = OnnxRuntimeEngine(folder / GRAPH_NAME, checkpoint.config)
        parity = measure_parity(engine, checkpoint)
        for name, error in parity.items():
            if not error <= PARITY_LIMIT:
                raise BuildError(
                    f"{checkpoint.name}: '{name}' of the graph differs from the reference ticks by {error:.1e} (limit {PARITY_LIMIT:.0e}); "
                    "write the reference again from these weights"
                )
        store_ticks(engine, checkpoint.config, folder / TICKS_NAME)
        (folder / MANIFEST_NAME).write_text(json.dumps(_manifest(checkpoint, folder, parity), indent=1) + "\n")
    return parity


def measure_parity(engine: Engine, checkpoint: Checkpoint) -> dict[str, float]:
    """Largest error of each output over the reference ticks, relative to the output's largest value (words and acts: absolute)."""
    rows = tensor_table(checkpoint.config)
    rings = Rings(checkpoint.config, engine)
    worst = {row.name: 0.0 for row in rows if row.role == "output"}
    reference = checkpoint.reference
    scale = {name: _scale(reference[name]) for name in worst}
    for tick in range(len(reference["mic"])):
        for row in rows:
            if row.role == "input" and row.name not in ("perceive_valid", "present_valid"):
                engine.inputs[row.name][...] = reference[row.name][tick]
        engine.run()
        for name in worst:
            error = np.abs(engine.outputs[name].astype(np.float64) - reference[name][tick].astype(np.float64)).max() / scale[name]
            worst[name] = max(worst[name], float(error))
        rings.absorb(tick)
    return worst


def _scale(values: NDArray[np.generic]) -> float:
    if np.issubdtype(values.dtype, np.integer):
        return 1.0
    return max(float(np.abs(values.astype(np.float64)).max()), NEAR_SILENCE)


def _manifest(checkpoint: Checkpoint, folder: Path, parity: dict[str, float]) -> dict[str, Any]:
    files = {}
    for name in (GRAPH_NAME, VOCABULARY_NAME, TICKS_NAME):
        data = (folder / name).read_bytes()
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    tools = {name: importlib.metadata.version(name) for name in ("copresence", "numpy", "onnx", "onnxruntime", "safetensors")}
    config = checkpoint.config
    return {
        "format": FORMAT,
        "name": checkpoint.name,
        "tick_ms": config.tick_ms,
        "config": config.to_dict(),
        "tensors": [{"name": t.name, "role": t.role, "dtype": t.dtype, "shape": list(t.shape)} for t in tensor_table(config)],
        "files": files,
        "parity": {"reference_ticks": len(checkpoint.reference["mic"]), "relative_error": parity},
        "tools": tools | {"python": platform.python_version()},
    }


def show(bundle: Bundle) -> str:
    """The bundle as a person wants to read it; raises NotABundle for a manifest that lacks what the exporter writes."""
    try:
        return _show(bundle)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"lacks the field {error}" if isinstance(error, KeyError) else str(error)
        raise NotABundle(f"{bundle.path / MANIFEST_NAME} cannot be shown: {reason}; export the bundle again") from error


def _show(bundle: Bundle) -> str:
    from export.quantize.quantize import describe  # which imports this module

    manifest, config = bundle.manifest, bundle.config
    trunk = config.trunk
    quantized = describe(manifest) if "quantized" in manifest else []
    signed = f"by key {bundle.key} as version {bundle.version}, not checked here" if bundle.key else "no"
    lines = [
        f"{manifest['name']}: a bundle of format {manifest['format']}, digest {bundle.digest[:16]}",
        f"  tick      {config.tick_ms} ms, {config.tick_samples} samples, {config.tokens} tokens "
        f"({config.audio_tokens} audio, {config.video_tokens} video, {trunk.summary_tokens} summary)",
        f"  trunk     width {trunk.width}, {trunk.perceive_layers} perceiving layers over {trunk.perceive_window} ticks, "
        f"{trunk.present_layers} present layers over {trunk.present_window} ticks",
        f"  words     {' '.join(config.text.words[1:])}",
        f"  acts      {' '.join(config.text.acts[1:])}",
        f"  built     {', '.join(f'{name} {version}' for name, version in manifest['tools'].items())}",
        *quantized,
        f"  parity    {'float graph, ' if quantized else ''}{manifest['parity']['reference_ticks']} reference ticks, relative error up to "
        + ", ".join(f"{name} {error:.1e}" for name, error in manifest["parity"]["relative_error"].items()),
        f"  signed    {signed}",
        "  files",
        *(f"    {name:16} {entry['bytes']:>12,} bytes  sha256 {entry['sha256'][:16]}…" for name, entry in manifest["files"].items()),
        "  tensors",
        *(f"    {t.role:6} {t.name:18} {t.dtype:8} {'×'.join(map(str, t.shape)):14} {t.units}: {t.meaning}" for t in tensor_table(config)),
    ]
    return "\n".join(lines)
