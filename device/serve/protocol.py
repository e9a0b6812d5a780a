"""The events of OpenAI's Realtime API (https://platform.openai.com/docs/api-reference/realtime) for a peer that never takes turns.

A *response* is whatever stretch of words, sound and acts the companion comes up with: it opens with the first of them and is done when
there is nothing more to come. What the API has for turns is answered as documented and changes nothing else: the companion hears,
sees and speaks all the time. Nothing here waits or knows of a network: events go in, events come out.
"""

from __future__ import annotations

import base64
import binascii
import copy
import json
import reprlib
import secrets
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from device.config import ModelConfig
from device.serve.network import DECODERS

Event = dict[str, Any]

RATE_HZ = 24000  # the API's pcm16
QUIET_TICKS = 2  # without word or sound: what it was saying is over
ASKED_TICKS = 5  # an answer that was asked for is waited for a second, as long as the scoreboard counts a reaction
ITEMS = 256  # the newest that a conversation can still name; older ones are forgotten
VOICE = "companion"  # the bundle has one
ACT_TOOL = "The companion does this by itself, as part of its presence; no answer is needed."


class ClientError(ValueError):
    """An event that cannot be taken as it is; `param` names the field. The session goes on."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


class Senses(Protocol):
    """Where what the peer sends goes to."""

    def hear(self, pcm: NDArray[np.int16]) -> None:
        """Sound at 24 kHz."""

    def read(self, ids: list[int]) -> bool:
        """Words of the bundle's vocabulary; False if too many are waiting."""

    def see(self, item_id: str, kind: str, picture: bytes) -> None:
        """An encoded picture."""

    def hush(self) -> None:
        """Nothing more of what is being said."""


class Tick(NamedTuple):
    """What became of a tick: the loop's event, its sound as pcm16 (empty: silence), and what only a timeline shows."""

    event: Event
    sound: bytes = b""
    shown: Event | None = None


@dataclass
class _Response:
    id: str
    asked: bool
    items: list[Event] = field(default_factory=list)  # in the order in which they began
    message: int | None = None  # which of them words and sound go into
    transcript: str = ""
    samples: int = 0
    quiet_ticks: int = 0


