"""The bridge's dictionary: every message, motion, output, setting and limit, once, for host, firmware and PROTOCOL.md.

`python -m firmware_bridge.dictionary FOLDER` writes the firmware's `dictionary.h`; `… PROTOCOL.md` renews the tables of that page.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

REVISION = 1  # raised with every change below that is released: it tells which side of a mismatch is the older one

LIMITS = {
    "TICK_US": (200_000, "period of the tick before it is trimmed"),
    "TRIM_PPM_MAX": (1000, "largest trim of that period"),
    "WINDOW": (8, "frames that the host may have in flight: 8 × 64 bytes fill half of the receive buffer"),
    "HEARTBEAT_US": (1_000_000, "without a heartbeat for so long: safe state"),
    "BOARD_RESET_US": (30_000_000, "without a heartbeat for so long: the board's reset line is pulsed"),
    "BOARD_BOOT_US": (120_000_000, "after a pulse the board has so long to come up before the next one"),
    "BOARD_PULSE_US": (200_000, "length of the pulse"),
    "BOARD_RESETS_MAX": (3, "pulses within any hour"),
    "ACTS_MAX": (16, "acts that can wait for their time"),
    "RESULTS_MAX": (32, "newest acts whose result can still be asked for"),
    "AHEAD_US": (10_000_000, "an act may lie so far in the future"),
    "AMPLIFIER_US": (600_000_000, "the amplifier is muted so long after the last `arm` or `amplifier`"),
    "PACE_US": (50_000, "between two reports of a pose that changes"),
    "REPORT_US": (1_000_000, "between two reports of the inputs"),
}

ENUMS = {
    "STATE": {
        "WAITING": "after a reset: outputs at rest, amplifier muted, acts refused",
        "ARMED": "acts are executed",
        "SAFE": "latched: servos at rest, amplifier muted, amber pulse; left by `arm` alone",
    },
    "CAUSE": {"RESET": "the microcontroller started", "COMMAND": "`arm` or `disarm`", "HEARTBEAT": "the host's heartbeat stayed away"},
    "RESULT": {
        "STARTED": "begun at the stated time",
        "PENDING": "waits for its time",
        "STALE": "came, or came to its turn, after its deadline: dropped",
        "REFUSED": "not armed",
        "FULL": "too many acts wait",
        "EARLY": "lies too far in the future",
        "UNKNOWN": "no such motion, or no such act is remembered",
    },
    "RESET": {
        "UNKNOWN": "no reason was left",
        "POWER": "power came",
        "BROWN_OUT": "the supply sagged",
        "PIN": "the reset pin",
        "WATCHDOG": "the program hung",
        "SOFTWARE": "`reboot`, or the debugger",
        "ASSERTION": "the program found itself in a state that cannot be",
        "STACK": "the stack overflowed",
        "FAULT": "the processor met an instruction or address that it cannot use",
    },
    "REBOOT": {
        "RESTART": "start anew",
        "BOOTLOADER": "start the chip's own loader (flashing over USB or UART)",
        "ASSERTION": "fail an assertion, to see that it is reported",
        "STACK": "overflow the stack, to see that it is reported",
        "HANG": "stop, to see the watchdog bite",
    },
    "INPUT": {"MUTED": "bit 0: the switch has cut the microphone", "BUTTON": "bit 1: the button is pressed"},
}


class Axis(NamedTuple):
    """One output that moves: limits in its unit, and in unit/s and unit/s²."""

    unit: str
    low: int
    high: int
    rest: int
    speed: int
    acceleration: int
    on_max_s: int  # away from rest for so long: back to rest, and counted


AXES = {
    "PAN": Axis("0.01°", -7000, 7000, 0, 18000, 90000, 600),
    "TILT": Axis("0.01°", -3500, 3500, 0, 15000, 90000, 600),
    "RED": Axis("‰", 0, 1000, 0, 2500, 50000, 14400),
    "GREEN": Axis("‰", 0, 1000, 0, 2500, 50000, 14400),
    "BLUE": Axis("‰", 0, 1000, 0, 2500, 50000, 14400),
}

# Motions: (ms after the start, axis, HOLD = new pose | SWAY = on top of the pose, value in the axis's unit).
Step = tuple[int, str, str, int]
MOTIONS: dict[str, tuple[Step, ...]] = {
    "REST": tuple((0, axis, how, 0) for axis in ("PAN", "TILT") for how in ("HOLD", "SWAY")),
    "NOD": ((0, "TILT", "SWAY", -1200), (220, "TILT", "SWAY", 500), (440, "TILT", "SWAY", -700), (640, "TILT", "SWAY", 0)),
    "SHAKE": ((0, "PAN", "SWAY", 1400), (240, "PAN", "SWAY", -1400), (560, "PAN", "SWAY", 900), (800, "PAN", "SWAY", 0)),
    "LOOK_UP": ((0, "PAN", "HOLD", 0), (0, "TILT", "HOLD", 2500)),
    "LOOK_DOWN": ((0, "PAN", "HOLD", 0), (0, "TILT", "HOLD", -2500)),
    "LOOK_LEFT": ((0, "PAN", "HOLD", 4500), (0, "TILT", "HOLD", 0)),
    "LOOK_RIGHT": ((0, "PAN", "HOLD", -4500), (0, "TILT", "HOLD", 0)),
    "LIGHT_ON": ((0, "RED", "HOLD", 900), (0, "GREEN", "HOLD", 700), (0, "BLUE", "HOLD", 450)),
    "LIGHT_OFF": ((0, "RED", "HOLD", 0), (0, "GREEN", "HOLD", 0), (0, "BLUE", "HOLD", 0)),
    # Red twice, then dark, whether the light was on or off; 450 ms because a light needs 400 from dark to bright.
    "ALERT": (
        *((0, axis, "HOLD", 0) for axis in ("GREEN", "BLUE")),
        *((at, "RED", "HOLD", value) for at, value in ((0, 1000), (450, 0), (900, 1000), (1350, 0))),
    ),
}

# Settings of the body: name → (default, lowest, highest, meaning). They live in RAM; the host sends them again after a reset.
SETTINGS = {
    "PAN_ZERO_US": (1500, 1000, 2000, "servo pulse at 0°"),
    "PAN_US_PER_90": (1000, -1500, 1500, "change of the pulse over 90°; negative turns it round"),
    "TILT_ZERO_US": (1500, 1000, 2000, "servo pulse at 0°"),
    "TILT_US_PER_90": (1000, -1500, 1500, "change of the pulse over 90°; negative turns it round"),
    "BATTERY_MILLI": (11_000, 1000, 50_000, "battery voltage over the voltage at the pin, in thousandths"),
    "BOARD_RESET": (1, 0, 1, "1: the board's reset line may be pulsed"),
}

COUNTERS = {
    "frames": "good frames received",
    "bad_bytes": "bytes outside of frames",
    "crc_errors": "frames that were complete but for their CRC",
    "out_of_order": "good frames that were not the next one",
    "rx_dropped": "bytes that found the receive buffer full",
    "tx_dropped": "frames that found the transmit buffer full",
    "acts_started": "acts begun",
    "acts_stale": "acts dropped after their deadline",
    "acts_refused": "acts refused for another reason",
    "on_time_cuts": "outputs put to rest because they were on too long",
    "heartbeats": "heartbeats accepted",
    "heartbeats_stale": "heartbeats older than they may be",
    "board_resets": "pulses on the board's reset line",
}


class Message(NamedTuple):
    """Its number is its place in the table; `fields` are name → type, in the order of the wire, little-endian, unaligned."""

    sender: str  # "host" or "mcu"
    fields: dict[str, str]
    meaning: str


MESSAGES = {
    "identify": Message("host", {"offset": "u16"}, "asks who is there; fixed for ever, like its answer"),
    "identity": Message(
        "mcu",
        {
            "offset": "u16",
            "total": "u16",
            "dictionary": "u32",
            "build": "u32",
            "settings": "u32",
            "reset": "u8",
            "window": "u8",
            "data": "bytes",
        },
        "hash of the dictionary, of the sources, CRC of the settings, why it started, frames it takes in flight; "
        "`data`: up to 40 bytes from `offset` of the packed dictionary, of `total`",
    ),
    "get_clock": Message("host", {"token": "u16"}, "asks for the time"),
    "clock": Message("mcu", {"token": "u16", "at": "u32"}, "the time at which `get_clock` was read"),
    "set": Message("host", {"setting": "u8", "value": "i32"}, "changes a setting; not while armed"),
    "get_settings": Message("host", {}, "asks for the CRC of the settings"),
    "settings": Message("mcu", {"crc": "u32"}, "CRC-32 over the settings as i32"),
    "arm": Message("host", {}, "leaves WAITING or SAFE"),
    "disarm": Message("host", {}, "goes to WAITING"),
    "get_state": Message("host", {}, "asks for the state"),
    "state": Message("mcu", {"at": "u32", "state": "u8", "cause": "u8"}, "sent on every change, and when asked for"),
    "heartbeat": Message("host", {"at": "u32"}, "the loop completed a tick at that time"),
    "act": Message(
        "host", {"id": "u16", "motion": "u8", "at": "u32", "deadline": "u32"}, "begin a motion at a time; not at all after the deadline"
    ),
    "ask_act": Message("host", {"id": "u16"}, "asks what became of an act"),
    "acted": Message("mcu", {"id": "u16", "result": "u8", "at": "u32"}, "what became of an act, and when"),
    "amplifier": Message("host", {"on": "u8"}, "0 mutes; anything else takes the mute away while armed"),
    "trim": Message("host", {"ppm": "i16"}, "makes the tick so much longer"),
    "tick": Message("mcu", {"number": "u32", "at": "u32"}, "an edge of the tick, and the time at which the timer took it"),
    "pose": Message(
        "mcu",
        {"at": "u32", **{axis.lower(): "i16" for axis in AXES}},
        "set-points of the outputs, while they change",
    ),
    "inputs": Message(
        "mcu",
        {"at": "u32", "flags": "u8", "battery_mv": "u16", "temperature_a": "i16", "temperature_b": "i16"},
        "flags as in INPUT; temperatures in 0.1 °C; sent once a second and when a flag changes",
    ),
    "get_health": Message("host", {}, "asks for the counters"),
    "health": Message("mcu", dict.fromkeys(COUNTERS, "u32"), "all counters, from the start on"),
    "refused": Message("mcu", {"message": "u8"}, "a command that is unknown, misshapen, out of range or not allowed now"),
    "reboot": Message("host", {"how": "u8"}, "as in REBOOT; not while armed"),
}

NUMBERS = {name: number for number, name in enumerate(MESSAGES)}
_NAMES = tuple(MESSAGES)
_STRUCT = {"u8": "B", "u16": "H", "u32": "I", "i16": "h", "i32": "i"}
_C_TYPES = {"u8": "uint8_t", "u16": "uint16_t", "u32": "uint32_t", "i16": "int16_t", "i32": "int32_t"}
IDENTITY_DATA_MAX = 40
_FORMATS = {
    name: struct.Struct("<B" + "".join(_STRUCT[kind] for kind in message.fields.values() if kind != "bytes"))
    for name, message in MESSAGES.items()
}


class Unreadable(ValueError):
    """A payload that is none of the dictionary's messages."""


