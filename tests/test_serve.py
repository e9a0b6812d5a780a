"""The server, with the real openai client as its peer: an engine that repeats what it hears, on the wall clock, on loopback."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_server import ChatServer, calls, says
from openai import AsyncOpenAI, AuthenticationError
from openai.resources.realtime.realtime import AsyncRealtimeConnection
from test_loop import CONFIG, write_bundle
from test_serve_network import encoded
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from device.bundle import Bundle
from device.cli import main
from device.config import TextConfig
from device.engine import OnnxRuntimeEngine
from device.events import EventLog
from device.serve import server as serving
from device.serve.companion import Companion
from device.serve.server import FILES, KEY_SUBPROTOCOL, SUBPROTOCOL, Rate, Server

TOKEN = "open-sesame"
THINKING = dataclasses.replace(
    CONFIG, text=TextConfig(words=("", "three", "five", "tell"), acts=("none", "ask", "look_left", "look_right"))
)
PATIENCE_S = 60  # the machine is shared
PACKET_S = 0.02


class Serving:
    """A server, and the thread in which its loops run."""

    def __init__(self, bundle: Path, events: Path, token: str | None = TOKEN) -> None:
        opened = Bundle.open(bundle)
        self.log, self.path = EventLog(str(events), patient=True), events
        engine = OnnxRuntimeEngine(opened.graph, CONFIG)
        companion = Companion(CONFIG, "echo", engine, self.log, seed=0, offset_ms=60, buffer_ms=80)
        self.server, self.stop = Server(companion, "127.0.0.1", 0, token), threading.Event()
        self.base = f"{self.server.address}/v1"
        self.socket = f"{self.base.replace('http', 'ws')}/realtime"
        self._thread = threading.Thread(target=companion.keep_company, args=({"event": "header"}, self.stop), name="loop", daemon=True)
        self._thread.start()
        self.server.start()

    def close(self) -> list[dict[str, Any]]:
        self.stop.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        self.server.close()
        self.log.close()
        return [json.loads(line) for line in self.path.read_text().splitlines()]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "echo")


@pytest.fixture
def serve(bundle: Path, tmp_path: Path) -> Iterator[Serving]:
    serving = Serving(bundle, tmp_path / "events.jsonl")
    yield serving
    serving.close()


def talk(peer: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(peer(), 3 * PATIENCE_S))


@asynccontextmanager
async def realtime(base: str, key: str = TOKEN) -> AsyncIterator[AsyncRealtimeConnection]:
    async with AsyncOpenAI(api_key=key, base_url=base) as client, client.realtime.connect(model="echo") as connection:
        yield connection


async def next_of(connection: AsyncRealtimeConnection, *types: str) -> Any:
    while (event := await asyncio.wait_for(connection.recv(), PATIENCE_S)).type not in types:
        pass
    return event


async def speak(connection: AsyncRealtimeConnection, sound: np.ndarray) -> None:
    """As a microphone does: 20 ms at a time."""
    begin, size = time.monotonic(), int(24000 * PACKET_S)
    for i in range(0, len(sound), size):
        await asyncio.sleep(max(0.0, begin + i / 24000 - time.monotonic()))
        await connection.input_audio_buffer.append(audio=base64.b64encode((sound[i : i + size] * 32767).astype("<i2").tobytes()).decode())


def tone(seconds: float) -> np.ndarray:
    return 0.4 * np.sin(2 * np.pi * 440 * np.arange(int(24000 * seconds)) / 24000)


# --- an existing client -----------------------------------------------------------------------------------------------


def test_the_openai_client_hears_reads_and_is_answered(bundle: Path, tmp_path: Path) -> None:
    serving = Serving(bundle, tmp_path / "events.jsonl")

    async def peer() -> None:
        async with AsyncOpenAI(api_key=TOKEN, base_url=serving.base) as client:
            assert [model.id async for model in await client.models.list()] == ["echo"]
        async with realtime(serving.base) as connection:
            assert (await next_of(connection, "session.created")).session.model == "echo"
            await connection.session.update(session={"type": "realtime", "instructions": "be kind"})
            assert (await next_of(connection, "session.updated")).session.instructions == "be kind"
            await connection.conversation.item.create(
                item={"type": "message", "role": "user", "content": [{"type": "input_text", "text": "two one"}]}
            )
            spoken = await next_of(connection, "response.output_audio_transcript.delta")
            acted = await next_of(connection, "response.function_call_arguments.done")
            assert (spoken.delta, acted.name, acted.arguments) == ("two one", "up", "{}"), "the engine repeats what it reads, and acts"
            await connection.conversation.item.create(item={"type": "function_call_output", "call_id": acted.call_id, "output": "done"})
            speaking = asyncio.create_task(speak(connection, tone(6)))
            heard = b""
            while len(heard) < 24000 * 2:  # a second of its voice
                heard += base64.b64decode((await next_of(connection, "response.output_audio.delta")).delta)
            speaking.cancel()
            await connection.response.cancel()
            assert (await next_of(connection, "response.done")).response.status in ("cancelled", "completed")
            sound = np.frombuffer(heard, "<i2")[-12000:] / 32768
            spectrum = np.abs(np.fft.rfft(sound * np.hanning(sound.size)))
            assert abs(np.argmax(spectrum) * 2 - 440) <= 4, "and what it hears, at the right pitch"

    talk(peer)
    deadline = time.monotonic() + PATIENCE_S
    while '"summary"' not in serving.path.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    events = serving.close()
    assert [events[0]["event"], events[-1]["event"]] == ["header", "summary"]
    assert events[-1]["ended_by"] == "microphone", "the peer left"
    assert {event["event"] for event in events} >= {"tick"} and events[-1]["clock"]["master"] == "network"


def test_pictures_reach_the_ticks(serve: Serving) -> None:
    async def peer() -> None:
        url = "data:image/jpeg;base64," + base64.b64encode(encoded(".jpg", 160, 120, 90)).decode()
        item = {"type": "message", "role": "user", "id": "look_1", "content": [{"type": "input_image", "image_url": url}]}
        async with connect(f"{serve.socket}?timeline=1", additional_headers={"Authorization": f"Bearer {TOKEN}"}) as connection:
            seen: list[dict[str, Any]] = []
            while not (seen and seen[-1].get("seen") == "look_1"):
                event = json.loads(await asyncio.wait_for(connection.recv(), PATIENCE_S))
                if event["type"] == "copresence.tick":
                    if not seen:
                        await connection.send(json.dumps({"type": "conversation.item.create", "item": item}))
                    seen.append(event)
            assert seen[0]["seen"] is None and seen[-1]["frame_age_s"] < 1
            levels = base64.b64decode(seen[-1]["heard"])
            assert len(levels) == CONFIG.audio_tokens * CONFIG.audio.mel_channels and max(levels) < CONFIG.audio.levels

    talk(peer)


def test_two_at_once_one_waits_and_is_told_that_the_other_is_there(serve: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "PATIENCE_S", 0.3)

    async def peer() -> None:
        async with realtime(serve.base) as first:
            await next_of(first, "session.created")
            async with realtime(serve.base) as second:
                refused = await next_of(second, "error", "session.created")
                assert refused.type == "error" and refused.error.code == "busy"
                with pytest.raises(ConnectionClosed) as closed:
                    await second.recv()
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
            await first.input_audio_buffer.clear()
            await next_of(first, "input_audio_buffer.cleared")
        monkeypatch.setattr(serving, "PATIENCE_S", PATIENCE_S)
        async with realtime(serve.base) as third:
            await next_of(third, "session.created")  # the first one has left

    talk(peer)


# --- who may come -----------------------------------------------------------------------------------------------------


def test_who_has_no_key_is_not_let_in(serve: Serving) -> None:
    async def peer() -> None:
        async with AsyncOpenAI(api_key="guessed", base_url=serve.base, max_retries=0) as client:
            with pytest.raises(AuthenticationError):
                await client.models.list()
        for headers, protocols in (({}, None), ({"Authorization": "Bearer guessed"}, None), ({}, [SUBPROTOCOL, f"{KEY_SUBPROTOCOL}no"])):
            with pytest.raises(InvalidStatus) as refused:
                await connect(serve.socket, additional_headers=headers, subprotocols=protocols).__aenter__()  # type: ignore[arg-type]
            assert refused.value.response.status_code == 401
        async with connect(serve.socket, subprotocols=[SUBPROTOCOL, KEY_SUBPROTOCOL + TOKEN]) as browser:  # type: ignore[list-item]
            assert json.loads(await browser.recv())["type"] == "session.created" and browser.subprotocol == SUBPROTOCOL

    talk(peer)


def test_without_a_key_other_sites_pages_are_still_kept_out(bundle: Path, tmp_path: Path) -> None:
    open_to_all = Serving(bundle, tmp_path / "events.jsonl", token=None)
    own = open_to_all.server.address

    async def peer() -> None:
        port = open_to_all.server.port
        for origin, host in (("https://example.org", "127.0.0.1"), (f"http://example.org:{port}", "example.org"), (None, "example.org")):
            headers = {"Origin": origin} if origin else {}
            address = f"ws://{host}:{port}/v1/realtime"  # a name that somebody made lead here
            with pytest.raises(InvalidStatus) as refused:
                await connect(address, host="127.0.0.1", port=port, additional_headers=headers).__aenter__()
            assert refused.value.response.status_code == 403, headers
        async with connect(open_to_all.socket, additional_headers={"Origin": own}) as browser:
            assert json.loads(await browser.recv())["type"] == "session.created"

    talk(peer)
    open_to_all.close()


def test_the_page_is_served_and_may_load_nothing_from_elsewhere(serve: Serving) -> None:
    for path in FILES:
        with urllib.request.urlopen(serve.server.address + path, timeout=PATIENCE_S) as answer:
            assert answer.read() == (serving.PAGE / FILES[path][0]).read_bytes()
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    for path in ("/nothing", "/../server.py", "/talk.js/", "/%2e%2e/server.py"):
        with pytest.raises(urllib.error.HTTPError) as missing:
            urllib.request.urlopen(serve.server.address + path, timeout=PATIENCE_S)
        assert missing.value.code == 404


def test_every_file_of_the_page_is_served(repository: Path) -> None:
    assert {name for name, _ in FILES.values()} == {path.name for path in (repository / "device" / "serve" / "page").iterdir()}


# --- what a peer may not do -------------------------------------------------------------------------------------------


def test_who_sends_too_much_is_told_and_cut(serve: Serving) -> None:
    async def peer() -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with connect(serve.socket, additional_headers=headers, max_queue=None) as flood:
            flooding = asyncio.create_task(_flood(flood))
            told = [json.loads(message) for message in await rest(flood)]
            await flooding
            codes = [event["error"]["code"] for event in told if event["type"] == "error"]
            assert flood.close_code == 1008 and codes == ["rate_limit_exceeded"]
        async with connect(serve.socket, additional_headers=headers) as large:
            await large.send(json.dumps({"type": "input_audio_buffer.append", "audio": "A" * serving.LARGEST_MESSAGE}))
            await rest(large)
            assert large.close_code == 1009
        async with realtime(serve.base) as another:
            await next_of(another, "session.created")

    talk(peer)


async def _flood(connection: ClientConnection) -> None:
    with contextlib.suppress(ConnectionClosed):
        for _ in range(100_000):
            await connection.send('{"type": "input_audio_buffer.clear"}')
            await asyncio.sleep(0)  # to read as well


async def rest(connection: ClientConnection) -> list[str | bytes]:
    """What came before the end."""
    came = []
    with contextlib.suppress(ConnectionClosed):
        while True:
            came.append(await asyncio.wait_for(connection.recv(), PATIENCE_S))
    return came


def test_a_rate_allows_a_burst_and_then_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(serving.time, "monotonic", lambda: now[0])
    rate, burst = Rate(), serving.MESSAGES_PER_S * serving.BURST_S
    assert all(rate.allows(10) for _ in range(burst)) and not rate.allows(10)
    now[0] += 2.0
    allowed = sum(rate.allows(10) for _ in range(burst))
    assert abs(allowed - 2 * serving.MESSAGES_PER_S) <= 2
    now[0] += 3600
    assert rate.allows(serving.BYTES_PER_S * serving.BURST_S) and not rate.allows(10)


@pytest.mark.parametrize("dead", [False, True])
def test_who_takes_nothing_in_or_does_not_answer_is_cut(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: bool) -> None:
    """A raw socket that opens a WebSocket and then reads no more; a dead one is not told much either, but asked whether it lives."""
    for name, value in ({"PING_S": 1.0, "DEAD_S": 3.0} if dead else {"MOST_WAITING": 20, "SLOW_S": 0.5}).items():
        monkeypatch.setattr(serving, name, value)
    monkeypatch.setattr(serving, "PATIENCE_S", PATIENCE_S)
    serve = Serving(bundle, tmp_path / "events.jsonl")

    async def peer() -> None:
        reader, writer = await _raw_websocket(serve)
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        if not dead:
            await _send_until_cut(writer)
        async with realtime(serve.base) as another:  # the place is free again
            await next_of(another, "session.created")
        writer.transport.abort()

    talk(peer)
    serve.close()


async def _raw_websocket(serve: Serving) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", serve.server.port)
    key = base64.b64encode(os.urandom(16)).decode()
    writer.write(
        f"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1:{serve.server.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
    )
    return reader, writer


async def _send_until_cut(writer: asyncio.StreamWriter) -> None:
    """Ask for a lot of answers, and read none."""
    text = json.dumps({"type": "session.update", "session": {"type": "realtime", "instructions": "x" * 50_000}}).encode()
    frame = b"\x81\xff" + len(text).to_bytes(8, "big") + bytes(4) + text  # masked with zeros
    try:
        for _ in range(2000):
            writer.write(frame)
            await asyncio.wait_for(writer.drain(), PATIENCE_S)
            await asyncio.sleep(0.03)
    except ConnectionError:
        return
    pytest.fail("it was not cut")


# --- the command ------------------------------------------------------------------------------------------------------


Peer = Callable[[AsyncRealtimeConnection], Awaitable[None]]


def serve_by_command(bundle: Path, events: Path, peer: Peer, *options: str) -> list[dict[str, Any]]:
    """`copresence serve` while `peer` talks to the base URL that it prints, interrupted after that; returns its events."""
    command = f"{sys.executable} -m device.cli serve --bundle {bundle} --port 0 --no-priority --events {events}".split()
    environment = {**os.environ, "COPRESENCE_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        page, api = process.stdout.readline(), process.stdout.readline()
        assert page.split()[-1].endswith(f"/#{TOKEN}") and "127.0.0.1" in page, process.stderr.read()

        async def visit() -> None:
            async with realtime(api.split("base URL ")[1].split(",")[0]) as connection:
                await next_of(connection, "session.created")
                await peer(connection)
                process.send_signal(signal.SIGINT)
                await rest(connection._connection)
                assert connection._connection.close_code == 1001

        talk(visit)
        assert process.wait(PATIENCE_S) == 0, process.stderr.read()
    return [json.loads(line) for line in events.read_text().splitlines()]


def test_the_command_serves_until_it_is_told_to_stop(bundle: Path, tmp_path: Path) -> None:
    async def peer(connection: AsyncRealtimeConnection) -> None:
        """Has nothing to say."""

    events = serve_by_command(bundle, tmp_path / "events.jsonl", peer)
    assert events[0]["event"] == "header" and events[0]["mic"] == "network" and events[-1]["ended_by"] == "signal"


def test_who_comes_is_answered_by_a_background_model_too(tmp_path: Path) -> None:
    """The bundle asks whenever it reads something; what comes back is text that it reads and an act that the peer is told of."""
    bundle = write_bundle(tmp_path / "asks", THINKING)

    async def peer(connection: AsyncRealtimeConnection) -> None:
        await connection.conversation.item.create(
            item={"type": "message", "role": "user", "content": [{"type": "input_text", "text": "three"}]}
        )
        heard: list[str] = []
        while not {"ask", "look_left", "tell five"} <= {*heard}:
            event = await next_of(connection, "response.output_audio_transcript.delta", "response.function_call_arguments.done")
            heard.append(event.delta.strip() if event.type.endswith("delta") else event.name)
        assert heard[0] == "three", "the engine repeats what it reads"

    with ChatServer(calls(("look", '{"direction": "left"}')), says("tell five"), says("")) as server:
        events = serve_by_command(bundle, tmp_path / "events.jsonl", peer, "--think", server.url, "--think-model", "owl")
    assert events[0]["think"] == f"owl at {server.url}" and server.requests[0]["model"] == "owl"
    assert [event["act"] for event in events if event["event"] == "think" and event["what"] == "act"] == ["look_left"]
    assert events[-1]["think"]["answered"] >= 1


def test_what_cannot_be_served_is_said(bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--bundle", str(bundle), "--port", str(taken.getsockname()[1])]) == 2
        assert "Address already in use" in capsys.readouterr().err
    assert main(["serve", "--bundle", str(bundle), "--jitter-buffer-ms", "1001"]) == 2
    assert main(["serve", "--bundle", str(bundle), "--think", "http://127.0.0.1:1/v1"]) == 2
    assert "has no act 'ask'" in capsys.readouterr().err
    monkeypatch.setenv("COPRESENCE_TOKEN", "two words")
    assert main(["serve", "--bundle", str(bundle)]) == 2
    assert "COPRESENCE_TOKEN" in capsys.readouterr().err
