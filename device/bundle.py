"""The bundle reader: checks everything a manifest promises before any file of the bundle is loaded."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device.config import ConfigError, ModelConfig
from device.tensors import Tensor, TensorMismatch, tensor_table

FORMAT = 1  # of the manifest; raised when an older reader would misunderstand a newer bundle
MANIFEST_NAME = "manifest.json"
GRAPH_NAME = "graph.onnx"
VOCABULARY_NAME = "vocabulary.json"

Signature = tuple[str, tuple[int, ...]]  # numpy's dtype name, shape


class BundleError(ValueError):
    """A directory that cannot be run as a bundle; the text ends with the remedy."""


class NotABundle(BundleError):
    """No directory, no manifest, or one that cannot be read. Remedy: export, or name another path."""


class NewerFormat(BundleError):
    """Made by a later copresence. Remedy: update."""


class ChangedFile(BundleError):
    """A file that is not what the manifest says. Remedy: export again."""


class Unproven(BundleError):
    """A quantized bundle without proof that it still behaves. Remedy: verify it, or say that it may run without."""


@dataclass(frozen=True)
class Bundle:
    """A verified bundle; `digest` is the SHA-256 of its manifest and so of everything in it."""

    path: Path
    config: ModelConfig
    manifest: dict[str, Any]
    digest: str

    @classmethod
    def open(cls, path: str | Path, unproven: bool = False) -> Bundle:
        """Read and verify `path`; raises BundleError, ConfigError or TensorMismatch. With `unproven`, a missing proof is let pass."""
        path = Path(path)
        text = _manifest_bytes(path)
        where = path / MANIFEST_NAME
        try:
            manifest = json.loads(text)
            version = manifest["format"]
            if not isinstance(version, int):
                raise TypeError("field 'format' is not a number")
            if version > FORMAT:
                raise NewerFormat(
                    f"{where} has format {version}, this copresence {copresence_version()} reads up to {FORMAT}; update copresence"
                )
            files = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in manifest["files"].items()}
            listed = {str(t["name"]): (str(t["dtype"]), tuple(t["shape"])) for t in manifest["tensors"]}
            config_values = manifest["config"]
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            reason = f"lacks the field {error}" if isinstance(error, KeyError) else str(error)
            raise NotABundle(f"{where} is not a manifest: {reason}; export the bundle again") from error
        if GRAPH_NAME not in files:
            raise NotABundle(f"{where} lists no {GRAPH_NAME} in 'files'; export the bundle again")
        for name, (sha256, size) in files.items():
            _check_file(path, name, sha256, size)
        try:
            config = ModelConfig.from_dict(config_values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        require_tensors(listed, tensor_table(config), str(where))
        if not unproven:
            require_proof(manifest, where)
        return cls(path, config, manifest, hashlib.sha256(text).hexdigest())

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
        return (path / MANIFEST_NAME).read_bytes()
    except FileNotFoundError as error:
        raise NotABundle(f"{path} is not a bundle: it has no {MANIFEST_NAME}; make one with 'copresence-export build'") from error


def _check_file(path: Path, name: str, sha256: str, size: int) -> None:
    if Path(name).name != name:
        raise NotABundle(f"{path / MANIFEST_NAME}: file name '{name}' leads out of the bundle; export the bundle again")
    file = path / name
    if not file.is_file():
        raise ChangedFile(f"{file} is missing; export the bundle again")
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if file.stat().st_size != size or digest.hexdigest() != sha256:
        raise ChangedFile(f"{file} is not the file that was exported (SHA-256 differs); export the bundle again")