def value_of(enum: str, name: str) -> int:
    """The number that `name` has in `enum`."""
    return list(ENUMS[enum]).index(name)


def name_of(enum: str, value: int) -> str:
    """The name of `value` in `enum`; a value that has none is shown as its number."""
    names = list(ENUMS[enum])
    return names[value] if value < len(names) else str(value)


def pack(name: str, **values: int) -> bytes:
    """The payload of message `name`; a missing, unknown or unfitting field raises ValueError."""
    fields = MESSAGES[name].fields
    if fields.keys() != values.keys():
        raise ValueError(f"'{name}' has the fields {', '.join(fields) or '(none)'}, not {', '.join(values) or '(none)'}")
    try:
        return _FORMATS[name].pack(NUMBERS[name], *(values[field] for field in fields))
    except struct.error as error:
        raise ValueError(f"a value of '{name}' does not fit its field ({', '.join(map(str, values.values()))}): {error}") from error


def unpack(payload: bytes) -> tuple[str, dict[str, Any]]:
    """Name and values of a payload; raises Unreadable."""
    if not payload or payload[0] >= len(_NAMES):
        raise Unreadable(f"no message has the number {payload[:1].hex() or '(none)'}")
    name = _NAMES[payload[0]]
    fields, form = MESSAGES[name].fields, _FORMATS[name]
    rest = payload[form.size :]
    if len(payload) < form.size or (rest and "bytes" not in fields.values()):
        raise Unreadable(f"'{name}' has {form.size} bytes, not {len(payload)}")
    values: dict[str, Any] = dict(zip(fields, form.unpack(payload[: form.size])[1:], strict=False))
    if "bytes" in fields.values():
        values["data"] = rest
    return name, values


