"""The background model: what it is told, what comes back, and that nothing it does or fails to do holds up or breaks the loop."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import itertools
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from types import AsyncGeneratorType
from typing import Any

import cv2
import numpy as np
import pytest
import soundfile
from chat_server import DONE, Body, ChatServer, calls, chunk, says
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loop import write_bundle

from device.audio import Line, Source, VirtualPlayout
from device.cli import main
from device.config import ModelConfig, TextConfig, TrunkConfig
from device.engine import HostMemory, allocate
from device.loop import Loop, NoActuator, TextQueue
from device.reach.breaker import FAILURES, LONGEST_S, OPEN_S, Breaker
from device.reach.client import CallPart, Client, _Bounded
from device.reach.context import LAST_S, Tick
from device.reach.endpoint import KEY_VARIABLE, Endpoint, read_key
from device.reach.limits import Limits, ReachError
from device.reach.reach import SIMULATED_S, TIMERS, Reach
from device.reach.tools import Dictation, Order, Refused, order_of, schemas, tellable_words, tool_table
from device.session import Session
from device.steering import Steering
from device.ticker import SimulatedTicker

WORDS = ("", "one", "two", "three", "now", "quiet", "tell", "sorry")
ACTS = ("none", "ask", "look_left", "look_up", "light_on", "shake")
CONFIG = ModelConfig(
    tick_ms=100,
    text=TextConfig(words=WORDS, acts=ACTS),
    trunk=TrunkConfig(width=32, heads=2, mlp=32, perceive_layers=2, present_layers=1, perceive_window=3, present_window=5),
)
TICK = CONFIG.tick_samples
LATER = round(SIMULATED_S / 0.1)  # ticks from a question to its answer
QUICK = Limits(connect_s=5.0, silence_s=5.0, answer_s=20.0, backoff_s=0.01)


class Engine:
    """Does what `acts` and `says` say for a tick, and remembers the text that each tick read."""

    def __init__(self, acts: dict[int, str], says: dict[int, str] | None = None) -> None:
        self.inputs, self.outputs = allocate(CONFIG)
        self.memory = HostMemory(CONFIG, self.inputs, self.outputs)
        self._acts, self._says = acts, says or {}
        self.read: list[str] = []

    def run(self) -> None:
        tick = len(self.read)
        self.read.append(" ".join(WORDS[token] for token in self.inputs["text_in"] if token))
        self.outputs["act"][...] = ACTS.index(self._acts.get(tick, "none"))
        self.outputs["say"][...] = (WORDS.index(self._says.get(tick, "")), 0)

    def texts(self) -> dict[int, str]:
        """What was read, by tick."""
        return {tick: text for tick, text in enumerate(self.read) if text}


class Ramp(Source):
    """A microphone in which every sample is another one."""

    def read(self, start: int, out: np.ndarray) -> None:
        out[...] = np.maximum(np.arange(start, start + out.size), 0) / 65536


class Eyes:
    """A camera whose pictures are all of another colour: picture t is exposed half a tick before the edge of tick t."""

    end_s: float | None = None
    fault: str | None = None
    counts: dict[str, int]

    def __init__(self) -> None:
        self.counts = {}

    def frames_at(self, edge_s: float) -> tuple[np.ndarray, float]:
        return np.stack([picture(round(edge_s / 0.1) - 2), picture(round(edge_s / 0.1) - 1)]), 0.05

    def close(self) -> None:
        """Nothing to close."""


def picture(tick: int) -> np.ndarray:
    frame = np.zeros((CONFIG.video.height, CONFIG.video.width, 3), np.uint8)
    frame[...] = (tick % 256, 100, 255 - tick % 256)
    frame[:7, :3] = 255
    return frame


class Moved(NoActuator):
    def __init__(self) -> None:
        self.acts: list[str] = []

    def act(self, name: str) -> None:
        self.acts.append(name)


class Events:
    dropped = 0

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        self.all.append(event)

    def thoughts(self, what: str) -> list[dict[str, Any]]:
        return [event for event in self.all if event["event"] == "think" and event["what"] == what]


class Run:
    """A loop in simulated time with a background model at `url`."""

    def __init__(
        self,
        url: str,
        acts: dict[int, str],
        says: dict[int, str] | None = None,
        ticks: int = 40,
        text: tuple[tuple[float, str], ...] = (),
        limits: Limits = QUICK,
        patient: bool = True,
        sound: bool = False,
        key: str | None = None,
    ) -> None:
        self.engine, self.body, self.events = Engine(acts, says), Moved(), Events()
        ticker = SimulatedTicker(100_000_000)
        playout = VirtualPlayout(CONFIG.audio.sample_rate_hz, ticker.now_ns)
        reach = Reach(CONFIG, Endpoint(url, "m", key), sound, patient, limits)
        loop = Loop(
            config=CONFIG,
            session=Session(CONFIG, self.engine),
            ticker=ticker,
            steering=Steering(100_000_000),
            line=Line(CONFIG, Ramp(), playout, 960),
            camera=Eyes(),
            text=TextQueue([(at_s, [WORDS.index(word) for word in words.split()]) for at_s, words in text], CONFIG.text.text_in),
            actuator=self.body,
            events=self.events,  # type: ignore[arg-type]
            recording=None,
            seconds=ticks * 0.1,
            stop=threading.Event(),
            thinker=reach,
        )
        try:
            self.summary = loop.run({"event": "header"})
        finally:
            reach.close()
        assert self.summary["ticks"] == ticks, "whatever happens, the loop goes on to its end"
        self.think = self.summary["think"]


# --- what it is told ------------------------------------------------------------------------------------------------------------


def test_it_is_told_what_was_heard_seen_said_read_and_done() -> None:
    with ChatServer(says("tell two")) as server:
        Run(server.url, {8: "shake", 9: "ask"}, {2: "three"}, text=((0.45, "now"),), ticks=30)
    request = server.requests[0]
    assert (request["model"], request["stream"]) == ("m", True)
    assert "one two three now sorry" in request["messages"][0]["content"], "the words that it may tell"
    content = request["messages"][1]["content"]
    assert [part["type"] for part in content] == ["text", "text", "image_url", "text", "image_url"], "no sound unless asked for"
    lines = content[0]["text"].splitlines()
    assert lines[0].startswith("Session time 1.0 s")
    assert "-0.7: " in lines[2] and lines[2].endswith("said three")
    assert "-0.5: " in lines[4] and "read 'now'" in lines[4]
    assert lines[-2].startswith("-0.1: heard ") and lines[-2].endswith("did shake (its answer to the word 'no')")
    assert lines[-1].endswith("saw a picture 0.05 s old, did ask")
    assert "0.7 s ago" in content[1]["text"] and "now" in content[3]["text"]
    for part, tick in ((content[2], 2), (content[4], 9)):
        png = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
        shown = cv2.cvtColor(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        np.testing.assert_array_equal(shown, picture(tick))


def test_sound_goes_along_if_configured() -> None:
    with ChatServer(says("tell two")) as server:
        Run(server.url, {99: "ask"}, ticks=120, sound=True)
    part = server.requests[0]["messages"][1]["content"][-1]
    assert part["input_audio"]["format"] == "wav"
    samples, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(part["input_audio"]["data"])), dtype="int16")
    assert (rate_hz, len(samples)) == (CONFIG.audio.sample_rate_hz, LAST_S * CONFIG.audio.sample_rate_hz)
    end = 100 * TICK
    expected = np.minimum(np.rint(np.arange(end - len(samples), end) / 2), 32767)
    np.testing.assert_array_equal(samples, expected)


# --- what comes back ------------------------------------------------------------------------------------------------------------


def test_an_answer_streams_into_the_ticks_one_thing_to_tell_at_a_time() -> None:
    with ChatServer(says("te", "ll on", "e, Tell", "\nTWO. tell", " three")) as server:
        run = Run(server.url, {5: "ask"})
    first = 5 + LATER
    assert run.engine.texts() == {first: "tell one", first + 1: "tell two", first + 2: "tell three"}
    assert (run.think["asked"], run.think["answered"], run.think["told"]) == (1, 1, 3)
    assert [event["word"] for event in run.events.thoughts("told")] == ["one", "two", "three"]


def test_text_of_the_run_goes_first() -> None:
    with ChatServer(says("tell one")) as server:
        run = Run(server.url, {5: "ask"}, text=(((5 + LATER) * 0.1 + 0.05, "now"),))
    assert run.engine.texts() == {5 + LATER: "now", 6 + LATER: "tell one"}


def test_words_that_are_none_or_command_the_model_are_refused_and_logged() -> None:
    with ChatServer(says("I think it is two: tell five tell quiet tell tell two quiet")) as server:
        run = Run(server.url, {5: "ask"})
    assert run.engine.texts() == {5 + LATER: "tell two"}
    [event] = run.events.thoughts("refused")
    assert event["words"] == 8 and event["reason"].endswith("i think it is two five quiet quiet")


def test_no_tick_waits_for_an_answer() -> None:
    free = threading.Event()

    def held() -> Iterator[bytes]:
        free.wait(60)
        yield DONE

    with ChatServer(held) as server:
        acts = {5: "ask", 9: "ask", 30: "look_up", 120: "shake"}
        # which ends while nothing has been answered
        run = Run(server.url, acts, {40: "three"}, ticks=200, text=((5.05, "now"),), patient=False)
        free.set()
    assert run.think == {"asked": 2, "dropped": 1, "answered": 0, "failed": 0, "told": 0, "calls": 0, "refused": 0}
    assert len(run.events.thoughts("dropped")) == 1
    assert run.body.acts == list(acts.values()) and run.engine.texts() == {50: "now"}, "it does and reads what it always would"
    assert [event["say"] for event in run.events.all if event["event"] == "tick" and event["say"]] == [["three"]]


def test_an_answer_that_comes_while_the_loop_runs_is_delivered() -> None:
    """Without patience, as in real time: whenever the answer is there, some tick reads it."""
    with ChatServer(says("tell one")) as server:
        reach = Reach(CONFIG, Endpoint(server.url, "m"), limits=QUICK)
        ids: list[int] = []
        deadline = time.monotonic() + 30
        for k in itertools.count():
            ids = reach.text((k + 1) * 0.1)
            if ids or time.monotonic() > deadline:
                break
            seen = Tick(k, (k + 1) * 0.1, (), (), "none" if k else "ask", False, 0.0, 1.0, 0, 0)
            reach.tick(seen, picture(0), np.zeros(TICK, np.float32))
            time.sleep(0.01)
        reach.close()
    assert ids == [WORDS.index("tell"), WORDS.index("one")]


# --- tools ------------------------------------------------------------------------------------------------------------------------


def test_several_tools_at_once_are_carried_out_and_bad_calls_are_refused() -> None:
    asked = (
        ("look", '{"direction": "left"}'),
        ("light", '{"state": "on"}'),
        ("set_timer", '{"seconds": 1.5, "word": "now"}'),
        ("status", ""),
        ("say", '{"word": "one"}'),
        ("format_disk", "{}"),
        ("look", '{"direction": "behind"}'),
        ("say", '{"word": "one", "loudly": true}'),
    )
    with ChatServer(calls(*asked), says("tell two")) as server:
        run = Run(server.url, {5: "ask", 5 + LATER: "look_up"}, ticks=60)
    assert run.body.acts == ["ask", "look_up", "look_left", "light_on"], "the model's own act goes first"
    assert {event["tick"]: event["act"] for event in run.events.thoughts("act")} == {6 + LATER: "look_left", 7 + LATER: "light_on"}
    assert run.engine.texts() == {5 + LATER: "tell one", 6 + LATER: "tell two", 5 + LATER + 15: "tell now"}
    answer, *results = server.requests[1]["messages"][2:]
    assert [call["function"]["name"] for call in answer["tool_calls"]] == [name for name, _ in asked]
    told = [json.loads(result["content"]) for result in results]
    assert [result["tool_call_id"] for result in results] == [f"id{i}" for i in range(8)]
    assert [told[i] for i in (0, 1, 2, 4)] == [{"ok": True}] * 4
    assert told[3]["ticks"] >= 6 and told[3]["lost_ticks"] == 0
    assert "unknown tool" in told[5]["refused"] and "'direction' must be" in told[6]["refused"] and "takes just word" in told[7]["refused"]
    assert [event["tool"] for event in run.events.thoughts("refused")] == ["format_disk", "look", "say"]
    assert (run.think["calls"], run.think["refused"]) == (5, 3)


def test_timers_are_few_and_do_not_stop_what_is_told() -> None:
    timers = calls(*[("set_timer", '{"seconds": 3600, "word": "now"}')] * (TIMERS // 2))
    with ChatServer(timers, says("tell one"), timers, says("tell one"), timers, says("tell two")) as server:
        run = Run(server.url, dict.fromkeys((0, 20, 40), "ask"), ticks=60)
    assert run.engine.texts() == {LATER: "tell one", 20 + LATER: "tell one", 40 + LATER: "tell two"}
    assert run.think["dropped"] == TIMERS // 2


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([calls(("status", ""))], "tool calls in each of 4 answers"),
        ([calls(*[("status", "")] * 9)], "more than 8 tool calls"),
        ([calls(*[("status", "")] * 6), calls(*[("status", "")] * 6)], "more than 8 tool calls"),
    ],
)
def test_tool_calls_without_end_end(answers: list[Body], reason: str) -> None:
    with ChatServer(*answers) as server:
        run = Run(server.url, {5: "ask"})
    assert [event["reason"] for event in run.events.thoughts("failed")] == [reason]
    assert len(server.requests) <= 4


def test_an_answer_that_is_given_up_leaves_nothing_to_the_collector() -> None:
    """Which runs in the tick's thread, and would close there what another thread's event loop closes at the same time."""

    async def given_up(url: str) -> list[str]:
        client = Client(Endpoint(url, "model"), Limits())
        pieces = client.stream([{"role": "user", "content": "?"}], [])
        async with aclosing(pieces):
            assert isinstance(await anext(pieces), CallPart)
        await asyncio.sleep(0.1)  # for what the event loop still closes
        left = [thing for thing in gc.get_objects() if type(thing) is AsyncGeneratorType and thing is not pieces]
        await client.close()
        return [generator.__qualname__ for generator in left]

    gc.collect()
    gc.disable()
    try:
        with ChatServer(calls(*[("status", "")] * 6)) as server:
            assert asyncio.run(given_up(server.url)) == []
    finally:
        gc.enable()


def test_a_response_that_is_closed_closes_what_its_bytes_come_from() -> None:
    """At once: what is left to the finalizer of a generator may be found by the collector in the tick's thread."""
    ended: list[str] = []

    class Stream:
        async def __aiter__(self) -> AsyncIterator[bytes]:
            try:
                yield b"one"
                yield b"two"
            finally:
                ended.append("bytes")

        async def aclose(self) -> None:
            ended.append("stream")

    async def half_read() -> None:
        bounded = _Bounded(Stream(), 100)
        chunks = aiter(bounded)
        assert await anext(chunks) == b"one" and ended == []
        await bounded.aclose()
        assert ended == ["bytes", "stream"]

    asyncio.run(half_read())


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_subnormal=False) | st.text(max_size=5),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([*tool_table(CONFIG.text), "x"]), st.text() | JSON.map(json.dumps) | st.just('{"seconds": 1e999, "word": "now"}'))
def test_any_call_is_an_order_or_refused(name: str, arguments: str) -> None:
    try:
        order = order_of(tool_table(CONFIG.text), name, arguments)
    except Refused:
        return
    assert order is None or order.value in (*ACTS, *WORDS)


