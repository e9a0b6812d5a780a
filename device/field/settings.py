"""The board's configuration: one TOML file, every key of which is a row of one table, and `copresence config`.

Check, explanation, the shipped file and the options that a key stands for all come from the table. A mistake is named with its line.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SETTINGS_FILE = Path("/etc/copresence/copresence.toml")
_BYTES = 1 << 20  # of a file written by hand


class SettingsError(ValueError):
    """A configuration file that cannot be used; the text names file, line, key and remedy."""


class Setting(NamedTuple):
    """One key. `option` is the attribute of `copresence run`'s arguments that it sets; empty for one that others read."""

    name: str  # section.key
    default: str | int | bool
    doc: str
    option: str = ""
    choices: tuple[str, ...] = ()
    low: int = 0
    high: int = 0

    @property
    def wanted(self) -> str:
        """What a value must be, for people."""
        if self.choices:
            return f"one of {', '.join(repr(choice) for choice in self.choices)}"
        if isinstance(self.default, bool):
            return "true or false"
        if isinstance(self.default, int):
            return f"a whole number from {self.low} to {self.high}"
        return "a text"

    def allows(self, value: object) -> bool:
        if type(value) is not type(self.default):
            return False
        if self.choices:
            return value in self.choices
        return isinstance(value, str | bool) or (isinstance(value, int) and self.low <= value <= self.high)


SETTINGS = (
    Setting("bundle.path", "/opt/copresence/current/bundle", "The bundle to run.", "bundle"),
    Setting(
        "bundle.keys", "/etc/copresence/keys", "Folder of public keys, which must be there: only bundles signed by one of them run.", "keys"
    ),
    Setting("bundle.state", "/var/lib/copresence", "Where the version of the signed bundle that ran last is kept.", "state"),
    Setting("bundle.unproven", False, "Run a quantized bundle without a passing proof; this is logged.", "unproven"),
    Setting(
        "engine.backend",
        "auto",
        "What runs the bundle. auto: TensorRT where it can be imported, otherwise ONNX Runtime on the CPU.",
        choices=("auto", "tensorrt", "onnxruntime"),
    ),
    Setting("engine.target", "", "The board, for TensorRT: a name in export/targets.toml, such as orin-nano-super."),
    Setting("engine.folder", "/var/lib/copresence-engine/engine", "Where the engine is kept that was built on this board."),
    Setting("audio.microphone", "live", "live, live:DEVICE (its index or name), none, or a sound file.", "mic"),
    Setting("audio.speaker", "live", "live, live:DEVICE, none, or a WAV file to write.", "speaker"),
    Setting(
        "audio.playout_offset_ms",
        0,
        "From a tick's edge to its speech. 0: from the engine's measured time, and raised when ticks come late.",
        "playout_offset_ms",
        low=0,
        high=1000,
    ),
    Setting(
        "audio.echo_canceller",
        "none",
        "In front of the model, for rooms that need one: webrtc is in the extra 'echo'.",
        "echo_canceller",
        choices=("none", "webrtc"),
    ),
    Setting(
        "camera.source",
        "none",
        "none, picamera2, argus or v4l2 (v4l2:/dev/video2 is another one), pattern (a test picture), a video file, or a folder of images.",
        "camera",
    ),
    Setting("bridge.port", "none", "Serial port of the microcontroller; auto: the only one there is; none: nothing moves.", "bridge"),
    Setting("bridge.body", "", "A TOML file with its servos' calibration, ends and rest; empty: a plain one.", "body"),
    Setting(
        "clock.master",
        "auto",
        "Whose clock the ticks follow. auto: the sound device's where there is one, otherwise the board's own.",
        "master",
        choices=("auto", "audio", "mcu", "soc"),
    ),
    Setting("realtime.priority", True, "Ask the kernel for real-time priority, a CPU and locked memory.", "priority"),
    Setting("recorder.raw", False, "Whether dumps of the flight recorder hold sound and pictures, too.", "record_raw"),
    Setting(
        "think.url",
        "",
        "A larger model to ask, when somebody says no to what was read: the address of an OpenAI-compatible server; empty: nobody.",
        "think",
    ),
    Setting("think.model", "default", "What that model is called there.", "think_model"),
    Setting("think.key_file", "", "Holds the key to it, and is its owner's alone; empty: none.", "think_key_file"),
    Setting("think.sound", False, "Whether it is sent what the microphone heard in the last seconds, too.", "think_sound"),
    Setting("voice.seed", 0, "Of the noise that the voice is made from.", "seed", low=0, high=(1 << 32) - 1),
    Setting("log.events", "journal", "Where events go: journal, - (standard output, with a line a tick), or a file.", "events"),
    Setting(
        "log.metrics_file",
        "",
        "Prometheus metrics for node_exporter's textfile collector, such as /run/copresence/copresence.prom; empty: none.",
        "metrics_file",
    ),
)
SECTIONS = {
    "bundle": "What runs, and whose word counts.",
    "engine": "On what it runs.",
    "audio": "Ears and voice.",
    "camera": "Eyes.",
    "bridge": "The body.",
    "clock": "Time.",
    "realtime": "What is asked of the kernel.",
    "recorder": "What it keeps of its last minute.",
    "think": "Whom it asks.",
    "voice": "How it sounds.",
    "log": "What it tells.",
}

_ROWS = {row.name: row for row in SETTINGS}


