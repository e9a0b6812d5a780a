"""`copresence-bridge`: look at the link to the microcontroller, talk over it, and flash what is behind it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from firmware_bridge.acts import ACT_LATE_NS, ACT_LEAD_NS
from firmware_bridge.body import BodyError, read_body
from firmware_bridge.bridge import Bridge
from firmware_bridge.dictionary import ENUMS, MESSAGES, MOTIONS, SETTINGS, name_of
from firmware_bridge.errors import BridgeError
from firmware_bridge.flash import WAYS, FlashError, flash
from firmware_bridge.framing import Decoder, Frame
from firmware_bridge.port import PortError, find_port

_READ_BYTES = 4096
ANSWER_S = 0.4  # what comes in this time after a command is shown as its answer

# Fields that are numbers on the wire and names for people.
_NAMED: dict[str, dict[str, Any]] = {"motion": dict(MOTIONS), "setting": dict(SETTINGS), "how": dict(ENUMS["REBOOT"])}
_SHOWN = {"state": "STATE", "cause": "CAUSE", "result": "RESULT", "reset": "RESET"}


class UsageError(ValueError):
    """A command that does not fit the dictionary; the text says what does."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 when nobody answers or flashing failed, 2 for input that cannot be used."""
    arguments = _parser().parse_args(argv)
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "decode": lambda a: _decode(a.file),
        "identify": _identify,
        "monitor": _monitor,
        "console": _console,
        "send": _send,
        "flash": _flash,
    }
    try:
        return commands[arguments.command](arguments)
    except (UsageError, BodyError) as error:
        print(f"copresence-bridge: {error}", file=sys.stderr)
        return 2
    except (BridgeError, PortError, FlashError) as error:
        print(f"copresence-bridge: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="copresence-bridge", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('copresence')}")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("decode", help="print the frames in a raw capture of the serial line, and what was damaged")
    command.add_argument("file", metavar="FILE", help="the capture, or a serial port; - for standard input")
    commands.add_parser("identify", help="who is there: build, dictionary, why it started")
    command = commands.add_parser("monitor", help="print what the microcontroller says, and one line of statistics a second")
    command.add_argument("--seconds", type=float, metavar="N", help="end after so long (default: Ctrl-C)")
    commands.add_parser("console", help="type commands as for 'send', one a line; 'help' lists them")
    command = commands.add_parser("send", help="send one command and print what is answered")
    command.add_argument("message", metavar="NAME", help="such as get_health, arm or act")
    command.add_argument("values", nargs="*", metavar="FIELD=VALUE", help="such as motion=NOD; times are ms from now")
    command = commands.add_parser("flash", help="put a firmware onto the chip, and see that it runs ('make flash-mcu')")
    command.add_argument("folder", type=Path, metavar="FOLDER", help="what 'make firmware' built: build/firmware")
    command.add_argument("--by", choices=sorted(WAYS), help="default: what is connected")
    for name in ("console", "send"):  # which move it
        commands.choices[name].add_argument(
            "--body", type=Path, metavar="FILE", help="what the body is like, as TOML (default: what the microcontroller was told last)"
        )
    for name in ("identify", "monitor", "console", "send", "flash"):
        commands.choices[name].add_argument("--port", metavar="PORT", help="default: the one in /dev/serial/by-id")
    return parser


def _open(arguments: argparse.Namespace, on_message: Callable[[str, dict[str, Any]], None] | None = None) -> Bridge:
    body = getattr(arguments, "body", None)
    settings = None if body is None else read_body(body)
    bridge = Bridge(arguments.port or find_port(), settings, on_message)
    bridge.start()
    return bridge


def _identify(arguments: argparse.Namespace) -> int:
    bridge = _open(arguments)
    identity = bridge.identity
    assert identity is not None
    print(
        f"{bridge.port}: build {identity.build:08x}, dictionary {identity.dictionary:08x}, settings {identity.settings:08x}, "
        f"started by {identity.reset}, {bridge.state}; round trip {bridge.clock.min_rtt_ns / 1e6:.2f} ms"
    )
    bridge.close()
    return 0


def _monitor(arguments: argparse.Namespace) -> int:
    bridge = _open(arguments, lambda name, values: print(_line(name, values), flush=True) if name not in ("clock", "health") else None)
    end = None if arguments.seconds is None else time.monotonic() + arguments.seconds
    try:
        while end is None or time.monotonic() < end:
            time.sleep(1.0 if end is None else max(0.0, min(1.0, end - time.monotonic())))
            for event in bridge.take_events():
                print(" ".join(f"{key}={value}" for key, value in event.items()))
            numbers = {**asdict(bridge.health), **{f"mcu_{name}": value for name, value in bridge.mcu_health.items()}}
            stats = " ".join(f"{name}={value}" for name, value in numbers.items() if value)
            rtt_ms, ppm = bridge.clock.min_rtt_ns / 1e6, bridge.clock.ppm
            print(f"stats state={bridge.state or 'GONE'} rtt_ms={rtt_ms:.3f} clock_ppm={ppm:+.1f} {stats}", flush=True)
    finally:
        bridge.close()
    return 0


