"""The WebSocket that peers come through, and the page; the only module that imports websockets, but for the bench beside it.

One peer at a time. Another one waits for `PATIENCE_S`, as a page that is loaded anew does, and is then refused: error `busy`, close code
1013. Whoever is refused loses nothing and may try again.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from device.serve.companion import Companion, Visit
from device.serve.protocol import Conversation, Event

REALTIME, MODELS = "/v1/realtime", "/v1/models"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
SUBPROTOCOL, KEY_SUBPROTOCOL = "realtime", "openai-insecure-api-key."  # how a browser hands over its key: it cannot set a header

MOST_CONNECTIONS = 8  # open at once: a peer, some in waiting, and the files of the page
LARGEST_MESSAGE = 1 << 20  # bytes: 16 s of sound, or a large photograph; the API's own limit is 15 MiB
MESSAGES_PER_S, BYTES_PER_S = 400, 2 << 20  # sound every 10 ms is 100, pictures at 30 Hz are 30; sound itself is 64 kB/s as base64
BURST_S = 5  # of them at once, such as after a stall of the network
PATIENCE_S = 2.0
PING_S, DEAD_S = 5.0, 10.0  # a peer that answers no ping for so long is dead
SLOW_S = 5.0  # a peer that takes nothing in for so long is cut
MOST_WAITING = 2 * MESSAGES_PER_S * BURST_S  # events for a peer: a message may be answered by two

GOING, POLICY, TRY_AGAIN = 1001, 1008, 1013  # RFC 6455, 7.4.1, and its registry

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/talk.css": ("talk.css", "text/css; charset=utf-8"),
    "/talk.js": ("talk.js", "text/javascript; charset=utf-8"),
    "/face.js": ("face.js", "text/javascript; charset=utf-8"),
    "/timeline.js": ("timeline.js", "text/javascript; charset=utf-8"),
    "/sound.js": ("sound.js", "text/javascript; charset=utf-8"),
    "/worklets.js": ("worklets.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
GUARDS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self' ws: wss:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "camera=(self), microphone=(self)",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class Rate:
    """What a peer may send: so many messages and bytes a second, and `BURST_S` of that at once."""

    def __init__(self) -> None:
        self._left = np.array([MESSAGES_PER_S, BYTES_PER_S], float) * BURST_S
        self._seen_s = time.monotonic()

    def allows(self, size: int) -> bool:
        now_s = time.monotonic()
        limits = np.array([MESSAGES_PER_S, BYTES_PER_S], float)
        self._left = np.minimum(self._left + (now_s - self._seen_s) * limits, limits * BURST_S) - (1, size)
        self._seen_s = now_s
        return bool((self._left >= 0).all())


class Server:
    """Listens from `start` on, in a thread of its own, until `close`."""

    def __init__(self, companion: Companion, host: str, port: int, token: str | None) -> None:
        """`port` 0: any that is free; `token` None: whoever can connect may talk. Raises OSError where it cannot listen."""
        self._companion, self._token = companion, token
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family)
        self.host, self.port = host, self._socket.getsockname()[1]
        self._files = {path: (kind, (PAGE / name).read_bytes()) for path, (name, kind) in FILES.items()}
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="server", daemon=True)
        self._listening = threading.Event()

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def start(self) -> None:
        self._thread.start()
        self._listening.wait()

    def close(self) -> None:
        """Say goodbye to whoever is there."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ending.set)
            self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._ending, self._engaged = asyncio.get_running_loop(), asyncio.Event(), asyncio.Lock()
        logger = logging.getLogger("copresence.serve")
        logger.addFilter(lambda record: record.getMessage() != "opening handshake failed")  # whoever knocks and goes is no news
        self._server = await serve(
            self._accompany,
            sock=self._socket,
            process_request=self._answer,
            select_subprotocol=lambda connection, offered: next((name for name in offered if name == SUBPROTOCOL), None),
            compression=None,  # sound and pictures do not get smaller
            ping_interval=PING_S,
            ping_timeout=DEAD_S,
            close_timeout=1,
            max_size=LARGEST_MESSAGE,
            server_header=None,
            logger=logger,
        )
        self._listening.set()
        async with self._server:
            await self._ending.wait()

    # --- before there is a WebSocket ----------------------------------------------------------------------------------

    def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """The page's files, the list of models, or None: go on and open the WebSocket."""
        path = urlsplit(request.path).path
        if not self._from_here(request.headers):
            return _plain(403, "this address is served to its own page and to programs only")
        if path in self._files:
            kind, body = self._files[path]
            return Response(
                200, "OK", Headers({"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close", **GUARDS}), body
            )
        if path not in (REALTIME, MODELS):
            return _plain(404, f"there is nothing here; the page is at /, the API at {REALTIME}")
        if not self._knows(request.headers):
            return _plain(401, "a key is needed; take the one that copresence serve printed when it began")
        if path == MODELS:
            model = {"id": self._companion.name, "object": "model", "created": 0, "owned_by": "copresence"}
            return _json({"object": "list", "data": [model]})
        if len(self._server.connections) >= MOST_CONNECTIONS:
            return _plain(503, "too many connections; try again later")
        return None

    def _from_here(self, headers: Headers) -> bool:
        """Not another site's page in somebody's browser: by its origin, and by the name under which it came to this machine."""
        hosts, origins = headers.get_all("Host"), headers.get_all("Origin")
        if len(hosts) != 1 or (self.host in LOOPBACK and urlsplit(f"//{hosts[0]}").hostname not in LOOPBACK):
            return False
        return all(urlsplit(origin).netloc == hosts[0] for origin in origins)

    def _knows(self, headers: Headers) -> bool:
        if self._token is None:
            return True
        offered = [name.strip() for value in headers.get_all("Sec-WebSocket-Protocol") for name in value.split(",")]
        keys = [name.removeprefix(KEY_SUBPROTOCOL) for name in offered if name.startswith(KEY_SUBPROTOCOL)]
        keys += [value.removeprefix("Bearer ") for value in headers.get_all("Authorization")]
        return any(hmac.compare_digest(key.encode(errors="replace"), self._token.encode()) for key in keys)

    # --- a peer -------------------------------------------------------------------------------------------------------

    async def _accompany(self, connection: ServerConnection) -> None:
        """From a peer's coming to its going."""
        assert connection.request is not None
        query = parse_qs(urlsplit(connection.request.path).query)
        try:
            await asyncio.wait_for(self._engaged.acquire(), PATIENCE_S)
        except asyncio.TimeoutError:  # which is not TimeoutError before Python 3.11
            await self._refuse(connection)
            return
        try:
            if not self._ending.is_set():
                await _Peer(self._companion, connection, watched="timeline" in query).stay()
        finally:
            self._engaged.release()

    async def _refuse(self, connection: ServerConnection) -> None:
        text = "somebody else is with the companion, and it attends to one at a time; try again later"
        error = {"type": "server_error", "code": "busy", "message": text, "param": None, "event_id": None}
        try:
            await connection.send(json.dumps({"type": "error", "event_id": f"event_{secrets.token_hex(8)}", "error": error}))
        except ConnectionClosed:
            return
        await connection.close(TRY_AGAIN, "busy")


