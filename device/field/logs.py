"""`copresence logs`: the companion's lines in systemd's journal, for people."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import IO, Any

LEVELS = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")  # journalctl's names, by syslog's number
_COLOURS = {"emerg": "1;37;41", "alert": "1;37;41", "crit": "1;31", "err": "31", "warning": "33", "notice": "1", "debug": "2"}  # ANSI SGR
LINES = 200  # shown of what there is, unless a time is given
UNITS = "copresence*"
_FIELDS = "MESSAGE,PRIORITY,_SYSTEMD_UNIT,UNIT,SYSLOG_IDENTIFIER"


class JournalError(RuntimeError):
    """The journal cannot be read. Remedy: in the text."""


def add_command(commands: Any) -> None:
    """`copresence logs`."""
    command = commands.add_parser("logs", help="what the companion told the journal, readable")
    command.add_argument("--follow", "-f", action="store_true", help="go on with what comes")
    command._negative_number_matcher = re.compile(r"-\d")  # argparse: what looks like one is a value, such as -5min
    command.add_argument(
        "--since", metavar="TIME", help="as journalctl's: '-5min', 'today', '2026-11-25 04:00' (default: the newest lines)"
    )
    command.add_argument("--level", choices=LEVELS, default="info", help="this and worse (default: info; debug shows the statistics)")
    command.add_argument("--grep", metavar="PATTERN", help="only lines in which this regular expression is found")
    command.add_argument("--json", action="store_true", help="lines of JSON: time, level, unit and the event")
    command.set_defaults(command_function=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0, also when whoever reads has gone; raises JournalError."""
    try:
        pattern = re.compile(arguments.grep or "", re.IGNORECASE)
    except re.error as error:
        raise JournalError(f"--grep {arguments.grep!r} is not a regular expression ({error}); escape what is meant literally") from error
    show = as_json if arguments.json else readable(sys.stdout.isatty() or "COPRESENCE_COLOUR" in os.environ)
    try:
        for record in records(arguments.level, arguments.since, arguments.follow, None if arguments.grep else LINES):
            line = show(record)
            if pattern.search(line):
                print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what Python still wants to flush
    except KeyboardInterrupt:
        pass
    return 0


def records(level: str, since: str | None, follow: bool, lines: int | None) -> Iterator[dict[str, Any]]:
    """{time_s, level, unit, event}, oldest first. Raises JournalError, and BrokenPipeError when nobody reads standard output any more."""
    command = [
        "journalctl",
        "--no-pager",
        "--quiet",
        "--output=json",
        f"--output-fields={_FIELDS}",
        f"--unit={UNITS}",
        f"--priority={level}",
    ]
    command += [f"--since={since}"] if since else [] if lines is None else [f"--lines={lines}"]
    command += ["--follow"] if follow else []
    if follow and lines is None and not since:
        command.append("--lines=all")
    try:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError as error:
        raise JournalError("there is no journalctl here; on a board: make logs HOST=user@board") from error
    assert child.stdout is not None and child.stderr is not None
    with _ends_with(child):
        for line in _lines(child.stdout):
            yield _record(json.loads(line))
        if child.wait() > 0:
            said = child.stderr.read().decode(errors="replace").strip().splitlines()
            if said and "No data available" in said[-1]:  # its way to say that no unit of that name ever wrote
                raise JournalError("the companion has told this journal nothing yet; start it: systemctl start copresence")
            raise JournalError(f"journalctl: {said[-1] if said else child.returncode}; read it as root, or join the group systemd-journal")


@contextlib.contextmanager
def _ends_with(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """A connection that is cut sends SIGHUP; journalctl must not stay behind."""

    def end(number: int, frame: FrameType | None) -> None:
        child.terminate()

    with contextlib.ExitStack() as stack:
        for number in (signal.SIGHUP, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, end))
        try:
            yield
        finally:
            if child.poll() is None:
                child.terminate()
            child.wait()


def _lines(source: IO[bytes]) -> Iterator[bytes]:
    """Lines as they come; raises BrokenPipeError when standard output has no reader any more, which a quiet journal never finds out."""
    poll = select.poll()
    poll.register(source, select.POLLIN)
    with contextlib.suppress(ValueError, OSError):  # under pytest it has no descriptor
        poll.register(sys.stdout.fileno(), 0)  # errors are reported all the same
    rest = b""
    while True:
        for descriptor, _ in poll.poll():
            if descriptor != source.fileno():
                raise BrokenPipeError
            data = os.read(source.fileno(), 65536)
            if not data:
                return
            *whole, rest = (rest + data).split(b"\n")
            yield from whole


def _record(entry: Mapping[str, Any]) -> dict[str, Any]:
    message = entry.get("MESSAGE", "")
    if isinstance(message, list):  # bytes that are no UTF-8
        message = bytes(message).decode(errors="replace")
    event: Any = None
    if isinstance(message, str) and message.startswith("{"):
        with contextlib.suppress(ValueError):
            event = json.loads(message)
    if not isinstance(event, dict) or "event" not in event:
        event = {"event": "text", "text": str(message)}
    # UNIT: of whom systemd itself tells.
    unit = str(entry.get("UNIT") or entry.get("_SYSTEMD_UNIT") or entry.get("SYSLOG_IDENTIFIER") or "")
    level = int(entry.get("PRIORITY", 6))
    return {
        "time_s": int(entry.get("__REALTIME_TIMESTAMP", 0)) / 1e6,
        "level": LEVELS[min(level, len(LEVELS) - 1)],
        "unit": unit.removesuffix(".service"),
        "event": event,
    }


def as_json(record: Mapping[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


def readable(colours: bool) -> Callable[[Mapping[str, Any]], str]:
    """A function that makes one line of a record."""

    def show(record: Mapping[str, Any]) -> str:
        at = time.strftime("%d.%m. %H:%M:%S", time.localtime(record["time_s"]))
        who = record["unit"].removeprefix("copresence").lstrip("-")
        text = f"{record['level']:8}{who + ' ' if who else ''}{sentence(record['event'])}"
        colour = _COLOURS.get(record["level"]) if colours else None
        return f"{at} {text}" if colour is None else f"{at} \033[{colour}m{text}\033[0m"

    return show


def sentence(event: Mapping[str, Any]) -> str:
    """An event in words; what has no words of its own is its name and its values."""
    rest = {name: value for name, value in event.items() if name not in ("event", "text", "say", "act", "t_s", "tick")}
    name = event["event"]
    if name == "text":
        return str(event["text"])
    if name == "chose":
        says = [f"says {' '.join(event['say'])}"] if event.get("say") else []
        return ", ".join(says + ([f"does {event['act']}"] if event.get("act") else []))
    shown = " ".join(f"{key} {_value(value)}" for key, value in rest.items())
    return f"{str(name).replace('_', ' ')}{': ' if shown else ''}{shown}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(_value(entry) for entry in value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_value(entry)}" for key, entry in value.items()) + "}"
    return str(value)
