"""What a body is like: calibration, limits and rest of its servos, from a small TOML file, as the dictionary's settings.

Everything may be left out; `[pan]` and `[tilt]` have the same fields:

    [pan]
    zero_us = 1500       # servo pulse at 0°
    us_per_90 = 1000     # change of the pulse over 90°; negative turns it round
    low_deg = -70        # the ends, within those of PROTOCOL.md, 'Outputs that move'
    high_deg = 70
    rest_deg = 0         # where it is when nothing moves it, and in the safe state
    speed_deg_s = 180

    [battery]
    divider = 11.0       # battery voltage over the voltage at the pin

    [board]
    reset = true         # whether the board may be reset when it has been silent for 30 s
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from firmware_bridge.dictionary import SETTINGS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PULSE_US = (500, 2500)  # what servos take; beyond that many run against their own stop


class BodyError(ValueError):
    """A file that describes no body; the text names file and field. Remedy: mend the field."""


def _servo(name: str) -> dict[str, tuple[str, float]]:
    return {
        "zero_us": (f"{name}_ZERO_US", 1),
        "us_per_90": (f"{name}_US_PER_90", 1),
        "low_deg": (f"{name}_LOW", 100),
        "high_deg": (f"{name}_HIGH", 100),
        "rest_deg": (f"{name}_REST", 100),
        "speed_deg_s": (f"{name}_SPEED", 100),
    }


# Section → field → (setting, how many of its units one of the field's is).
FIELDS: dict[str, dict[str, tuple[str, float]]] = {
    "pan": _servo("PAN"),
    "tilt": _servo("TILT"),
    "battery": {"divider": ("BATTERY_MILLI", 1000.0)},
    "board": {"reset": ("BOARD_RESET", 1)},
}


def read_body(path: Path) -> dict[str, int]:
    """All SETTINGS, those that `path` does not name at their default; raises BodyError."""
    try:
        sections = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BodyError(f"{path}: cannot be read ({error.strerror}); name the file that describes the body") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise BodyError(f"{path} is not TOML: {error}; mend it there") from error
    settings = {name: values[0] for name, values in SETTINGS.items()}
    for section, fields in sections.items():
        known = FIELDS.get(section)
        if known is None or not isinstance(fields, dict):
            raise BodyError(f"{path}: there is no section [{section}]; there are: {', '.join(FIELDS)}")
        for field, value in fields.items():
            if field not in known:
                raise BodyError(f"{path}: [{section}] has no field '{field}'; it has: {', '.join(known)}")
            name, factor = known[field]
            settings[name] = _setting(f"{path}: [{section}] {field}", name, factor, value)
    for section, servo in (("pan", "PAN"), ("tilt", "TILT")):
        _require_sense(f"{path}: [{section}]", servo, settings)
    return settings


def _setting(where: str, name: str, factor: float, value: Any) -> int:
    _, low, high, _ = SETTINGS[name]
    if name == "BOARD_RESET":
        if not isinstance(value, bool):
            raise BodyError(f"{where} = {value!r} is neither true nor false; give one of them")
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BodyError(f"{where} = {value!r} is not a number; give one from {low / factor:g} to {high / factor:g}")
    if not low <= value * factor <= high:
        raise BodyError(f"{where} = {value:g} is out of range; give a number from {low / factor:g} to {high / factor:g}")
    return round(value * factor)


def _require_sense(where: str, servo: str, settings: dict[str, int]) -> None:
    low, high, rest = (settings[f"{servo}_{end}"] for end in ("LOW", "HIGH", "REST"))
    if not low <= rest <= high:
        raise BodyError(f"{where} rest_deg = {rest / 100:g} is beyond the ends, {low / 100:g} and {high / 100:g}; give one between them")
    for end, at in (("low_deg", low), ("high_deg", high)):
        pulse_us = settings[f"{servo}_ZERO_US"] + at * settings[f"{servo}_US_PER_90"] / 9000
        if not PULSE_US[0] <= pulse_us <= PULSE_US[1]:
            raise BodyError(
                f"{where} at {end} = {at / 100:g} the pulse is {pulse_us:.0f} µs, which servos do not take "
                f"({PULSE_US[0]} to {PULSE_US[1]}); bring the end nearer, or look at zero_us and us_per_90"
            )
