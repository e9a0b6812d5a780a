"""What a tick costs on this machine, as one table: engine, loop, start-up, memory, and the timer beside cyclictest."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from export.demo import LENGTH_S, SCENE_VIDEO, SCENE_WAV, Cue, make_scene, read_events

LONG_TICKS = 36_000  # two hours
SHORT_TICKS = 100
COMPARED_TICKS = 1000  # whose median engine time is compared at both ends of the long run
CYCLICTEST_US = 200_000
HISTOGRAM_US = 20_000  # longer latencies are counted as overflows and show in the maximum

Summary = dict[str, Any]


def run_bench(bundle: Path, repeats: int, firmware: Path | None = None) -> None:
    """Print the table; `repeats` real-time runs of 20 s each, every one beside its own cyclictest; a body in QEMU runs `firmware`."""
    with tempfile.TemporaryDirectory() as name, _body(firmware, Path(name) / "mcu") as port:
        folder = Path(name)
        up = next(cue for cue in make_scene(folder) if cue.what == "up")
        runs, cyclic = [], []
        for i in range(repeats):
            print(f"real-time run {i + 1} of {repeats} ({LENGTH_S:.0f} s)", file=sys.stderr, flush=True)
            summary, latency = _realtime_run(bundle, folder, port, up)
            runs.append(summary)
            cyclic.append(latency)
        print(f"{LONG_TICKS} simulated ticks", file=sys.stderr, flush=True)
        print(_table(bundle, runs, cyclic, _simulated_run(bundle, folder, SHORT_TICKS), _simulated_run(bundle, folder, LONG_TICKS)))


@contextmanager
def _body(firmware: Path | None, port: Path) -> Iterator[Path | None]:
    """The port of a microcontroller in QEMU; None without firmware."""
    if firmware is None:
        yield None
        return
    command = [sys.executable, "-m", "firmware_bridge.qemu", str(firmware), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as machine:
        assert machine.stdout is not None
        machine.stdout.readline()  # it is there
        try:
            yield port
        finally:
            machine.terminate()


def _reaction_s(events: list[Summary], up: Cue) -> float | None:
    """From the end of the word *up* to the tilt servo's set-point moving up; None if it did not."""
    looks = [e["t_s"] for e in events if e["event"] == "bridge_act" and e["motion"] == "LOOK_UP" and "t_s" in e]
    first = next((t_s for t_s in looks if up.start_s < t_s < up.due_s + 1), None)
    poses = [e["t_s"] for e in events if e["event"] == "bridge_pose" and e["tilt"] > 0 and first is not None and e["t_s"] >= first]
    return poses[0] - up.end_s if poses else None


def _realtime_run(bundle: Path, folder: Path, port: Path | None, up: Cue) -> tuple[Summary, dict[str, float] | None]:
    events = folder / "events.jsonl"
    timer = start_cyclictest(LENGTH_S, CYCLICTEST_US, "--policy=other")
    _copresence(
        *("--bundle", str(bundle), "--mic", str(folder / SCENE_WAV), "--camera", str(folder / SCENE_VIDEO)),
        *("--speaker", str(folder / "out.wav"), "--events", str(events), "--clock", "realtime", "--no-priority"),
        *(("--bridge", str(port)) if port else ()),
    )
    found = read_events(events)
    return found[-1] | {"reaction_s": _reaction_s(found, up)}, timer() if timer else None


def _simulated_run(bundle: Path, folder: Path, ticks: int) -> Summary:
    """The summary of a simulated run without inputs, with the median engine time of its first and last ticks."""
    events = folder / f"{ticks}.jsonl"
    tick_s = json.loads((bundle / "manifest.json").read_text())["tick_ms"] / 1000
    _copresence(
        *("--bundle", str(bundle), "--mic", "none", "--speaker", str(folder / "long.wav"), "--events", str(events)),
        *("--clock", "simulated", "--seconds", str(ticks * tick_s)),
    )
    found = read_events(events)
    engine_ms = [e["engine_ms"] for e in found if e["event"] == "tick"]
    early, late = engine_ms[SHORT_TICKS : SHORT_TICKS + COMPARED_TICKS], engine_ms[-COMPARED_TICKS:]
    return found[-1] | {"early_ms": median(early or engine_ms), "last_ms": median(late)}


def _copresence(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "device.cli", "run", *arguments], check=True, stdout=subprocess.DEVNULL)


