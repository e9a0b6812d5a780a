"""One line of statistics a second: what it holds is a table, and the journal, the metrics and `copresence top` all use that table."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from device.audio import Line
from device.config import ModelConfig
from device.field import board
from device.session import Decision

MINUTE_S = 60
ON_TIME = 0.99  # of the last minute's ticks, for a companion that is well: one tick in twenty seconds may be late or lost
DEVICE_ALIVE_NS = 2_000_000_000  # a sound device calls back every few ms; PulseAudio's first call took up to 1.9 s
METRICS_S = 15  # node_exporter is asked every 15 s or less often
_FLOOR_DBFS = -99.0
_COARSE = 8  # every so many pixels is enough to say how bright it is
RECENT = 8  # things said and done that `top` shows


class Statistic(NamedTuple):
    """One value of the line; `metric` is its Prometheus name, with two names for a pair of median and 99th percentile."""

    name: str
    doc: str
    metric: str
    kind: str = "gauge"


STATISTICS = (
    Statistic("ticks", "ticks completed since the start", "copresence_ticks_total", "counter"),
    Statistic("missed", "ticks that were skipped", "copresence_missed_ticks_total", "counter"),
    Statistic("late", "ticks whose speech came late", "copresence_late_ticks_total", "counter"),
    Statistic("engine_ms", "engine time of the last minute, median and 99th percentile", "copresence_engine_seconds"),
    Statistic("edge_ms", "lateness of the edges of the last minute, median and 99th percentile", "copresence_edge_lateness_seconds"),
    Statistic("underruns", "times that the speaker ran empty", "copresence_underruns_total", "counter"),
    Statistic("overruns", "times that the microphone ran over", "copresence_overruns_total", "counter"),
    Statistic("camera_s", "age of the newest frame", "copresence_camera_age_seconds"),
    Statistic("clock", "state of the clock", ""),
    Statistic("ladder", "what it does without", ""),
    Statistic("bridge", "state of the microcontroller; none: not configured, gone: no link", ""),
    Statistic("bridge_ms", "shortest round trip to the microcontroller of late", "copresence_bridge_round_trip_seconds"),
    Statistic("bridge_faults", "frames lost, damaged or late on the bridge, and acts dropped", "copresence_bridge_faults_total", "counter"),
    Statistic("celsius", "the hottest thermal zone", "copresence_temperature_celsius"),
    Statistic("watts", "the power rail that draws most, which is the board's input where there is one", "copresence_power_watts"),
    Statistic("held_back", "cooling devices that are not idle: the board is slower than it could be", ""),
    Statistic("memory_mb", "resident memory", "copresence_memory_bytes"),
    Statistic("dropped", "log lines that came faster than they could be written", "copresence_log_dropped_total", "counter"),
)
_BASE_UNITS = {"ms": 1e-3, "mb": float(1 << 20)}  # Prometheus wants seconds and bytes


class Senses:
    """What a tick heard, saw and leaned to, as a few numbers: of the first tick after each summary, for more are never read."""

    def __init__(self, config: ModelConfig, line: Line) -> None:
        self._config, self._line = config, line
        self.late = 0
        self._wanted = True
        self._power = self._brightness = self._movement = 0.0
        self._leans: tuple[int, float, int, float] = (0, 0.0, 0, 0.0)

    def ticked(self, decision: Decision, frames: NDArray[np.uint8], late: bool) -> None:
        """Note one tick, at its end and in the loop's thread; arrays as in the tensor table."""
        self.late += late
        if not self._wanted:
            return
        self._wanted = False
        mic = self._line.mic[-self._config.tick_samples :]
        self._power = float(np.dot(mic, mic)) / mic.size
        older, newer = frames[0, ::_COARSE, ::_COARSE].astype(np.float32), frames[1, ::_COARSE, ::_COARSE]
        self._brightness = float(newer.mean()) / 255
        self._movement = float(np.abs(newer - older).mean()) / 255
        say, act = decision.say_prob[:, 1:].max(axis=0), decision.act_prob[1:]
        self._leans = (int(say.argmax()) + 1, float(say.max()), int(act.argmax()) + 1, float(act.max()))

    def summary(self) -> dict[str, Any]:
        """Of the tick that was noted last; probabilities are those of the likeliest word and act but nothing."""
        self._wanted = True
        word, word_prob, act, act_prob = self._leans
        return {
            "mic_dbfs": round(10 * math.log10(self._power), 1) if self._power > 1e-9 else _FLOOR_DBFS,
            "brightness": round(self._brightness, 3),
            "movement": round(self._movement, 3),
            "word": [self._config.text.words[word], round(word_prob, 3)],
            "act": [self._config.text.acts[act], round(act_prob, 3)],
        }


