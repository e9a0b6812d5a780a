"""Numbers that the PyTorch model and the ONNX graph must agree on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from device.config import ModelConfig

# OpenAI CLIP's image mean and deviation, as in Inkling's image processor.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HMLP_FOLDS = ((1, 5), (1, 2), (1, 4), (2, 1))  # (time, height and width) of each stage
NORM_EPS = 1e-6  # RMSNorm, as Inkling's
MASKED = -30000.0  # added to a score that must not count; fits float16


def modality_bias(c: ModelConfig) -> NDArray[np.float32]:
    """f32[tokens, tokens]: 0 where a token may see another of the same or an earlier tick, MASKED where not.

    Perception tokens stay blind to text, history and the other sense: a model that can read its answer from its own
    history learns nothing from the picture.
    """
    kind = np.repeat([0, 1, 2], [c.audio_tokens, c.video_tokens, c.trunk.summary_tokens])
    return np.where((kind[:, None] == kind) | (kind[:, None] == 2), 0.0, MASKED).astype(np.float32)