def _send(arguments: argparse.Namespace) -> int:
    name, values = parse_command([arguments.message, *arguments.values])  # before the port is opened
    bridge = _open(arguments, _print_answers)
    _command(bridge, name, values)
    bridge.close()
    return 0


def _console(arguments: argparse.Namespace) -> int:
    bridge = _open(arguments, _print_answers)
    for line in sys.stdin:
        words = line.split()
        if words == ["help"]:
            print("\n".join(f"{name} {' '.join(f'{f}=' for f in m.fields)}" for name, m in MESSAGES.items() if m.sender == "host"))
        elif words:
            try:
                _command(bridge, *parse_command(words))
            except UsageError as error:
                print(error)
    bridge.close()
    return 0


def _command(bridge: Bridge, name: str, values: dict[str, int]) -> None:
    now_ns = time.monotonic_ns()
    for field in ("at", "deadline"):
        if field in values:
            values[field] = bridge.clock.to_us(now_ns + values[field] * 1_000_000)
    try:
        bridge.send(name, **values)
    except ValueError as error:
        raise UsageError(str(error)) from error
    time.sleep(ANSWER_S)


def parse_command(words: list[str]) -> tuple[str, dict[str, int]]:
    """`NAME FIELD=VALUE …` as name and numbers, times in ms from now; raises UsageError."""
    name, message = words[0], MESSAGES.get(words[0])
    if message is None or message.sender != "host":
        known = [known for known, m in MESSAGES.items() if m.sender == "host"]
        raise UsageError(f"there is no command {name!r}; there are: {', '.join(known)}")
    lead_ms = ACT_LEAD_NS // 1_000_000
    defaults = {"at": lead_ms if name == "act" else 0, "deadline": lead_ms + ACT_LATE_NS // 1_000_000, "id": 0, "offset": 0, "token": 0}
    values = {field: defaults[field] for field in message.fields if field in defaults}
    for word in words[1:]:
        field, equals, text = word.partition("=")
        if not equals or field not in message.fields:
            raise UsageError(f"{word!r} is not a value of '{name}'; give: {' '.join(f'{f}=…' for f in message.fields) or 'nothing'}")
        values[field] = _value(field, text)
    missing = [field for field in message.fields if field not in values]
    if missing:
        raise UsageError(f"'{name}' needs {' '.join(f'{field}=…' for field in missing)}")
    return name, values


def _value(field: str, text: str) -> int:
    names = list(_NAMED.get(field, ()))
    if text.upper() in names:
        return names.index(text.upper())
    try:
        return int(text, 0)
    except ValueError:
        raise UsageError(f"{field}={text} is not a number" + (f", nor one of {', '.join(names)}" if names else "")) from None


def _print_answers(name: str, values: dict[str, Any]) -> None:
    if name not in ("clock", "tick", "inputs", "pose"):
        print(_line(name, values), flush=True)


def _line(name: str, values: dict[str, Any]) -> str:
    def shown(field: str, value: Any) -> Any:
        if isinstance(value, bytes):
            return value.hex()
        return name_of(_SHOWN[field], value) if field in _SHOWN else value

    return f"{name} " + " ".join(f"{field}={shown(field, value)}" for field, value in values.items())


def _flash(arguments: argparse.Namespace) -> int:
    flash(arguments.folder, arguments.port, arguments.by, lambda text: print(text, flush=True))
    return 0


def _decode(name: str) -> int:
    decoder = Decoder()
    try:
        # Unbuffered: frames from a live port are shown when they arrive.
        with open(sys.stdin.fileno() if name == "-" else Path(name), "rb", buffering=0, closefd=name != "-") as capture:
            while data := capture.read(_READ_BYTES):
                _show(decoder.feed(data))
        _show(decoder.flush())
    except BrokenPipeError:  # the reader has seen enough (`| head`); keep Python from complaining when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        pass
    except OSError as error:
        print(f"copresence-bridge: cannot read {name}: {error.strerror}; name a capture file, or - for standard input", file=sys.stderr)
        return 2
    print(f"frames: {decoder.frames}, bytes outside of frames: {decoder.bad_bytes}, CRC errors: {decoder.crc_errors}")
    return 0


def _show(frames: list[Frame]) -> None:
    for frame in frames:
        print(f"{frame.sequence:2}  {len(frame.payload):2} bytes  {frame.payload.hex(' ')}".rstrip(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
