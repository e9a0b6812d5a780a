"""Any picture to the bundle's size, by PyAV (FFmpeg's scaler), which every other part of sound and vision needs anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from device.camera.source import Frames
from device.config import ModelConfig

if TYPE_CHECKING:
    import av


def fit(picture: av.VideoFrame, config: ModelConfig) -> Frames:
    """Scale until it covers the model's frame, then cut the edges off: u8[H, W, 3], RGB."""
    height, width = config.video.height, config.video.width
    scale = max(height / picture.height, width / picture.width)
    tall, wide = max(height, round(picture.height * scale)), max(width, round(picture.width * scale))
    image = picture.to_ndarray(format="rgb24", width=wide, height=tall, interpolation="AREA")
    top, left = (tall - height) // 2, (wide - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])
