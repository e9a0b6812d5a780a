"""A voice activity detector as turn-based systems use it: silero-vad with the field's defaults, run on ONNX Runtime."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from device.audio import Samples
from export.errors import ExportError

RATE_HZ, WINDOW, CONTEXT = 16000, 512, 64  # samples; what the network was trained with
THRESHOLD, RELEASE = 0.5, 0.35  # probability of speech at which a turn begins, and under which its silence is counted
PREFIX_S, SILENCE_S = 0.3, 0.5  # of sound before the turn that belongs to it; of silence that ends it


class DetectorMissing(ExportError):
    """silero-vad is not installed. Remedy: pip install 'copresence[scoreboard]'."""


class Turn(NamedTuple):
    """A turn by the detector's lights, in s."""

    start_s: float  # of the sound that belongs to it
    fired_s: float  # when it was noticed
    over_s: float  # when its end was noticed


def turns(room: Samples) -> list[Turn]:
    """The turns in a sound, f32[n] at 16 kHz; one that is not over at the end of the sound is none."""
    found, since, quiet = [], None, 0
    for i, speech in enumerate(_probabilities(room)):
        now = (i + 1) * WINDOW
        if since is None:
            if speech >= THRESHOLD:
                since, quiet = now, 0
            continue
        if speech >= THRESHOLD:
            quiet = 0
        elif speech < RELEASE or quiet:
            quiet = quiet or now
            if now - quiet >= SILENCE_S * RATE_HZ:
                start_s = max((since - WINDOW) / RATE_HZ - PREFIX_S, 0.0)
                found.append(Turn(start_s, since / RATE_HZ, now / RATE_HZ))
                since = None
    return found


def _probabilities(room: Samples) -> list[float]:
    network = _network()
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros(CONTEXT, np.float32)
    probabilities = []
    for window in room[: len(room) // WINDOW * WINDOW].reshape(-1, WINDOW):
        heard = np.concatenate((context, window))[None].astype(np.float32)
        speech, state = network.run(None, {"input": heard, "state": state, "sr": np.array(RATE_HZ, np.int64)})
        probabilities.append(float(speech[0, 0]))
        context = window[-CONTEXT:]
    return probabilities


@cache
def _network() -> Any:
    import onnxruntime

    spec = find_spec("silero_vad")  # its folder only: the package itself imports torch
    if spec is None or spec.origin is None:
        raise DetectorMissing("silero-vad is not installed; run: pip install 'copresence[scoreboard]'")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    path = Path(spec.origin).parent / "data" / "silero_vad.onnx"
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
