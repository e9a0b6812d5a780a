"""The Realtime events: each is as the openai library describes it, and what has no meaning without turns is answered all the same."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter

from device.config import ModelConfig, TextConfig
from device.serve.protocol import ASKED_TICKS, ITEMS, QUIET_TICKS, Conversation, Tick

CONFIG = ModelConfig(text=TextConfig(words=("", "one", "two", "ok", "tell"), acts=("none", "look_up", "nod")))
SOUND = np.arange(4800, dtype="<i2").tobytes()  # 0.2 s
JPEG = "data:image/jpeg;base64," + base64.b64encode(b"\xff\xd8 not looked into here").decode()

Event = dict[str, Any]


class Senses:
    """What reached the companion."""

    def __init__(self) -> None:
        self.heard: list[np.ndarray] = []
        self.words: list[int] = []
        self.pictures: list[tuple[str, str, bytes]] = []
        self.hushed = 0
        self.full = False

    def hear(self, pcm: np.ndarray) -> None:
        self.heard.append(pcm)

    def read(self, ids: list[int]) -> bool:
        self.words += [] if self.full else ids
        return not self.full

    def see(self, item_id: str, kind: str, picture: bytes) -> None:
        self.pictures.append((item_id, kind, picture))

    def hush(self) -> None:
        self.hushed += 1


@functools.cache
def models() -> TypeAdapter[Any]:
    return TypeAdapter(RealtimeServerEvent)


def valid(events: Iterable[Event]) -> list[Event]:
    """They are events of the API, as the library that clients use describes them."""
    events = list(events)
    for event in events:
        assert models().validate_python(json.loads(json.dumps(event))).type == event["type"]
    assert len({event["event_id"] for event in events}) == len(events)
    return events


@pytest.fixture
def senses() -> Senses:
    return Senses()


@pytest.fixture
def talk(senses: Senses) -> Conversation:
    return Conversation(CONFIG, "echo", senses)


def say(talk: Conversation, **event: Any) -> list[Event]:
    """Send one event; what comes back."""
    return valid(talk.receive(json.dumps(event)))


def tick(talk: Conversation, *words: str, act: str = "none", sound: bytes = b"") -> list[Event]:
    return valid(talk.tick(Tick({"event": "tick", "say": list(words), "act": act}, sound)))


def types(events: list[Event]) -> list[str]:
    return [event["type"] for event in events]


def only_error(events: list[Event]) -> Event:
    assert types(events) == ["error"]
    return dict(events[0]["error"])


def message(*parts: Event, role: str = "user", **more: Any) -> Event:
    return {"type": "conversation.item.create", "item": {"type": "message", "role": role, "content": list(parts)}, **more}


def text(words: str) -> Event:
    return {"type": "input_text", "text": words}


# --- what it says and does --------------------------------------------------------------------------------------------


def test_a_session_begins_with_its_settings(talk: Conversation) -> None:
    created, conversation = valid(talk.greet())
    assert (created["type"], conversation["type"]) == ("session.created", "conversation.created")
    assert created["session"]["model"] == "echo" and created["session"]["audio"]["input"]["turn_detection"] is None
    assert [tool["name"] for tool in created["session"]["tools"]] == ["look_up", "nod"]


def test_words_and_sound_are_a_response_that_ends_when_it_is_quiet(talk: Conversation) -> None:
    first = tick(talk, "one", sound=SOUND)
    assert types(first) == [
        "response.created",
        "response.output_item.added",
        "conversation.item.added",
        "response.content_part.added",
        "response.output_audio_transcript.delta",
        "response.output_audio.delta",
    ]
    more = tick(talk, "two", sound=SOUND[:960])
    assert types(more) == ["response.output_audio_transcript.delta", "response.output_audio.delta"]
    assert [base64.b64decode(e["delta"]) for e in (first[-1], more[-1])] == [SOUND, SOUND[:960]]
    assert [first[-2]["delta"], more[0]["delta"]] == ["one", " two"]
    quiet = [tick(talk) for _ in range(QUIET_TICKS)]
    assert quiet[:-1] == [[]] * (QUIET_TICKS - 1)
    assert types(quiet[-1]) == [
        "response.output_audio.done",
        "response.output_audio_transcript.done",
        "response.content_part.done",
        "conversation.item.done",
        "response.output_item.done",
        "response.done",
    ]
    done = quiet[-1][-1]["response"]
    assert done["status"] == "completed" and done["id"] == first[0]["response"]["id"]
    assert done["output"][0]["content"] == [{"type": "output_audio", "transcript": "one two"}]
    assert tick(talk) == []


def test_an_act_is_a_function_call_that_is_done_at_once(talk: Conversation) -> None:
    events = tick(talk, act="look_up")
    assert types(events) == [
        "response.created",
        "response.output_item.added",
        "conversation.item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "conversation.item.done",
        "response.output_item.done",
        "response.done",
    ]
    call = events[-1]["response"]["output"]
    assert [(item["type"], item["name"], item["arguments"], item["status"]) for item in call] == [
        ("function_call", "look_up", "{}", "completed")
    ]
    assert events[1]["item"]["status"] == "in_progress", "what was told is not changed afterwards"


def test_an_act_while_it_speaks_goes_into_the_same_response(talk: Conversation) -> None:
    tick(talk, "ok", sound=SOUND)
    acted = tick(talk, act="nod", sound=SOUND)
    assert "response.created" not in types(acted) and "response.done" not in types(acted)
    assert {event["output_index"] for event in acted if "call_id" in event} == {1}
    done = [tick(talk) for _ in range(QUIET_TICKS)][-1][-1]["response"]
    assert [item["type"] for item in done["output"]] == ["message", "function_call"]


def test_of_every_tick_only_who_asks_is_told(senses: Senses) -> None:
    watched = Conversation(CONFIG, "echo", senses, timeline=True)
    assert [event["type"] for event in watched.greet()][-1] == "copresence.bundle"
    event = {"event": "tick", "tick": 7, "say": [], "act": "none", "engine_ms": 5.0}
    (told,) = watched.tick(Tick(event, b"", {"seen": "look_1"}))
    assert (told["type"], told["tick"], told["engine_ms"], told["seen"]) == ("copresence.tick", 7, 5.0, "look_1")


# --- what has no meaning without turns --------------------------------------------------------------------------------


def test_a_commit_makes_an_item_of_what_was_appended(talk: Conversation, senses: Senses) -> None:
    assert only_error(say(talk, type="input_audio_buffer.commit"))["code"] == "input_audio_buffer_commit_empty"
    assert say(talk, type="input_audio_buffer.append", audio=base64.b64encode(SOUND).decode()) == []
    assert senses.heard[0].dtype == np.int16 and senses.heard[0].tobytes() == SOUND, "it is heard without being committed"
    events = say(talk, type="input_audio_buffer.commit")
    assert types(events) == ["input_audio_buffer.committed", "conversation.item.added", "conversation.item.done"]
    assert events[0]["item_id"] == events[1]["item"]["id"] and events[1]["item"]["content"][0]["type"] == "input_audio"
    assert only_error(say(talk, type="input_audio_buffer.commit"))["code"] == "input_audio_buffer_commit_empty"
    say(talk, type="input_audio_buffer.append", audio=base64.b64encode(SOUND).decode())
    assert types(say(talk, type="input_audio_buffer.clear")) == ["input_audio_buffer.cleared"]
    assert only_error(say(talk, type="input_audio_buffer.commit"))["code"] == "input_audio_buffer_commit_empty"


def test_a_response_that_is_asked_for_has_what_comes_next(talk: Conversation) -> None:
    assert types(say(talk, type="response.create")) == ["response.created"]
    assert only_error(say(talk, type="response.create"))["code"] == "conversation_already_has_active_response"
    assert tick(talk) == []
    assert "response.created" not in types(tick(talk, "one", sound=SOUND))
    done = [tick(talk) for _ in range(QUIET_TICKS)][-1][-1]["response"]
    assert done["output"][0]["content"][0]["transcript"] == "one"


def test_a_response_that_is_asked_for_ends_if_nothing_comes(talk: Conversation) -> None:
    created = say(talk, type="response.create", response={"instructions": "be brief"})[0]["response"]
    told = [tick(talk) for _ in range(ASKED_TICKS)]
    assert told[:-1] == [[]] * (ASKED_TICKS - 1)
    done = told[-1][-1]["response"]
    assert (done["id"], done["status"]) == (created["id"], "completed")
    assert [item["content"][0]["transcript"] for item in done["output"]] == [""], "it has an item at least"


def test_cancelling_ends_the_response_and_hushes(talk: Conversation, senses: Senses) -> None:
    assert only_error(say(talk, type="response.cancel"))["code"] == "response_cancel_not_active"
    response = tick(talk, "one", sound=SOUND)[0]["response"]["id"]
    assert only_error(say(talk, type="response.cancel", response_id="another"))["code"] == "response_cancel_not_active"
    assert senses.hushed == 0
    done = say(talk, type="response.cancel", response_id=response)[-1]["response"]
    assert done["status"] == "cancelled" and done["output"][0]["status"] == "incomplete" and senses.hushed == 1


def test_truncating_shortens_what_was_said(talk: Conversation) -> None:
    item = tick(talk, "one", sound=SOUND)[1]["item"]["id"]
    for _ in range(QUIET_TICKS):
        tick(talk)
    wanted = {"type": "conversation.item.truncate", "item_id": item, "content_index": 0}
    assert "from 0 to 200" in only_error(say(talk, **wanted, audio_end_ms=201))["message"]
    assert only_error(say(talk, **{**wanted, "content_index": 1}, audio_end_ms=100))["param"] == "content_index"
    (event,) = say(talk, **wanted, audio_end_ms=100)
    assert (event["type"], event["audio_end_ms"]) == ("conversation.item.truncated", 100)
    (kept,) = say(talk, type="conversation.item.retrieve", item_id=item)
    assert kept["item"]["content"][0]["transcript"] == ""
    users = say(talk, **message(text("one")))[0]["item"]["id"]
    assert only_error(say(talk, **{**wanted, "item_id": users}, audio_end_ms=0))["param"] == "item_id"


def test_the_end_of_turns_can_be_set_and_changes_nothing(talk: Conversation) -> None:
    for detection in ({"type": "server_vad", "threshold": 0.4}, {"type": "semantic_vad", "eagerness": "high"}, None):
        (event,) = say(talk, type="session.update", session={"type": "realtime", "audio": {"input": {"turn_detection": detection}}})
        assert event["type"] == "session.updated" and event["session"]["audio"]["input"]["turn_detection"] == detection
    assert tick(talk, "one", sound=SOUND)[0]["type"] == "response.created"


# --- settings, items, errors ------------------------------------------------------------------------------------------


def test_a_setting_that_is_not_ours_to_change_stays_and_is_told(talk: Conversation) -> None:
    asked = {
        "type": "realtime",
        "model": "gpt-realtime",
        "instructions": "be kind",
        "tools": [{"type": "function", "name": "f"}],
        "audio": {"output": {"voice": "marin", "speed": 1.2}, "input": {"format": {"type": "audio/pcm", "rate": 24000}}},
    }
    (event,) = say(talk, type="session.update", session=asked)
    session = event["session"]
    assert session["instructions"] == "be kind", "what is present is updated"
    assert (session["model"], session["audio"]["output"]["voice"]) == ("echo", "companion")
    assert [tool["name"] for tool in session["tools"]] == ["look_up", "nod"]


@pytest.mark.parametrize(
    ("session", "param"),
    [
        ({"type": "transcription"}, "session.type"),
        ({"output_modalities": ["text"]}, "session.output_modalities"),
        ({"audio": {"input": {"format": {"type": "audio/pcmu"}}}}, "session.audio.input.format"),
        ({"audio": {"output": {"format": {"type": "audio/pcm", "rate": 16000}}}}, "session.audio.output.format"),
        ({"input_audio_format": "pcm16"}, "session.input_audio_format"),
        ({"audio": {"input": {"turn_detection": {"type": "none"}}}}, "session.audio.input.turn_detection"),
        ({"audio": []}, "session.audio"),
        ({"instructions": 1}, "session.instructions"),
        ([], "session"),
    ],
)
def test_a_setting_that_cannot_be_is_named_and_nothing_is_changed(talk: Conversation, session: Any, param: str) -> None:
    before = json.dumps(talk.session)
    wanted = {"max_output_tokens": 7, **session} if isinstance(session, dict) else session
    error = only_error(say(talk, type="session.update", session=wanted, event_id="mine"))
    assert (error["param"], error["event_id"]) == (param, "mine")
    assert json.dumps(talk.session) == before


def test_words_pictures_and_results_are_items(talk: Conversation, senses: Senses) -> None:
    added, done = say(talk, **message(text("Tell TWO"), {"type": "input_image", "image_url": JPEG}))
    assert (added["type"], done["type"]) == ("conversation.item.added", "conversation.item.done")
    assert senses.words == [4, 2] and senses.pictures == [(added["item"]["id"], "image/jpeg", base64.b64decode(JPEG.split(",")[1]))]
    assert "image_url" not in added["item"]["content"][1], "a picture is not sent back"
    result = {"type": "function_call_output", "call_id": "call_1", "output": "done"}
    named = say(talk, type="conversation.item.create", item={**result, "id": "mine"})[0]
    assert (named["item"]["id"], named["previous_item_id"]) == ("mine", added["item"]["id"])
    assert types(say(talk, type="conversation.item.retrieve", item_id="mine")) == ["conversation.item.retrieved"]
    assert types(say(talk, type="conversation.item.delete", item_id="mine")) == ["conversation.item.deleted"]
    assert only_error(say(talk, type="conversation.item.delete", item_id="mine"))["code"] == "item_not_found"
    say(talk, **message({"type": "output_text", "text": "words it has not"}, role="assistant"))
    assert senses.words == [4, 2], "what it is said to have said before is not read to it"


@pytest.mark.parametrize(
    ("event", "param"),
    [
        (message(text("tell seven")), "item.content[0].text"),
        (message({"type": "input_image", "image_url": "https://example.org/a.jpg"}), "item.content[0].image_url"),
        (message({"type": "input_image", "image_url": "data:image/jpeg;base64,§"}), "item.content[0].image_url"),
        (message({"type": "input_audio", "audio": ""}), "item.content[0].type"),
        (message(text("one"), role="nobody"), "item.role"),
        (message(text("one"), previous_item_id="nowhere"), "previous_item_id"),
        ({"type": "conversation.item.create", "item": {"type": "function_call"}}, "item.type"),
        ({"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": "one"}}, "item.content"),
        ({"type": "input_audio_buffer.append", "audio": "AAA="[:3] + "!"}, "audio"),
        ({"type": "input_audio_buffer.append", "audio": base64.b64encode(b"odd").decode()}, "audio"),
        ({"type": "input_audio_buffer.append"}, "audio"),
        ({"type": "output_audio_buffer.clear"}, "type"),
        ({"type": "no.such.event"}, "type"),
        ({"type": ["session.update"]}, "type"),
    ],
)
def test_what_cannot_be_taken_is_named_and_reaches_nobody(talk: Conversation, senses: Senses, event: Event, param: str) -> None:
    error = only_error(say(talk, **event, event_id="mine"))
    assert (error["type"], error["param"], error["event_id"]) == ("invalid_request_error", param, "mine")
    assert not senses.heard and not senses.words and not senses.pictures
    assert only_error(valid(talk.receive("no JSON")))["code"] == "invalid_json"


def test_words_that_it_has_no_time_to_read_are_refused(talk: Conversation, senses: Senses) -> None:
    senses.full = True
    assert only_error(say(talk, **message(text("one"))))["code"] == "too_much_text"


def test_a_conversation_of_any_length_keeps_a_bounded_number_of_items(talk: Conversation) -> None:
    first = say(talk, **message(text("one")))[0]["item"]["id"]
    for _ in range(ITEMS):
        tick(talk, act="nod")
    assert only_error(say(talk, type="conversation.item.retrieve", item_id=first))["code"] == "item_not_found"
    assert len(talk._items) == ITEMS


def test_what_the_network_lost_is_told_to_whom_it_concerns(talk: Conversation) -> None:
    (fast,) = valid(talk.notice({"event": "loss", "tick": 3, "of": ["dropped_samples"]}))
    assert fast["error"]["code"] == "input_audio_too_fast"
    (picture,) = valid(talk.notice({"event": "loss", "tick": 3, "of": ["bad_pictures"]}))
    assert picture["error"]["code"] == "invalid_image"
    assert list(talk.notice({"event": "loss", "tick": 3, "of": ["lost_ticks"]})) == []


KEYS = st.sampled_from(
    "type session audio input item role content item_id audio_end_ms content_index response event_id text image_url format id".split()
)
TYPES = st.sampled_from(
    [
        "session.update",
        "input_audio_buffer.append",
        "input_audio_buffer.commit",
        "conversation.item.create",
        "conversation.item.truncate",
        "response.create",
        "response.cancel",
        "message",
        "input_text",
        "input_image",
        "realtime",
        "user",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=8) | TYPES | st.just(JPEG)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine is shared
@given(st.lists(st.builds(lambda kind, rest: {**rest, "type": kind}, TYPES, st.dictionaries(KEYS, JSON, max_size=5)) | JSON, max_size=5))
def test_whatever_a_peer_sends_it_gets_events_of_the_api(messages: list[Any]) -> None:
    talk = Conversation(CONFIG, "echo", Senses())
    for sent in messages:
        valid(talk.receive(json.dumps(sent)))
        tick(talk, "one", sound=SOUND)
