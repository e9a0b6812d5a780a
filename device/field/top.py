"""`copresence top`: what the companion does just now, in a terminal."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device.field import board
from device.field.statistics import STATISTICS

if TYPE_CHECKING:
    from rich.console import RenderableType

PERIOD_S = 0.5  # the status is renewed once a second
STALE_S = 3.0
_BARS = "▁▂▃▄▅▆▇█"
_LOUD_DBFS, _QUIET_DBFS = -10, -70  # of the level meter


class TerminalError(RuntimeError):
    """rich is not installed. Remedy: install the extra 'board'."""


def add_command(commands: Any) -> None:
    """`copresence top`."""
    command = commands.add_parser("top", help="what the companion hears, sees, says and does, and how it is, as it happens")
    command.add_argument("--once", action="store_true", help="print it once, and end")
    command.add_argument("--status", type=Path, default=board.STATUS, metavar="FILE", help=f"default: {board.STATUS}")
    command.set_defaults(command_function=run)


def run(arguments: argparse.Namespace) -> int:
    """Until Ctrl-C; raises TerminalError."""
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError as error:
        raise TerminalError(f"rich cannot be imported ({error}); install the extra 'board', or look at {arguments.status}") from error
    console = Console()
    if arguments.once:
        console.print(view(board.read_json(arguments.status), time.monotonic_ns()))
        return 0
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(view(board.read_json(arguments.status), time.monotonic_ns()), refresh=True)
            time.sleep(PERIOD_S)
    return 0


def view(status: Mapping[str, Any], now_ns: int) -> RenderableType:
    """One picture of a status, or of there being none."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if not status:
        return Text("The companion does not run here. Why: copresence doctor, copresence logs", style="bold red")
    age_s = (now_ns - status["at_ns"]) / 1e9
    stats, senses, health = status["stats"], status["senses"], status["health"]
    sick = [name for name, well in health.items() if not well]
    state, style = ("ticking", "bold green") if not sick else (f"not well: {', '.join(sick)}", "bold yellow")
    if age_s > STALE_S:
        state, style = f"silent for {age_s:.0f} s", "bold red"
    versions = status["versions"]
    budget_ms = float(versions["playout_offset_ms"])
    head = Text.assemble(
        (state, style),
        f"   ladder {stats['ladder']}   clock {_clock(status['clock'])}   up {_duration(status['t_s'])}\n",
        (f"{versions['bundle']} {versions['bundle_sha256'][:12]}   copresence {versions['copresence']} {status['release']}", "dim"),
    )
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="cyan", no_wrap=True)
    rows.add_column()
    rows.add_row("engine", _engine(status["engine_ms"], stats["engine_ms"], budget_ms))
    rows.add_row("hears", f"{_meter(senses['mic_dbfs'])} {senses['mic_dbfs']:.0f} dBFS   {versions['mic']}")
    rows.add_row("sees", _sees(senses, stats["camera_s"], versions["camera"]))
    rows.add_row("leans to", f"{_leaning(senses['word'])}   {_leaning(senses['act'])}")
    rows.add_row("says", _newest(status["said"], status["t_s"]) + ("   speaking" if status["speaking"] else ""))
    rows.add_row("does", _newest(status["did"], status["t_s"]))
    rows.add_row("bridge", _bridge(status["bridge"], versions))
    rows.add_row("heat", "   ".join(f"{zone} {celsius:.0f} °C" for zone, celsius in status["celsius"].items()) or "not reported")
    # Whatever else the line of statistics holds, by the table that explains it.
    shown = {"engine_ms", "camera_s", "clock", "ladder", "celsius"}
    counts = Table.grid(padding=(0, 2))
    for row in STATISTICS:
        if row.name in stats and row.name not in shown and not row.name.startswith("bridge"):
            counts.add_row(Text(row.name, style="cyan"), Text(_plain(stats[row.name])), Text(row.doc, style="dim"))
    return Group(head, Text(), rows, Text(), counts)


def sparkline(values: Sequence[float], budget: float) -> str:
    """Bars whose full height is the budget."""
    return "".join(_BARS[min(len(_BARS) - 1, int(value / budget * len(_BARS)))] for value in values)


def _engine(times_ms: Sequence[float], pair_ms: Sequence[float], budget_ms: float) -> RenderableType:
    from rich.text import Text

    line = Text()
    for value, bar in zip(times_ms, sparkline(times_ms, budget_ms), strict=True):
        line.append(bar, "red" if value > budget_ms else "green")
    return line.append(f"  {pair_ms[0]:.1f} ms, p99 {pair_ms[1]:.1f}, of {budget_ms:.0f}")


def _clock(clock: Mapping[str, Any]) -> str:
    return f"{clock['master']} {clock['state']}" + (f" {clock['ppm']:+.1f} ppm" if "ppm" in clock else "")


def _meter(dbfs: float) -> str:
    filled = round(20 * (dbfs - _QUIET_DBFS) / (_LOUD_DBFS - _QUIET_DBFS))
    return "█" * max(0, min(20, filled)) + "░" * (20 - max(0, min(20, filled)))


def _sees(senses: Mapping[str, Any], age_s: float, camera: str) -> str:
    if camera == "none":
        return "nothing: no camera"
    return f"brightness {senses['brightness']:.0%}, movement {senses['movement']:.1%}, {age_s * 1000:.0f} ms old   {camera}"


def _leaning(pair: Sequence[Any]) -> str:
    return f"{pair[0]} {pair[1]:.0%}"


def _newest(entries: Sequence[Sequence[Any]], now_s: float) -> str:
    return ", ".join(f"{what} ({now_s - at_s:.0f} s ago)" for at_s, what in list(reversed(entries))[:3]) or "nothing yet"


def _bridge(bridge: Mapping[str, Any], versions: Mapping[str, Any]) -> str:
    if not bridge:
        return "none"
    trip_ms = bridge.get("round_trip_ms")
    shown = [bridge["state"]] + ([f"{trip_ms:.2f} ms"] if trip_ms is not None else []) + [f"{bridge['faults']} faults"]
    return "   ".join(shown + ([f"firmware {versions['firmware']}"] if "firmware" in versions else []))


def _plain(value: Any) -> str:
    return " / ".join(str(part) for part in value) if isinstance(value, list) else str(value)


def _duration(seconds: float) -> str:
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}"