def test_only_values_of_the_table_become_orders() -> None:
    table = tool_table(CONFIG.text)
    assert order_of(table, "set_timer", '{"seconds": 2, "word": "now"}') == Order("text", "now", 2.0)
    for seconds in ("true", "-1", "NaN", "Infinity", "1e999", '"2"', "3601", "[2]"):
        with pytest.raises(Refused):
            order_of(table, "set_timer", f'{{"seconds": {seconds}, "word": "now"}}')
    for arguments in ("[" * 900, "[1]", "{", '{"word": "' + "a" * 2000 + '"}'):
        with pytest.raises(Refused):
            order_of(table, "say", arguments)


def test_a_tool_that_the_bundle_has_no_acts_for_is_not_offered() -> None:
    assert set(tool_table(CONFIG.text)) == {"set_timer", "say", "look", "light", "status"}
    mute = tool_table(TextConfig(words=("", "tell", "one"), acts=("none", "ask", "look_up")))
    assert set(mute) == {"set_timer", "say", "look", "status"}
    [look] = [tool["function"] for tool in schemas(mute) if tool["function"]["name"] == "look"]
    assert look["parameters"]["properties"] == {"direction": {"type": "string", "enum": ["up"]}}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["tell", "one", "two", "quiet", "hm", "Tell", ",", "\n"])), st.data())
