"""The record beside a compiled engine: what it was built from, by what and for what; read before the engine is deserialised.

An engine is executable code. Its folder holds engine.json, which lists every other file with its SHA-256 as a bundle's manifest does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from device.bundle import Signature, require_tensors
from device.config import ModelConfig
from device.engine.interface import StaleEngine
from device.tensors import tensor_table

FORMAT = 1  # of the record
RECORD_NAME = "engine.json"
PLAN_NAME = "engine.plan"
TIMING_CACHE_NAME = "timing.cache"
REPORT_NAME = "report.json"

REMEDY = "compile the bundle again on this board with 'copresence-export compile'"


def describe(bundle_sha256: str, config: ModelConfig, tensorrt: str, sm: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The record's values; `tensorrt` is the library's version, `sm` the GPU's compute capability such as '8.7'."""
    return {
        "format": FORMAT,
        "bundle_sha256": bundle_sha256,
        "tensorrt": tensorrt,
        "sm": sm,
        "tensors": [{"name": t.name, "role": t.role, "dtype": t.dtype, "shape": list(t.shape)} for t in tensor_table(config)],
        "files": {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()},
    }


def load_plan(folder: Path, bundle_sha256: str, config: ModelConfig, tensorrt: str, sm: str) -> bytes:
    """The engine's bytes, when everything agrees: bundle, TensorRT version, SM, tensor table and SHA-256.

    Raises StaleEngine or TensorMismatch. What is hashed is what is returned, so that nobody can swap the file in between.
    """
    where = folder / RECORD_NAME
    try:
        record = json.loads(where.read_bytes())
        found = {name: record[name] for name in ("format", "bundle_sha256", "tensorrt", "sm")}
        listed: dict[str, Signature] = {str(t["name"]): (str(t["dtype"]), tuple(t["shape"])) for t in record["tensors"]}
        sha256 = record["files"][PLAN_NAME]["sha256"]
        plan = (folder / PLAN_NAME).read_bytes()
    except OSError as error:
        raise StaleEngine(f"{error.filename}: cannot be read ({error.strerror}); {REMEDY}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise StaleEngine(f"{where} is not the record of an engine ({error!r}); {REMEDY}") from error
    wanted = {"format": FORMAT, "bundle_sha256": bundle_sha256, "tensorrt": tensorrt, "sm": sm}
    for name, value in wanted.items():
        if found[name] != value:
            raise StaleEngine(f"{where}: the engine's '{name}' is {found[name]!r}, here it must be {value!r}; {REMEDY}")
    require_tensors(listed, tensor_table(config), str(where))
    if hashlib.sha256(plan).hexdigest() != sha256:
        raise StaleEngine(f"{folder / PLAN_NAME} is not the file that was compiled (SHA-256 differs); {REMEDY}")
    return plan
