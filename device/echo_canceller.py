"""An echo canceller in front of the model, for rooms that need one: WebRTC's AEC3, in the wheel that livekit maintains."""

from __future__ import annotations

from typing import Any

import numpy as np

from device.audio import Samples

FRAME_MS = 10  # what WebRTC takes at once
SCALE = 32768  # of its 16-bit samples


class CancellerMissing(RuntimeError):
    """livekit is not installed. Remedy: pip install 'copresence[echo]', or leave --echo-canceller out."""


class WebRtcCanceller:
    """Takes what the speaker really played out of what the microphone heard at the same time.

    What people say comes out 8 ms late (measured on livekit 1.2.1 at 16 kHz); a tick costs 4 ms on a busy x86-64 core.
    """

    def __init__(self, rate_hz: int) -> None:
        try:
            from livekit.rtc import AudioFrame
            from livekit.rtc.apm import AudioProcessingModule
        except ImportError as error:
            raise CancellerMissing(
                f"--echo-canceller webrtc needs livekit ({error}); run: pip install 'copresence[echo]', or leave the option out"
            ) from error
        self._frame: Any = AudioFrame
        self._rate_hz, self._size = rate_hz, rate_hz * FRAME_MS // 1000
        self._module = AudioProcessingModule(echo_cancellation=True)

    def __call__(self, mic: Samples, voice: Samples) -> None:
        """Clean `mic` in place: f32[n], a whole number of frames, that follow those of the call before; `voice` as in a tick."""
        for at in range(0, mic.size, self._size):
            span = slice(at, at + self._size)
            self._module.process_reverse_stream(self._wrapped(voice[span]))
            heard = self._wrapped(mic[span])
            self._module.process_stream(heard)
            mic[span] = np.frombuffer(heard.data, np.int16) / np.float32(SCALE)

    def _wrapped(self, samples: Samples) -> Any:
        whole = np.clip(np.round(samples * SCALE), -SCALE, SCALE - 1).astype(np.int16)
        return self._frame(whole.tobytes(), self._rate_hz, 1, self._size)
