"""The companion's lines in systemd's journal: JSON behind a priority, statistics once a second, repeated events folded.

A thread writes them to standard output, which is the journal's under systemd; the loop only puts events into a queue of fixed size.
The same thread keeps what the running companion says of itself in a file (`copresence top`, `doctor` and the confirmation read it),
and the metrics.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from device.events import Background
from device.field import board
from device.field.statistics import METRICS_S, Statistics, metrics

CRITICAL, ERROR, WARNING, NOTICE, INFO, DEBUG = 2, 3, 4, 5, 6, 7  # <syslog.h>
# Of every event that is not a piece of information.
PRIORITIES = {
    "fault": CRITICAL,
    "runs_after_rollback": ERROR,
    "bridge_down": ERROR,
    "status_fault": ERROR,
    "bridge_refused": WARNING,
    "ladder": WARNING,
    "loss": WARNING,
    "unproven": WARNING,
    "bridge_up": NOTICE,
    "recovery": NOTICE,
    "summary": NOTICE,
    "versions": NOTICE,
    "bridge_act": DEBUG,
    "stats": DEBUG,
}
FOLD_S = 60.0  # what is told comes again after so long, with how often it has been there
FOLDS_MAX = 64  # kinds of event that are counted at a time
VERSIONS_S = 3600.0
# For the event file alone: a pose comes ten times a second while the body moves, and the loop's own statistics say less than these.
QUIET = frozenset({"bridge_pose", "statistics"})


def priority(event: Mapping[str, Any]) -> int:
    """As syslog's, lower is worse."""
    name = event["event"]
    if name == "clock":
        return WARNING if event["state"] == "holdover" else INFO
    if name == "bridge_act" and "failed" in event:
        return WARNING
    if name == "bridge_state":
        return WARNING if event["state"] == "SAFE" else INFO
    if name == "realtime":
        return WARNING if event.get("missing") else INFO
    return PRIORITIES.get(str(name), INFO)


class Folding:
    """Tells the first of equal events at once, and the others as a number once a minute. Time is the session's, in s."""

    def __init__(self) -> None:
        self._folds: dict[str, tuple[float, int, dict[str, Any]]] = {}  # since when, how often, the newest

    def take(self, event: dict[str, Any], at_s: float) -> list[dict[str, Any]]:
        """What is to be told now."""
        told = self.due(at_s)
        key = _kind(event)
        if key in self._folds:
            since_s, count, _ = self._folds[key]
            self._folds[key] = (since_s, count + 1, event)
            return told
        if len(self._folds) < FOLDS_MAX:
            self._folds[key] = (at_s, 0, event)
        return [*told, event]

    def due(self, at_s: float, all_of_them: bool = False) -> list[dict[str, Any]]:
        """Those whose minute is over, with `repeated`; one that did not come again is forgotten."""
        told = []
        for key, (since_s, count, event) in list(self._folds.items()):
            if at_s - since_s >= FOLD_S or all_of_them:
                if count:
                    told.append({**event, "repeated": count})
                    self._folds[key] = (at_s, 0, event)
                else:
                    del self._folds[key]
        return told


class Journal(Background):
    """The loop's event log on a board: as device.events.EventLog, with statistics in place of a line for each tick."""

    def __init__(
        self,
        statistics: Statistics,
        header: Mapping[str, Any],
        firmware: Callable[[], Mapping[str, Any]] = dict,
        metrics_file: Path | None = None,
        status_file: Path | None = None,
        write: Callable[[str], object] | None = None,
    ) -> None:
        """`header` is the loop's first event; `firmware` is asked for again and again, for it may be flashed meanwhile.

        The status goes into $RUNTIME_DIRECTORY where there is one.
        """
        folder = os.environ.get("RUNTIME_DIRECTORY")
        self._statistics, self._metrics_file, self._firmware = statistics, metrics_file, firmware
        # The bundle's digest stands for its configuration, which is long.
        self._versions = {name: value for name, value in header.items() if name not in ("event", "config", "text")}
        self._status_file = status_file or (Path(folder) / board.STATUS.name if folder else None)
        self._write_line = write or _print
        self._folding = Folding()
        self._at_s = self._versions_s = self._metrics_s = 0.0
        super().__init__("journal", self._take, patient=False)

    def close(self) -> None:
        super().close()
        for event in self._folding.due(self._at_s, all_of_them=True):
            self.attempt(self._tell, event)
        if self._status_file is not None:
            self._status_file.unlink(missing_ok=True)

    def attempt(self, write: Callable[..., None], *item: Any) -> None:
        """As in Background, and goes on after a fault: journald may be started anew."""
        first, self.fault = self.fault, None
        super().attempt(write, *item)
        self.fault = first or self.fault

    def _take(self, event: dict[str, Any]) -> None:
        name = event["event"]
        if name == "tick":
            self._take_tick(event)
        elif name == "header":
            self._tell({"event": "versions", **self._all_versions()})
        elif name not in QUIET:
            if name == "ladder":
                self._statistics.step(event)
            for told in [event] if priority(event) == DEBUG else self._folding.take(event, self._at_s):
                self._tell(told)

    def _take_tick(self, event: dict[str, Any]) -> None:
        self._at_s = event["t_s"]
        if event["say"] or event["act"] != "none":
            said = {"say": event["say"]} if event["say"] else {}
            did = {"act": event["act"]} if event["act"] != "none" else {}
            self._tell({"event": "chose", "t_s": event["t_s"], **said, **did})
        if self._statistics.add(event):
            self._every_second()

    def _every_second(self) -> None:
        line = self._statistics.line(self.dropped)
        self._write_files(line)  # first, for who waits for the journal must not look dead
        self._tell(line)
        for event in self._folding.due(self._at_s):
            self._tell(event)
        if self._at_s - self._versions_s >= VERSIONS_S:
            self._versions_s = self._at_s
            self._tell({"event": "versions", **self._all_versions()})

    def _write_files(self, line: dict[str, Any]) -> None:
        try:
            if self._status_file is not None:
                self._write_status(line, self._status_file)
            if self._metrics_file is not None and (self._metrics_s == 0 or self._at_s - self._metrics_s >= METRICS_S):
                self._metrics_s = self._at_s
                board.replace(self._metrics_file, metrics(line))
        except OSError as error:  # a full disk: the companion stays, and says so
            self._take({"event": "status_fault", "file": str(error.filename), "reason": error.strerror})

    def _write_status(self, line: dict[str, Any], file: Path) -> None:
        status = {
            "at_ns": time.monotonic_ns(),
            "pid": os.getpid(),
            "t_s": self._at_s,
            "release": board.release(),
            "versions": self._all_versions(),
            "health": self._statistics.health(),
            "stats": line,
            **self._statistics.now(),
        }
        board.replace(file, json.dumps(status, ensure_ascii=False))

    def _all_versions(self) -> dict[str, Any]:
        return {**self._versions, "release": board.release(), **self._firmware()}

    def _tell(self, event: Mapping[str, Any]) -> None:
        self._write_line(f"<{priority(event)}>{json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n")


def _print(line: str) -> None:
    print(line, end="", flush=True)


def _kind(event: Mapping[str, Any]) -> str:
    """What makes two events equal: everything but numbers, which count and date them."""
    return json.dumps({name: value for name, value in event.items() if not isinstance(value, int | float)}, default=str)
