"""What a run leaves behind: JSON lines and a WAV, written by a thread so that no tick waits for a disk or a terminal."""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
import wave
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from device.audio import Samples

QUEUE_ITEMS = 256  # 51 s of ticks; a disk that stalls for longer loses some, and that is counted


class Background:
    """Runs `write` on the items handed over, in a thread. In a `patient` one `put` waits for room, otherwise it drops and counts."""

    def __init__(self, name: str, write: Callable[..., None], patient: bool) -> None:
        self._write, self._patient = write, patient
        self._items: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()  # whose put never waits for the thread
        self.dropped = 0
        self.fault: str | None = None  # why writing stopped, if it did
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, *item: Any) -> None:
        """Hand `item` over as the arguments of `write`."""
        while self._items.qsize() >= QUEUE_ITEMS:
            if not self._patient:
                self.dropped += 1
                return
            time.sleep(0.001)
        self._items.put(item)

    def close(self) -> None:
        """Wait until everything is written."""
        self._items.put(None)
        self._thread.join()

    def attempt(self, write: Callable[..., None], *item: Any) -> None:
        """Call `write`, and keep the first fault: a full disk or a closed pipe must not end the companion."""
        if self.fault is None:
            try:
                write(*item)
            except Exception as error:  # noqa: BLE001 - whatever it was is reported at the end of the run
                self.fault = f"{type(error).__name__}: {error}"

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            self.attempt(self._write, *item)


class EventLog(Background):
    """JSON lines to a file or to standard output, and a line on the terminal for each thing said or done."""

    def __init__(self, path: str | None, patient: bool) -> None:
        self._terminal = path != "-"
        self._file: IO[str] | None = None
        if path is not None:
            self._file = sys.stdout if path == "-" else open(path, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
        super().__init__("events", self._write_event, patient)

    def close(self) -> None:
        super().close()
        if self._file is not None and self._file is not sys.stdout:
            self.attempt(self._file.close)

    def _write_event(self, event: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n")
        if self._terminal and (line := readable(event)):
            print(line, flush=True)


class Recording(Background):
    """What was played, as a 16-bit mono WAV whose header is right after every write; gaps between the pieces are zeros."""

    def __init__(self, path: str, rate_hz: int, patient: bool) -> None:
        self._file = open(path, "wb")  # noqa: SIM115
        self._wav = wave.Wave_write(self._file)
        self._wav.setnchannels(1)
        self._wav.setsampwidth(2)
        self._wav.setframerate(rate_hz)
        self._wav.writeframes(b"")
        super().__init__("speaker", self._write_samples, patient)

    def finish(self, length: int) -> None:
        """Write what is waiting and close the file at `length` samples."""
        self.close()
        self.attempt(self._pad, length)
        self.attempt(self._wav.close)
        self.attempt(self._file.close)

    def _write_samples(self, start: int, samples: Samples) -> None:
        self._pad(start)
        # 32768, as readers divide by it; full scale itself is the one value that does not fit.
        self._wav.writeframes(np.clip(np.rint(samples * 32768), -32768, 32767).astype("<i2").tobytes())

    def _pad(self, end: int) -> None:
        self._wav.writeframes(bytes(2 * max(0, end - self._wav.tell())))


def readable(event: dict[str, Any]) -> str:
    """One line for a tick in which something was said or done, and for what becomes of a question; otherwise nothing."""
    if event["event"] == "think":
        detail = next((event[name] for name in ("word", "act", "reason", "tool") if name in event), "")
        return f"{'':12}background model: {event['what']} {detail}".rstrip()
    if event["event"] != "tick" or (not event["say"] and event["act"] == "none"):
        return ""
    says = [f"says {' '.join(event['say'])}"] if event["say"] else []
    does = [f"does {event['act']}"] if event["act"] != "none" else []
    return f"{event['t_s']:9.2f} s  {', '.join(says + does)}"
