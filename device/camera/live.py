"""Cameras that are devices: a thread keeps their newest frames at hand, so that no tick waits, and opens them again when they stop."""

from __future__ import annotations

import concurrent.futures
import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from device.camera.fit import fit
from device.camera.source import Frames, Shot, Window
from device.config import ModelConfig

if TYPE_CHECKING:
    import av

OPEN_S = 10.0  # a USB camera that has just been plugged in answers after 2 to 5 s
READ_S = 0.5  # how long one read may wait, and so how long closing may
SILENT_S = 2.0  # without a frame for so long, a camera has stopped: longer than any exposure in the dark, which ends at about 1 s
CLOSE_S = 3.0  # a driver whose hardware is gone may never return
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0  # between attempts to open it, doubling

KEPT_FRAMES = 64  # newest: more than two seconds at 30 Hz, 4 MB
CLOSEST_NS = 15_000_000  # frames of a faster camera are left out: a tick shows two, half a tick apart
GAPS = 15  # of the newest frames, whose median is the camera's period
FRESH_NS = 2_000_000_000  # a frame is handed over within this time of its exposure
CLOCK_NOISE_NS = 1_000_000  # by so much a stamp may lie in the future, being rounded or measured on another core

T = TypeVar("T")


class CameraFault(OSError):
    """A camera that cannot be opened, or stopped. It is tried again; the text says what to look at."""


class Picture(NamedTuple):
    """As a device gives it. `stamp_ns`: when exposure began, on a clock of the device's choice."""

    stamp_ns: int
    image: av.VideoFrame


class Device(Protocol):
    """An open camera. Any exception means that it has stopped."""

    def read(self, timeout_s: float) -> Picture | None:
        """The newest picture not read yet; None if none came in `timeout_s`."""

    def close(self) -> None: ...


