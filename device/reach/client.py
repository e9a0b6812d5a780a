"""The `openai` client library, wrapped: one streamed chat completion within bounds of time and bytes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, NamedTuple

from device.reach.endpoint import Endpoint
from device.reach.limits import Failure, Garbled, Limits, ReachError, Rejected, Unreachable

try:
    import httpx2
    import openai
except ImportError as error:
    raise ReachError(f"--think needs the extra 'reach', and {error.name} is not installed; pip install 'copresence[reach]'") from error

_NO_KEY = "none"  # the library insists on one; a local server ignores it
_PASSING = (408, 409, 429)  # and 5xx: time-out, conflict, too many requests


class CallPart(NamedTuple):
    """A piece of a tool call; pieces with one place belong together."""

    place: int
    id: str
    name: str
    arguments: str


class _Bounded(httpx2.AsyncByteStream):
    """A response's bytes, so many at most: a line without end would fill the memory before anybody sees a piece of it."""

    def __init__(self, stream: Any, limit: int) -> None:
        self._stream, self._left = stream, limit
        self._chunks: Any = None

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._chunks = aiter(self._stream)
        return self

    async def __anext__(self) -> bytes:
        chunk: bytes = await anext(self._chunks)
        self._left -= len(chunk)
        if self._left < 0:
            raise Garbled("the answer is too long")
        return chunk

    async def aclose(self) -> None:
        if self._chunks is not None:  # now and here, not in whatever thread the cycle collector finds it in
            await self._chunks.aclose()
        await self._stream.aclose()


class Client:
    """Streams answers of one endpoint; connects when it is asked. Belongs to the thread of one event loop."""

    def __init__(self, endpoint: Endpoint, limits: Limits) -> None:
        self._endpoint = endpoint

        async def bound(response: Any) -> None:
            if response.headers.get("content-encoding", "identity") != "identity":  # a few bytes could become very many
                raise Garbled("the answer is compressed, which was not asked for")
            response.stream = _Bounded(response.stream, limits.answer_bytes)

        http = httpx2.AsyncClient(
            event_hooks={"response": [bound]},
            follow_redirects=False,  # picture, sound and key go where they were meant to and nowhere else
            trust_env=not endpoint.local,  # proxies and certificates of the environment
            timeout=httpx2.Timeout(limits.silence_s, connect=limits.connect_s),
        )
        self._openai = openai.AsyncOpenAI(
            api_key=endpoint.key or _NO_KEY,
            base_url=endpoint.url,
            max_retries=0,  # the caller's, who knows whether something of the answer has been acted on
            http_client=http,
            default_headers={"Accept-Encoding": "identity"},
        )

    async def stream(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> AsyncGenerator[str | CallPart, None]:
        """The answer's text and tool calls, piece by piece as they come; raises Failure."""
        try:
            completions: Any = self._openai.chat.completions
            response = await completions.create(model=self._endpoint.model, messages=messages, tools=tools, stream=True)
            # The library leaves an answer that is given up in a ring of generators, which another thread may then collect, and close too.
            async with response, aclosing(response._iterator):
                async for chunk in response:
                    for piece in _pieces(chunk):
                        yield piece
        except (openai.OpenAIError, httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:  # ValueError: no JSON, no UTF-8
            raise _failure(error) from error

    async def close(self) -> None:
        await self._openai.close()


def _failure(error: Exception) -> Failure:
    """What it is called here. Nothing that the server wrote is in the text: it may repeat the key, or be an essay."""
    if isinstance(error.__cause__, Failure):  # our own, which the library took for a broken connection
        return error.__cause__
    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        if status in _PASSING or status >= 500:
            return Unreachable(f"the server answered with status {status}")
        remedy = {401: "check the key", 403: "check the key", 404: "check address and model name"}.get(status, "check address and model")
        return Rejected(f"the server answered with status {status}; {remedy}")
    if isinstance(error, openai.APITimeoutError | httpx2.TimeoutException):
        return Unreachable("the server is silent")
    if isinstance(error, openai.APIConnectionError | httpx2.HTTPError):
        return Unreachable("no connection to the server, or it broke off")
    if isinstance(error, openai.APIError):
        return Unreachable("the server broke off its answer with an error")
    return Garbled(f"the answer is not that of the protocol ({type(error).__name__})")


def _pieces(chunk: Any) -> list[str | CallPart]:
    """What is in one chunk. The library does not validate chunks: anything can be anything, and what is no text is nothing."""
    choices = getattr(chunk, "choices", None)
    if not isinstance(choices, list) or not choices:
        return []  # usage, or a sign of life
    delta = getattr(choices[0], "delta", None)
    pieces: list[str | CallPart] = []
    content = getattr(delta, "content", None)
    if isinstance(content, str) and content:
        pieces.append(content)
    calls = getattr(delta, "tool_calls", None)
    for place, call in enumerate(calls if isinstance(calls, list) else []):
        function, index = getattr(call, "function", None), getattr(call, "index", None)
        texts = (_text(call, "id"), _text(function, "name"), _text(function, "arguments"))
        pieces.append(CallPart(index if isinstance(index, int) else place, *texts))
    return pieces


def _text(holder: Any, name: str) -> str:
    value = getattr(holder, name, None)
    return value if isinstance(value, str) else ""
