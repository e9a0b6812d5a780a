"""How hot the board is and what it draws, from sysfs: the same files that tegrastats reads on a Jetson, and what other boards have."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from device.streams import STREAMS


def read(root: Path = Path("/sys")) -> dict[str, Any]:
    """What there is of: `zones_c` {thermal zone: °C}, `rails_w` {power rail: W}, `cpu_mhz` {policy: [now, most]}, `held_back` by what.

    `held_back` names the cooling devices that are not idle, {name: [state, most]}: the board is slower than it could be.
    Files that are missing or cannot be read are left out (a zone of a part that is switched off answers with an error).
    """
    found = {
        "zones_c": dict(_zones(root)),
        "rails_w": dict(_rails(root)),
        "cpu_mhz": dict(_clocks(root)),
        "held_back": dict(_cooling(root)),
    }
    return {name: values for name, values in found.items() if values}


def _zones(root: Path) -> Iterator[tuple[str, float]]:
    for zone in _sorted(root / "class/thermal", "thermal_zone*"):
        with contextlib.suppress(OSError, ValueError):
            yield _text(zone / "type").removesuffix("-thermal"), round(int(_text(zone / "temp")) / 1000, 1)  # in m°C


def _rails(root: Path) -> Iterator[tuple[str, float]]:
    """INA3221 (Jetson): volts and amperes of up to three channels; others: power in µW. Documentation/hwmon in the kernel's sources."""
    for monitor in _sorted(root / "class/hwmon", "hwmon*"):
        for volts in _sorted(monitor, "in[123]_input"):
            channel = volts.name[2]
            with contextlib.suppress(OSError, ValueError):
                watts = int(_text(volts)) * int(_text(monitor / f"curr{channel}_input")) / 1e6  # mV · mA
                yield _text(monitor / f"in{channel}_label"), round(watts, 2)
        for power in _sorted(monitor, "power*_input"):
            label = monitor / power.name.replace("_input", "_label")
            with contextlib.suppress(OSError, ValueError):
                name = _text(label) if label.exists() else f"{_text(monitor / 'name')} {power.name.removesuffix('_input')}"
                yield name, round(int(_text(power)) / 1e6, 2)


def _clocks(root: Path) -> Iterator[tuple[str, list[int]]]:
    for policy in _sorted(root / "devices/system/cpu/cpufreq", "policy*"):
        with contextlib.suppress(OSError, ValueError):
            yield policy.name, [int(_text(policy / name)) // 1000 for name in ("scaling_cur_freq", "cpuinfo_max_freq")]  # in kHz


def _cooling(root: Path) -> Iterator[tuple[str, list[int]]]:
    for device in _sorted(root / "class/thermal", "cooling_device*"):
        with contextlib.suppress(OSError, ValueError):
            state, most, name = (_text(device / file) for file in ("cur_state", "max_state", "type"))
            if int(state) > 0 and "fan" not in name.lower():  # a fan that turns holds nothing back
                yield f"{name} {device.name.removeprefix('cooling_device')}", [int(state), int(most)]


def _sorted(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern), key=lambda path: (len(path.name), path.name))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip()


class Thermometer:
    """Reads once a second in a thread of its own: a sensor behind a slow bus takes milliseconds that no tick has."""

    def __init__(self, root: Path = Path("/sys")) -> None:
        self._root, self._over = root, threading.Event()
        self._newest: tuple[float, dict[str, Any]] = (0.0, {})
        self._thread = threading.Thread(target=self._run, name="thermometer", daemon=True)
        self._thread.start()

    def newest(self) -> dict[str, Any]:
        """The newest reading; empty where there is nothing to read, or where reading hangs. Never waits."""
        at_s, reading = self._newest
        return reading if time.monotonic() - at_s < (STREAMS["thermal"].stale_s or 0) else {}

    def close(self) -> None:
        """Let the thread go; one that hangs in a sensor is left behind."""
        self._over.set()
        self._thread.join(1)

    def _run(self) -> None:
        while True:
            reading = read(self._root)
            self._newest = (time.monotonic(), reading)
            if self._over.wait(STREAMS["thermal"].log_s):
                return
