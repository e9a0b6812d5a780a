"""Who watches the loop on a board: systemd, the statistics, and the light that says that a release was given up."""

from __future__ import annotations

import time

from device.camera import Frames
from device.field.statistics import Senses
from device.loop import Actuator
from device.notify import Notifier
from device.session import Decision
from device.ticker import Edge

ALERT_TICKS = 50  # between two alerts: ten seconds of 200 ms
ARMED_TICKS = 10  # the body takes acts soon after the first heartbeat


class Watch:
    """Passes each completed tick on; `alert` makes the body's light blink until a release is confirmed."""

    def __init__(self, notifier: Notifier, senses: Senses, alert: Actuator | None = None) -> None:
        self._notifier, self._senses, self._alert = notifier, senses, alert
        self._until_alert = ARMED_TICKS

    def ticked(self, edge: Edge, decision: Decision, frames: Frames, late_samples: int) -> None:
        self._senses.ticked(decision, frames, late_samples > 0)
        self._notifier.ticked(time.monotonic_ns(), in_time=late_samples == 0 and edge.missed == 0)
        if self._alert is not None:
            self._until_alert -= 1
            if self._until_alert == 0:
                self._alert.act("alert")
                self._until_alert = ALERT_TICKS
