"""The record beside a compiled engine: what it was built from, by what and for what; read before the engine is deserialised.

An engine is executable code. Its folder holds engine.json, which lists every other file with its SHA-256 as a bundle's manifest does.
A machine that trusts keys (device/signature.py) takes an engine only from one of them, by `engine.sig`, or from its own `compile`, which
keeps the SHA-256 of the record in the state folder. Both are looked at before the record is parsed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from device.bundle import Signature, require_tensors
from device.config import ModelConfig
from device.engine.interface import StaleEngine
from device.signature import BadSignature, Trust, read_bounded
from device.tensors import tensor_table

FORMAT = 1  # of the record
RECORD_NAME = "engine.json"
PLAN_NAME = "engine.plan"
TIMING_CACHE_NAME = "timing.cache"
REPORT_NAME = "report.json"
SIGNATURE_NAME = "engine.sig"  # as a bundle's manifest.sig, over engine.json
OWN_NAME = "own-engines"  # in the state folder: SHA-256 of the records that were made here, one a line
OWN_MAX = 100  # the newest
_SMALL_BYTES = 1 << 16

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


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise StaleEngine(f"{file}: cannot be read ({error.strerror}); {REMEDY}") from error


def remember_own(record: bytes, trust: Trust) -> None:
    """This machine has made the engine of `record`; raises OSError."""
    folder = trust.memory.folder
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*_own(folder), hashlib.sha256(record).hexdigest()][-OWN_MAX:]
    descriptor, scratch = tempfile.mkstemp(prefix=f".{OWN_NAME}.", dir=folder)
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(descriptor)
        os.replace(scratch, folder / OWN_NAME)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise


def _own(folder: Path) -> list[str]:
    try:
        return read_bounded(folder / OWN_NAME, _SMALL_BYTES).decode("ascii").split()
    except (OSError, ValueError):
        return []  # none that could be vouched for


def _require_trust(record: bytes, folder: Path, trust: Trust) -> None:
    """Raises Unsigned, UnknownKey or BadSignature."""
    if hashlib.sha256(record).hexdigest() in _own(trust.memory.folder):
        return
    where = folder / SIGNATURE_NAME
    signature: bytes | None = None
    with contextlib.suppress(FileNotFoundError):
        try:
            signature = read_bounded(where, _SMALL_BYTES)
        except ValueError as error:
            raise BadSignature(f"{where}: {error}; sign the engine again with 'copresence-export sign'") from error
    trust.keys.verify(record, signature, where, "engine")


def load_plan(folder: Path, bundle_sha256: str, config: ModelConfig, tensorrt: str, sm: str, trust: Trust | None = None) -> bytes:
    """The engine's bytes, when everything agrees: signature, bundle, TensorRT version, SM, tensor table and SHA-256.

    Raises StaleEngine or TensorMismatch, and what TrustedKeys.verify raises. What is hashed is what is returned, so that nobody can swap
    the file in between.
    """
    where = folder / RECORD_NAME
    written = _read(where)
    if trust:
        _require_trust(written, folder, trust)
    try:
        record = json.loads(written)
        found = {name: record[name] for name in ("format", "bundle_sha256", "tensorrt", "sm")}
        listed: dict[str, Signature] = {str(t["name"]): (str(t["dtype"]), tuple(t["shape"])) for t in record["tensors"]}
        sha256 = record["files"][PLAN_NAME]["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise StaleEngine(f"{where} is not the record of an engine ({error!r}); {REMEDY}") from error
    plan = _read(folder / PLAN_NAME)
    wanted = {"format": FORMAT, "bundle_sha256": bundle_sha256, "tensorrt": tensorrt, "sm": sm}
    for name, value in wanted.items():
        if found[name] != value:
            raise StaleEngine(f"{where}: the engine's '{name}' is {found[name]!r}, here it must be {value!r}; {REMEDY}")
    require_tensors(listed, tensor_table(config), str(where))
    if hashlib.sha256(plan).hexdigest() != sha256:
        raise StaleEngine(f"{folder / PLAN_NAME} is not the file that was compiled (SHA-256 differs); {REMEDY}")
    return plan


def require_files(folder: Path, record: bytes) -> None:
    """Every file that the record lists is the one that was compiled; raises StaleEngine."""
    try:
        listed = {str(name): str(entry["sha256"]) for name, entry in json.loads(record)["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StaleEngine(f"{folder / RECORD_NAME} is not the record of an engine ({error!r}); {REMEDY}") from error
    for name, sha256 in listed.items():
        if hashlib.sha256(_read(folder / Path(name).name)).hexdigest() != sha256:
            raise StaleEngine(f"{folder / name} is not the file that was compiled (SHA-256 differs); {REMEDY}")