def start_cyclictest(seconds: float, interval_us: int, *scheduling: str) -> Callable[[], dict[str, float]] | None:
    """Start cyclictest, if it is there; the function returned waits for its figures in ms. Empty ones: it was not let."""
    program = shutil.which("cyclictest") or shutil.which("cyclictest", path="/usr/sbin:/usr/bin")
    if program is None:
        return None
    loops = str(int(seconds * 1_000_000 / interval_us))
    command = [program, "--quiet", *scheduling, f"--interval={interval_us}", f"--loops={loops}", f"--histogram={HISTOGRAM_US}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def finish() -> dict[str, float]:
        output = process.communicate(timeout=3 * seconds + 10)[0]
        rows = [line.split() for line in output.splitlines() if line and not line.startswith("#")]
        counts = np.array([[int(value) for value in row[:2]] for row in rows if len(row) >= 2])
        if process.returncode or not counts.size:
            return {}
        latencies = np.repeat(counts[:, 0], counts[:, 1])
        worst = next(int(line.split(":")[1].split()[0]) for line in output.splitlines() if line.startswith("# Max Latencies"))
        p50, p99, p999 = np.percentile(latencies, (50, 99, 99.9))
        return {"p50": p50 / 1000, "p99": p99 / 1000, "p99.9": p999 / 1000, "max": worst / 1000}

    return finish


def _table(bundle: Path, runs: list[Summary], cyclic: list[dict[str, float] | None], short: Summary, long: Summary) -> str:
    def over_runs(read: Callable[[Summary], float]) -> float:
        return median(read(run) for run in runs)

    tick_ms = json.loads((bundle / "manifest.json").read_text())["tick_ms"]
    rows = [
        ("engine, p50", over_runs(lambda r: r["engine_ms"]["p50"]), "ms", "6"),
        ("engine, p99", over_runs(lambda r: r["engine_ms"]["p99"]), "ms", "12"),
        ("real-time factor: engine p50 over the tick", over_runs(lambda r: r["engine_ms"]["p50"]) / tick_ms, "", ""),
        ("loop without the engine, p50", over_runs(lambda r: r["overhead_ms"]["p50"]), "ms", "1"),
        ("loop without the engine, p99", over_runs(lambda r: r["overhead_ms"]["p99"]), "ms", ""),
        ("process start to first tick", over_runs(lambda r: r["first_tick_s"]), "s", "2"),
        ("peak memory", over_runs(lambda r: r["memory_mb"]), "MB", "300"),
        *((f"edge lateness, {p}", over_runs(lambda r, p=p: r["late_ms"][p]), "ms", "") for p in ("p50", "p99", "max")),  # type: ignore[misc]
    ]
    known = [c for c in cyclic if c]
    if known:
        rows += [(f"cyclictest in the same minute, {p}", median(c[p] for c in known), "ms", "") for p in ("p50", "p99", "max")]
        ratios = [run["late_ms"]["p99"] / c["p99"] for run, c in zip(runs, cyclic, strict=True) if c]
        rows.append(("edge lateness over cyclictest, p99", median(ratios), "×", "5"))
    reactions = [run["reaction_s"] for run in runs if run["reaction_s"] is not None]
    if reactions:
        rows.append(("end of the word 'up' to the tilt servo's motion", median(reactions), "s", "0.5"))
    rows += [
        (f"engine, simulated, ticks {SHORT_TICKS} to {SHORT_TICKS + COMPARED_TICKS}", long["early_ms"], "ms", ""),
        (f"engine, simulated, last {COMPARED_TICKS} of {LONG_TICKS} ticks", long["last_ms"], "ms", ""),
        ("their ratio", long["last_ms"] / long["early_ms"], "×", "same"),
        (f"peak memory after {SHORT_TICKS} simulated ticks", short["memory_mb"], "MB", ""),
        (f"peak memory after {LONG_TICKS} simulated ticks", long["memory_mb"], "MB", "same"),
    ]
    processor = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?")
    lost, late, ticks = (sum(r[name] for r in runs) for name in ("gap_ticks", "late_speech_ticks", "ticks"))
    head = [
        f"{bundle}, fp32, ONNX Runtime; {processor}, {os.cpu_count()} cores, Python {platform.python_version()}",
        f"medians of {len(runs)} real-time runs of {LENGTH_S:.0f} s",
        f"{lost} ticks lost and late speech in {late} of {ticks}",
        "",
        f"| {'':52} | {'measured':>10} | {'aim':>6} |",
        f"|{'-' * 54}|{'-' * 11}:|{'-' * 7}:|",
    ]
    return "\n".join([*head, *(f"| {name:52} | {value:7.2f} {unit:2} | {aim:>6} |" for name, value, unit, aim in rows)])
