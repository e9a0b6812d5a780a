"""What a network between a peer and the companion costs: from a tick's last sample to what is done about it, and the ticks lost.

The network is made here, on loopback: a relay delays each packet by a random part of the jitter, both ways. A packet that is lost comes
later by `RETRANSMIT_S`, and TCP holds up all that follow it; none ever overtakes another.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from device.serve.protocol import RATE_HZ

TOKEN = "measuring"
PACKET_S = 0.02
RETRANSMIT_S = 0.2  # Linux's shortest retransmission time-out (RFC 6298 has a second)
JITTERS_MS, LOSSES = (0, 50, 150), (0.0, 0.02, 0.1)
BUFFERS_MS = (120, 250)
SETTLED_TICKS = 10  # the first two seconds: start-up, and finding the stream's place
NOISE = 0.003  # −50 dBFS: a quiet room


def measure(bundle: Path, seconds: float) -> Iterator[str]:
    """The table, line by line."""
    local_ms = _local_ms(bundle, seconds)
    head = f"| {'network':>24} | {'buffer':>7} | {'p50':>8} | {'p99':>8} | {'added, p50':>10} | {'lost ticks':>10} |"
    yield head
    yield "|" + "|".join(f"{'-' * (len(cell) - 1)}:" for cell in head.split("|")[1:-1]) + "|"
    p50, p99 = np.percentile(local_ms, (50, 99))
    yield f"| {'none: the local loop':>24} | {'–':>7} | {p50:5.0f} ms | {p99:5.0f} ms | {'':>10} | {'0.0 %':>10} |"
    for buffer_ms in BUFFERS_MS:
        with _server(bundle, buffer_ms) as port:
            for jitter_ms in JITTERS_MS:
                for loss in LOSSES:
                    took_ms, lost = asyncio.run(_visit(port, jitter_ms / 1000, loss, seconds))
                    network = f"{jitter_ms} ms jitter, {100 * loss:.0f} % loss"
                    if not took_ms:
                        yield f"| {network:>24} | {buffer_ms:>4} ms | {'–':>8} | {'–':>8} | {'–':>10} | {100 * lost:8.1f} % |"
                        continue
                    there50, there99 = np.percentile(took_ms, (50, 99))
                    cells = f"{there50:5.0f} ms | {there99:5.0f} ms | {there50 - p50:7.0f} ms | {100 * lost:8.1f} %"
                    yield f"| {network:>24} | {buffer_ms:>4} ms | {cells} |"


def _local_ms(bundle: Path, seconds: float) -> list[float]:
    """Of each tick of `copresence run` on this machine: from its edge to its decision."""
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events.jsonl"
        sources = ("--mic", "none", "--speaker", "none", "--seconds", str(seconds), "--no-priority")
        _copresence("run", "--bundle", str(bundle), "--events", str(events), *sources).communicate()
        ticks = [event for event in map(json.loads, events.read_text().splitlines()) if event["event"] == "tick"]
    return [tick["late_ms"] + tick["engine_ms"] for tick in ticks[SETTLED_TICKS:]]


def _copresence(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "COPRESENCE_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "device.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@contextmanager
def _server(bundle: Path, buffer_ms: int) -> Iterator[int]:
    """The port that it listens on."""
    options = ("--port", "0", "--no-priority", "--jitter-buffer-ms", str(buffer_ms))
    process = _copresence("serve", "--bundle", str(bundle), *options)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline().split("/#")[0].rpartition(":")[2])
    finally:
        process.terminate()
        process.communicate()


async def _visit(port: int, jitter_s: float, loss: float, seconds: float) -> tuple[list[float], float]:
    """Of each tick run: ms from the capture of its last sample to the peer's knowing what was done. And the share of ticks lost."""
    async with _relay(port, jitter_s, loss) as relayed:
        address = f"ws://127.0.0.1:{relayed}/v1/realtime?timeline=1"
        async with connect(address, additional_headers={"Authorization": f"Bearer {TOKEN}"}, open_timeout=60) as connection:
            begin_s = time.monotonic()
            speaking = asyncio.create_task(_speak(connection, begin_s))
            ticks: list[tuple[float, dict[str, Any]]] = []
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_listen(connection, ticks), seconds)
            speaking.cancel()
    settled = [(at_s, tick) for at_s, tick in ticks if tick["tick"] >= SETTLED_TICKS]
    took_ms = [(at_s - begin_s - tick["heard_s"]) * 1000 for at_s, tick in settled if tick["heard_s"] > 0]
    lost = sum(tick["gap_ticks"] for _, tick in settled)
    return took_ms, lost / max(1, lost + len(settled))


async def _speak(connection: ClientConnection, begin_s: float) -> None:
    """A microphone: what was captured by now is sent, 20 ms at a time."""
    size, rng = round(RATE_HZ * PACKET_S), np.random.default_rng(0)
    with suppress(ConnectionClosed):
        for i in range(1, 1 << 30):
            await asyncio.sleep(max(0.0, begin_s + i * PACKET_S - time.monotonic()))
            sound = (32768 * NOISE * rng.standard_normal(size)).astype("<i2").tobytes()
            await connection.send(json.dumps({"type": "input_audio_buffer.append", "audio": base64.b64encode(sound).decode()}))


async def _listen(connection: ClientConnection, ticks: list[tuple[float, dict[str, Any]]]) -> None:
    async for message in connection:
        at_s, event = time.monotonic(), json.loads(message)
        if event["type"] == "copresence.tick":
            ticks.append((at_s, event))


@asynccontextmanager
async def _relay(port: int, jitter_s: float, loss: float) -> Any:
    """A port that leads to another one, over a network like that."""
    rng, tasks = random.Random(0), set[asyncio.Task[None]]()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        packets: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            with suppress(ConnectionError):
                while (packet := await packets.get())[1]:
                    await asyncio.sleep(packet[0] - time.monotonic())
                    writer.write(packet[1])
                writer.close()

        delivery = asyncio.create_task(deliver())
        due_s, data = 0.0, b"-"
        with suppress(ConnectionError):
            while data:
                data = await reader.read(1 << 16)
                delay_s = rng.uniform(0, jitter_s) + (RETRANSMIT_S if rng.random() < loss else 0)
                due_s = max(due_s, time.monotonic() + delay_s)
                packets.put_nowait((due_s, data))
        await delivery

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        for task in (asyncio.create_task(pump(reader, back)), asyncio.create_task(pump(there, writer))):
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each network (default: 20)")
    arguments = parser.parse_args()
    for line in measure(arguments.bundle, arguments.seconds):
        print(line, flush=True)
