"""Microphone, camera, speaker, text and clock of a peer at the other end of a network, as the loop knows them.

What comes too late for its tick is never queued up: the tick is lost, the model sees that it is, and the next one hears what is new.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from device.audio import Ring, Samples, Source, VirtualPlayout
from device.camera import FrameCamera, Frames, Shot
from device.camera.fit import fit
from device.config import ModelConfig
from device.loop import TextQueue
from device.steering import Stamp
from device.ticker import Edge, Ticker

BURST_MS = 100  # so much ahead of its time is packets on top of each other; beyond it the oldest is dropped, for a backlog is reaction time
LATE_EDGES = 3  # what is missing at so many in a row, while there are new samples, is not late: the peer lost it, or its path is longer now
MOST_LOST = 5  # ticks in a row: after a second without samples the peer's microphone is off, and ticks go on in silence
CAPTURE_S = 4  # of microphone kept
LARGEST_PICTURE = 1920 * 1080  # pixels; the model sees 160×120
PICTURES_AHEAD = 2  # waiting to be decoded; a third pushes the oldest out
KNOWN_PICTURES = 64  # by name: six seconds at 10 Hz
MOST_WORDS = 64  # of text that waits: three seconds' worth
DECODERS = {"image/jpeg": "mjpeg", "image/png": "png"}  # FFmpeg's names


class NetworkMicrophone(Source):
    """The peer's samples as a `Source`, and its sample clock as a master.

    A packet has no time stamp: its place is how many samples came before it. Session sample i is the stream's sample origin + i,
    chosen so that the packet that travelled fastest is there `buffer_ms` before the edge that needs it.
    """

    def __init__(self, rate_hz: int, buffer_ms: int, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        super().__init__()
        self._rate_hz, self._now_ns = rate_hz, now_ns
        self._margin, self._burst = rate_hz * buffer_ms // 1000, rate_hz * BURST_MS // 1000
        self._captured = Ring(CAPTURE_S * rate_hz)
        self.position = 0  # samples received
        self._origin = self._silent_until = 0
        self._flowing = False  # there is a stream, and `_origin` is its
        self._missing_edges = 0
        self._fastest: tuple[int, int] | None = None  # of the packets since the last edge: CLOCK_MONOTONIC, and the position after it
        self._stamp: tuple[int, int] | None = None
        self.counts = {"lost_ticks": 0, "inserted_samples": 0, "dropped_samples": 0}

    def append(self, samples: Samples) -> None:
        """What has just come, f32[n] ±1 at the session's rate; called by the network's thread."""
        if not samples.size:
            return
        newest = samples[-self._captured.capacity :]
        self._captured.write(self.position + samples.size - newest.size, newest)
        self.position += samples.size
        came = (self._now_ns(), self.position)
        if self._fastest is None or self._lateness(came) <= self._lateness(self._fastest):
            self._fastest = came

    def end(self) -> None:
        """The peer is gone, and with it the session."""
        self.length = 0

    def heard_until(self, end: int) -> int:
        """The position in the stream that session sample `end` has."""
        return self._origin + end if self._flowing else 0

    def ready(self, end: int) -> bool:
        """At the edge that ends at session sample `end`: whether its tick can be run, or is lost."""
        position, fastest = self.position, self._fastest
        self._fastest = None
        self._stamp = fastest or self._stamp
        if not self._flowing:
            if fastest is not None:
                self._flowing, self._silent_until = True, end
                self._place(fastest, end)
            return True
        surplus = position - self._origin - end
        if surplus >= 0:
            self._missing_edges = 0
            if surplus > self._margin + self._burst:
                self.counts["dropped_samples"] += surplus - self._margin
                self._origin += surplus - self._margin
            return True
        self._missing_edges += 1
        if self._missing_edges > MOST_LOST:
            self._missing_edges, self._flowing = 0, False
            return True
        if self._missing_edges >= LATE_EDGES and fastest is not None:
            before = self._origin
            self._place(fastest, end)
            self.counts["inserted_samples"] += max(0, before - self._origin)
            self._missing_edges = 0
        self.counts["lost_ticks"] += 1
        return False

    def stamp(self) -> Stamp | None:
        """Session time is where its margin begins."""
        if self._stamp is None or not self._flowing:
            return None
        own_ns, position = self._stamp
        return Stamp(own_ns, (position - self._origin - self._margin) * 1_000_000_000 // self._rate_hz, self._origin)

    def read(self, start: int, out: Samples) -> None:
        if not self._flowing:
            out[...] = 0
            return
        self._captured.read(self._origin + start, out)
        out[: max(0, self._silent_until - start)] = 0
        out[max(0, self.position - self._origin - start) :] = 0  # not there yet

    def _place(self, fastest: tuple[int, int], end: int) -> None:
        """Put session sample `end` one margin before what would be there now if all packets travelled as fast as this one."""
        own_ns, position = fastest
        self._origin = position + (self._now_ns() - own_ns) * self._rate_hz // 1_000_000_000 - self._margin - end

    def _lateness(self, came: tuple[int, int]) -> int:
        own_ns, position = came
        return own_ns - position * 1_000_000_000 // self._rate_hz


class NetworkTicker:
    """A real-time ticker that loses the ticks whose samples have not come."""

    def __init__(self, ticker: Ticker, microphone: NetworkMicrophone, tick_samples: int, stop: threading.Event) -> None:
        self._ticker, self._microphone, self._tick_samples, self._stop = ticker, microphone, tick_samples, stop

    def start(self) -> None:
        self._ticker.start()

    def wait(self, tick: int) -> Edge:
        lost = 0
        while True:
            edge = self._ticker.wait(tick)
            lost += edge.missed
            over = self._stop.is_set() or self._microphone.length is not None
            if over or self._microphone.ready((edge.tick + 1) * self._tick_samples):
                return edge._replace(missed=lost)
            lost, tick = lost + 1, edge.tick + 1

    def now_ns(self) -> int:
        return self._ticker.now_ns()

    @property
    def origin_ns(self) -> int:
        return self._ticker.origin_ns

    def steer(self, shift_ns: int) -> None:
        self._ticker.steer(shift_ns)

    def close(self) -> None:
        self._ticker.close()


class NetworkSpeaker(VirtualPlayout):
    """The peer's loudspeaker: what a tick says is kept for whoever sends it, and counts as played when it is due."""

    def __init__(self, rate_hz: int, now_ns: Callable[[], int]) -> None:
        super().__init__(rate_hz, now_ns)
        self.speech: Samples = np.zeros(0, np.float32)  # of the newest tick, less what came too late
        self._hushed = False

    def hush(self) -> None:
        """Nothing more of what it is saying now; what it begins after a tick of silence is heard again."""
        self._hushed = True

    def put(self, start: int, speech: Samples) -> int:
        self._hushed = self._hushed and bool(speech.any())
        if self._hushed:
            speech = np.zeros_like(speech)
        late = super().put(start, speech)
        self.speech = speech[late:].copy()
        return late