class _Peer:
    """One connection and its visit."""

    def __init__(self, companion: Companion, connection: ServerConnection, watched: bool) -> None:
        self._companion, self._connection = companion, connection
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[str | None] = asyncio.Queue(MOST_WAITING)
        self._visit = Visit(companion, self._tell, watched)
        self._conversation = Conversation(companion.config, companion.name, self._visit, watched)
        self._gone = asyncio.Event()
        self._farewell = (GOING, "the companion goes")

    async def stay(self) -> None:
        """Until it leaves, is cut, or the loop ends because everything does."""
        self._post(self._conversation.greet())
        self._companion.receive(self._visit, self._ended)
        sending = asyncio.create_task(self._send())
        receiving, gone = asyncio.create_task(self._receive()), asyncio.create_task(self._gone.wait())
        await asyncio.wait((receiving, gone), return_when=asyncio.FIRST_COMPLETED)
        self._visit.leave()
        await gone
        if self._outbox.full():
            sending.cancel()
        else:
            self._outbox.put_nowait(None)  # after what is still to be told
        await asyncio.wait((sending,))
        await self._connection.close(*self._farewell)
        await receiving

    async def _receive(self) -> None:
        rate = Rate()
        try:
            async for message in self._connection:
                if not rate.allows(len(message)):
                    text = (
                        f"more than {MESSAGES_PER_S} messages or {BYTES_PER_S} bytes a second; send sound as it is recorded, fewer pictures"
                    )
                    self._post([self._conversation.error("rate_limit_exceeded", text)])
                    self._farewell = (POLICY, "rate limit exceeded")
                    return
                self._post(self._conversation.receive(message))
        except ConnectionClosed:
            return

    def _tell(self, event: Event, speech: NDArray[np.float32], shown: dict[str, Any]) -> None:
        """In the loop's thread."""
        self._loop.call_soon_threadsafe(self._take, event, speech, shown)

    def _take(self, event: Event, speech: NDArray[np.float32], shown: dict[str, Any]) -> None:
        if event["event"] == "tick":
            self._post(self._conversation.tick(self._visit.told(event, speech, shown)))
        else:
            self._post(self._conversation.notice(event))

    def _post(self, events: Iterable[Event]) -> None:
        try:
            for event in events:
                self._outbox.put_nowait(json.dumps(event))
        except asyncio.QueueFull:
            self._cut()

    async def _send(self) -> None:
        try:
            while (message := await self._outbox.get()) is not None:
                await asyncio.wait_for(self._connection.send(message), SLOW_S)
        except asyncio.TimeoutError:
            self._cut()
        except ConnectionClosed:
            return

    def _cut(self) -> None:
        """It does not take in what it is told: no goodbye would reach it either."""
        if not self._connection.transport.is_closing():
            print("copresence: a peer was too slow, and was cut", file=sys.stderr)
            self._connection.transport.abort()

    def _ended(self) -> None:
        """In the loop's thread: it has ended."""
        self._loop.call_soon_threadsafe(self._gone.set)


def _plain(status: int, text: str) -> Response:
    return _json({"error": {"message": text, "type": "invalid_request_error", "code": str(status), "param": None}}, status)


def _json(value: Any, status: int = 200) -> Response:
    body = json.dumps(value).encode()
    reason = {200: "OK", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 503: "Service Unavailable"}[status]
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close", **GUARDS}
    return Response(status, reason, Headers(headers), body)
