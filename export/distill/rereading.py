"""Reading a hand again with more compute than a tick has: one picture seen in many ways, by a checkpoint's own eyes."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from device.camera import Frames
from device.config import ModelConfig
from device.positions import rope_table
from export.checkpoint import WEIGHTS_NAME, read_config
from export.distill.losses import Auxiliary, perceive_kind
from export.distill.model import TickModel
from export.distill.teacher import HEADS_NAME, load_weights

View = tuple[float, float, bool]  # shift to the right and down in pixels, mirrored
ONE_LOOK: tuple[View, ...] = ((0.0, 0.0, False),)
# The patches are 40 pixels wide: a shift by less than that shows each of them other parts of the hand. Training mirrors hands, too.
# On 191 pictures of the dev people shifts read right 3 of the 5 that one look misreads, and spoil none; with scales as well, one is spoilt.
MANY_LOOKS: tuple[View, ...] = tuple(product((-14.0, 0.0, 14.0), (-14.0, 0.0, 14.0), (False, True)))


class Rereader:
    """The perceiving layers of a checkpoint, and the auxiliary head that names the hand in a picture."""

    def __init__(self, model: TickModel, heads: Auxiliary) -> None:
        self.config: ModelConfig = model.config
        self._model, self._heads = model.eval(), heads.eval()
        c = self.config
        self._rope = torch.from_numpy(rope_table(c, np.arange(1)))[:, c.audio_tokens : c.audio_tokens + c.video_tokens]

    @classmethod
    def read(cls, checkpoint: Path) -> Rereader:
        """Of a checkpoint folder that `train` wrote, with its heads; raises CheckpointError."""
        checkpoint = checkpoint.parent if checkpoint.name == WEIGHTS_NAME else checkpoint
        config = read_config(checkpoint)
        reader = cls(TickModel(config), Auxiliary(config))
        load_weights(reader._model, checkpoint / WEIGHTS_NAME)
        load_weights(reader._heads, checkpoint / HEADS_NAME)
        return reader

    @torch.no_grad()
    def probabilities(self, picture: Frames, views: tuple[View, ...] = MANY_LOOKS) -> NDArray[np.float32]:
        """What u8[H, W, 3] shows, seen in all `views`: f32[11], no hand and the digits."""
        seen = torch.from_numpy(np.stack([view(picture, *how) for how in views]))
        frames = seen[:, None, None].expand(-1, 1, self.config.video.frames, -1, -1, -1)
        tokens = self._model.video(frames, torch.zeros(len(views), 1, 1))
        tokens = perceive_kind(self._model, tokens, self._rope.expand(len(views), -1, -1, -1, -1))
        return np.asarray(self._heads.hands(tokens[:, 0]).softmax(-1).mean(0).numpy())


def view(picture: Frames, right: float, down: float, mirrored: bool) -> Frames:
    """The picture moved; what was outside of it is like its edge."""
    height, width = picture.shape[:2]
    move = np.array([(-1.0, 0.0, width - 1 + right) if mirrored else (1.0, 0.0, right), (0.0, 1.0, down)])
    return np.asarray(cv2.warpAffine(picture, move, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))