class Conversation:
    """One peer's session. `receive` takes a message of the peer and `tick` a tick of the loop; both yield the events to send."""

    def __init__(self, config: ModelConfig, model: str, senses: Senses, timeline: bool = False) -> None:
        """`timeline`: tell of every tick, in events of our own, which clients of the API do not know."""
        self._config, self._senses, self._timeline = config, senses, timeline
        self._prefix, self._number = secrets.token_hex(4), 0
        self._id = self._name("conv")
        self._items: OrderedDict[str, Event] = OrderedDict()
        self._lengths_ms: dict[str, int] = {}  # of what was said
        self._appended = 0  # samples since the last commit
        self._response: _Response | None = None
        self._words = {word: i for i, word in enumerate(config.text.words) if word}
        self.session: Event = {
            "type": "realtime",
            "object": "realtime.session",
            "id": self._name("sess"),
            "model": model,
            "output_modalities": ["audio"],
            "instructions": "",
            "audio": {
                "input": {"format": dict(_PCM), "noise_reduction": None, "transcription": None, "turn_detection": None},
                "output": {"format": dict(_PCM), "voice": VOICE, "speed": 1.0},
            },
            "tools": [
                {"type": "function", "name": act, "description": ACT_TOOL, "parameters": {"type": "object", "properties": {}}}
                for act in config.text.acts[1:]
            ],
            "tool_choice": "auto",
            "max_output_tokens": "inf",
            "tracing": None,
            "truncation": "auto",
        }

    def greet(self) -> Iterator[Event]:
        """What a peer is told first."""
        yield self._event("session.created", session=copy.deepcopy(self.session))
        yield self._event("conversation.created", conversation={"id": self._id, "object": "realtime.conversation"})
        if self._timeline:
            c = self._config
            frame = {"width": c.video.width, "height": c.video.height, "patch": c.video.patch}
            dmel = {"channels": c.audio.mel_channels, "levels": c.audio.levels, "per_tick": c.audio_tokens}
            words, acts = c.text.words[1:], c.text.acts[1:]
            yield self._event("copresence.bundle", tick_ms=c.tick_ms, frame=frame, dmel=dmel, words=words, acts=acts)

    def receive(self, message: str | bytes) -> Iterator[Event]:
        """Never raises; what is wrong with a message is an `error` event."""
        event_id = None
        try:
            event = _parsed(message)
            event_id = event.get("event_id")
            if not (event_id is None or isinstance(event_id, str)):
                event_id = None
                raise ClientError("invalid_type", "event_id must be a string", "event_id")
            kind = event.get("type")
            handler = _HANDLERS.get(kind) if isinstance(kind, str) else None
            if handler is None:
                raise ClientError("invalid_value", f"unknown event type {_brief(kind)}; known here: {', '.join(_HANDLERS)}", "type")
            yield from handler(self, event)
        except ClientError as error:
            yield self.error(error.code, str(error), error.param, event_id)

    def tick(self, tick: Tick) -> Iterator[Event]:
        """What the loop did in a tick, as items of a response."""
        event = tick.event
        words, act = event["say"], event["act"]
        if words or tick.sound:
            response = yield from self._speak()
            if words:
                delta = " " * bool(response.transcript) + " ".join(words)
                response.transcript += delta
                yield self._part("response.output_audio_transcript.delta", response, delta=delta)
            if tick.sound:
                response.samples += len(tick.sound) // 2
                yield self._part("response.output_audio.delta", response, delta=base64.b64encode(tick.sound).decode())
        if act != "none":
            yield from self._act(act)
        yield from self._settle(bool(words or tick.sound))
        if self._timeline:
            yield self._event("copresence.tick", **{k: v for k, v in event.items() if k != "event"}, **(tick.shown or {}))

    def notice(self, event: Event) -> Iterator[Event]:
        """What else the loop tells: losses of what the peer sent, and acts that a background model orders, are its business too."""
        if event["event"] == "think" and event["what"] == "act":
            yield from self._act(event["act"])
        lost = event.get("of", ()) if event["event"] == "loss" else ()
        if "dropped_samples" in lost:
            text = "sound came faster than it is heard, and the oldest was dropped; send it as it is recorded, 24000 samples a second"
            yield self.error("input_audio_too_fast", text)
        if "bad_pictures" in lost:
            yield self.error("invalid_image", "a picture cannot be decoded, or is too large; send a JPEG or PNG of 1920×1080 at most")
        if self._timeline and event["event"] in ("loss", "recovery", "clock", "think"):
            yield self._event(f"copresence.{event['event']}", **{k: v for k, v in event.items() if k != "event"})

    def error(self, code: str, message: str, param: str | None = None, event_id: str | None = None) -> Event:
        about = {"type": "invalid_request_error", "code": code, "message": message, "param": param, "event_id": event_id}
        return self._event("error", error=about)

    # --- what the peer sends ------------------------------------------------------------------------------------------

    def _session_update(self, event: Event) -> Iterator[Event]:
        # All of it is checked before any of it counts.
        for path, value in list(_changes(_object(event, "session", "session"))):
            place = self.session
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value
        yield self._event("session.updated", session=copy.deepcopy(self.session))

    def _append(self, event: Event) -> Iterator[Event]:
        sound = _decoded(event.get("audio"), "audio")
        if len(sound) % 2:
            raise ClientError("invalid_value", "audio must be whole samples of 16 bits, 24000 a second, mono", "audio")
        self._appended += len(sound) // 2
        self._senses.hear(np.frombuffer(sound, "<i2"))
        yield from ()

    def _clear(self, event: Event) -> Iterator[Event]:
        self._appended = 0
        yield self._event("input_audio_buffer.cleared")

    def _commit(self, event: Event) -> Iterator[Event]:
        if not self._appended:
            raise ClientError("input_audio_buffer_commit_empty", "no sound was appended since the last commit; it was heard all the same")
        self._appended = 0
        content = [{"type": "input_audio", "transcript": None}]
        previous = self._newest()
        item = self._keep({"id": self._name("item"), "type": "message", "role": "user", "status": "completed", "content": content})
        yield self._event("input_audio_buffer.committed", item_id=item["id"], previous_item_id=previous)
        yield from self._tell_item(item, previous)

    def _item_create(self, event: Event) -> Iterator[Event]:
        item = _object(event, "item", "item")
        previous = event.get("previous_item_id")
        if previous is None:
            previous = self._newest()
        elif previous == "root":
            previous = None
        elif not isinstance(previous, str) or previous not in self._items:
            raise ClientError("item_not_found", f"there is no item {_brief(previous)}", "previous_item_id")
        name = item.get("id")
        if name is not None and (not isinstance(name, str) or not 0 < len(name) <= 64):
            raise ClientError("invalid_value", "item.id must be a text of 1 to 64 characters", "item.id")
        if name in self._items:
            raise ClientError("invalid_value", f"there is an item {_brief(name)} already", "item.id")
        name = name or self._name("item")
        if item.get("type") == "message":
            kept = self._take_message(item, name)
        elif item.get("type") == "function_call_output":  # an act needs no answer, and the model has no use for one
            kept = {"type": "function_call_output", "call_id": _text(item, "call_id"), "output": _text(item, "output")}
        else:
            raise ClientError("invalid_value", "item.type must be message or function_call_output", "item.type")
        yield from self._tell_item(self._keep({"id": name, **kept, "status": "completed"}), previous)

    def _item_delete(self, event: Event) -> Iterator[Event]:
        item = self._known(event)
        del self._items[item["id"]]
        self._lengths_ms.pop(item["id"], None)
        yield self._event("conversation.item.deleted", item_id=item["id"])

    def _item_retrieve(self, event: Event) -> Iterator[Event]:
        yield self._event("conversation.item.retrieved", item={**self._known(event)})

    def _item_truncate(self, event: Event) -> Iterator[Event]:
        item, index, end_ms = self._known(event), event.get("content_index"), event.get("audio_end_ms")
        if item.get("role") != "assistant":
            raise ClientError("invalid_value", "only what the companion said can be truncated", "item_id")
        if index != 0:
            raise ClientError("invalid_value", "content_index must be 0", "content_index")
        length_ms = self._lengths_ms.get(item["id"], 0)
        if type(end_ms) is not int or not 0 <= end_ms <= length_ms:
            raise ClientError("invalid_value", f"audio_end_ms must be from 0 to {length_ms}, the length of the sound", "audio_end_ms")
        self._lengths_ms[item["id"]] = end_ms
        item["content"] = [{"type": "output_audio", "transcript": ""}]
        yield self._event("conversation.item.truncated", item_id=item["id"], content_index=0, audio_end_ms=end_ms)

    def _response_create(self, event: Event) -> Iterator[Event]:
        if not isinstance(event.get("response", {}), dict | None):
            raise ClientError("invalid_type", "response must be an object", "response")
        if self._response is not None:
            text = f"response {self._response.id} is in progress; wait for its response.done, or cancel it"
            raise ClientError("conversation_already_has_active_response", text)
        yield from self._open(asked=True)

    def _response_cancel(self, event: Event) -> Iterator[Event]:
        response = self._response
        if response is None or event.get("response_id") not in (None, response.id):
            raise ClientError("response_cancel_not_active", "there is no such response in progress; nothing was changed", "response_id")
        self._senses.hush()
        yield from self._close(response, "cancelled")

    def _output_clear(self, event: Event) -> Iterator[Event]:
        raise ClientError("invalid_value", "output_audio_buffer.clear is for WebRTC; here, stop playing, and send response.cancel", "type")

    # --- items --------------------------------------------------------------------------------------------------------

    def _take_message(self, item: Event, name: str) -> Event:
        """Deliver what is in a message, once all of it has been checked; returns what is kept of it. Pictures are not sent back."""
        role, content = item.get("role"), item.get("content")
        if not isinstance(role, str) or role not in _PARTS:
            raise ClientError("invalid_value", f"item.role must be one of {', '.join(_PARTS)}", "item.role")
        if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
            raise ClientError("invalid_type", "item.content must be a list of objects", "item.content")
        kept: list[Event] = []
        ids: list[int] = []
        pictures: list[tuple[str, bytes]] = []
        for i, part in enumerate(content):
            kind, path = part.get("type"), f"item.content[{i}]"
            if kind not in _PARTS[role]:
                raise ClientError("invalid_value", f"content of role {role} must be {' or '.join(_PARTS[role])}", f"{path}.type")
            if kind == "input_image":
                pictures.append(_picture(part.get("image_url"), f"{path}.image_url"))
                kept.append({"type": kind})
            else:
                text = _text(part, "text", f"{path}.text")
                kept.append({"type": kind, "text": text})
                ids += self._ids(text, f"{path}.text") if role != "assistant" else []
        if ids and not self._senses.read(ids):
            raise ClientError("too_much_text", "more words are waiting than it reads in seconds; send them later", "item.content")
        for kind, picture in pictures:
            self._senses.see(name, kind, picture)
        return {"type": "message", "role": role, "content": kept}

    def _ids(self, text: str, path: str) -> list[int]:
        words = text.lower().split()
        unknown = next((word for word in words if word not in self._words), None)
        if unknown is not None:
            known = ", ".join(self._words)
            raise ClientError("unknown_word", f"the bundle has no word {_brief(unknown)}; it knows: {known}", path)
        return [self._words[word] for word in words]

    def _keep(self, item: Event) -> Event:
        item = {"object": "realtime.item", **item}
        self._items[item["id"]] = item
        while len(self._items) > ITEMS:
            self._lengths_ms.pop(self._items.popitem(last=False)[0], None)
        return item

    def _tell_item(self, item: Event, previous: str | None) -> Iterator[Event]:
        for type_ in ("conversation.item.added", "conversation.item.done"):
            yield self._event(type_, item={**item}, previous_item_id=previous)

    def _known(self, event: Event) -> Event:
        name = event.get("item_id")
        item = self._items.get(name) if isinstance(name, str) else None
        if item is None:
            raise ClientError("item_not_found", f"there is no item {_brief(name)}", "item_id")
        return item

    def _newest(self) -> str | None:
        return next(reversed(self._items), None)

    # --- what the companion does --------------------------------------------------------------------------------------

    def _open(self, asked: bool = False) -> Generator[Event, None, _Response]:
        """The response under way, opened if there is none."""
        if self._response is None:
            self._response = _Response(self._name("resp"), asked)
            yield self._event("response.created", response=self._told(self._response, "in_progress"))
        return self._response

    def _speak(self) -> Generator[Event, None, _Response]:
        """The same, with a message in it that words and sound can go into."""
        response = yield from self._open()
        if response.message is None:
            response.transcript, response.samples = "", 0
            response.message = yield from self._begin(response, {"type": "message", "role": "assistant", "content": []})
            yield self._part("response.content_part.added", response, part={"type": "audio", "transcript": ""})
        return response

    def _act(self, act: str) -> Iterator[Event]:
        response = yield from self._open()
        call = self._name("call")
        index = yield from self._begin(response, {"type": "function_call", "name": act, "call_id": call, "arguments": ""})
        place = {"response_id": response.id, "item_id": response.items[index]["id"], "output_index": index, "call_id": call}
        yield self._event("response.function_call_arguments.delta", **place, delta="{}")
        yield self._event("response.function_call_arguments.done", **place, name=act, arguments="{}")
        yield from self._end(response, index, arguments="{}", status="completed")

    def _settle(self, speaking: bool) -> Iterator[Event]:
        """At the end of a tick: close the response if nothing more is to be expected of it."""
        response = self._response
        if response is None:
            return
        response.quiet_ticks = 0 if speaking else response.quiet_ticks + 1
        waits = response.asked and not response.items
        patience_ticks = ASKED_TICKS if waits else 1 if response.message is None else QUIET_TICKS
        if response.quiet_ticks >= patience_ticks:
            if waits:
                yield from self._speak()  # a response has an item, and be it an empty one
            yield from self._close(response, "completed")

    def _close(self, response: _Response, status: str) -> Iterator[Event]:
        if response.message is not None:
            transcript = response.transcript
            yield self._part("response.output_audio.done", response)
            yield self._part("response.output_audio_transcript.done", response, transcript=transcript)
            yield self._part("response.content_part.done", response, part={"type": "audio", "transcript": transcript})
            self._lengths_ms[response.items[response.message]["id"]] = response.samples * 1000 // RATE_HZ
            content = [{"type": "output_audio", "transcript": transcript}]
            ended = "completed" if status == "completed" else "incomplete"
            yield from self._end(response, response.message, content=content, status=ended)
        self._response = None
        yield self._event("response.done", response=self._told(response, status))

    def _begin(self, response: _Response, item: Event) -> Generator[Event, None, int]:
        """Returns the new item's index."""
        previous, index = self._newest(), len(response.items)
        item = self._keep({"id": self._name("item"), **item, "status": "in_progress"})
        response.items.append(item)
        yield self._event("response.output_item.added", response_id=response.id, output_index=index, item={**item})
        yield self._event("conversation.item.added", item={**item}, previous_item_id=previous)
        return index

    def _end(self, response: _Response, index: int, **changes: Any) -> Iterator[Event]:
        item = response.items[index]
        item.update(changes)
        names = list(self._items)
        before = names.index(item["id"]) if item["id"] in self._items else 0
        yield self._event("conversation.item.done", item={**item}, previous_item_id=names[before - 1] if before else None)
        yield self._event("response.output_item.done", response_id=response.id, output_index=index, item={**item})

    def _told(self, response: _Response, status: str) -> Event:
        details = {"type": "cancelled", "reason": "client_cancelled"} if status == "cancelled" else None
        return {
            "id": response.id,
            "object": "realtime.response",
            "status": status,
            "status_details": details,
            "output": [{**item} for item in response.items],
            "conversation_id": self._id,
            "output_modalities": ["audio"],
            "max_output_tokens": "inf",
            "audio": {"output": {"format": _PCM, "voice": VOICE}},
            "usage": None,
            "metadata": None,
        }

    def _part(self, type_: str, response: _Response, **values: Any) -> Event:
        """An event about the one part of the message under way."""
        index = response.message
        assert index is not None
        item_id = response.items[index]["id"]
        return self._event(type_, response_id=response.id, item_id=item_id, output_index=index, content_index=0, **values)

    def _event(self, type_: str, **values: Any) -> Event:
        return {"type": type_, "event_id": self._name("event"), **values}

    def _name(self, kind: str) -> str:
        self._number += 1
        return f"{kind}_{self._prefix}_{self._number}"


