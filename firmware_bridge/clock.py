"""The microcontroller's clock in CLOCK_MONOTONIC: a decaying regression over round trips."""

from __future__ import annotations

import time
from threading import Lock

from firmware_bridge.health import LinkHealth

DECAY = 1 / 30  # of what is known, with every sample: at one a second, half a minute of memory
PRIOR_S2 = 100.0  # trust in crystals: slopes seen over less than 20 s are drawn towards that of a perfect one
SLOPE_MAX = 500e-6  # what two crystals can differ by, with a wide margin
RTT_MARGIN_NS = 200_000  # a round trip of this length has a quarter of the weight of an instant one
OUTLIER = 3.0  # round trips so many times as long as is usual say nothing
WRAP_US = 1 << 32


class ClockSync:
    """µs of the microcontroller (u32, unwrapped here) ↔ ns of CLOCK_MONOTONIC. Any thread may convert."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.samples = self.rejected = 0
        self.min_rtt_ns = 0.0
        self._usual_rtt_ns = 0.0
        self._weight = self._mean_ns = self._mean_us = self._variance = self._covariance = 0.0
        self._origin_ns = self._origin_us = self._newest_us = 0
        self._slope = 0.0  # µs of the microcontroller per µs of ours, less one

    @property
    def ready(self) -> bool:
        return self.samples >= 4

    def add(self, sent_ns: int, received_ns: int, mcu_us: int) -> bool:
        """A round trip in the middle of which the clock stood at `mcu_us`; False if it was an outlier."""
        rtt_ns = received_ns - sent_ns
        with self._lock:
            if self.samples == 0:
                self._origin_ns, self._origin_us, self._newest_us = sent_ns + rtt_ns // 2, mcu_us, mcu_us
                self.min_rtt_ns = self._usual_rtt_ns = float(rtt_ns)
            self._newest_us = self._unwrap(mcu_us)
            self._usual_rtt_ns += (min(rtt_ns, 4 * self._usual_rtt_ns) - self._usual_rtt_ns) / 8
            # The shortest grows slowly, so that a lucky one is not believed for ever.
            self.min_rtt_ns = min(self.min_rtt_ns * (1 + DECAY / 4), rtt_ns)
            if self.ready and rtt_ns > OUTLIER * self._usual_rtt_ns + RTT_MARGIN_NS:
                self.rejected += 1
                return False
            self._learn(sent_ns + rtt_ns / 2 - self._origin_ns, self._newest_us - self._origin_us, rtt_ns)
            self.samples += 1
            return True

    def _learn(self, at_ns: float, at_us: int, rtt_ns: int) -> None:
        # The clock was read anywhere within the round trip: its weight falls with the square of its length, whatever came before.
        weight = (RTT_MARGIN_NS / (rtt_ns + RTT_MARGIN_NS)) ** 2
        self._weight = self._weight * (1 - DECAY) + weight
        share = weight / self._weight
        off_ns = at_ns - self._mean_ns
        residual_us = (at_us - self._mean_us) - off_ns / 1000  # against a perfect clock: small numbers keep their precision
        self._mean_ns += share * off_ns
        self._mean_us += share * (residual_us + off_ns / 1000)
        off_s = off_ns / 1e9
        keep = 1 - share
        self._variance = keep * (self._variance + share * off_s * off_s)
        self._covariance = keep * (self._covariance + share * off_s * residual_us / 1e6)
        slope = self._covariance / (self._variance + PRIOR_S2 * max(DECAY, 1 / (self.samples + 1)))
        self._slope = max(-SLOPE_MAX, min(SLOPE_MAX, slope))

    def _unwrap(self, mcu_us: int) -> int:
        return self._newest_us + (mcu_us - self._newest_us + WRAP_US // 2) % WRAP_US - WRAP_US // 2

    def to_ns(self, mcu_us: int) -> int:
        """CLOCK_MONOTONIC at which the microcontroller's clock stood at `mcu_us` (u32, within half an hour of now)."""
        with self._lock:
            off_us = self._unwrap(mcu_us) - self._origin_us - self._mean_us
            return self._origin_ns + round(self._mean_ns + off_us * 1000 / (1 + self._slope))

    def to_us(self, ns: int) -> int:
        """The microcontroller's clock (u32) at `ns` of CLOCK_MONOTONIC."""
        with self._lock:
            off_us = (ns - self._origin_ns - self._mean_ns) / 1000 * (1 + self._slope)
            return (self._origin_us + round(self._mean_us + off_us)) % WRAP_US

    @property
    def ppm(self) -> float:
        """How much faster than ours the microcontroller's clock runs."""
        return self._slope * 1e6


class RoundTrips:
    """Questions for the time, one after the other. Of those that were sent twice nobody knows which one was answered: they do not count."""

    def __init__(self, clock: ClockSync, health: LinkHealth) -> None:
        self._clock, self._health = clock, health
        self._token, self._sent_ns, self._resent = -1, 0, 0

    def begin(self) -> int:
        """The token of a question that goes out now."""
        self._token = (self._token + 1) % 65536
        self._sent_ns, self._resent = time.monotonic_ns(), self._health.resent
        return self._token

    def end(self, token: int, mcu_us: int, now_ns: int) -> None:
        """Its answer came."""
        if (token, self._health.resent) == (self._token, self._resent):
            self._clock.add(self._sent_ns, now_ns, mcu_us)
