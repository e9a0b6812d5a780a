"""Speech from espeak-ng, the synthesiser that gives the companion its voice and the training data its strangers."""

from __future__ import annotations

import io
import shutil
import subprocess

import numpy as np
import soundfile
import soxr

from export.errors import ExportError

_TIMEOUT_S = 20  # a word takes milliseconds; this only keeps a broken installation from hanging a build


class EspeakMissing(ExportError):
    """espeak-ng is not installed. Remedy: apt-get install espeak-ng."""


def speak(
    text: str, voice: str = "en-us", words_per_minute: int = 160, pitch: int = 50, variation: int = 50, rate_hz: int = 16000
) -> np.ndarray:
    """Say `text`; f32[n] at `rate_hz`, full scale ±1, with espeak's own silence around it.

    `voice` is an espeak-ng voice with an optional variant ("en-us+f3"), `pitch` and `variation` (of the pitch) run from 0 to 99.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise EspeakMissing("espeak-ng is not installed; run: apt-get install espeak-ng")
    ssml = f'<prosody range="{2 * variation}%">{text}</prosody>' if variation != 50 else text
    command = [program, "--stdout", "-m", "-v", voice, "-s", str(words_per_minute), "-p", str(pitch), ssml]
    wav = subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S).stdout
    samples, rate = soundfile.read(io.BytesIO(_with_length(wav)), dtype="float32")
    return np.asarray(soxr.resample(samples, rate, rate_hz), dtype=np.float32)


def _with_length(wav: bytes) -> bytes:
    # A WAV on a pipe has a placeholder for its length; the data begin after the 44-byte header.
    size = len(wav) - 44
    return wav[:4] + (size + 36).to_bytes(4, "little") + wav[8:40] + size.to_bytes(4, "little") + wav[44:]
