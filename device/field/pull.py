"""`copresence pull`: one archive for a bug report, and what was left out of it."""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from device.bundle import copresence_version
from device.field import board, doctor, logs
from device.field.settings import SETTINGS_FILE, Settings, SettingsError

JOURNAL_LINES = 20_000  # five hours of statistics
NEWEST_DUMPS = 8
DUMP_BYTES = 64 << 20
_SYSTEM_FILES = ("etc/os-release", "etc/nv_tegra_release", "proc/cmdline", "proc/device-tree/model", "proc/meminfo", "proc/asound/cards")
_SLOTS = ("opt/copresence/rolled-back.json", "opt/copresence/trial.json", "opt/copresence/current/release.json")
# The flight recorder's files say by themselves whether they hold sound and pictures: MCAP's metadata is length-prefixed and not compressed.
_WITHOUT_RAW = b"\x03\x00\x00\x00raw\x05\x00\x00\x00false"
_METADATA_BYTES = 1 << 20  # it comes first

ALWAYS_LEFT_OUT = (
    "sound and pictures: calibration sets, recordings, dumps that hold them",
    "keys, passwords and certificates",
    "what other programs told the journal",
)


def add_command(commands: Any) -> None:
    """`copresence pull`."""
    command = commands.add_parser("pull", help="the last journal, versions, findings and dumps in one archive, for a bug report")
    command.add_argument("--out", default="-", metavar="FILE", help="a .tar.gz; default: standard output")
    command.add_argument("--config", type=Path, default=SETTINGS_FILE, metavar="FILE", help=f"default: {SETTINGS_FILE}")
    command.set_defaults(command_function=run)


def run(arguments: argparse.Namespace) -> int:
    """Writes the archive, and what is in it and what is not to standard error."""
    if arguments.out == "-" and sys.stdout.isatty():
        raise logs.JournalError("an archive is not for a terminal; give --out FILE, or on the workstation: make pull HOST=user@board")
    scratch = io.BytesIO()  # whole or not at all; some megabytes
    told = write_archive(scratch, arguments.config)
    if arguments.out == "-":
        sys.stdout.buffer.write(scratch.getvalue())
        sys.stdout.buffer.flush()
    else:
        path = Path(arguments.out)
        part = path.with_name(f".{path.name}")
        part.write_bytes(scratch.getvalue())
        os.replace(part, path)
    print(told, file=sys.stderr)
    return 0


def write_archive(file: io.BytesIO, config: Path, root: Path = Path("/")) -> str:
    """Fill a gzipped tar; returns its table of contents, which is also a file in it."""
    left_out = list(ALWAYS_LEFT_OUT)
    contents = []
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, data in _pieces(config, root, left_out):
            _add(archive, name, data)
            contents.append(f"  {name} ({len(data)} bytes)")
        told = "\n".join(["In this archive:", *contents, "Left out, for privacy:", *(f"  {what}" for what in left_out)]) + "\n"
        _add(archive, "CONTENTS.txt", told.encode())
    return told


def _pieces(config: Path, root: Path, left_out: list[str]) -> Iterator[tuple[str, bytes]]:
    """(name, content), one after the other; notes down what it passes over."""
    status = board.read_json(root / board.STATUS.relative_to("/"))
    versions = {"copresence": copresence_version(), "python": platform.python_version(), "kernel": platform.release()}
    yield "versions.json", _json({**versions, "running": status.get("versions")})
    yield "status.json", _json(status)
    yield "doctor.json", _json([finding._asdict() for finding in doctor.examine(doctor.Place(config, root))])
    yield "journal.jsonl", _journal()
    for name, path in {config.name: config, **{name: root / name for name in (*_SYSTEM_FILES, *_SLOTS)}}.items():
        if path.is_file():
            yield f"files/{name}", path.read_bytes()
    yield from _dumps(config, root, left_out)


def _dumps(config: Path, root: Path, left_out: list[str]) -> Iterator[tuple[str, bytes]]:
    try:
        state = Path(Settings.read(config)["bundle.state"])
    except SettingsError:
        state = root / "var/lib/copresence"
    found = sorted((state / "dumps").glob("*.mcap"), key=lambda path: path.name)
    left_out += [f"{path}: older than the newest {NEWEST_DUMPS}" for path in found[:-NEWEST_DUMPS]]
    for path in found[-NEWEST_DUMPS:]:
        try:
            data = path.read_bytes() if path.stat().st_size <= DUMP_BYTES else b""
        except OSError as error:
            left_out.append(f"{path}: cannot be read ({error.strerror}); pull as root")
            continue
        if _WITHOUT_RAW in data[:_METADATA_BYTES]:
            yield f"dumps/{path.name}", data
        else:
            left_out.append(f"{path}: may hold sound and pictures, or is too large")


def _journal() -> bytes:
    try:
        records = logs.records("debug", None, follow=False, lines=JOURNAL_LINES)
        return "".join(logs.as_json(record) + "\n" for record in records).encode()
    except logs.JournalError as error:
        return f"{error}\n".encode()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(f"copresence-{platform.node()}/{name}")
    entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o644
    archive.addfile(entry, io.BytesIO(data))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