class Statistics:
    """Gathers the loop's tick events, in the journal's thread, and makes a line of each second of them.

    The functions are asked once a second: `counts` for what the devices lost, `clock` for the steering's summary, `bridge` for
    the microcontroller's state, round trip and faults; `alive` for whether microphone and speaker are; `heat` for what
    device.thermal reads.
    """

    def __init__(
        self,
        tick_ms: int,
        senses: Senses,
        counts: Callable[[], Mapping[str, int]],
        clock: Callable[[], Mapping[str, Any]],
        bridge: Callable[[], Mapping[str, Any]],
        alive: Callable[[], Mapping[str, bool]],
        heat: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._senses, self._counts, self._clock, self._bridge, self._alive = senses, counts, clock, bridge, alive
        self._heat = heat
        newest = MINUTE_S * 1000 // tick_ms
        self._engine: deque[float] = deque(maxlen=newest)
        self._edge: deque[float] = deque(maxlen=newest)
        self._seconds: deque[tuple[int, int, int]] = deque(maxlen=MINUTE_S + 1)  # ticks, missed and late, from the start on
        self._ticks = self._missed = self._second = 0
        self._frame_age_s = 0.0
        self._speaking = False
        self._ladder = "full"
        self._said: deque[tuple[float, str]] = deque(maxlen=RECENT)
        self._did: deque[tuple[float, str]] = deque(maxlen=RECENT)

    def add(self, event: Mapping[str, Any]) -> bool:
        """Take a tick event; True if a second of ticks is over, and so a line is due."""
        self._ticks += 1
        self._missed += event["gap_ticks"]
        self._engine.append(event["engine_ms"])
        self._edge.append(event["late_ms"])
        self._frame_age_s, self._speaking = event["frame_age_s"], event["speaking"]
        if event["say"]:
            self._said.append((event["t_s"], " ".join(event["say"])))
        if event["act"] != "none":
            self._did.append((event["t_s"], event["act"]))
        second = int(event["t_s"] + 1e-3)  # tick times are rounded to 1 ms
        over, self._second = second > self._second, second
        return over

    def step(self, event: Mapping[str, Any]) -> None:
        """Take the event of a step of the ladder."""
        self._ladder = str(event["to"])

    def line(self, dropped: int) -> dict[str, Any]:
        """The values of STATISTICS; what there is none of is left out."""
        counts, bridge, heat = self._counts(), self._bridge(), self._heat()
        zones, rails, held_back = (heat.get(name, {}) for name in ("zones_c", "rails_w", "held_back"))
        self._seconds.append((self._ticks, self._missed, self._senses.late))
        values = {
            "ticks": self._ticks,
            "missed": self._missed,
            "late": self._senses.late,
            "engine_ms": _median_and_99th(self._engine),
            "edge_ms": _median_and_99th(self._edge),
            "underruns": counts.get("output_xruns", 0),
            "overruns": counts.get("input_xruns", 0),
            "camera_s": round(self._frame_age_s, 2),
            "clock": self._clock()["state"],
            "ladder": self._ladder,
            "bridge": bridge.get("state", "none"),
            "bridge_ms": bridge.get("round_trip_ms"),
            "bridge_faults": bridge.get("faults"),
            "celsius": round(max(zones.values()), 1) if zones else None,
            "watts": round(max(rails.values()), 1) if rails else None,
            "held_back": ", ".join(held_back) or None,
            "memory_mb": round(board.memory_mb(), 1),
            "dropped": dropped,
        }
        return {"event": "stats", **{name: value for name, value in values.items() if value is not None}}

    def health(self) -> dict[str, bool]:
        """Whether the companion is well, by what could be wrong: see device/boot/slots.py."""
        newest = self._seconds[-1] if self._seconds else (0, 0, 0)
        oldest = self._seconds[0] if len(self._seconds) > MINUTE_S else (0, 0, 0)
        ran, missed, late = (new - old for new, old in zip(newest, oldest, strict=True))
        return {"ticks": ran > 0 and missed + late <= max(1, (1 - ON_TIME) * (ran + missed)), **self._alive()}

    def now(self) -> dict[str, Any]:
        """What else `copresence top` shows."""
        return {
            "engine_ms": list(self._engine)[-MINUTE_S:],
            "senses": self._senses.summary(),
            "speaking": self._speaking,
            "said": list(self._said),
            "did": list(self._did),
            "clock": dict(self._clock()),
            "bridge": dict(self._bridge()),
            "celsius": dict(self._heat().get("zones_c", {})),
        }


def metrics(line: Mapping[str, Any]) -> str:
    """A line of statistics in Prometheus' text format."""
    lines = []
    for row in STATISTICS:
        if row.metric and row.name in line:
            scale = _BASE_UNITS.get(row.name.rpartition("_")[2], 1)
            lines += [
                f"# HELP {row.metric} {row.doc}",
                f"# TYPE {row.metric} {'summary' if isinstance(line[row.name], list) else row.kind}",
            ]
            if isinstance(line[row.name], list):
                pairs = zip(("0.5", "0.99"), line[row.name], strict=True)
                lines += [f'{row.metric}{{quantile="{quantile}"}} {value * scale:g}' for quantile, value in pairs]
            else:
                lines.append(f"{row.metric} {line[row.name] * scale:.10g}")
    return "\n".join(lines) + "\n"


def calls_back(device: Any) -> bool:
    """Whether a sound device is alive; a file, or none, always is."""
    if not hasattr(device, "stamp"):
        return True
    stamp = device.stamp()
    return stamp is not None and time.monotonic_ns() - stamp.own_ns < DEVICE_ALIVE_NS


def bridge_state(bridge: Any) -> dict[str, Any]:
    """Of a firmware_bridge.Bridge; empty for a body that is not there."""
    if not hasattr(bridge, "health"):
        return {}
    health = bridge.health
    faults = health.resent + health.timeouts + health.bad_bytes + health.crc_errors + health.unreadable + bridge.dropped
    connected = bridge.connected
    return {
        "state": bridge.state if connected else "gone",
        "round_trip_ms": round(bridge.clock.min_rtt_ns / 1e6, 3) if connected else None,
        "faults": faults,
        "connects": health.connects,
    }


def _median_and_99th(values: deque[float]) -> list[float]:
    return [round(float(value), 2) for value in np.percentile(np.array(values), (50, 99))]