def table() -> dict[str, Any]:
    """All of it, JSON-ready; what the hash is taken over. Explanations are left out: they may be improved without a flash."""
    return {
        "revision": REVISION,
        "limits": {name: value for name, (value, _) in LIMITS.items()},
        "enums": {name: list(values) for name, values in ENUMS.items()},
        "axes": {name: axis[1:] for name, axis in AXES.items()},
        "motions": MOTIONS,
        "settings": {name: values[:3] for name, values in SETTINGS.items()},
        "messages": {name: {"from": m.sender, "fields": m.fields} for name, m in MESSAGES.items()},
    }


def _canonical(values: Any) -> bytes:
    return json.dumps(values, separators=(",", ":"), ensure_ascii=True).encode()  # not sorted: the order of messages is their numbers


def dictionary_hash(values: dict[str, Any] | None = None) -> int:
    """First 32 bits of the SHA-256 of the dictionary."""
    return int.from_bytes(hashlib.sha256(_canonical(values or table())).digest()[:4], "big")


def settings_crc(values: dict[str, int]) -> int:
    """CRC-32 of a whole set of settings, as the firmware computes it."""
    return zlib.crc32(struct.pack(f"<{len(SETTINGS)}i", *(values[name] for name in SETTINGS)))


def packed(version: str) -> bytes:
    """What the firmware carries: the dictionary and its version, compressed."""
    return zlib.compress(_canonical({**table(), "version": version}), 9)


