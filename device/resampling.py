"""Sample rates: from the device's to the session's, and from that to a device whose crystal is another one; by samplerate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from device.audio import Samples
from device.portaudio import AudioDeviceError

CONVERTER = "sinc_medium"  # 90 % of the band is kept, 46 samples at the lower rate of look-ahead; `sinc_fastest` would cut at 6.4 kHz
LOOK_AHEAD = 48  # samples, at the lower rate: so many more than are given out it has to have seen
BLOCK = 32  # samples taken at once: what is taken is committed, so that speech which comes later than that is late


class FixedRatio:
    """A stream, block by block, at another rate. Sample k of what comes out lies where sample k / ratio went in; nothing is shifted."""

    def __init__(self) -> None:
        self._resampler = _samplerate().Resampler(CONVERTER, 1)

    def __call__(self, block: Samples, ratio: float) -> Samples:
        return self._resampler.process(block, ratio)

    def reset(self) -> None:
        """What comes next does not follow what came before."""
        self._resampler.reset()


class ChangingRatio:
    """Pulls a stream through at a ratio (samples out for one in) that may be another one for every block.

    `take` fills a block with the next samples of what goes in.
    """

    def __init__(self, take: Callable[[Samples], None]) -> None:
        self._take, self._block = take, np.zeros(BLOCK, np.float32)
        self._resampler = _samplerate().CallbackResampler(self._next, 1.0, CONVERTER, 1)

    def __call__(self, frames: int, ratio: float) -> Samples:
        self._resampler.set_starting_ratio(ratio)  # at once, so that `frames` samples are exactly frames / ratio of what goes in
        return self._resampler.read(frames)

    def reset(self) -> None:
        """What goes in next does not follow what went in before."""
        self._resampler.reset()

    def _next(self) -> Samples:
        self._take(self._block)
        return self._block


def _samplerate() -> Any:
    try:
        import samplerate
    except ImportError as error:
        raise AudioDeviceError(f"samplerate is not usable here ({error}); install the extra 'board', or name files") from error
    return samplerate
