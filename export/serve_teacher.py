"""A background model of our own: a checkpoint that reads the hand again with more compute, behind OpenAI's chat completions."""

from __future__ import annotations

import base64
import binascii
import hmac
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from device.camera import Frames
from export.distill.behaviours import DIGITS

REQUEST_BYTES = 1 << 22  # a question with eight seconds of sound has half a megabyte
SILENT_S = 10.0  # a client that sends nothing for so long is cut off
AT_ONCE = 4  # requests; the reading itself is one after the other
SEEN = 0.5  # probability of a hand from which a picture is believed to show one
LARGEST_PICTURE = 4096  # pixels along a side
_PICTURE = re.compile(r"data:image/(?:png|jpeg);base64,")
_SAID = re.compile(rf"said (?:.* )?({'|'.join(DIGITS)})\b")  # as device.reach.context writes a tick


class BadQuestion(ValueError):
    """A request that is none of chat completions with a picture; the text says what is wrong."""


class Reader(Protocol):
    """Who looks at a picture."""

    def probabilities(self, picture: Frames) -> NDArray[np.float32]:
        """u8[H, W, 3] RGB of the model's size to f32[11]: no hand, and the ten digits."""


class Teacher:
    """Answers a question about a hand. `size` is the (height, width) of the pictures that `reader` takes."""

    def __init__(self, reader: Reader, size: tuple[int, int]) -> None:
        self._reader, self._size, self._lock = reader, size, threading.Lock()

    def answer(self, request: Any) -> str:
        """`tell` and the digit in the pictures of a chat completion request, never the one that was denied; raises BadQuestion."""
        pictures, text = _question(request)
        frames = [self._frame(picture) for picture in pictures]
        if not frames:
            raise BadQuestion("there is no picture in it")
        said = _SAID.findall(text)
        with self._lock:
            looks = np.stack([self._reader.probabilities(frame) for frame in frames])
        return decide(looks, said[-1] if said else None)

    def _frame(self, picture: bytes) -> Frames:
        try:
            image: Image.Image = Image.open(io.BytesIO(picture), formats=("PNG", "JPEG"))
            small = max(image.size) <= LARGEST_PICTURE
            image = image.convert("RGB") if small else image  # only now it is unpacked
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BadQuestion("a picture is not PNG or JPEG, or is broken") from error
        if not small:
            raise BadQuestion(f"a picture has more than {LARGEST_PICTURE} pixels along a side")
        height, width = self._size
        return np.asarray(image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BOX))


def decide(looks: NDArray[np.float32], denied: str | None) -> str:
    """From f32[n, 11], what each picture shows, to what to tell."""
    shown = looks[looks[:, 0] < SEEN]
    if not len(shown):
        return "tell sorry"
    digits = shown[:, 1:].mean(0)
    if denied is not None:
        digits[DIGITS.index(denied)] = 0
    return f"tell {DIGITS[int(digits.argmax())]}"


def _question(request: Any) -> tuple[list[bytes], str]:
    """The pictures and the text of what the user wrote last."""
    try:
        content = next(message["content"] for message in reversed(request["messages"]) if message["role"] == "user")
        parts: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        pictures = []
        for part in parts:
            if part["type"] == "image_url":
                start = _PICTURE.match(url := part["image_url"]["url"])
                if start is None:
                    raise BadQuestion("a picture is not in the request itself as PNG or JPEG; nothing is fetched")
                pictures.append(base64.b64decode(url[start.end() :], validate=True))
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration, binascii.Error) as error:
        raise BadQuestion("it has no 'messages' as chat completions have them") from error
    return pictures, text


class TeacherServer(ThreadingHTTPServer):
    """POST /v1/chat/completions, streamed or whole, and GET /v1/models, on this machine's own address. Port 0 takes a free one."""

    daemon_threads = True

    def __init__(self, teacher: Teacher, name: str, port: int, key: str | None = None) -> None:
        """Raises OSError."""
        self.teacher, self.name, self.key = teacher, name, key
        self.places = threading.Semaphore(AT_ONCE)
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: TeacherServer
    protocol_version = "HTTP/1.1"
    timeout = SILENT_S

    def do_GET(self) -> None:
        if self._admitted() and self._is("/v1/models"):
            self._send(
                200, {"object": "list", "data": [{"id": self.server.name, "object": "model", "created": 0, "owned_by": "copresence"}]}
            )

    def do_POST(self) -> None:
        if not (self._admitted() and self._is("/v1/chat/completions")):
            return
        if not self.server.places.acquire(blocking=False):
            self._refuse(429, "too many questions at once; ask again later")
            return
        try:
            request = self._body()
            answer = self.server.teacher.answer(request)
        except BadQuestion as error:
            self._refuse(400, str(error))
        else:
            if request.get("stream"):
                self._stream(_chunks(answer, self.server.name))
            else:
                self._send(
                    200,
                    _completion(
                        "chat.completion", self.server.name, {"message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
                    ),
                )
        finally:
            self.server.places.release()

    def _admitted(self) -> bool:
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        admitted = self.server.key is None or hmac.compare_digest(sent.encode(), self.server.key.encode())
        if not admitted:
            self._refuse(401, "the key is not the one that this server was given")
        return admitted

    def _is(self, path: str) -> bool:
        if self.path != path:
            self._refuse(404, "there are only /v1/chat/completions and /v1/models here")
        return self.path == path

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > REQUEST_BYTES:
            raise BadQuestion(f"its length must be given, and be {REQUEST_BYTES} bytes at most")
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise BadQuestion("it is not JSON") from error
        if not isinstance(request, dict):
            raise BadQuestion("it is not a JSON object")
        return request

    def _refuse(self, status: int, message: str) -> None:
        self.close_connection = True  # what of the request has not been read must not be taken for the next one
        self._send(status, {"error": {"message": message, "type": "invalid_request_error", "code": None}})

    def _send(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, chunks: Iterator[str]) -> None:
        self.close_connection = True  # which ends a body of unknown length
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(f"data: {chunk}\n\n".encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing of what is asked is written down."""


def _completion(kind: str, name: str, choice: dict[str, Any]) -> dict[str, Any]:
    return {"id": "reading", "object": kind, "created": int(time.time()), "model": name, "choices": [{"index": 0, **choice}]}


def _chunks(answer: str, name: str) -> Iterator[str]:
    words = answer.split(" ")
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, *({"content": f"{word} "} for word in words)]
    for delta in deltas:
        yield json.dumps(_completion("chat.completion.chunk", name, {"delta": delta, "finish_reason": None}))
    yield json.dumps(_completion("chat.completion.chunk", name, {"delta": {}, "finish_reason": "stop"}))
    yield "[DONE]"


def serve(server: TeacherServer, say: Callable[[str], None]) -> None:
    """Until Ctrl-C."""
    say(f"{server.name} answers at {server.url}; ask it with: copresence run --think {server.url} …")
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("ended")
