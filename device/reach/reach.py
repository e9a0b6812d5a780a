"""The background model beside the loop: questions go out, words, acts and timers come back, and no tick waits."""

from __future__ import annotations

import asyncio
import heapq
import json
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import aclosing
from typing import Any

from device.audio import Samples
from device.camera import Frames
from device.config import ModelConfig
from device.reach.breaker import Breaker
from device.reach.client import CallPart, Client
from device.reach.context import Journal, Package, Tick, messages
from device.reach.endpoint import Endpoint
from device.reach.limits import Failure, Garbled, Limits, ReachError, Unreachable
from device.reach.tools import ASK, SORRY, TELL, Dictation, Order, Refused, order_of, schemas, tellable_words, tool_table

WAITING = 16  # things to tell, and as many acts; more are dropped and counted
TIMERS = 8
SIMULATED_S = 1.0  # session time from a question to its answer where time is simulated


class Reach:
    """Asks a background model whenever the model acts `ask`: one question at a time, more are dropped and counted.

    `text`, `tick` and `take_events` are the loop's: they hand over and pick up, and return. `patient`: for a simulated run, in which
    every answer is there SIMULATED_S after its question, however long it takes to come.
    """

    def __init__(
        self, config: ModelConfig, endpoint: Endpoint, sound: bool = False, patient: bool = False, limits: Limits | None = None
    ) -> None:
        """Raises ReachError."""
        words, acts = config.text.words, config.text.acts
        if ASK not in acts or TELL not in words or config.text.text_in < 2:
            raise ReachError(f"--think: the bundle has no act '{ASK}' or no word '{TELL}', so it cannot ask; leave --think out")
        self._ids = {word: [words.index(TELL), words.index(word)] for word in tellable_words(config.text)}
        self._patient, self._pending, self._due_s = patient, False, 0.0
        self._journal = Journal(config, sound)
        self._told: deque[str] = deque()
        self._acts: deque[str] = deque()
        self._timers: list[tuple[float, int, str]] = []  # heap: (due in s, number, word)
        self._events: list[dict[str, Any]] = []
        self._counts = {"asked": 0, "dropped": 0}
        self._ticks = self._missed = self._late_ticks = self._timed = 0
        self._mind = _Mind(config, endpoint, limits or Limits())

    # --- the loop's calls ---

    def text(self, edge_s: float) -> list[int]:
        """Ids of what the model reads in the tick that ends at `edge_s`: one thing to tell at most, as it was trained."""
        self._collect(edge_s)
        if self._timers and self._timers[0][0] <= edge_s:
            return self._ids[heapq.heappop(self._timers)[2]]
        return self._ids[self._told.popleft()] if self._told else []

    def tick(self, tick: Tick, frame: Frames, heard: Samples) -> list[str]:
        """Take note of a tick that was run; returns acts for the body, one at most and none beside the model's own.

        `frame` u8[H, W, 3] is the newest that it saw, `heard` f32[tick_samples].
        """
        acts = [self._acts.popleft()] if self._acts and tick.act == "none" else []
        self._journal.note(tick, frame, heard, tuple(acts))
        self._ticks += 1
        self._missed += tick.missed
        self._late_ticks += tick.late_samples > 0
        self._mind.status = {
            "session_s": tick.t_s,
            "ticks": self._ticks,
            "lost_ticks": self._missed,
            "late_speech_ticks": self._late_ticks,
            "engine_ms": tick.engine_ms,
            "picture_age_s": tick.frame_age_s,
        }
        for act in acts:
            self._note("act", act=act)
        if tick.act == ASK:
            self._ask(tick.t_s, frame)
        return acts

    def take_events(self) -> list[dict[str, Any]]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def summary(self) -> dict[str, int]:
        return {**self._counts, **self._mind.counts}

    def close(self) -> None:
        """Whatever is under way is given up."""
        self._mind.close()

    def _ask(self, now_s: float, frame: Frames) -> None:
        self._counts["asked"] += 1
        if self._pending if self._patient else not self._mind.idle.is_set():
            self._drop("it is still busy with the question before")
            return
        self._pending, self._due_s = True, now_s + SIMULATED_S
        self._note("asked", question=self._counts["asked"])
        self._mind.ask(self._journal.package(self._counts["asked"], frame))

    def _collect(self, edge_s: float) -> None:
        """Pick up what the background model ordered, and what is to be logged of it."""
        if self._patient and self._pending:
            if edge_s < self._due_s:
                return
            self._mind.idle.wait()
            self._pending = False
        for _ in range(self._mind.orders.qsize()):
            self._accept(self._mind.orders.get_nowait(), edge_s)
        for _ in range(self._mind.events.qsize()):
            self._events.append(self._mind.events.get_nowait())

    def _accept(self, order: Order, now_s: float) -> None:
        if order.after_s:
            if len(self._timers) == TIMERS:
                self._drop(f"{TIMERS} timers are running already")
                return
            self._timed += 1
            heapq.heappush(self._timers, (now_s + order.after_s, self._timed, order.value))
            return
        waiting = self._acts if order.kind == "act" else self._told
        if len(waiting) == WAITING:
            self._drop(f"{WAITING} are waiting already")
        else:
            waiting.append(order.value)

    def _drop(self, reason: str) -> None:
        self._counts["dropped"] += 1
        self._note("dropped", reason=reason)

    def _note(self, what: str, **more: Any) -> None:
        self._events.append({"event": "think", "what": what, **more})


