"""What the board says of itself: temperatures, memory, release, and whether its engine was verified."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

VERIFIED = Path("/run/copresence-engine/verified.json")  # written by 'copresence-export prepare', which runs as root
ROLLED_BACK = Path("/opt/copresence/rolled-back.json")  # written by device/boot/slots.py
STATUS = Path("/run/copresence/status.json")


def temperatures(root: Path = Path("/")) -> dict[str, float]:
    """°C by thermal zone, of those that can be read; empty where there are none."""
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    return dict(read for zone in zones if (read := _zone(zone)))


def _zone(folder: Path) -> tuple[str, float] | None:
    try:
        return (folder / "type").read_text().strip(), int((folder / "temp").read_text()) / 1000
    except (OSError, ValueError):  # on a Jetson, those of units that are asleep
        return None


def memory_mb() -> float:
    """Resident size of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def release() -> str:
    """Name of the release that this process runs from: /opt/copresence/releases/NAME/venv; empty elsewhere."""
    folder = Path(sys.prefix).resolve().parent
    return folder.name if folder.parent.name == "releases" else ""


def verified(bundle_sha256: str) -> bool:
    """Whether the engine of this bundle was built or checked since the boot."""
    return read_json(VERIFIED).get("bundle_sha256") == bundle_sha256


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step, readable for all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(value, ensure_ascii=False) + "\n")


def replace(path: Path, text: str) -> None:
    """Write a file in one step, readable for all; for what is renewed every second, so that it is not forced to a disk."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    with open(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(descriptor, 0o644)
        file.write(text)
    os.replace(scratch, path)