class NetworkCamera(FrameCamera):
    """Still pictures as they come, each exposed when it came. `seen` is the name of the one that the newest tick was shown."""

    def __init__(self, config: ModelConfig, now_s: Callable[[], float]) -> None:
        self._config, self._now_s = config, now_s
        self._pictures: queue.Queue[tuple[float, str, str, bytes] | None] = queue.Queue()
        self._names: deque[tuple[float, str]] = deque(maxlen=KNOWN_PICTURES)
        self._showing, self._over = threading.Lock(), False
        self.seen: str | None = None
        super().__init__(config, self._decoded(), patient=False)
        self.counts.update(dropped_pictures=0, bad_pictures=0)

    def show(self, name: str, kind: str, picture: bytes) -> None:
        """A picture of one of the kinds in `DECODERS`, under a name; called by the network's thread. What cannot be decoded is counted."""
        with self._showing:
            if self._over:
                return
            while self._pictures.qsize() >= PICTURES_AHEAD:
                with suppress(queue.Empty):
                    self._pictures.get_nowait()
                    self.counts["dropped_pictures"] += 1
            self._pictures.put((self._now_s(), name, kind, picture))

    def frames_at(self, edge_s: float) -> tuple[Frames, float]:
        frames, age_s = super().frames_at(edge_s)
        shown_s = edge_s - age_s
        self.seen = next((name for time_s, name in reversed(tuple(self._names)) if abs(time_s - shown_s) < 1e-6), None)
        return frames, age_s

    def close(self) -> None:
        with self._showing:
            self._over = True
            self._pictures.put(None)  # no picture comes after it, or pushes it out
        super().close()

    def _decoded(self) -> Iterator[Shot | float]:
        import av

        last_s = -1.0
        while (picture := self._pictures.get()) is not None:
            time_s, name, kind, data = picture
            last_s = time_s = max(time_s, last_s + 1e-3)
            try:
                decoder: Any = av.CodecContext.create(DECODERS[kind], "r")
                decoder.options = {"max_pixels": str(LARGEST_PICTURE)}
                frame = fit(decoder.decode(av.Packet(data))[0], self._config)
            except (av.FFmpegError, ValueError, IndexError):
                self.counts["bad_pictures"] += 1
                continue
            self._names.append((time_s, name))
            yield Shot(time_s, frame)


class NetworkText(TextQueue):
    """Words as they come, delivered with the next ticks."""

    def __init__(self, per_tick: int) -> None:
        super().__init__([], per_tick)

    def add(self, ids: list[int]) -> bool:
        """Called by the network's thread; False if too many are waiting already."""
        if len(self._waiting) + len(ids) > MOST_WORDS:
            return False
        self._waiting.extend((0.0, word) for word in ids)
        return True
