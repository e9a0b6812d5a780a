"""The microphone and the speaker on one count of samples: files, silence, and the record of what was really played."""

from __future__ import annotations

import abc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from device.config import ModelConfig

Samples = NDArray[np.float32]  # full scale ±1
Canceller = Callable[[Samples, Samples], None]  # takes what was played (second) out of what was heard meanwhile (first), in place

WAITING_S = 4  # longer than any tick with its playout offset
PLAYED_S = 30  # a stall of that length still loses nothing from the record; 2 MB at 16 kHz


class SourceError(ValueError):
    """A microphone or camera source that cannot be read. Remedy: give one that can; the text names it."""


class Ring:
    """The newest `capacity` samples of a stream, addressed by their position in it."""

    def __init__(self, capacity: int) -> None:
        self._data = np.zeros(capacity, np.float32)
        self.capacity = capacity

    def write(self, position: int, samples: Samples) -> None:
        at = position % self.capacity
        first = min(samples.size, self.capacity - at)
        self._data[at : at + first] = samples[:first]
        self._data[: samples.size - first] = samples[first:]

    def read(self, position: int, out: Samples) -> None:
        at = position % self.capacity
        first = min(out.size, self.capacity - at)
        out[:first] = self._data[at : at + first]
        out[first:] = self._data[: out.size - first]

    def clear(self, position: int, count: int) -> None:
        count = min(count, self.capacity)
        at = position % self.capacity
        first = min(count, self.capacity - at)
        self._data[at : at + first] = 0
        self._data[: count - first] = 0


class Playout(abc.ABC):
    """Speech on its way to the speaker, and what the speaker really played.

    One thread puts speech in, one takes samples out (in live audio the device's callback); neither ever waits.
    """

    def __init__(self, rate_hz: int) -> None:
        self._waiting, self._played = Ring(WAITING_S * rate_hz), Ring(PLAYED_S * rate_hz)
        self.position = 0  # of the next sample to be taken
        self.origin = 0  # speech due at session sample i waits at position origin + i
        self.heard_origin = 0  # while session sample i was captured, position heard_origin + i was heard
        self.counts: dict[str, int] = {}  # what a device lost

    def put(self, start: int, speech: Samples) -> int:
        """Queue speech whose first sample is due at `start`; returns how many samples came too late and were cut."""
        start += self.origin
        late = _between(0, self.position - start, speech.size)
        self._waiting.write(start + late, speech[late:])
        passed = _between(0, self.position - start, speech.size)
        # What the other thread passed while this one wrote must not wait there for the ring's next round.
        self._waiting.clear(start + late, passed - late)
        return passed

    def take(self, out: Samples) -> None:
        """The next samples for the speaker: speech where there is some, zeros elsewhere."""
        self._waiting.read(self.position, out)
        self._waiting.clear(self.position, out.size)
        self._played.write(self.position, out)
        self.position += out.size

    def skip(self, start: int, position: int) -> None:
        """Nothing has been played from `start` on, nor will be up to `position`: the device was away. In the taking thread."""
        self._waiting.clear(start, position - start)
        self._played.clear(start, position - start)
        self.position = position

    @abc.abstractmethod
    def start(self) -> None:
        """Begin; the ticker starts right after."""

    @abc.abstractmethod
    def sync(self, end: int, edge_ns: int) -> None:
        """As `Source.sync`, after the source's; the edge was at `edge_ns` of CLOCK_MONOTONIC."""

    def heard(self, start: int, out: Samples) -> None:
        """What played while session samples from `start` on were captured; zeros where the speaker has not got to yet."""
        start += self.heard_origin
        self._played.read(start, out)
        out[_between(0, self.position - start, out.size) :] = 0


class VirtualPlayout(Playout):
    """A speaker that is only a clock: it takes samples as its time passes."""

    def __init__(self, rate_hz: int, now_ns: Callable[[], int]) -> None:
        super().__init__(rate_hz)
        self._rate_hz, self._now_ns = rate_hz, now_ns
        self._taken = np.empty(rate_hz, np.float32)

    def start(self) -> None:
        """The ticker starts it."""

    def put(self, start: int, speech: Samples) -> int:
        self._run()
        return super().put(start, speech)

    def sync(self, end: int, edge_ns: int) -> None:
        self._run()

    def _run(self) -> None:
        while (due := self._now_ns() * self._rate_hz // 1_000_000_000 - self.position) > 0:
            self.take(self._taken[:due])


class Source(abc.ABC):
    """Microphone samples by session position."""

    ends = False
    length: int | None = None  # of the whole, once its end has been seen

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}  # what a device lost

    def start(self) -> None:  # noqa: B027 - a file has nothing to begin
        """Begin; the ticker starts right after."""

    def sync(self, end: int) -> None:  # noqa: B027 - a file is never behind
        """At the edge that ends at session sample `end`: come to terms with what the device lost or has too much."""

    @abc.abstractmethod
    def read(self, start: int, out: Samples) -> None:
        """Samples from `start` on, zeros beyond the ends; `start` only goes forward."""


