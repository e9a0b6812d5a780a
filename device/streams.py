"""The streams table: everything that comes in or goes out, how often, by when, what stands in for it, and what the log keeps of it.

The loop, the camera, the statistics line and the flight recorder take their numbers from here; the tensor table (device/tensors.py)
has the shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Stream:
    """One row. What is None does not apply."""

    name: str
    way: Literal["in", "out"]
    rate: str
    budget_ms: float | None  # of the loop's time in each tick for it; ticks beyond it are counted in the statistics line
    stale_s: float | None  # what is older is not used
    safe: str  # what stands in for it when it is late or missing
    log: str  # what the event log keeps
    log_s: float | None = None  # … at most so often; None: each time
    tensors: tuple[str, ...] = ()  # rows of the tensor table that carry it
    private: bool = False  # people's sound and pictures: in the flight recorder's dumps only where the configuration says so


# fmt: off
_ROWS = (
    Stream("edge", "in", "every tick", 5, None,
           "lost ticks are marked absent, never run in a burst", "late_ms and gap_ticks of each tick"),
    Stream("microphone", "in", "sample rate", 5, None,
           "silence of the same length", "losses as they begin and end", tensors=("mic",), private=True),
    Stream("heard", "in", "sample rate", None, None,
           "zeros where nothing was played", "nothing", tensors=("voice",), private=True),
    Stream("camera", "in", "two frames a tick", None, 1.0,
           "black, with the age of the last frame", "frame_age_s of each tick; losses as they begin and end",
           tensors=("frames",), private=True),
    Stream("frame age", "in", "every tick", None, None,
           "goes on growing", "frame_age_s of each tick", tensors=("frame_age",)),
    Stream("text", "in", "when delivered, up to text_in words a tick", None, None,
           "waits for a tick with room", "nothing", tensors=("text_in",)),
    Stream("choices", "in", "every tick", None, None,
           "the last ones there were", "say and act of each tick", tensors=("said", "acted")),
    Stream("speech", "out", "sample rate", 5, None,
           "zeros; what comes late loses its late part", "late speech as it begins and ends", tensors=("speech",), private=True),
    Stream("decision", "out", "every tick", None, None,
           "nothing said, nothing done", "say and act of each tick", tensors=("say", "act", "say_prob", "act_prob")),
    Stream("body", "out", "when chosen; a heartbeat every tick", None, None,
           "acts are dropped and counted; without heartbeats the body stops by itself", "its own events"),
    Stream("thermal", "in", "1 Hz", None, 5.0,
           "left out of the statistics line", "in the statistics line", log_s=1.0),
    Stream("statistics", "out", "1 Hz", None, None,
           "none is due twice", "one event", log_s=1.0),
    Stream("dump", "out", "on a fault, a signal or a command", None, None,
           "an event says why there is none", "one event", log_s=60.0),
)
# fmt: on
STREAMS = {stream.name: stream for stream in _ROWS}
