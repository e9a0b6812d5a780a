"""How much of a background model is borne, and what its failures are called."""

from __future__ import annotations

from dataclasses import dataclass


class ReachError(ValueError):
    """A background model that cannot be set up; the text names the option and the remedy."""


class Failure(Exception):
    """A question without an answer; the text says why, and holds no secret."""


class Unreachable(Failure):
    """No connection, silence, or a server in trouble. Remedy: the same request again, soon."""


class Rejected(Failure):
    """The server will not answer this request, however often it comes. Remedy: key, model name, address."""


class Garbled(Failure):
    """What came is no answer, or more than an answer is. Remedy: another server or model."""


@dataclass(frozen=True)
class Limits:
    """Of one question, its retries and the rounds of tool calls included; tests make them smaller."""

    connect_s: float = 3.0
    silence_s: float = 10.0  # nothing arrives; a hosted model that reasons takes several seconds to its first token
    answer_s: float = 30.0  # nobody waits longer for a digit
    answer_bytes: int = 1 << 18  # a chunk of the protocol has some 300 bytes for one token
    retries: int = 2
    backoff_s: float = 0.5  # before the first retry; then twice as long
    rounds: int = 4  # requests that follow from tool calls
    calls: int = 8
    words: int = 8  # told