class LiveCamera:
    """The newest frames of a device. `origin_ns`: CLOCK_MONOTONIC at session time 0, which steering moves."""

    end_s: float | None = None

    def __init__(self, config: ModelConfig, open_device: Callable[[], Device], origin_ns: Callable[[], int]) -> None:
        self._config, self._open_device, self._origin_ns = config, open_device, origin_ns
        # Appended to by one thread and popped by another, neither of which ever waits: a full one lets its oldest go.
        self._arrived: deque[Shot] = deque(maxlen=KEPT_FRAMES)
        self._window = Window(config, self._next)
        self._closing = threading.Event()
        self.resting = False
        self._kept_ns = 0  # exposure of the newest frame that was kept, of this device or, before it was opened again, the last
        self.exposed_ns: int | None = None
        self.fault: str | None = None
        self.counts = {"stale_frames": 0, "dropped_frames": 0, "blind_ticks": 0}
        self._thread = threading.Thread(target=self._keep_open, name="camera", daemon=True)
        self._thread.start()

    def frames_at(self, edge_s: float) -> tuple[Frames, float]:
        origin_s = self._origin_ns() / 1e9
        frames, age_s, newest_s = self._window.at(origin_s + edge_s, origin_s)
        self.exposed_ns = None if newest_s is None else round(newest_s * 1e9)
        self.counts["stale_frames"] = self._window.stale_frames
        self.counts["blind_ticks"] += self.fault is not None
        return frames, age_s

    def close(self) -> None:
        """Let the device go, if it lets itself be closed in time."""
        self._closing.set()
        self._thread.join(READ_S + OPEN_S + CLOSE_S)

    def _next(self) -> Shot | None:
        try:
            return self._arrived.popleft()
        except IndexError:
            return None

    def _keep_open(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._closing.is_set():
            try:
                device = within(OPEN_S, "opening the camera", self._open_device, lambda late: late.close())
                try:
                    self._grab(device)
                finally:
                    with contextlib.suppress(Exception):  # why it stopped is what counts
                        within(CLOSE_S, "closing the camera", device.close)
            except Exception as error:  # noqa: BLE001 - whatever a driver raises, the companion goes on without eyes
                if self.fault is None:
                    pause_s = FIRST_PAUSE_S
                    foreign = f"{type(error).__name__}: {error}; check the camera and its cable"
                    self.fault = str(error) if isinstance(error, CameraFault) else foreign
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _grab(self, device: Device) -> None:
        clock, period, heard_ns = StampClock(), Period(), time.monotonic_ns()
        while not self._closing.is_set():
            picture = device.read(READ_S)
            now_ns = time.monotonic_ns()
            if picture is None:
                if now_ns - heard_ns > SILENT_S * 1e9:
                    raise CameraFault(f"no frame came for {SILENT_S:.0f} s; check the camera and its cable")
                continue
            heard_ns, self.fault = now_ns, None
            exposed_ns = clock.monotonic_ns(picture.stamp_ns, now_ns)
            if exposed_ns is None:
                self.counts["dropped_frames"] += 1
                continue
            self.counts["dropped_frames"] += period.lost_before(exposed_ns)
            if exposed_ns - self._kept_ns >= CLOSEST_NS and not self.resting:
                self._kept_ns = exposed_ns
                self._arrived.append(Shot(exposed_ns / 1e9, fit(picture.image, self._config)))


class StampClock:
    """A device's stamps on CLOCK_MONOTONIC, without steps back.

    Drivers stamp with CLOCK_MONOTONIC, some with CLOCK_BOOTTIME or CLOCK_REALTIME: the first that makes the frame a fresh one is taken, and
    its distance to CLOCK_MONOTONIC is measured once, and again when a stamp steps, as after the time of day has been set. Stamps that fit
    none of them count from the arrival of the first frame.
    """

    CLOCKS = (time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME, time.CLOCK_REALTIME)

    def __init__(self) -> None:
        self._shift_ns: int | None = None
        self._last_ns = 0

    def monotonic_ns(self, stamp_ns: int, arrived_ns: int) -> int | None:
        """None for a frame that is not newer than the last. `arrived_ns`: now, on CLOCK_MONOTONIC."""
        if self._shift_ns is None or not self._last_ns < stamp_ns + self._shift_ns or not _is_fresh(stamp_ns + self._shift_ns, arrived_ns):
            self._shift_ns = self._find_shift_ns(stamp_ns, arrived_ns)
        exposed_ns = min(stamp_ns + self._shift_ns, arrived_ns)
        if exposed_ns <= self._last_ns:
            return None
        self._last_ns = exposed_ns
        return exposed_ns

    def _find_shift_ns(self, stamp_ns: int, arrived_ns: int) -> int:
        for clock in self.CLOCKS:
            shift_ns = 0 if clock == time.CLOCK_MONOTONIC else time.monotonic_ns() - time.clock_gettime_ns(clock)
            if _is_fresh(stamp_ns + shift_ns, arrived_ns):
                return shift_ns
        if self._shift_ns is not None and self._last_ns - FRESH_NS < stamp_ns + self._shift_ns <= arrived_ns:
            return self._shift_ns  # nothing stepped: the frame is old, or the last one again
        return arrived_ns - stamp_ns


class Period:
    """Tells from the time between frames how many are missing: the median of the newest gaps is what one frame takes."""

    def __init__(self) -> None:
        self._gaps_ns: deque[int] = deque(maxlen=GAPS)
        self._last_ns: int | None = None

    def lost_before(self, exposed_ns: int) -> int:
        """How many frames should have come between the last one and this one; 0 until the period is known."""
        gap_ns = 0 if self._last_ns is None else exposed_ns - self._last_ns
        self._last_ns = exposed_ns
        lost = 0
        if len(self._gaps_ns) == GAPS:
            lost = max(0, round(gap_ns / max(1.0, statistics.median(self._gaps_ns))) - 1)
        if gap_ns:
            self._gaps_ns.append(gap_ns)
        return lost


def _is_fresh(exposed_ns: int, arrived_ns: int) -> bool:
    return -CLOCK_NOISE_NS <= arrived_ns - exposed_ns <= FRESH_NS


def within(limit_s: float, what: str, call: Callable[[], T], too_late: Callable[[T], object] = lambda result: None) -> T:
    """What `call` returns, if it does so in time; otherwise CameraFault, and `too_late` gets the result that nobody waits for any more."""
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            outcome.set_exception(error)

    threading.Thread(target=work, name=what, daemon=True).start()
    concurrent.futures.wait((outcome,), limit_s)
    if outcome.done():
        return outcome.result()
    outcome.add_done_callback(lambda late: None if late.exception() else too_late(late.result()))
    raise CameraFault(f"{what} took longer than {limit_s:.0f} s; if this persists, unplug it or restart the board")
