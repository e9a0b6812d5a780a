"""What a network does to sound, pictures and time: in simulated time, packet by packet."""

from __future__ import annotations

import threading
import time

import cv2
import numpy as np
import pytest
from test_loop import CONFIG, RATE, TICK, noise

from device.serve.network import (
    LATE_EDGES,
    MOST_LOST,
    MOST_WORDS,
    PICTURES_AHEAD,
    NetworkCamera,
    NetworkMicrophone,
    NetworkSpeaker,
    NetworkText,
    NetworkTicker,
)
from device.steering import Steering
from device.ticker import Edge

PACKET = RATE // 50  # 20 ms
BUFFER_MS = 80
TICK_NS = CONFIG.tick_ms * 1_000_000
SOUND = noise(40 * RATE)


class Journey:
    """A peer that sends `SOUND` from session time 0 on, by a path on which packet i takes `delay_s(i)`; packets stay in order."""

    def __init__(self, delays_s: list[float], ppm: float = 0.0, buffer_ms: int = BUFFER_MS) -> None:
        sent_s = (np.arange(len(delays_s)) + 1) * PACKET / RATE * (1 - ppm * 1e-6)
        self.due_ns = (np.maximum.accumulate(sent_s + delays_s) * 1e9).astype(np.int64)
        self.now_ns = 1
        self.microphone = NetworkMicrophone(RATE, buffer_ms, lambda: self.now_ns)
        self._sent = 0

    def until(self, now_ns: int) -> None:
        while self._sent < len(self.due_ns) and self.due_ns[self._sent] <= now_ns:
            self.now_ns = max(1, int(self.due_ns[self._sent]))
            self.microphone.append(SOUND[self._sent * PACKET : (self._sent + 1) * PACKET])
            self._sent += 1
        self.now_ns = now_ns

    def tick(self, tick: int, origin_ns: int = 0) -> bool:
        """Whether the tick can be run at its edge."""
        self.until(origin_ns + (tick + 1) * TICK_NS)
        return self.microphone.ready((tick + 1) * TICK)

    def heard(self, tick: int) -> np.ndarray:
        out = np.empty(TICK, np.float32)
        self.microphone.read(tick * TICK, out)
        return out

    def place(self, tick: int) -> int:
        """Where in `SOUND` it was heard from; it must be whole."""
        heard = self.heard(tick)
        where = self.microphone.heard_until((tick + 1) * TICK) - TICK
        assert where >= 0 and np.array_equal(heard, SOUND[where : where + TICK])
        return where


