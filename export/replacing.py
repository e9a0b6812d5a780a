"""A folder that is replaced in one step, so that a kill at any time leaves a whole one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A scratch folder that takes the place of `out` when the block ends well, and vanishes when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        new = scratch / "new"
        new.mkdir()
        yield new
        for file in new.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())
        if out.exists():
            _exchange(new, out)
        else:
            new.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step, so that a kill at any time leaves a whole bundle; raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"folders cannot be exchanged in one step: {os.strerror(code)}")