class _Mind:
    """The thread that talks to the background model. `Limits` bounds what one question puts into its two queues."""

    def __init__(self, config: ModelConfig, endpoint: Endpoint, limits: Limits) -> None:
        self.orders: queue.SimpleQueue[Order] = queue.SimpleQueue()  # whose calls never wait
        self.events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.status: dict[str, Any] = {}  # of the newest tick, replaced as a whole
        self.counts = {"answered": 0, "failed": 0, "told": 0, "calls": 0, "refused": 0}
        self.idle = threading.Event()
        self.idle.set()
        self._limits = limits
        self._tools, self._words = tool_table(config.text), tellable_words(config.text)
        self._breaker, self._apologised = Breaker(), False
        self._loop = asyncio.new_event_loop()
        self._client = Client(endpoint, limits)
        self._thread = threading.Thread(target=self._loop.run_forever, name="think", daemon=True)
        self._thread.start()

    def ask(self, package: Package) -> None:
        self.idle.clear()
        asyncio.run_coroutine_threadsafe(self._think(package), self._loop)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._give_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _give_up(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    # --- one question ---

    async def _think(self, package: Package) -> None:
        """One question to its end, which comes within `answer_s`; raises nothing."""
        told, begin_s = self.counts["told"], time.monotonic()
        try:
            if not self._breaker.allows(package.asked_s):
                self.counts["failed"] += 1
                self._note(package, "failed", reason="it has failed too often and is not asked for a while")
                return
            await asyncio.wait_for(self._converse(package), self._limits.answer_s)
            self._breaker.succeeded()
            self._apologised = False
            self.counts["answered"] += 1
            self._note(package, "answered", seconds=round(time.monotonic() - begin_s, 2))
        except Exception as error:  # noqa: BLE001 - whatever a stranger's answer does to a library, the companion goes on
            self.counts["failed"] += 1
            rest_s = self._breaker.failed(package.asked_s)
            self._note(package, "failed", reason=self._reason(error), **({"not_asked_for_s": rest_s} if rest_s else {}))
            if not self._apologised and self.counts["told"] == told and SORRY in self._words:
                self.orders.put(Order("text", SORRY))
            self._apologised = True  # once, until an answer comes again
        finally:
            self.idle.set()

    def _reason(self, error: Exception) -> str:
        if isinstance(error, Failure):
            return str(error)
        if isinstance(error, asyncio.TimeoutError):
            return f"the answer was not whole within {self._limits.answer_s:g} s"
        return f"what came broke something ({type(error).__name__})"

    async def _converse(self, package: Package) -> None:
        """Requests, until an answer comes without tool calls."""
        conversation = messages(package, self._words)
        dictation = Dictation(self._words, self._limits.words)
        calls = 0
        try:
            for _ in range(self._limits.rounds):
                text, asked = await self._request(package, conversation, dictation)
                if not asked:
                    return
                calls += len(asked)
                if calls > self._limits.calls:
                    raise Garbled(f"more than {self._limits.calls} tool calls")
                conversation.append({"role": "assistant", "content": text or None, "tool_calls": [_call(call) for call in asked]})
                conversation += [{"role": "tool", "tool_call_id": call.id, "content": self._carry_out(package, call)} for call in asked]
            raise Garbled(f"tool calls in each of {self._limits.rounds} answers")
        finally:
            if dictation.refused:
                self.counts["refused"] += dictation.refused
                reason = f"not 'tell' and a word that it can say: {' '.join(dictation.examples)}"
                self._note(package, "refused", reason=reason, words=dictation.refused)

    async def _request(self, package: Package, conversation: list[dict[str, Any]], dictation: Dictation) -> tuple[str, list[CallPart]]:
        """The text and the tool calls of one answer, whose words are told as they come; tried again as long as nothing has come."""
        for attempt in range(self._limits.retries + 1):
            texts: list[str] = []
            calls: dict[int, CallPart] = {}
            try:
                async with aclosing(self._client.stream(conversation, schemas(self._tools))) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, CallPart):
                            self._add(calls, piece)
                        else:
                            texts.append(piece)
                            self._tell(package, dictation.feed(piece))
                self._tell(package, dictation.end())
            except Unreachable as failure:
                if texts or calls or attempt == self._limits.retries:
                    raise
                self._note(package, "retry", reason=str(failure))
                await asyncio.sleep(self._limits.backoff_s * 2**attempt)
            else:
                if not texts and not calls:
                    raise Garbled("the answer is empty")
                return "".join(texts), [calls[place] for place in sorted(calls)]
        raise AssertionError("the last attempt returns or raises")

    def _add(self, calls: dict[int, CallPart], part: CallPart) -> None:
        """A piece of a call to those before it."""
        before = calls.get(part.place)
        if before is not None:
            calls[part.place] = before._replace(name=before.name or part.name, arguments=before.arguments + part.arguments)
        elif len(calls) < self._limits.calls:
            calls[part.place] = part._replace(id=part.id or f"call_{part.place}")
        else:
            raise Garbled(f"more than {self._limits.calls} tool calls")

    def _tell(self, package: Package, words: Iterable[str]) -> None:
        for word in words:
            self.counts["told"] += 1
            self.orders.put(Order("text", word))
            self._note(package, "told", word=word)

    def _carry_out(self, package: Package, call: CallPart) -> str:
        """Do what a call asks for; returns what the background model gets to know of it."""
        name = call.name[:40]
        try:
            order = order_of(self._tools, call.name, call.arguments)
        except Refused as refused:
            self.counts["refused"] += 1
            self._note(package, "refused", tool=name, reason=str(refused))
            return json.dumps({"refused": str(refused)})
        self.counts["calls"] += 1
        self._note(package, "call", tool=name, arguments=call.arguments)
        if order is None:
            return json.dumps(self.status)
        self.orders.put(order)
        return json.dumps({"ok": True})

    def _note(self, package: Package, what: str, **more: Any) -> None:
        self.events.put({"event": "think", "what": what, "question": package.number, **more})


def _call(call: CallPart) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