def test_how_an_answer_is_cut_into_pieces_does_not_matter(words: list[str], data: st.DataObject) -> None:
    text = " ".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))

    def told(pieces: list[str]) -> tuple[list[str], int]:
        dictation = Dictation(tellable_words(CONFIG.text), most=8)
        found = [word for piece in pieces for word in dictation.feed(piece)] + list(dictation.end())
        return found, dictation.refused

    assert told([text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]) == told([text])


# --- what goes wrong ------------------------------------------------------------------------------------------------------------


def forever(*parts: bytes, every_s: float = 0.0) -> Body:
    def body() -> Iterator[bytes]:
        for part in itertools.cycle(parts):
            yield part
            time.sleep(every_s)

    return body


def raw(*parts: bytes) -> Body:
    return lambda: iter(parts)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (forever(chunk({"content": "hm "})), "the answer is too long"),
        (forever(b"x" * 1024), "the answer is too long"),
        (forever(b"data: " + b"[" * 1024), "the answer is too long"),
        (forever(chunk({"content": "tell one "})), "the answer is too long"),
        (raw(b"<html>hello</html>\n\n"), "the answer is empty"),
        (raw(b"data: {nonsense\n\n"), "not that of the protocol"),
        (raw(b"data: \xff\xfe\n\n"), "not that of the protocol"),
        (raw(b"data: 7\n\ndata: []\n\n", b'data: {"choices": 5}\n\n', b'data: {"choices": [null, {"delta": 3}]}\n\n', DONE), ""),
        (raw(chunk({"content": 5}), chunk({"tool_calls": [None, 3, {"function": "look"}]}), DONE), ""),
        (raw(chunk({"tool_calls": [{"index": -(10**30), "function": {"name": ["look"], "arguments": {}}}]}), DONE), ""),
        (raw(b'data: {"error": {"message": "the key sk-secret is wrong"}}\n\n'), "broke off its answer with an error"),
        (raw(DONE), "the answer is empty"),
        (raw(), "the answer is empty"),
    ],
)
def test_endless_answers_and_garbage_fail_and_nothing_breaks(answer: Body, reason: str) -> None:
    with ChatServer(answer) as server:
        run = Run(server.url, {5: "ask"}, limits=Limits(backoff_s=0.01, answer_bytes=1 << 15), key="sk-secret")
    failed = run.events.thoughts("failed")
    if reason:
        assert [reason in event["reason"] for event in failed] == [True]
    assert sum(text == "tell one" for text in run.engine.texts().values()) in (0, Limits().words)
    assert (run.engine.texts().get(5 + LATER) == "tell sorry") == (bool(failed) and not run.think["told"])
    assert "sk-secret" not in json.dumps(run.events.all)


