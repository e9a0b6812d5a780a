"""The boards that an engine can be built for, read from targets.toml, and the check that a board can run a precision."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from export.errors import ExportError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class TargetError(ExportError):
    """A board that is not in the table, or a precision that it cannot run; the text names what it can. Remedy: choose one of those."""


@dataclass(frozen=True)
class Precision:
    """What one precision costs: bytes a weight and an activation, the rate of a board that its products run at, and the share of the
    bandwidth that decoders of this width were measured to reach."""

    name: str
    weight_bytes: float
    float_bytes: int  # activations, and all weights that stay in floating point
    products: str  # key of Target.gpu_tops
    bandwidth_share: float


@dataclass(frozen=True)
class JetPack:
    """What a board's software brings; versions as `major.minor[.patch]`."""

    name: str
    tensorrt: str
    cuda: str
    python: str


@dataclass(frozen=True)
class Target:
    """One board. GB and TOPS are powers of ten; `gpu_tops` are dense rates, `memory_gb` is shared by CPU and GPU."""

    name: str
    board: str
    sm: str
    memory_gb: float
    bandwidth_gb_s: float
    l2_mb: float
    gpu_tops: dict[str, float]
    jetpack: tuple[JetPack, ...]
    precisions: tuple[Precision, ...]

    def require(self, precision: str) -> Precision:
        """The precision of that name if this board runs it; raises TargetError."""
        names = [p.name for p in self.precisions]
        if precision in names:
            return self.precisions[names.index(precision)]
        if precision in precisions():
            raise TargetError(
                f"{self.board} (SM {self.sm}) has no {precision}; give it one of {', '.join(names)}, or choose another --target"
            )
        raise TargetError(f"no precision '{precision}'; known are {', '.join(precisions())}")


@functools.cache
def precisions() -> dict[str, Precision]:
    """Every precision by its name, in the table's order."""
    return {name: Precision(name, **row) for name, row in _table()["precision"].items()}


@functools.cache
def targets() -> dict[str, Target]:
    """Every board by its name, in the table's order."""
    jetpacks = {name: JetPack(name, **row) for name, row in _table()["jetpack"].items()}
    found = {}
    for name, row in _table()["target"].items():
        known = {"jetpack": tuple(jetpacks[j] for j in row["jetpack"]), "precisions": tuple(precisions()[p] for p in row["precisions"])}
        found[name] = Target(name, **(row | known))
    return found


def find_target(name: str) -> Target:
    """The board of that name; raises TargetError."""
    if name not in targets():
        raise TargetError(f"no target '{name}'; known are {', '.join(targets())}")
    return targets()[name]


@functools.cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    return tomllib.loads(files("export").joinpath("targets.toml").read_text(encoding="utf-8"))