_PCM = {"type": "audio/pcm", "rate": RATE_HZ}
_PARTS = {"user": ("input_text", "input_image"), "system": ("input_text",), "assistant": ("output_text",)}

_HANDLERS: dict[str, Callable[[Conversation, Event], Iterator[Event]]] = {
    "session.update": Conversation._session_update,
    "input_audio_buffer.append": Conversation._append,
    "input_audio_buffer.clear": Conversation._clear,
    "input_audio_buffer.commit": Conversation._commit,
    "conversation.item.create": Conversation._item_create,
    "conversation.item.delete": Conversation._item_delete,
    "conversation.item.retrieve": Conversation._item_retrieve,
    "conversation.item.truncate": Conversation._item_truncate,
    "response.create": Conversation._response_create,
    "response.cancel": Conversation._response_cancel,
    "output_audio_buffer.clear": Conversation._output_clear,
}


class _Setting(NamedTuple):
    """A field of a session: what it may be, in words and as a check, and whether it is kept or stays as it is here."""

    wanted: str
    fits: Callable[[Any], bool]
    kept: bool = False


def _named(*types: str) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and value.get("type") in types)


def _is_object(value: Any) -> bool:
    return value is None or isinstance(value, dict)


# What a peer may set. Without turns, detection of their ends changes nothing: it is kept and shown. What is not kept is accepted, and the
# effective value is told: there is one voice, the acts are the tools, nothing is transcribed.
_SETTINGS: dict[str, _Setting] = {
    "type": _Setting("'realtime'", lambda v: v == "realtime"),
    "model": _Setting("a text", lambda v: isinstance(v, str)),
    "instructions": _Setting("a text", lambda v: isinstance(v, str), kept=True),
    "output_modalities": _Setting("['audio']", lambda v: v == ["audio"]),
    "audio.input.format": _Setting("audio/pcm at a rate of 24000", lambda v: _is_pcm(v)),
    "audio.input.noise_reduction": _Setting("null, near_field or far_field", _named("near_field", "far_field"), kept=True),
    "audio.input.transcription": _Setting("null or an object", _is_object),
    "audio.input.turn_detection": _Setting("null, server_vad or semantic_vad", _named("server_vad", "semantic_vad"), kept=True),
    "audio.output.format": _Setting("audio/pcm at a rate of 24000", lambda v: _is_pcm(v)),
    "audio.output.voice": _Setting("a text or an object", lambda v: isinstance(v, str | dict)),
    "audio.output.speed": _Setting("a number", lambda v: type(v) in (int, float)),
    "tools": _Setting("a list of objects", lambda v: isinstance(v, list) and all(isinstance(tool, dict) for tool in v)),
    "tool_choice": _Setting("a text or an object", lambda v: isinstance(v, str | dict)),
    "max_output_tokens": _Setting("'inf' or from 1 to 4096", lambda v: v == "inf" or (type(v) is int and 0 < v <= 4096), kept=True),
    "tracing": _Setting("null, 'auto' or an object", lambda v: v == "auto" or _is_object(v)),
    "truncation": _Setting("a text or an object", lambda v: isinstance(v, str | dict)),
    "parallel_tool_calls": _Setting("true or false", lambda v: v is None or isinstance(v, bool)),
    "reasoning": _Setting("an object", _is_object),
    "prompt": _Setting("an object", _is_object),
    "include": _Setting("a list", lambda v: v is None or isinstance(v, list)),
}
_SECTIONS = {"audio", "audio.input", "audio.output"}


