"""The bundle reader: checks everything a manifest promises before any file of the bundle is loaded.

In this order: who signed the manifest (over its raw bytes, device/signature.py), its fields, its version, that the folder holds the
listed files and no other, their sizes and hashes, the configuration and the tensor table. Nothing is read without a bound, and
nothing is allocated by a size that a manifest claims.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from device.config import ConfigError, ModelConfig
from device.errors import BundleError as BundleError
from device.signature import (
    HIGHEST_VERSION,
    PUBLIC_BYTES,
    SIGNATURE_BYTES,
    SIGNATURE_NAME,
    BadSignature,
    Trust,
    key_id,
    open_regular,
    read_bounded,
)
from device.tensors import Tensor, TensorMismatch, tensor_table

FORMAT = 1  # of the manifest; raised when an older reader would misunderstand a newer bundle
MANIFEST_NAME = "manifest.json"
GRAPH_NAME = "graph.onnx"
VOCABULARY_NAME = "vocabulary.json"

MANIFEST_BYTES = 8 << 20  # a thousand times companion-nano's
TENSOR_BYTES = 4 << 30  # of all tensors of a tick together: half the memory of the smallest board; companion-nano has 24 MB

Signature = tuple[str, tuple[int, ...]]  # numpy's dtype name, shape


class NotABundle(BundleError):
    """No directory, no manifest, or one that cannot be read. Remedy: export, or name another path."""


class NewerFormat(BundleError):
    """Made by a later copresence. Remedy: update."""


class ChangedFile(BundleError):
    """A file that is not what the manifest says. Remedy: export again."""


class SwappedFile(ChangedFile):
    """Another file under a listed name: its size differs, or the manifest lists its content under another name."""


class UnlistedFile(BundleError):
    """Something in the folder that the manifest does not list, and so nobody vouches for. Remedy: remove it."""


class Unproven(BundleError):
    """A quantized bundle without proof that it still behaves. Remedy: verify it, or say that it may run without."""


@dataclass(frozen=True)
class Bundle:
    """A verified bundle; `digest` is the SHA-256 of its manifest and so of everything in it."""

    path: Path
    config: ModelConfig
    manifest: dict[str, Any]
    digest: str
    version: int  # of the release; 0 before it is signed
    key: str | None  # id of the key in the signature file, which means nothing unless `signed_by` is set
    signed_by: str | None  # name of the trusted key whose signature was checked; None on a machine that trusts no key

    @classmethod
    def open(cls, path: str | Path, trust: Trust | None = None, unproven: bool = False) -> Bundle:
        """Read and verify `path`, also the signature and the version where `trust` has a key; with `unproven` a missing proof is let pass.

        Raises BundleError (the errors of device/signature.py among them), VersionMemoryError, ConfigError or TensorMismatch.
        """
        path = Path(path)
        where = path / MANIFEST_NAME
        text, signature = _manifest_bytes(path), _signature_bytes(path)
        signed_by = trust.keys.verify(text, signature, path / SIGNATURE_NAME) if trust else None
        manifest = _parse(text, where)
        version = _integer(manifest.get("version", 0), "version", where, HIGHEST_VERSION)
        if trust:
            if version == 0:
                raise NotABundle(f"{where}: is signed but has no 'version'; sign the bundle again with 'copresence-export sign'")
            trust.memory.check(version, where)
        files = _listed_files(manifest, where)
        listed = _listed_tensors(manifest, where)
        _check_files(path, files)
        try:
            config = ModelConfig.from_dict(_field(manifest, "config", dict, where))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        rows = tensor_table(config)
        if sum(math.prod(row.shape) * np.dtype(row.dtype).itemsize for row in rows) > TENSOR_BYTES:
            raise ConfigError(f"{where}: the tensors of a tick exceed {TENSOR_BYTES >> 30} GiB; correct the configuration and export again")
        require_tensors(listed, rows, str(where))
        if not unproven:
            require_proof(manifest, where)
        key = None if signature is None else key_id(signature[:PUBLIC_BYTES])
        return cls(path, config, manifest, hashlib.sha256(text).hexdigest(), version, key, signed_by)

    @property
    def signature(self) -> str:
        """`valid`, `not checked` (this machine trusts no key) or `none`."""
        if self.signed_by is not None:
            return "valid"
        return "none" if self.key is None else "not checked"

    @property
    def unproven(self) -> str:
        """Why a quantized bundle counts as unproven; empty for one that is proven or needs no proof."""
        return lacking_proof(self.manifest)

    @property
    def name(self) -> str:
        return str(self.manifest.get("name", self.path.name))

    @property
    def graph(self) -> Path:
        return self.path / GRAPH_NAME


def copresence_version() -> str:
    """Version of the installed distribution."""
    try:
        return importlib.metadata.version("copresence")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def lacking_proof(manifest: Mapping[str, Any]) -> str:
    """Why a manifest lacks the proof it needs: only what was quantized needs one. Empty when nothing is lacking."""
    if "quantized" not in manifest:
        return ""
    proof = manifest.get("proof")
    gates = proof.get("gates") if isinstance(proof, dict) else None
    if not isinstance(proof, dict) or not isinstance(gates, list) or not gates:
        return "it carries no proof that it behaves like the bundle it was quantized from"
    failed = [str(gate.get("gate", "?")) if isinstance(gate, dict) else "?" for gate in gates if not _passed(gate)]
    if failed:
        return f"its proof did not pass: {', '.join(failed)}"
    if proof.get("graph_sha256") != manifest["files"][GRAPH_NAME]["sha256"]:
        return "its proof is that of another graph"
    return ""


def _passed(gate: object) -> bool:
    return isinstance(gate, dict) and gate.get("passed") is True


def require_proof(manifest: Mapping[str, Any], where: str | Path) -> None:
    """Raise Unproven unless the manifest has the proof it needs; also for whoever is about to sign it."""
    if reason := lacking_proof(manifest):
        raise Unproven(f"{where}: {reason}; prove it with 'copresence-export verify', or run it with --unproven all the same")


def require_tensors(found: Mapping[str, Signature], wanted: Iterable[Tensor], where: str) -> None:
    """Raise TensorMismatch unless `found` is just the rows of `wanted`; the text names the tensor and both shapes."""
    rows = {row.name: (row.dtype, row.shape) for row in wanted}
    for name, expected in rows.items():
        if found.get(name) != expected:
            has = _describe(found[name]) if name in found else "no such tensor"
            raise TensorMismatch(f"{where}: tensor '{name}' must be {_describe(expected)}, but there is {has}; export the bundle again")
    for name in found:
        if name not in rows:
            raise TensorMismatch(f"{where}: tensor '{name}' {_describe(found[name])} is not in the tensor table; export the bundle again")


def _describe(signature: Signature) -> str:
    return f"{signature[0]}{list(signature[1])}"


def _manifest_bytes(path: Path) -> bytes:
    if not path.is_dir():
        raise NotABundle(f"{path} is not a directory; give a bundle made by 'copresence-export build'")
    try:
        return read_bounded(path / MANIFEST_NAME, MANIFEST_BYTES)
    except FileNotFoundError as error:
        raise NotABundle(f"{path} is not a bundle: it has no {MANIFEST_NAME}; make one with 'copresence-export build'") from error
    except (ValueError, OSError) as error:
        raise NotABundle(f"{path / MANIFEST_NAME} is not a manifest: {error}; export the bundle again") from error


def _signature_bytes(path: Path) -> bytes | None:
    file = path / SIGNATURE_NAME
    try:
        return read_bounded(file, PUBLIC_BYTES + SIGNATURE_BYTES)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise BadSignature(f"{file} is not a signature: {error}; copy the bundle again or sign it again") from error


def _parse(text: bytes, where: Path) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        manifest = json.loads(text, parse_constant=refuse)
    # ValueError: also text that is not UTF-8, and numbers of thousands of digits. RecursionError: thousands of brackets.
    except (ValueError, RecursionError) as error:
        raise NotABundle(f"{where} is not a manifest: {error}; export the bundle again") from error
    if not isinstance(manifest, dict):
        raise NotABundle(f"{where} is not a manifest: it is no object; export the bundle again")
    version = _field(manifest, "format", int, where)
    if version > FORMAT:
        raise NewerFormat(f"{where} has format {version}, this copresence {copresence_version()} reads up to {FORMAT}; update copresence")
    return manifest


def _field(values: Any, name: str, kind: type, where: Path) -> Any:
    """Field `name` of a JSON object, which has to be a `kind`; raises NotABundle."""
    names = {dict: "an object", list: "a list", int: "a number", str: "a text"}
    if not isinstance(values, dict) or name not in values:
        raise NotABundle(f"{where} is not a manifest: lacks the field '{name}'; export the bundle again")
    if type(values[name]) is not kind:
        raise NotABundle(f"{where} is not a manifest: field '{name}' is not {names[kind]}; export the bundle again")
    return values[name]


def _integer(value: Any, name: str, where: Path, highest: int = 1 << 48) -> int:
    if type(value) is not int or not 0 <= value <= highest:
        raise NotABundle(f"{where} is not a manifest: field '{name}' is not a whole number from 0 to {highest}; export the bundle again")
    return value


def _listed_files(manifest: dict[str, Any], where: Path) -> dict[str, tuple[str, int]]:
    files = {}
    for name, entry in _field(manifest, "files", dict, where).items():
        if Path(name).name != name or not name.isprintable():
            raise NotABundle(f"{where}: file name {name!r} leads out of the bundle; export the bundle again")
        files[name] = (_field(entry, "sha256", str, where), _integer(_field(entry, "bytes", int, where), "bytes", where))
    if GRAPH_NAME not in files:
        raise NotABundle(f"{where} lists no {GRAPH_NAME} in 'files'; export the bundle again")
    return files


def _listed_tensors(manifest: dict[str, Any], where: Path) -> dict[str, Signature]:
    tensors = {}
    for row in _field(manifest, "tensors", list, where):
        shape = tuple(_integer(size, "shape", where) for size in _field(row, "shape", list, where))
        tensors[_field(row, "name", str, where)] = (_field(row, "dtype", str, where), shape)
    return tensors


def _check_files(path: Path, files: Mapping[str, tuple[str, int]]) -> None:
    """Raise unless the folder holds just the listed files, the manifest and its signature, and each is what was listed."""
    there = set(os.listdir(path))
    for name in sorted(there - set(files) - {MANIFEST_NAME, SIGNATURE_NAME}):
        raise UnlistedFile(f"{path / name} is not listed in the manifest; remove it from the bundle, or export the bundle again")
    for name in files:
        if name not in there:
            raise ChangedFile(f"{path / name} is missing; export the bundle again")
    for name, (sha256, size) in files.items():
        _check_file(path / name, sha256, size, {other for other, _ in files.values()})


def _check_file(file: Path, sha256: str, size: int, listed: set[str]) -> None:
    try:
        stream = open_regular(file)
    except ValueError as error:
        raise ChangedFile(f"{file}: {error}; export the bundle again") from error
    with stream:
        there = os.fstat(stream.fileno()).st_size
        if there != size:
            raise SwappedFile(f"{file} is another file than the one listed: it has {there} bytes and not {size}; export the bundle again")
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() == sha256:
        return
    if digest.hexdigest() in listed:
        raise SwappedFile(f"{file} is another file than the one listed: the manifest has it under another name; export the bundle again")
    raise ChangedFile(f"{file} is not the file that was exported (SHA-256 differs); export the bundle again")