def unpacked(data: bytes) -> dict[str, Any]:
    """The dictionary that a firmware carries; raises Unreadable."""
    try:
        values = json.loads(zlib.decompress(data))
    except (zlib.error, ValueError) as error:
        raise Unreadable(f"the firmware's dictionary cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise Unreadable("the firmware's dictionary is not a table")
    return values


def build_number(firmware: Path) -> int:
    """First 32 bits of the SHA-256 of the firmware's sources and the dictionary: equal builds have equal numbers."""
    digest = hashlib.sha256(_canonical(table()))
    for path in sorted([*firmware.glob("*.[ch]"), *firmware.glob("*.ld"), firmware / "Makefile"]):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:4], "big")


def c_header(version: str, build: int) -> str:
    """`dictionary.h`."""
    lines = ["/* Made by firmware_bridge/dictionary.py; changes belong there. */", "#pragma once", "#include <stdint.h>", ""]
    lines += [f"#define DICTIONARY_HASH 0x{dictionary_hash():08x}u", f"#define BUILD_NUMBER 0x{build:08x}u"]
    lines += [f"#define {name} {value}" for name, (value, _) in LIMITS.items()]
    for enum, names in ENUMS.items():
        lines += ["", f"enum {{ {', '.join(f'{enum}_{name}' for name in names)}, {enum}_COUNT }};"]
    lines += ["", f"enum {{ {', '.join(f'AXIS_{name}' for name in AXES)}, AXIS_COUNT }};"]
    lines += [f"enum {{ {', '.join(f'MOTION_{name}' for name in MOTIONS)}, MOTION_COUNT }};"]
    lines += [f"enum {{ {', '.join(f'SETTING_{name}' for name in SETTINGS)}, SETTING_COUNT }};"]
    lines += [f"enum {{ {', '.join(f'MESSAGE_{name.upper()}' for name in MESSAGES)}, MESSAGE_COUNT }};", ""]
    for name, message in MESSAGES.items():
        fields = [
            f"uint8_t data[{IDENTITY_DATA_MAX}];" if kind == "bytes" else f"{_C_TYPES[kind]} {field};"
            for field, kind in message.fields.items()
        ]
        lines.append(f"struct __attribute__((packed)) {name} {{ uint8_t which; {' '.join(fields)} }};")
    rows = ", ".join(f"{{{a.low}, {a.high}, {a.rest}, {a.speed}, {a.acceleration}, {a.on_max_s}}}" for a in AXES.values())
    steps = [(at, axis, how, value) for motion in MOTIONS.values() for at, axis, how, value in motion]
    first, starts = 0, []
    for motion in MOTIONS.values():
        starts.append(first)
        first += len(motion)
    blob = packed(version)
    sizes = ", ".join(f"sizeof(struct {name})" if m.sender == "host" else "0" for name, m in MESSAGES.items())
    lines += [
        "",
        "struct axis { int16_t low, high, rest; int32_t speed, acceleration, on_max_s; };",
        "struct step { uint16_t at_ms; uint8_t axis, sway; int16_t value; };",
        "struct setting { int32_t initial, low, high; };",
        f"#define STEP_COUNT {len(steps)}",
        f"#define PACKED_BYTES {len(blob)}",
        "#ifdef DICTIONARY_TABLES",
        f"static const struct axis AXES[AXIS_COUNT] = {{{rows}}};",
        "static const struct step STEPS[STEP_COUNT] = {"
        + ", ".join(f"{{{at}, AXIS_{axis}, {int(how == 'SWAY')}, {value}}}" for at, axis, how, value in steps)
        + "};",
        f"static const uint8_t MOTION_START[MOTION_COUNT + 1] = {{{', '.join(map(str, [*starts, first]))}}};",
        "#endif",
        "#ifdef DICTIONARY_MESSAGES",
        "static const struct setting SETTINGS[SETTING_COUNT] = {"
        + ", ".join(f"{{{v[0]}, {v[1]}, {v[2]}}}" for v in SETTINGS.values())
        + "};",
        f"static const uint8_t COMMAND_BYTES[MESSAGE_COUNT] = {{{sizes}}};",
        f"static const uint8_t PACKED[PACKED_BYTES] = {{{', '.join(map(str, blob))}}};",
        "#endif",
        "",
    ]
    return "\n".join(lines)


