"""What the tests of quantization share: a small float model as a bundle, and calibration sets made of noise."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from ticks import SMALL, make_model

from device.bundle import FORMAT, GRAPH_NAME, MANIFEST_NAME
from device.calibration import CalibrationRecorder, record_dtype
from device.config import ModelConfig
from device.tensors import tensor_table
from export.graph import build_graph


@functools.cache
def float_model(config: ModelConfig = SMALL) -> onnx.ModelProto:
    weights = {name: value.numpy() for name, value in make_model(config).state_dict().items()}
    return build_graph(config, weights)


def float_bundle(folder: Path, config: ModelConfig = SMALL) -> Path:
    """A bundle of a small model, as `build` would have written it."""
    folder.mkdir(parents=True)
    onnx.save(float_model(config), folder / GRAPH_NAME)
    data = (folder / GRAPH_NAME).read_bytes()
    manifest = {
        "format": FORMAT,
        "name": "small",
        "config": config.to_dict(),
        "tensors": [{"name": t.name, "role": t.role, "dtype": t.dtype, "shape": list(t.shape)} for t in tensor_table(config)],
        "files": {GRAPH_NAME: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}},
        "parity": {"reference_ticks": 0, "relative_error": {}},
        "tools": {},
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return folder


def fake_ticks(count: int, seed: int = 0) -> np.ndarray:
    """Records of noise."""
    rng = np.random.default_rng(seed)
    ticks = np.zeros(count, record_dtype(SMALL))
    ticks["tick"] = np.arange(count)
    ticks["mic"] = 1e-3 * rng.standard_normal(ticks["mic"].shape)
    ticks["frames"] = rng.integers(100, 104, ticks["frames"].shape)
    ticks["frame_age"] = 0.05
    return ticks


def lively() -> np.ndarray:
    """Records in which there is everything that a set must hold."""
    ticks, rng = fake_ticks(240), np.random.default_rng(1)
    for start in range(0, 240, 12):
        ticks["mic"][start : start + 2] = 0.1 * rng.standard_normal(ticks["mic"][:2].shape)
        ticks["voice"][start + 5 : start + 7] = 0.1 * rng.standard_normal(ticks["voice"][:2].shape)
        ticks["frames"][start + 3 : start + 6, :, 40:80, 40:80] = 200
        ticks["said"][start + 5] = 1
    return ticks


def write_set(folder: Path, recordings: list[np.ndarray]) -> Path:
    """A data set of these recordings."""
    for seed, ticks in enumerate(recordings):
        recorder = CalibrationRecorder(folder, SMALL, "digest", seed, patient=True)
        for record in ticks:
            recorder.record(int(record["tick"]), {name: record[name] for name in record.dtype.names or ()})
        recorder.close()
        assert recorder.fault is None
    return folder
