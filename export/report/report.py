"""`copresence-export report`: a bundle, and an engine where there is one, to a page that is replaced in one step."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from export.errors import ExportError
from export.report.page import render
from export.report.subject import read_subject


class ReportError(ExportError):
    """A page that cannot be written where it was to be. Remedy: another --out."""


def report(bundle: Path, out: Path | None = None, engine: Path | None = None) -> Path:
    """Write the page, by default beside the bundle; an older one stays until the new one is whole.

    Raises ReportError, and what `read_subject` and `render` raise.
    """
    out = out or bundle.with_name(f"{bundle.resolve().name}.html")
    if out.is_dir():
        raise ReportError(f"{out}: is a folder; give the name of a file as --out")
    if bundle.resolve() in out.resolve().parents:
        raise ReportError(f"{out}: is within the bundle, which may hold nothing that its manifest does not list; give another --out")
    page = render(read_subject(bundle, engine))
    try:
        _replace(out, page.encode())
    except OSError as error:
        raise ReportError(f"{out}: cannot be written ({error.strerror}); free space there or give another --out") from error
    return out


def _replace(out: Path, data: bytes) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    descriptor, scratch = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
            os.fchmod(descriptor, 0o644)  # mkstemp's is for its owner alone, and a report is for others
        os.replace(scratch, out)
    finally:
        Path(scratch).unlink(missing_ok=True)