def test_a_server_that_drips_is_given_up_in_time() -> None:
    with ChatServer(forever(b": still here\n", every_s=0.02)) as server:
        run = Run(server.url, {5: "ask"}, limits=Limits(answer_s=0.5))
    assert [event["reason"] for event in run.events.thoughts("failed")] == ["the answer was not whole within 0.5 s"]
    assert run.engine.texts() == {5 + LATER: "tell sorry"}


def test_a_server_that_is_silent_is_asked_again_and_given_up() -> None:
    with ChatServer(forever(b"", every_s=0.02)) as server:
        run = Run(server.url, {5: "ask"}, limits=Limits(silence_s=0.1, backoff_s=0.01, retries=1))
    assert len(server.requests) == 2
    assert [event["reason"] for event in run.events.thoughts("failed")] == ["the server is silent"]


def test_a_compressed_answer_is_not_unpacked() -> None:
    with ChatServer(says("tell one"), headers={"Content-Encoding": "gzip"}) as server:
        run = Run(server.url, {5: "ask"})
    assert [event["reason"] for event in run.events.thoughts("failed")] == ["the answer is compressed, which was not asked for"]
    assert len(server.requests) == 1


def test_a_redirection_is_not_followed() -> None:
    with (
        ChatServer(says("tell one")) as other,
        ChatServer(says(""), status=(307,), headers={"Location": other.url + "/chat/completions"}) as server,
    ):
        run = Run(server.url, {5: "ask"}, key="sk-secret")
    assert not other.requests and run.think["failed"] == 1


