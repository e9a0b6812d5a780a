"""A server of OpenAI's streamed chat completions whose answers are written by the test: well-behaved, slow, endless, or nonsense."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = Callable[[], Iterator[bytes]]


class ChatServer:
    """Answers request after request with what `answers` holds, the last one again and again; keeps what it was asked."""

    def __init__(self, *answers: Body, status: tuple[int, ...] = (), headers: dict[str, str] | None = None) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.gone = threading.Event()  # set when it is closed: what never ends ends then
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    turn = len(outer.requests)
                    outer.requests.append(body)
                    outer.keys.append(self.headers["Authorization"])
                code = status[min(turn, len(status) - 1)] if status else 200
                self.send_response(code)
                for name, value in {"Content-Type": "text/event-stream", **(headers or {}), "Connection": "close"}.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for part in answers[min(turn, len(answers) - 1)]():
                        if outer.gone.is_set():
                            break
                        self.wfile.write(part)
                except OSError:
                    pass  # the client has had enough
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self) -> ChatServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.gone.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def chunk(delta: Any) -> bytes:
    value = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [{"index": 0, "delta": delta}]}
    return b"data: " + json.dumps(value).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def says(*pieces: str) -> Body:
    """An answer whose text comes in these pieces."""
    return lambda: iter([*(chunk({"content": piece}) for piece in pieces), DONE])


def calls(*tools: tuple[str, str]) -> Body:
    """An answer that calls these (tool, arguments), all begun before any is whole, as real servers stream several."""

    def body() -> Iterator[bytes]:
        for place, (name, _) in enumerate(tools):
            yield chunk({"tool_calls": [{"index": place, "id": f"id{place}", "function": {"name": name, "arguments": ""}}]})
        for half in (0, 1):
            for place, (_, text) in enumerate(tools):
                part = text[: len(text) // 2] if half == 0 else text[len(text) // 2 :]
                yield chunk({"tool_calls": [{"index": place, "function": {"arguments": part}}]})
        yield DONE

    return body
