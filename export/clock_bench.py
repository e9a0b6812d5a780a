"""How well the clock keeps time: a figure of its phase beside drifting masters, and its edges beside cyclictest, idle and under load."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from device.realtime import PRIORITY, RealTime
from device.ticker import RealtimeTicker
from export.bench import start_cyclictest
from export.drift import TICK_NS, Crystal, phase_errors_ms

FIGURE_S = 1500.0
FIGURE = {
    "250 ppm slow": Crystal(-250),
    "250 ppm fast, with silences of 100 ms": Crystal(250, silences=0.02, seed=1),
    "warms up by 60 ppm in ten minutes": Crystal(0, ramp_ppm=60, seed=2),
}
EDGE_US = 10_000  # twenty times as many edges as ticks: enough for a 99.9th percentile
LATENESS_S = 30.0
PERCENTILES = {"p50": 50.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}
AIM = 3.0  # times cyclictest's p99, idle


def main(arguments: list[str]) -> int:
    """`python -m export.clock_bench FIGURE.png`, part of `make bench`."""
    path = Path(arguments[0])
    print(lateness(LATENESS_S))  # first: a process that has computed for long is a scheduler's last choice
    draw_phase(path, FIGURE_S)
    print(f"\nthe clock's phase beside simulated masters: {path}")
    return 0


def draw_phase(path: Path, seconds: float) -> None:
    """Phase error of every edge over time, with the millisecond it has to keep within."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    axes.axhspan(-1, 1, color="0.92", label="within 1 ms")
    axes.axvline(30, color="0.7", linewidth=0.8)
    for label, crystal in FIGURE.items():
        errors = phase_errors_ms(crystal, seconds)
        axes.plot((1 + np.arange(errors.size)) * TICK_NS / 1e9, errors, linewidth=0.8, label=label)
    axes.set(xscale="log", ylim=(-3, 3), xlabel="time since the start, s (the line: 30 s)", ylabel="edge after the master's, ms")
    axes.set_title("Simulated masters whose callbacks come up to 5 ms late")
    axes.legend(loc="upper right", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)


def lateness(seconds: float) -> str:
    """The table; what cannot be measured here is said in its place."""
    lines = [f"edges every {EDGE_US // 1000} ms for {seconds:.0f} s, each run beside cyclictest with the same scheduling; ms", ""]
    lines += [f"| {'':24} | {'edge':>8} | {'cyclictest':>10} | {'ratio':>8} |\n|{'-' * 26}|{'-' * 9}:|{'-' * 11}:|{'-' * 9}:|"]
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        for condition in ("idle", "under load"):
            if condition == "under load" and shutil.which("stress-ng") is None:
                notes.append("under load: stress-ng is not installed; run .ci/packages stress-ng")
                continue
            with _load(Path(folder), condition), RealTime() as privileges:
                ours, missed, theirs = _measure(seconds, "scheduler" not in privileges.missing)
            lines += [_row(f"{condition}, {name}", ours[name], theirs.get(name)) for name in PERCENTILES]
            notes.append(f"{condition}: {missed} edges missed; scheduler {privileges.event['scheduler'] or 'ordinary'}")
            if privileges.missing:
                notes.append(f"{condition}: not granted: {', '.join(f'{k} ({v})' for k, v in privileges.missing.items())}")
    return "\n".join(
        [*lines, "", *notes, f"aim: p99 at most {AIM:.0f} × cyclictest when idle, and with privileges no edge missed under load"]
    )


def _row(name: str, ours: float, theirs: float | None) -> str:
    beside = f"{theirs:10.3f} | {ours / theirs if theirs else float('inf'):6.2f} ×" if theirs is not None else f"{'–':>10} | {'–':>8}"
    return f"| {name:24} | {ours:8.3f} | {beside} |"


def _measure(seconds: float, fifo: bool) -> tuple[dict[str, float], int, dict[str, float]]:
    """Lateness of our edges in ms, how many were missed, and cyclictest's in the same seconds (nothing if it is not there)."""
    scheduling = ("--mlockall", "--policy=fifo", f"--priority={PRIORITY}") if fifo else ("--policy=other",)
    timer = start_cyclictest(seconds, EDGE_US, *scheduling)
    ticker = RealtimeTicker(EDGE_US * 1000)
    count = round(seconds * 1e6 / EDGE_US)
    late_ms, tick, missed = np.zeros(count), 0, 0
    try:
        ticker.start()
        for i in range(count):
            edge = ticker.wait(tick)
            late_ms[i], tick = edge.late_ns / 1e6, edge.tick + 1
            missed += edge.missed
    finally:
        ticker.close()
    ours = {name: float(np.percentile(late_ms, share)) for name, share in PERCENTILES.items()}
    return ours, missed, timer() if timer else {}


@contextmanager
def _load(folder: Path, condition: str) -> Iterator[None]:
    """Under load: every core computes, and one process writes to the disk."""
    if condition == "idle":
        yield
        return
    command = ["stress-ng", "--cpu", "0", "--hdd", "1", "--hdd-bytes", "64m", "--temp-path", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as stress:
        try:
            yield
        finally:
            stress.terminate()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