def tables() -> str:
    """The tables of PROTOCOL.md."""

    def block(title: str, head: str, rows: list[str]) -> list[str]:
        columns = head.count("|") + 1
        return [f"### {title}", "", f"| {head} |", "|" + "---|" * columns, *(f"| {row} |" for row in rows), ""]

    lines = block(
        "Messages",
        "number | name | from | fields | meaning",
        [
            f"{NUMBERS[name]} | `{name}` | {m.sender} | {', '.join(f'{f} {k}' for f, k in m.fields.items())} | {m.meaning}"
            for name, m in MESSAGES.items()
        ],
    )
    lines += block("Limits", "name | value | meaning", [f"`{n}` | {v} | {why}" for n, (v, why) in LIMITS.items()])
    for enum, values in ENUMS.items():
        lines += block(enum, "value | name | meaning", [f"{i} | `{n}` | {why}" for i, (n, why) in enumerate(values.items())])
    lines += block(
        "Outputs that move",
        "name | unit | range | at rest | speed /s | acceleration /s² | on for at most",
        [f"`{n}` | {a.unit} | {a.low} … {a.high} | {a.rest} | {a.speed} | {a.acceleration} | {a.on_max_s} s" for n, a in AXES.items()],
    )
    lines += block(
        "Motions",
        "number | name | steps",
        [
            f"{i} | `{name}` | " + "; ".join(f"{at} ms: {axis} {how.lower()} {value}" for at, axis, how, value in steps)
            for i, (name, steps) in enumerate(MOTIONS.items())
        ],
    )
    lines += block(
        "Settings",
        "number | name | default | range | meaning",
        [f"{i} | `{n}` | {d} | {low} … {high} | {why}" for i, (n, (d, low, high, why)) in enumerate(SETTINGS.items())],
    )
    lines += block("Counters", "name | meaning", [f"`{n}` | {why}" for n, why in COUNTERS.items()])
    return "\n".join(lines).rstrip() + "\n"


BEGIN, END = "<!-- tables: made by dictionary.py -->\n", "<!-- end of tables -->\n"


def with_tables(page: str) -> str:
    """`page` with its tables made anew."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + "\n" + tables() + "\n" + END + rest.partition(END)[2]


def main(arguments: list[str]) -> int:
    target = Path(arguments[0])
    if target.suffix == ".md":
        target.write_text(with_tables(target.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    build = build_number(Path(__file__).parent / "firmware")
    version = arguments[1] if len(arguments) > 1 else "unknown"
    target.mkdir(parents=True, exist_ok=True)
    (target / "dictionary.h").write_text(c_header(version, build), encoding="utf-8")
    (target / "build.json").write_text(json.dumps({"version": version, "build": build, "dictionary": dictionary_hash()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
