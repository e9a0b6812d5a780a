"""Float bundle and calibration set to quantized bundle, written all or nothing."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from device.bundle import GRAPH_NAME, MANIFEST_NAME, Bundle
from device.engine import OnnxRuntimeEngine
from export.quantize.compare import Difference, ProbeEngine, compare
from export.quantize.placement import Layer, Precision, QuantizeError, find_layers, place
from export.quantize.ranges import Histogram, Range, choose, picture
from export.quantize.recordings import DataSet, outputs_of, progress
from export.quantize.sensitivity import Scan, keep_under_budget, scan, write_scan
from export.replacing import replacing
from export.ticks import TICKS_NAME, store_ticks

REPORT_NAME = "quantization.json"
COMPARED_TICKS = 400  # of the calibration set, for the error written into the report
INPUT_ERROR = 3e-4  # relative squared error that int8 may cost what enters a layer; where it costs more, only the weights are int8


def quantize(
    source: Path, out: Path, precision: Precision, calibration: Path, method: str, scan_folder: Path | None, budget: float | None
) -> Difference:
    """Quantize the float bundle `source` into `out`; how far it is from the float graph on calibration ticks.

    With `scan_folder`, a per-layer scan as picture and table goes there; with `budget`, the layers that cost most stay in FP16 until
    the error is below that share of what the gates allow. Raises BundleError, CalibrationError, QuantizeError or OSError; whatever
    was at `out` before stays until the new bundle is whole.
    """
    bundle = Bundle.open(source)
    if "quantized" in bundle.manifest:
        raise QuantizeError(f"{source} is quantized already; give the float bundle it was made from")
    if out.exists() and not (out / MANIFEST_NAME).is_file():
        raise QuantizeError(f"{out}: exists and is not a bundle; give another --out, it will not be overwritten")
    if out.resolve() == source.resolve():
        raise QuantizeError(f"{out}: is the float bundle itself, which the proof needs; give another --out")
    data = DataSet.open(calibration, bundle.config)
    model = onnx.load(bundle.graph)
    layers = find_layers(model)
    histograms = measure(model, layers, data) if precision == "int8" else {}
    ranges = {name: choose(histogram, method) for name, histogram in histograms.items()}
    chosen: dict[str, Precision] = int8_precisions(layers, ranges) if precision == "int8" else {y.name: precision for y in layers}
    scales = {name: found.scale for name, found in ranges.items()}
    found: Scan | None = None
    if scan_folder is not None or budget is not None:
        found = scan(model, data, chosen, scales, precision)
        if scan_folder is not None:
            write_scan(found, scan_folder)
        if budget is not None:
            chosen = keep_under_budget(model, data, chosen, scales, found, budget)
    placed = place(model, chosen, scales)
    reference, ticks = (outputs_of(graph, data, COMPARED_TICKS, what) for graph, what in ((model, "float"), (placed, "quantized")))
    difference = compare(reference, ticks, bundle.config)
    report = _report(layers, chosen, ranges, histograms, difference, found)
    _write(bundle, placed, out, precision, data, report)
    Bundle.open(out, unproven=True)  # what was written can be read back
    return difference


def int8_precisions(layers: list[Layer], ranges: Mapping[str, Range]) -> dict[str, Precision]:
    """By weight: `int8`, or `int8-weights` for a layer with an input that loses more than INPUT_ERROR by its range."""
    lost = {layer.name: max(ranges[name].error for name in layer.inputs) for layer in layers}
    return {name: "int8-weights" if error > INPUT_ERROR else "int8" for name, error in lost.items()}


def measure(model: onnx.ModelProto, layers: list[Layer], data: DataSet) -> dict[str, Histogram]:
    """Histograms of what enters the layers over the whole set, by tensor."""
    histograms = {name: Histogram() for layer in layers for name in layer.inputs}
    engine = ProbeEngine(model, data.config, histograms)
    for _ in progress(data.play(engine), len(data), "calibration"):
        for name, values in engine.probes.items():
            histograms[name].add(values)
    return histograms


def _report(
    layers: list[Layer],
    chosen: Mapping[str, Precision],
    ranges: Mapping[str, Range],
    histograms: Mapping[str, Histogram],
    difference: Difference,
    found: Scan | None,
) -> dict[str, Any]:
    """Everything that was chosen, and why; JSON-ready."""
    activations = {
        name: {**found._asdict(), "histogram": picture(histograms[name]), "peak": histograms[name].peak} for name, found in ranges.items()
    }
    return {
        "difference": asdict(difference),
        "layers": [
            {"weight": y.name, "shape": list(y.shape), "precision": chosen[y.name], "nodes": list(y.nodes), "inputs": list(y.inputs)}
            for y in layers
        ],
        "activations": activations,
        "sensitivity": None if found is None else found.to_dict(),
    }


def _write(bundle: Bundle, model: onnx.ModelProto, out: Path, precision: Precision, data: DataSet, report: dict[str, Any]) -> None:
    try:
        with replacing(out) as folder:
            for name in bundle.manifest["files"]:
                if name not in (GRAPH_NAME, TICKS_NAME):
                    (folder / name).write_bytes((bundle.path / name).read_bytes())
            onnx.save(model, folder / GRAPH_NAME)
            store_ticks(OnnxRuntimeEngine(folder / GRAPH_NAME, bundle.config), bundle.config, folder / TICKS_NAME)
            (folder / REPORT_NAME).write_text(json.dumps(report) + "\n")
            (folder / MANIFEST_NAME).write_text(json.dumps(_manifest(bundle, folder, precision, data, report), indent=1) + "\n")
    except OSError as error:
        raise QuantizeError(f"{out}: cannot be written ({error.strerror}); free space there or give another --out") from error


def _manifest(bundle: Bundle, folder: Path, precision: Precision, data: DataSet, report: dict[str, Any]) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for layer in report["layers"]:
        counts[layer["precision"]] = counts.get(layer["precision"], 0) + 1
    tools = bundle.manifest["tools"] | {name: importlib.metadata.version(name) for name in ("numpy", "onnx", "onnxruntime")}
    files = {}
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        files[file.name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return bundle.manifest | {
        "files": files,
        "tools": tools,
        "quantized": {
            "precision": precision,
            "of": {"name": bundle.name, "digest": bundle.digest, "graph_sha256": bundle.manifest["files"][GRAPH_NAME]["sha256"]},
            "calibration": {"sha256": data.digest, "ticks": len(data), "recordings": len(data.recordings), "found": data.found},
            "layers": counts,
            "difference": report["difference"],
        },
    }


def describe(manifest: Mapping[str, Any]) -> list[str]:
    """Lines for `show`: what was quantized, on what data, and the proof."""
    q = manifest["quantized"]
    found = ", ".join(f"{count} {name}" for name, count in q["calibration"]["found"].items())
    lines = [
        f"  quantized {q['precision']} from {q['of']['name']} {q['of']['digest'][:16]}, layers: "
        + ", ".join(f"{count} {name}" for name, count in q["layers"].items()),
        f"  calibrated on {q['calibration']['ticks']} ticks, set {q['calibration']['sha256'][:16]}: {found}",
        f"  on those ticks {Difference(**q['difference']).row()}",
    ]
    gates = manifest.get("proof", {}).get("gates", ())
    lines += [f"  gate      {g['gate']}: {g['value']:.3f} {g['unit']} (limit {g['limit']})" for g in gates]
    return lines if gates else [*lines, "  gate      none passed yet: run 'copresence-export verify'"]
