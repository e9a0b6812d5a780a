"""What a report is about: a bundle, what its quantization wrote down, and the engine that was compiled from it."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from device.bundle import MANIFEST_BYTES, MANIFEST_NAME, Bundle
from device.engine.record import RECORD_NAME, REPORT_NAME
from device.errors import BundleError
from device.signature import SIGNATURE_NAME, TrustedKeys, read_bounded
from export.checkpoint import require_buildable
from export.compile import QUANTIZATION_NAME
from export.cost import Work, count
from export.report.untrusted import FILE_BYTES, Record, Unreadable, read_record
from export.targets import Precision, Target, precisions, targets

_AGAIN = "export the bundle again"
_COMPILE_AGAIN = "compile the bundle again"


class Signature(NamedTuple):
    """What this machine can say about it: with a trusted key it checks, without one it tells only who claims to have signed."""

    state: Literal["none", "not checked", "valid", "refused"]
    words: str


@dataclass(frozen=True)
class CompiledEngine:
    """The record and the report of an engine that was compiled from just this bundle, on a board of export/targets.toml."""

    record: Record
    report: Record
    target: Target


@dataclass(frozen=True)
class Subject:
    """Everything that the page is made from; texts and numbers in it are whoever's wrote them."""

    bundle: Bundle
    manifest: Record
    signature: Signature
    quantization: Record | None  # None: a float bundle
    engine: CompiledEngine | None
    work: Work
    precision: Precision

    @property
    def boards(self) -> list[Target]:
        """Those that run this precision."""
        return [target for target in targets().values() if self.precision in target.precisions]

    @property
    def board(self) -> Target:
        """The one that layers are estimated for: where the engine runs, or else the first of the table."""
        return self.engine.target if self.engine else self.boards[0]

    def work_of(self, weight: str) -> Work | None:
        """The part of the tick's work that is the products with one weight; None if there is none of that name."""
        nodes = tuple(node for node in self.work.products if node.weight == weight)
        if not nodes:
            return None
        return dataclasses.replace(self.work, parameters=nodes[0].weight_size, nodes=nodes, live=0, io_bytes=0, ring_bytes=0)


def read_subject(path: Path, engine: Path | None) -> Subject:
    """Read and check it all; raises BundleError, CheckpointError, TensorMismatch, ConfigError, KeyFileError or Unreadable."""
    bundle = Bundle.open(path, unproven=True)
    manifest = Record(bundle.manifest, path / MANIFEST_NAME, _AGAIN)
    quantized = "quantized" in bundle.manifest  # be it what it may: the board's rule for what needs a proof
    name = manifest.record("quantized").text("precision") if quantized else "fp32"
    if name not in precisions():
        raise Unreadable(f"{manifest.file}: field 'quantized.precision' is {name!r} and none of {', '.join(precisions())}; {_AGAIN}")
    quantization = None
    if quantized:
        if QUANTIZATION_NAME not in bundle.manifest["files"]:
            raise Unreadable(f"{manifest.file}: is that of a quantized bundle and lists no {QUANTIZATION_NAME}; {_AGAIN}")
        quantization = read_record(path / QUANTIZATION_NAME, _AGAIN)
    require_buildable(manifest.file, bundle.config)
    compiled = None if engine is None else _read_engine(engine, bundle)
    return Subject(bundle, manifest, _signature(bundle), quantization, compiled, count(bundle.config), precisions()[name])


def _signature(bundle: Bundle) -> Signature:
    if bundle.key is None:
        return Signature("none", "none")
    claimed = f"by key {bundle.key} as version {bundle.version}"
    keys = TrustedKeys.read()
    if not keys.keys:
        return Signature("not checked", f"{claimed}; not checked: this machine trusts no key")
    text = read_bounded(bundle.path / MANIFEST_NAME, MANIFEST_BYTES)
    if hashlib.sha256(text).hexdigest() != bundle.digest:
        raise Unreadable(f"{bundle.path / MANIFEST_NAME}: was changed while it was read; run the command again")
    where = bundle.path / SIGNATURE_NAME
    try:
        return Signature("valid", f"{claimed}; valid, by '{keys.verify(text, read_bounded(where, 1 << 10), where)}'")
    except BundleError as error:
        return Signature("refused", f"{claimed}; refused: {error}")


def _read_engine(folder: Path, bundle: Bundle) -> CompiledEngine:
    record = read_record(folder / RECORD_NAME, _COMPILE_AGAIN)
    if record.text("bundle_sha256") != bundle.digest:
        raise Unreadable(
            f"{record.file}: the engine was compiled from another bundle than {bundle.path} as it is now "
            "(signing and verifying change a bundle); give that one, or compile this one again"
        )
    name = record.text("target")
    if name not in targets():
        raise Unreadable(f"{record.file}: field 'target' is {name!r} and none of {', '.join(targets())}; {_COMPILE_AGAIN}")
    report = read_record(folder / REPORT_NAME, _COMPILE_AGAIN)
    sha256 = hashlib.sha256(read_bounded(report.file, FILE_BYTES)).hexdigest()
    if record.record("files").record(REPORT_NAME).text("sha256") != sha256:
        raise Unreadable(f"{report.file}: is not the report of this engine (SHA-256 differs); {_COMPILE_AGAIN}")
    return CompiledEngine(record, report, targets()[name])