class Settings:
    """The value of every key, by `section.key`: the file's, or else the default."""

    def __init__(self, values: Mapping[str, str | int | bool]) -> None:
        self._values = {row.name: values.get(row.name, row.default) for row in SETTINGS}

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Raises SettingsError for the first mistake in the file, or a file that cannot be read."""
        mistakes, values = _examine(path)
        if mistakes:
            raise SettingsError(mistakes[0])
        return cls(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def engine_folder(self) -> Path | None:
        """Of the TensorRT engine; None where ONNX Runtime runs the bundle."""
        backend = self["engine.backend"]
        if backend == "auto":
            backend = "tensorrt" if importlib.util.find_spec("tensorrt") else "onnxruntime"
        return Path(self["engine.folder"]) if backend == "tensorrt" else None

    def arguments(self) -> dict[str, Any]:
        """The arguments of `copresence run` that the keys stand for, by the name of the attribute."""
        found: dict[str, Any] = {row.option: self._values[row.name] for row in SETTINGS if row.option}
        found["no_priority"] = not found.pop("priority")
        found["master"] = None if found["master"] == "auto" else found["master"]
        found["keys"] = found["keys"] or None
        found["engine"] = self.engine_folder()
        found["think"] = found["think"] or None
        found["playout_offset_ms"] = found["playout_offset_ms"] or "auto"
        found["echo_canceller"] = None if found["echo_canceller"] == "none" else found["echo_canceller"]
        for name in ("metrics_file", "body", "think_key_file"):
            found[name] = Path(found[name]) if found[name] else None
        return found


def mistakes(path: Path) -> list[str]:
    """Everything that is wrong with a file, in the order of its lines; each names file, line, key and remedy."""
    return _examine(path)[0]


def example() -> str:
    """The file as it is shipped: every key with its explanation, at its default."""
    lines = ["# The configuration of copresence. `copresence config --check` looks it over, `copresence config --explain` explains it.\n"]
    for section, doc in SECTIONS.items():
        lines.append(f"\n[{section}] # {doc}\n")
        for row in SETTINGS:
            if row.name.split(".")[0] == section:
                lines += [f"# {line}\n" for line in (row.doc, _limits(row)) if line]
                lines.append(f"{row.name.split('.')[1]} = {_toml(row.default)}\n")
    return "".join(lines)


def add_command(commands: Any) -> None:
    """`copresence config`."""
    command = commands.add_parser("config", help="check or explain the board's configuration file")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--check", action="store_true", help="name every mistake in the file, with its line")
    which.add_argument("--explain", nargs="?", const="", metavar="KEY", help="what every key means, or one key or section")
    which.add_argument("--example", action="store_true", help="print the file as it is shipped")
    command.add_argument("file", nargs="?", type=Path, default=SETTINGS_FILE, metavar="FILE", help=f"default: {SETTINGS_FILE}")
    command.set_defaults(command_function=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0, or 2 for a file with mistakes or a key that there is not."""
    if arguments.example:
        print(example(), end="")
        return 0
    if arguments.explain is not None:
        print("\n\n".join(_explain(row) for row in _chosen(arguments.explain)))
        return 0
    found = mistakes(arguments.file)
    for text in found:
        print(f"copresence: {text}", file=sys.stderr)
    if not found:
        print(f"{arguments.file}: good")
    return 2 if found else 0


def _chosen(name: str) -> list[Setting]:
    rows = [row for row in SETTINGS if not name or row.name == name or row.name.split(".")[0] == name]
    if not rows:
        raise SettingsError(f"there is no key {name!r}{_suggestion(name, _ROWS)}; all of them: copresence config --explain")
    return rows


def _explain(row: Setting) -> str:
    wanted = row.wanted[0].upper() + row.wanted[1:]
    return f"{row.name} = {_toml(row.default)}\n    {row.doc}\n    {wanted}."


def _examine(path: Path) -> tuple[list[str], dict[str, Any]]:
    try:
        with path.open("rb") as file:
            data = file.read(_BYTES + 1)
        if len(data) > _BYTES:
            raise ValueError(f"it is larger than {_BYTES} bytes")
        text = data.decode()
        tables = tomllib.loads(text)
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror}); 'copresence config --example' prints one to begin with"], {}
    except ValueError as error:  # TOMLDecodeError too, which names line and column; text that is not UTF-8
        return [f"{path}: is not TOML: {error}; correct it there"], {}
    lines = _lines(text)
    values = dict(_leaves(tables))
    found: list[tuple[int, str]] = []
    for name, value in values.items():
        at, row = f"{path}, line {lines.get(name, '?')}", _ROWS.get(name)
        if row is None:
            found.append((lines.get(name, 0), f"{at}: there is no key '{name}'{_suggestion(name, _ROWS)}; correct or remove it"))
        elif not row.allows(value):
            found.append((lines.get(name, 0), f"{at}: '{name}' must be {row.wanted}, not {_shown(value)}; correct it"))
    return [text for _, text in sorted(found)], values


def _leaves(tables: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for section, table in tables.items():
        if isinstance(table, dict) and table:
            yield from ((f"{section}.{key}", value) for key, value in table.items())
        elif not (section in SECTIONS and table == {}):
            yield section, table


_SECTION = re.compile(r"\s*\[+\s*([^\]#]+?)\s*\]")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")


def _lines(text: str) -> dict[str, int]:
    """The line of every key, which the parser does not tell."""
    section = ""
    found: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := _SECTION.match(line):
            section = _bare(header[1])
            found.setdefault(section, number)
        elif key := _KEY.match(line):
            found.setdefault(".".join(part for part in (section, _bare(key[1])) if part), number)
    return found


def _bare(name: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in name.split("."))


def _suggestion(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.7)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _limits(row: Setting) -> str:
    """What the default does not show of what is allowed."""
    return f"{row.wanted[0].upper()}{row.wanted[1:]}." if row.choices or type(row.default) is int else ""


def _toml(value: str | int | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _shown(value: object) -> str:
    return _toml(value) if isinstance(value, str | bool | int) else repr(value)