def test_a_server_in_trouble_is_asked_again() -> None:
    with ChatServer(says("oh"), says("oh"), says("tell two"), status=(500, 429, 200)) as server:
        run = Run(server.url, {5: "ask"})
    assert run.engine.texts() == {5 + LATER: "tell two"}
    assert [event["reason"] for event in run.events.thoughts("retry")] == [f"the server answered with status {code}" for code in (500, 429)]


def test_what_has_been_told_is_not_asked_for_again() -> None:
    def breaks_off() -> Iterator[bytes]:
        yield chunk({"content": "tell one tell two tell"})
        yield b'data: {"error": {"message": "out of memory"}}\n\n'

    with ChatServer(breaks_off) as server:
        run = Run(server.url, {5: "ask"})
    assert len(server.requests) == 1
    assert run.engine.texts() == {5 + LATER: "tell one", 6 + LATER: "tell two"}, "and no word of sorrow after an answer"


def test_a_request_that_is_rejected_is_not_repeated_and_the_key_stays_secret() -> None:
    with ChatServer(raw(b'{"error": {"message": "Incorrect API key provided: sk-secret"}}'), status=(401,)) as server:
        run = Run(server.url, {5: "ask"}, key="sk-secret")
    assert server.keys == ["Bearer sk-secret"]
    assert [event["reason"] for event in run.events.thoughts("failed")] == ["the server answered with status 401; check the key"]
    assert "sk-secret" not in json.dumps(run.events.all)