def _changes(values: Event, path: str = "") -> Iterator[tuple[list[str], Any]]:
    """Each setting that a peer wants changed and that is its to change, as (path, value)."""
    for key, value in values.items():
        name = f"{path}{key}"
        if name in _SECTIONS:
            if value is not None:
                yield from _changes(_object(values, key, f"session.{name}"), f"{name}.")
            continue
        setting = _SETTINGS.get(name)
        if setting is None:
            known = ", ".join(_SETTINGS)
            raise ClientError("unknown_parameter", f"a session has no {_brief(name)}; it has: {known}", f"session.{name}"[:100])
        if not setting.fits(value):
            raise ClientError("invalid_value", f"session.{name} must be {setting.wanted}, not {_brief(value)}", f"session.{name}")
        if setting.kept:
            yield name.split("."), value


def _is_pcm(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "audio/pcm" and value.get("rate", RATE_HZ) in (RATE_HZ, None)


def _parsed(message: str | bytes) -> Event:
    try:
        event = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise ClientError("invalid_json", "a message must be a JSON object") from error
    if not isinstance(event, dict):
        raise ClientError("invalid_json", f"a message must be a JSON object, not {_brief(event)}")
    return event


def _object(event: Event, key: str, path: str) -> Event:
    value = event.get(key)
    if not isinstance(value, dict):
        raise ClientError("invalid_type", f"{path} must be an object, not {_brief(value)}", path)
    return value


def _text(event: Event, key: str, path: str | None = None) -> str:
    value, path = event.get(key), path or f"item.{key}"
    if not isinstance(value, str):
        raise ClientError("invalid_type", f"{path} must be a text, not {_brief(value)}", path)
    return value


def _decoded(value: Any, path: str) -> bytes:
    if not isinstance(value, str):
        raise ClientError("invalid_type", f"{path} must be base64, not {_brief(value)}", path)
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ClientError("invalid_value", f"{path} must be base64: {error}", path) from error


def _picture(url: Any, path: str) -> tuple[str, bytes]:
    """A data URI as (kind, encoded picture)."""
    head, _, data = url.partition(";base64,") if isinstance(url, str) else ("", "", "")
    kind = head.removeprefix("data:")
    if not data or kind not in DECODERS:
        known = " or ".join(DECODERS)
        raise ClientError("invalid_value", f"{path} must be a data URI of {known} in base64; nothing is fetched from elsewhere", path)
    return kind, _decoded(data, path)


def _brief(value: Any) -> str:
    """For a message to whoever sent it, and never much of it."""
    return reprlib.repr(value)
