"""What the link costs beside a bare echo on a pty, as a table: `python -m firmware_bridge.bench ELF`, part of `make bench`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
import tty
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from firmware_bridge.bridge import Bridge
from firmware_bridge.dictionary import pack
from firmware_bridge.framing import encode
from firmware_bridge.port import open_port
from firmware_bridge.qemu import Machine

ROUNDS = 300
STREAM_S = 3.0
_FRAME = encode(0, pack("get_clock", token=0))
# In a process of its own, as QEMU is.
_ECHO = "import os, sys\nwhile data := os.read(int(sys.argv[1]), 4096): os.write(int(sys.argv[1]), data)"


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(arguments[0]), Path(folder) / "mcu")
        machine.start()
        try:
            link_ms, commands_hz, late_ms = _measure_link(str(machine.port))
        finally:
            machine.kill()
    echo_ms, echoes_hz = _measure_echo()
    link, echo = (sorted(values) for values in (link_ms, echo_ms))
    rows: list[tuple[str, float, str, float | None]] = [
        ("command round trip, p50", median(link), "ms", median(link) / median(echo)),
        ("command round trip, p99", _p99(link), "ms", _p99(link) / _p99(echo)),
        ("commands acknowledged per second", commands_hz, "/s", commands_hz / echoes_hz),
        ("bare echo of as many bytes, p50", median(echo), "ms", None),
        ("bare echo of as many bytes, p99", _p99(echo), "ms", None),
        ("bare echoes per second, one after the other", echoes_hz, "/s", None),
        ("act off its time, p50", median(late_ms), "ms", None),
        ("act off its time, p99", _p99(sorted(late_ms)), "ms", None),
    ]
    print(f"the bridge: firmware in QEMU over a pty, {ROUNDS} round trips\n")
    print(f"| {'':52} | {'measured':>11} | {'over echo':>9} |\n|{'-' * 54}|{'-' * 12}:|{'-' * 10}:|")
    for name, value, unit, ratio in rows:
        print(f"| {name:52} | {value:8.2f} {unit:2} | {'' if ratio is None else f'{ratio:.2f} ×':>9} |")
    return 0


def _p99(values: list[float]) -> float:
    return values[min(len(values) - 1, int(0.99 * len(values)))]


def _measure_link(port: str) -> tuple[list[float], float, list[float]]:
    """Round trips in ms, commands a second with a full window, |lateness| of acts in ms."""
    answered = threading.Event()
    bridge = Bridge(port, on_message=lambda name, values: answered.set() if name == "settings" else None)
    bridge.start()
    try:
        trips = [_timed(lambda: bridge.send("get_settings"), answered) for _ in range(ROUNDS)]
        before, begin = bridge.health.sent, time.perf_counter()
        while time.perf_counter() - begin < STREAM_S:
            if bridge.backlog < 16:
                bridge.send("amplifier", on=0)
            else:
                time.sleep(0.001)
        commands_hz = (bridge.health.sent - before) / (time.perf_counter() - begin)
        events: list[dict[str, Any]] = []
        for i in range(60):
            bridge.heartbeat()
            if i > 5:
                bridge.act("nod")
            time.sleep(0.1)
            events += bridge.take_events()
        return trips, commands_hz, [abs(event["late_ms"]) for event in events if "late_ms" in event]
    finally:
        bridge.close()


def _timed(send: Callable[[], None], answered: threading.Event) -> float:
    answered.clear()
    begin = time.perf_counter()
    send()
    answered.wait(1.0)
    return (time.perf_counter() - begin) * 1000


def _measure_echo() -> tuple[list[float], float]:
    near, far = os.openpty()
    for end in (near, far):
        tty.setraw(end)
    echo = subprocess.Popen([sys.executable, "-c", _ECHO, str(near)], pass_fds=[near])
    try:
        with open_port(os.ttyname(far)) as port:
            port.timeout = 1.0
            trips = []
            for _ in range(ROUNDS + 20):
                begin = time.perf_counter()
                port.write(_FRAME)
                if port.read(len(_FRAME)) != _FRAME:
                    raise RuntimeError("the pty gave back something else; run the bench again")
                trips.append((time.perf_counter() - begin) * 1000)
            trips = trips[20:]  # the echo's interpreter starts up
            return trips, 1000 * len(trips) / sum(trips)
    finally:
        echo.kill()
        echo.wait()
        for end in (near, far):
            os.close(end)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