def test_without_a_network_it_is_sorry_once_then_quiet() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but nobody listens
        run = Run(f"http://127.0.0.1:{closed.getsockname()[1]}/v1", dict.fromkeys(range(5, 100, 15), "ask"), ticks=120)
    assert run.engine.texts() == {5 + LATER: "tell sorry"}
    assert (run.think["asked"], run.think["failed"], run.think["told"]) == (7, 7, 0)
    failed = run.events.thoughts("failed")
    assert [event["reason"].partition(",")[0] for event in failed[:FAILURES]] == ["no connection to the server"] * FAILURES
    assert failed[FAILURES - 1]["not_asked_for_s"] == OPEN_S
    assert all("not asked for a while" in event["reason"] for event in failed[FAILURES:])
    assert len(run.events.thoughts("retry")) == FAILURES * QUICK.retries, "behind an open breaker nothing is tried"


def test_after_a_rest_it_is_asked_again_and_may_be_sorry_again() -> None:
    trouble = (400,) * FAILURES
    with ChatServer(*[says("")] * FAILURES, says("tell two"), says(""), status=(*trouble, 200, 400)) as server:
        asks = [0, 20, 40, 60, round(OPEN_S * 10) + 60, round(OPEN_S * 10) + 80]
        run = Run(server.url, dict.fromkeys(asks, "ask"), ticks=asks[-1] + 20)
    assert len(server.requests) == FAILURES + 2, "the one at tick 60 was not sent"
    assert run.engine.texts() == {LATER: "tell sorry", asks[4] + LATER: "tell two", asks[5] + LATER: "tell sorry"}


def test_the_breaker_rests_longer_each_time() -> None:
    breaker, now_s, rests = Breaker(), 0.0, []
    for _ in range(FAILURES - 1):
        assert breaker.failed(now_s) == 0 and breaker.allows(now_s)
    for _ in range(8):
        rest_s = breaker.failed(now_s)
        assert not breaker.allows(now_s + rest_s - 0.1) and breaker.allows(now_s + rest_s)
        rests.append(rest_s)
        now_s += rest_s
    assert rests == [min(OPEN_S * 2**i, LONGEST_S) for i in range(8)]
    breaker.succeeded()
    assert breaker.failed(now_s) == 0


# --- where it is, and the key -----------------------------------------------------------------------------------------------------