class Silence(Source):
    """No microphone."""

    def read(self, start: int, out: Samples) -> None:
        out[...] = 0


class SoundFile(Source):
    """A sound file of any rate and channels, mixed to mono and resampled as it is read."""

    ends = True

    def __init__(self, path: str | Path, rate_hz: int) -> None:
        super().__init__()
        import soundfile
        import soxr

        try:
            self._file = soundfile.SoundFile(path)
        except (soundfile.LibsndfileError, OSError) as error:
            raise SourceError(f"microphone file {path} cannot be read: {error}; give a WAV, FLAC or OGG file") from error
        file_hz = self._file.samplerate
        self._resampler = None if file_hz == rate_hz else soxr.ResampleStream(file_hz, rate_hz, 1)
        self._block = file_hz  # a second at a time
        self._kept, self._start = np.zeros(0, np.float32), 0  # samples read ahead, and the position of the first
        self._fill(1)

    def read(self, start: int, out: Samples) -> None:
        end = start + out.size
        self._fill(end + 1)  # one more, to know whether this is the end
        self._drop(start)
        before = max(0, self._start - start)
        part = self._kept[max(0, start - self._start) : end - self._start]
        out[:before] = 0
        out[before : before + part.size] = part
        out[before + part.size :] = 0

    def _fill(self, end: int) -> None:
        while self.length is None and self._start + self._kept.size < end:
            block = self._file.read(self._block, dtype="float32", always_2d=True).mean(axis=1)
            last = block.size < self._block
            if self._resampler is not None:
                block = self._resampler.resample_chunk(block, last=last)
            self._kept = np.concatenate([self._kept, block])
            if last:
                self.length = self._start + self._kept.size
                self._file.close()

    def _drop(self, start: int) -> None:
        done = _between(0, start - self._start, self._kept.size)
        self._kept, self._start = self._kept[done:], self._start + done


class Line:
    """Microphone in and speaker out, as the loop uses them: tick by tick."""

    def __init__(
        self, config: ModelConfig, source: Source, playout: Playout, playout_offset_samples: int, canceller: Canceller | None = None
    ) -> None:
        self._tick_samples, self.playout_offset_samples = config.tick_samples, playout_offset_samples
        self._canceller, self._context = canceller, np.zeros(config.context_samples, np.float32)  # of the tick before, cleaned
        self.source, self._playout = source, playout
        self._kept = (PLAYED_S - 1) * config.audio.sample_rate_hz
        size = config.tick_samples + config.context_samples
        self.mic, self.voice = np.zeros(size, np.float32), np.zeros(size, np.float32)

    def start(self) -> int:
        """Begin, just before the ticker does; returns after how many samples the microphone hears what the speaker is given."""
        self.source.start()
        self._playout.start()
        return self._playout.origin - self._playout.heard_origin

    def gather(self, tick: int, edge_ns: int) -> None:
        """Fill `mic` and `voice` (f32[context + tick], ±1) for a tick at its edge, `edge_ns` of CLOCK_MONOTONIC."""
        end = (tick + 1) * self._tick_samples
        self.source.sync(end)
        self._playout.sync(end, edge_ns)
        self.source.read(end - self.mic.size, self.mic)
        self._playout.heard(end - self.voice.size, self.voice)
        if self._canceller is not None:
            # Of a tick after lost ones the context is that of the last tick there was: the canceller hears a stream without gaps.
            context = self._context.size
            self._canceller(self.mic[context:], self.voice[context:])
            self.mic[:context] = self._context
            self._context[...] = self.mic[self.mic.size - context :]

    def counts(self) -> dict[str, int]:
        """What the devices lost so far."""
        return {**self.source.counts, **self._playout.counts}

    def play(self, tick: int, speech: Samples) -> int:
        """Speech of `tick` begins one playout offset after its edge; returns the samples that came too late for that."""
        return self._playout.put((tick + 1) * self._tick_samples + self.playout_offset_samples, speech)

    def played(self, start: int, end: int) -> Samples:
        """A copy of what was played over session samples start … end, or as much of its end as is kept."""
        out = np.empty(min(end - start, self._kept), np.float32)
        self._playout.heard(end - out.size, out)
        return out


def _between(low: int, value: int, high: int) -> int:
    return max(low, min(value, high))
