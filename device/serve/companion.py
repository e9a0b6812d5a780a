"""The companion and the one peer that is with it: a loop for each visit, on the engine that all of them share."""

from __future__ import annotations

import base64
import queue
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from device.audio import Line
from device.config import ModelConfig
from device.dmel import DMel
from device.engine import Engine
from device.events import EventLog
from device.loop import Loop, NoActuator, NoThinker, Thinker
from device.serve.network import NetworkCamera, NetworkMicrophone, NetworkSpeaker, NetworkText, NetworkTicker
from device.serve.protocol import RATE_HZ, Tick
from device.session import Session
from device.steering import Steering
from device.ticker import RealtimeTicker

QUALITY = "MQ"  # soxr's: whole up to 7.3 kHz at 16 kHz, and holds back 6 to 38 ms, measured; "LQ" holds back 3 to 20, and ends at 6 kHz
LOOK_S = 0.5  # how often the main thread looks whether it is to stop while nobody is there


Tell = Callable[[dict[str, Any], NDArray[np.float32], dict[str, Any]], None]


class Visit:
    """A peer's stay: its senses as the loop knows them, and the loop itself. What the loop does is handed to `tell`, in the loop's thread.

    `tell` is given every event of the loop, with the tick's speech (f32 at the session's rate) and, if `watched`, what a timeline
    shows besides; it must not wait.
    """

    def __init__(self, companion: Companion, tell: Tell, watched: bool) -> None:
        config = companion.config
        self._companion, self._tell, self._watched = companion, tell, watched
        rate_hz, tick_ns = config.audio.sample_rate_hz, config.tick_ms * 1_000_000
        self._stack = ExitStack()
        self._clock = RealtimeTicker(tick_ns)
        self._stack.callback(self._clock.close)
        self._microphone = NetworkMicrophone(rate_hz, companion.buffer_ms)
        self._speaker = NetworkSpeaker(rate_hz, self._clock.now_ns)
        self._camera = NetworkCamera(config, self._now_s)
        self._stack.callback(self._camera.close)
        self._text = NetworkText(config.text.text_in)
        self._to_session = soxr.ResampleStream(RATE_HZ, rate_hz, 1, dtype="float32", quality=QUALITY)
        self._to_peer = soxr.ResampleStream(rate_hz, RATE_HZ, 1, dtype="float32", quality=QUALITY)
        self._line: Line | None = None
        self._dmel = DMel(config.audio)

    # What the peer sends, in the network's thread: `protocol.Senses`.

    def hear(self, pcm: NDArray[np.int16]) -> None:
        self._microphone.append(self._to_session.resample_chunk(pcm.astype(np.float32) / 32768))

    def read(self, ids: list[int]) -> bool:
        return self._text.add(ids)

    def see(self, item_id: str, kind: str, picture: bytes) -> None:
        self._camera.show(item_id, kind, picture)

    def hush(self) -> None:
        self._speaker.hush()

    def leave(self) -> None:
        """The peer is gone: the loop ends with the tick under way."""
        self._microphone.end()

    def told(self, event: dict[str, Any], speech: NDArray[np.float32], shown: dict[str, Any]) -> Tick:
        """A tick as a conversation takes it: its speech as the peer's pcm16, tick after tick, and what was heard as dMel levels."""
        pcm = np.clip(np.rint(self._to_peer.resample_chunk(speech) * 32768), -32768, 32767).astype("<i2")
        if "heard" in shown:
            shown["heard"] = base64.b64encode(self._dmel.levels(shown["heard"]).tobytes()).decode()  # u8[hops, channels]
        return Tick(event, pcm.tobytes() if pcm.any() else b"", shown)

    # What the loop tells: its `events`.

    @property
    def dropped(self) -> int:
        return self._companion.log.dropped

    def put(self, event: dict[str, Any]) -> None:
        self._companion.log.put(event)
        shown: dict[str, Any] = {}
        if self._watched and event["event"] == "tick" and self._line is not None:
            config = self._companion.config
            heard_samples = self._microphone.heard_until((event["tick"] + 1) * config.tick_samples)
            heard_s = heard_samples / config.audio.sample_rate_hz  # of the peer's own sound: what it sent later is not heard yet
            shown = {"heard": self._line.mic.copy(), "heard_s": round(heard_s, 4), "seen": self._camera.seen}
        self._tell(event, self._speaker.speech, shown)

    def run(self, header: dict[str, Any], stop: threading.Event) -> None:
        """In the main thread, until the peer leaves or `stop` is set."""
        companion, config = self._companion, self._companion.config
        tick_ns, rate_hz = config.tick_ms * 1_000_000, config.audio.sample_rate_hz
        with self._stack:
            # The peer's microphone hears what is said in sound that the jitter buffer holds back.
            offset_samples = (companion.offset_ms + companion.buffer_ms) * rate_hz // 1000
            self._line = Line(config, self._microphone, self._speaker, offset_samples)
            Loop(
                config=config,
                session=Session(config, companion.engine, companion.seed),
                ticker=NetworkTicker(self._clock, self._microphone, config.tick_samples, stop),
                steering=Steering(tick_ns, self._microphone, "network"),
                line=self._line,
                camera=self._camera,
                text=self._text,
                actuator=NoActuator(),
                events=self,
                recording=None,
                seconds=None,
                stop=stop,
                thinker=companion.open_thinker(self._stack),
            ).run(header)

    def close(self) -> None:
        """It never came to run."""
        self._stack.close()

    def _now_s(self) -> float:
        return self._clock.now_ns() / 1e9 if self._clock.origin_ns else 0.0


@dataclass
class Companion:
    """What outlives a visit. One peer at a time: there is one engine, with one memory."""

    config: ModelConfig
    name: str
    engine: Engine
    log: EventLog
    seed: int
    offset_ms: int  # from a tick's edge to its speech
    buffer_ms: int  # of jitter in the peer's packets that loses nothing
    open_thinker: Callable[[ExitStack], Thinker] = lambda visit: NoThinker()  # one for each visit: the next peer's has seen nothing of it
    _closed: bool = False
    _visits: queue.SimpleQueue[tuple[Visit, Callable[[], None]]] = field(default_factory=queue.SimpleQueue)

    def receive(self, visit: Visit, gone: Callable[[], None]) -> None:
        """A peer has come; `gone` is called once its loop has ended."""
        self._visits.put((visit, gone))
        if self._closed:
            self._send_away()

    def keep_company(self, header: dict[str, Any], stop: threading.Event) -> None:
        """Run one visit after the other, in the calling thread, until `stop` is set."""
        try:
            while not stop.is_set():
                with suppress(queue.Empty):
                    visit, gone = self._visits.get(timeout=LOOK_S)
                    try:
                        visit.run(header, stop)
                    finally:
                        gone()
        finally:
            self._closed = True
            self._send_away()

    def _send_away(self) -> None:
        with suppress(queue.Empty):
            while True:
                visit, gone = self._visits.get_nowait()
                visit.close()
                gone()