def test_the_key_comes_from_a_file_of_its_owner_alone_or_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    file = tmp_path / "key"
    file.write_text("sk-secret\n")
    file.chmod(0o600)
    assert (read_key(file), read_key(None)) == ("sk-secret", None)
    monkeypatch.setenv(KEY_VARIABLE, "sk-other")
    assert (read_key(file), read_key(None)) == ("sk-secret", "sk-other")
    for mode in (0o640, 0o604, 0o620, 0o644):
        file.chmod(mode)
        with pytest.raises(ReachError, match=f"chmod 600 {file}"):
            read_key(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644, "it is not mended behind anybody's back"
    file.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(file)
    for bad, content in ((file, ""), (file, "two words"), (file, "ü"), (tmp_path / "absent", None), (tmp_path, None), (link, None)):
        if content is not None:
            file.write_text(content)
        with pytest.raises(ReachError) as caught:
            read_key(bad)
        assert str(bad) in str(caught.value) and "two words" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "key", "text"),
    [
        ("127.0.0.1:8080/v1", None, "not the address of a server"),
        ("ftp://host/v1", None, "not the address of a server"),
        ("http://", None, "not the address of a server"),
        ("http://host:port/v1", None, "not the address of a server"),
        ("http://[::1/v1", None, "not the address of a server"),
        ("http://me:sk-secret@host/v1", None, "a key goes into"),
        ("https://host/v1?key=sk-secret", None, "a key goes into"),
        ("http://example.com/v1", "sk-secret", "would cross the network in clear"),
    ],
)
def test_an_address_that_will_not_do(url: str, key: str | None, text: str) -> None:
    with pytest.raises(ReachError, match=text) as caught:
        Endpoint(url, "m", key)
    assert "sk-secret" not in str(caught.value)


def test_a_key_may_go_where_nobody_listens() -> None:
    for url in ("https://example.com/v1", "http://localhost:1/v1", "http://127.0.0.2/v1", "http://[::1]:8080/v1"):
        assert "sk-secret" not in repr(Endpoint(url, "m", "sk-secret"))


# --- the command ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[[ModelConfig], Path]:
    """Makes bundles that repeat what they read, and ask whenever they read something."""
    return lambda config: write_bundle(tmp_path / "echo", config)


def test_copresence_run_asks_the_model_that_it_is_given(
    bundle: Callable[[ModelConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk-secret")
    log = tmp_path / "events.jsonl"
    with ChatServer(says("tell two"), says("tell five")) as server:
        command = [
            "run",
            "--bundle",
            str(bundle(CONFIG)),
            "--clock",
            "simulated",
            "--seconds",
            "3",
            "--text",
            "0.25:one",
            "--events",
            str(log),
        ]
        assert main([*command, "--think", server.url, "--think-model", "owl", "--think-sound"]) == 0
    assert server.keys[0] == "Bearer sk-secret" and server.requests[0]["model"] == "owl"
    assert server.requests[0]["messages"][1]["content"][-1]["type"] == "input_audio"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert events[0]["think"] == f"owl at {server.url}"
    said = {event["tick"]: event["say"] for event in events if event["event"] == "tick" and event["say"]}
    assert said == {2: ["one"], 2 + LATER: ["tell", "two"]}, "what it was told is what it read, a second after it asked"
    assert (events[-1]["think"]["asked"], events[-1]["think"]["answered"]) == (2, 2)
    assert "sk-secret" not in log.read_text() + capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--think", "http://127.0.0.1:1/v1"], "has no act 'ask' or no word 'tell'"),
        (["--think", "somewhere"], "not the address of a server"),
        (["--think", "http://127.0.0.1:1/v1", "--think-key-file", "/nowhere/key"], "/nowhere/key: not a key file"),
        (["--think-sound"], "give --think URL"),
    ],
)
def test_a_model_that_cannot_be_asked_is_one_line_and_exit_2(
    bundle: Callable[[ModelConfig], Path], capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    dull = ModelConfig(tick_ms=100, text=TextConfig(words=("", "one"), acts=("none", "up")), trunk=CONFIG.trunk)
    assert main(["run", "--bundle", str(bundle(dull)), "--clock", "simulated", "--seconds", "1", *options]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and text in errors


def test_nobody_is_asked_unless_configured(bundle: Callable[[ModelConfig], Path], tmp_path: Path) -> None:
    code = (
        "import sys; from device.cli import main; "
        f"main(['run', '--bundle', {str(bundle(CONFIG))!r}, '--clock', 'simulated', '--seconds', '1', '--text', '0:one']); "
        "print(*({'openai', 'httpx2', 'asyncio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert done.stdout.splitlines()[-1] == ""
