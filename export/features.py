"""dMel levels of an audio file, computed by the very front end that goes into the tick graph."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile
import soxr
from numpy.typing import NDArray

from device.config import AudioConfig, ModelConfig, TextConfig
from export.errors import ExportError
from export.graph import build_front_end


class AudioFileError(ExportError):
    """A sound file that cannot be read. Remedy: give a WAV or FLAC file."""


def read_audio(path: Path, rate_hz: int) -> NDArray[np.float32]:
    """Any rate and channels to mono f32[n] at `rate_hz`; raises AudioFileError."""
    if not path.is_file():
        raise AudioFileError(f"{path}: no such file; give a WAV or FLAC file")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise AudioFileError(f"{path}: cannot be read as sound ({error}); give a WAV or FLAC file") from error
    return np.asarray(soxr.resample(samples.mean(axis=1), rate, rate_hz), dtype=np.float32)


class FrontEnd:
    """The dMel front end on ONNX Runtime, for whole recordings."""

    def __init__(self, audio: AudioConfig | None = None) -> None:
        """`audio`: a checkpoint's; by default the published range [-7, 2]."""
        plain = ModelConfig(text=TextConfig(words=("", "-"), acts=("none", "-")))
        self.config = plain if audio is None else dataclasses.replace(plain, audio=audio)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(build_front_end(self.config).SerializeToString(), options, ["CPUExecutionProvider"])

    def levels(self, samples: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Mono f32[n] at the configuration's rate to u8[ceil(n / hop), channels]; silence is assumed around it."""
        c = self.config
        ticks = -(-len(samples) // c.tick_samples)
        padded = np.zeros(c.context_samples + ticks * c.tick_samples, np.float32)
        padded[c.context_samples : c.context_samples + len(samples)] = samples
        size = c.tick_samples + c.context_samples
        starts = range(0, ticks * c.tick_samples, c.tick_samples)
        parts = [self._session.run(None, {"samples": padded[s : s + size]})[0] for s in starts]
        frames = -(-len(samples) // c.audio.hop_samples)
        return np.concatenate([np.zeros((0, c.audio.mel_channels), np.uint8), *parts])[:frames]