def test_what_comes_in_time_is_heard_whole_one_buffer_later() -> None:
    path = Journey([0.003] * 500)
    assert path.tick(0) and not path.heard(0).any(), "the first samples say where the stream begins"
    for tick in range(1, 90):
        assert path.tick(tick)
        assert abs(tick * TICK - path.place(tick) - BUFFER_MS * RATE // 1000) <= 0.004 * RATE
    assert not any(path.microphone.counts.values())


def test_lateness_within_the_buffer_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    path = Journey(list(rng.uniform(0, (BUFFER_MS - 20) / 1000, 1000)))
    steps = {path.place(tick) - tick * TICK for tick in range(190) if path.tick(tick) and tick}
    assert len(steps) == 1 and not any(path.microphone.counts.values())


def test_a_tick_whose_packets_are_late_is_lost_and_what_comes_late_is_not_heard_later() -> None:
    delays_s = [0.0] * 1000
    delays_s[100] = 0.25  # and with it, all that follow it until they have caught up
    path = Journey(delays_s)
    ran = [path.tick(tick) and (tick == 0 or path.place(tick) == path.place(tick)) for tick in range(90)]
    lost = [tick for tick, ready in enumerate(ran) if not ready]
    assert 1 <= len(lost) <= 3 and path.microphone.counts["lost_ticks"] == len(lost)
    assert path.tick(90) and 90 * TICK - path.place(90) <= (BUFFER_MS + 5) * RATE // 1000, "reaction time is as before"
    assert path.microphone.counts["dropped_samples"] == path.microphone.counts["inserted_samples"] == 0


def test_a_path_that_becomes_longer_costs_some_ticks_once() -> None:
    path = Journey([0.0] * 500 + [0.3] * 500)
    ran = [path.tick(tick) for tick in range(190)]
    assert ran.count(False) <= LATE_EDGES + 1 and all(ran[-80:])
    assert path.place(189) == 189 * TICK - (BUFFER_MS + 300) * RATE // 1000, "the lateness is in every tick from then on"


def test_samples_that_the_peer_lost_are_made_up_for_by_silence() -> None:
    path = Journey([0.0] * 500)
    missing = slice(150, 175)  # half a second of packets that are never sent
    path.due_ns = np.delete(path.due_ns, missing)
    ran = [path.tick(tick) for tick in range(80)]
    assert 1 <= ran.count(False) <= MOST_LOST + LATE_EDGES and all(ran[-30:])
    lag = (80 * TICK - 25 * PACKET) - path.microphone.heard_until(80 * TICK)
    assert abs(lag - BUFFER_MS * RATE // 1000) <= 0.001 * RATE, "and reaction time is as before"


def test_sound_that_comes_too_fast_is_dropped_and_counted() -> None:
    path = Journey([0.0] * 100)
    for tick in range(5):
        path.tick(tick)
    path.microphone.append(SOUND[: 3 * RATE])
    assert path.tick(5)
    assert path.microphone.counts["dropped_samples"] == pytest.approx(3 * RATE, abs=TICK)
    path.microphone.append(SOUND)  # more than is kept at all
    assert path.tick(6) and np.isfinite(path.heard(6)).all()


def test_without_a_microphone_ticks_go_on_in_silence_and_it_may_come_back() -> None:
    path = Journey([0.0] * 100)
    ran = [path.tick(tick) for tick in range(60)]
    assert ran[:20] == [True] * 20
    assert ran.count(False) == MOST_LOST and all(ran[30:]), "after so many it is off"
    assert not path.heard(59).any()
    path.microphone.append(SOUND[: 2 * TICK])
    assert path.tick(60) and not path.heard(60).any()
    path.microphone.append(SOUND[: 2 * TICK])
    assert path.tick(61) and path.heard(61).any()


def test_an_empty_packet_is_no_microphone() -> None:
    """A resampler gives nothing for its first packet."""
    path = Journey([0.0] * 20)
    path.microphone.append(SOUND[:0])
    assert path.microphone.ready(TICK) and path.microphone.stamp() is None and path.microphone.heard_until(TICK) == 0


@pytest.mark.parametrize("ppm", [-250.0, 100.0])
@pytest.mark.parametrize("jitter_s", [0.0, 0.05])
def test_the_edges_follow_the_peers_clock(ppm: float, jitter_s: float) -> None:
    """40 s: the drift of 250 ppm is 10 ms by then, and the phase stays within the jitter's own uncertainty."""
    rng = np.random.default_rng(1)
    path = Journey(list(rng.uniform(0, jitter_s, 2000)), ppm)
    steering, origin_ns = Steering(TICK_NS, path.microphone, "network"), 0
    offsets_ms = []
    for tick in range(390):
        if path.tick(tick, origin_ns):
            origin_ns += steering.shift_ns(origin_ns, (tick + 1) * TICK_NS)
        true_ns = -ppm * 1e-6 * (tick + 1) * TICK_NS
        offsets_ms.append((origin_ns - true_ns) / 1e6)
    assert steering.state == "locked"
    assert np.ptp(offsets_ms[-100:]) < 3, "ms"
    assert path.microphone.counts["dropped_samples"] == 0


class Edges:
    """A ticker whose edges come when they are waited for."""

    origin_ns = 0

    def __init__(self) -> None:
        self.waited: list[int] = []

    def start(self) -> None: ...

    def wait(self, tick: int) -> Edge:
        self.waited.append(tick)
        return Edge(tick, (tick + 1) * TICK_NS, 0, 0)

    def now_ns(self) -> int:
        return 0

    def steer(self, shift_ns: int) -> None: ...

    def close(self) -> None: ...


def test_the_ticker_counts_lost_ticks_as_missed_and_ends_with_the_peer() -> None:
    path, edges, stop = Journey([0.0] * 20 + [0.35] + [0.0] * 500), Edges(), threading.Event()
    ticker = NetworkTicker(edges, path.microphone, TICK, stop)
    tick, missed = 0, []
    while tick < 30:
        edges.wait = lambda tick: (path.until((tick + 1) * TICK_NS), Edge(tick, (tick + 1) * TICK_NS, 0, 0))[1]  # type: ignore[method-assign]
        edge = ticker.wait(tick)
        missed += [edge.missed] if edge.missed else []
        tick = edge.tick + 1
    assert sum(missed) == path.microphone.counts["lost_ticks"] > 0
    path.microphone.end()
    assert ticker.wait(1000).tick == 1000, "it returns at once, so that the loop can end"


def test_a_hushed_speaker_is_silent_until_it_has_paused() -> None:
    now = [0]
    speaker = NetworkSpeaker(RATE, lambda: now[0])
    speech = SOUND[:TICK]
    speaker.put(TICK, speech)
    assert np.array_equal(speaker.speech, speech)
    speaker.hush()
    for k, (given, heard) in enumerate(((speech, False), (np.zeros_like(speech), False), (speech, True))):
        speaker.put((k + 2) * TICK, given)
        assert speaker.speech.any() == heard
    now[0] = 5 * TICK_NS
    played = np.zeros(5 * TICK, np.float32)
    speaker.sync(5 * TICK, now[0])
    speaker.heard(0, played)
    assert [bool(part.any()) for part in played.reshape(5, TICK)] == [False, True, False, False, True], "the model hears what was played"


def test_speech_that_is_late_is_sent_less_its_late_part() -> None:
    now = [TICK_NS * 3 // 2]
    speaker = NetworkSpeaker(RATE, lambda: now[0])
    late = speaker.put(TICK, SOUND[:TICK])
    assert late == TICK // 2 and np.array_equal(speaker.speech, SOUND[late:TICK])


def encoded(kind: str, width: int, height: int, grey: int) -> bytes:
    done, data = cv2.imencode(kind, np.full((height, width, 3), grey, np.uint8))
    assert done
    return data.tobytes()


def test_pictures_are_seen_by_name_and_bad_ones_are_counted() -> None:
    now = [0.0]
    camera = NetworkCamera(CONFIG, lambda: now[0])
    try:
        for at_s, name, kind, picture in (
            (0.1, "first", "image/jpeg", encoded(".jpg", 320, 240, 200)),
            (0.2, "broken", "image/jpeg", b"\xff\xd8 not a picture"),
            (0.3, "huge", "image/png", encoded(".png", 4000, 3000, 10)),
            (0.4, "second", "image/png", encoded(".png", 160, 120, 90)),
        ):
            now[0] = at_s
            before = len(camera._names) + camera.counts["bad_pictures"]
            camera.show(name, kind, picture)
            deadline = time.monotonic() + 60
            while len(camera._names) + camera.counts["bad_pictures"] == before:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        deadline = time.monotonic() + 60
        while camera.frames_at(0.45)[1] > 0.06:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        frames, age_s = camera.frames_at(0.5)
        assert camera.seen == "second" and age_s == pytest.approx(0.1)
        assert np.abs(frames[1].astype(int) - 90).max() <= 3 and np.abs(frames[0].astype(int) - 200).max() <= 3
        assert camera.counts["bad_pictures"] == 2 and camera.fault is None
    finally:
        camera.close()


def test_a_camera_ends_while_pictures_keep_coming() -> None:
    camera, closing = NetworkCamera(CONFIG, lambda: 0.0), threading.Event()
    picture = encoded(".jpg", 160, 120, 200)

    def shower() -> None:
        while not closing.is_set():
            camera.show("look", "image/jpeg", picture)

    showing = [threading.Thread(target=shower, daemon=True) for _ in range(2)]
    for thread in showing:
        thread.start()
    ending = threading.Thread(target=camera.close, daemon=True)
    ending.start()
    ending.join(60)
    closing.set()
    assert not ending.is_alive()
    camera.show("look", "image/jpeg", picture)
    assert camera._pictures.qsize() <= PICTURES_AHEAD + 1, "and nothing gathers afterwards"


def test_words_wait_for_the_next_ticks_and_not_without_bound() -> None:
    words = NetworkText(per_tick=3)
    assert words.add([1, 2, 3, 1])
    assert (words.due(0.2), words.due(0.3)) == ([1, 2, 3], [1])
    assert words.add([1] * MOST_WORDS) and not words.add([1])
