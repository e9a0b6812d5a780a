"""JSON that somebody else wrote: asked for field by field, each by its kind, and the one that is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from device.signature import read_bounded
from export.errors import ExportError

FILE_BYTES = 16 << 20  # of any JSON file read here; companion-nano's quantization.json has 48 kB
LONGEST = 4096  # entries of a list or an object, so that a page stays one that a browser can show
_LARGEST = 1e30  # of a number: what is computed from such ones is finite

T = TypeVar("T")


class Unreadable(ExportError):
    """A file whose content is not what our own commands write; the text names file, field and remedy."""


@dataclass(frozen=True)
class Record:
    """An object in a JSON file; every accessor raises Unreadable."""

    values: dict[str, Any]
    file: Path
    remedy: str
    path: str = ""

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def text(self, name: str) -> str:
        return self._as(name, "a text", lambda value: value if isinstance(value, str) else None)

    def flag(self, name: str) -> bool:
        return self._as(name, "true or false", lambda value: value if isinstance(value, bool) else None)

    def number(self, name: str) -> float:
        return self._as(name, "a finite number", _finite)

    def whole(self, name: str) -> int:
        return self._as(name, "a whole number", lambda value: value if type(value) is int and abs(value) < 1 << 62 else None)

    def numbers(self, name: str, count: int | None = None) -> list[float]:
        """All of a list; with `count`, of just so many."""
        kind = f"a list of {'' if count is None else f'{count} '}finite numbers"
        found = self._as(name, kind, lambda value: [_finite(v) for v in value] if _is_list(value) else None)
        if count is not None and len(found) != count:
            self._refuse(name, kind)
        return [v if v is not None else self._refuse(name, kind) for v in found]

    def record(self, name: str) -> Record:
        values = self._as(name, "an object", lambda value: value if isinstance(value, dict) and len(value) <= LONGEST else None)
        return Record(values, self.file, self.remedy, self._full(name))

    def records(self, name: str) -> list[Record]:
        """The objects in a list."""
        found = self._as(name, "a list of objects", lambda value: value if _is_list(value) else None)
        return [Record({"": value}, self.file, self.remedy, f"{self._full(name)}[{i}]").record("") for i, value in enumerate(found)]

    def each(self) -> Iterator[tuple[str, Record]]:
        """Name and value of all fields, which are objects."""
        return ((name, self.record(name)) for name in self.values)

    def each_number(self) -> Iterator[tuple[str, float]]:
        """Name and value of all fields, which are numbers."""
        return ((name, self.number(name)) for name in self.values)

    def _as(self, name: str, kind: str, read: Callable[[Any], T | None]) -> T:
        value = read(self.values.get(name))
        return self._refuse(name, kind) if value is None else value

    def _refuse(self, name: str, kind: str) -> NoReturn:
        raise Unreadable(f"{self.file}: field '{self._full(name)}' is not {kind}; {self.remedy}")

    def _full(self, name: str) -> str:
        return f"{self.path}.{name}".strip(".")


def read_record(file: Path, remedy: str) -> Record:
    """The object in a JSON file; raises Unreadable."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        values = json.loads(read_bounded(file, FILE_BYTES), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"{file}: cannot be read ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise Unreadable(f"{file}: is no object; {remedy}")
    return Record(values, file, remedy)


def _finite(value: Any) -> float | None:
    if type(value) not in (int, float):
        return None
    return float(value) if -_LARGEST < value < _LARGEST else None


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= LONGEST
