"""The teacher: a bigger checkpoint whose probabilities a student learns from (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from device.config import ModelConfig
from device.positions import rope_table
from export.checkpoint import WEIGHTS_NAME, CheckpointError, read_config
from export.distill.losses import Auxiliary, perceived
from export.distill.model import TickModel, blocks, mixed_precision

HEADS_NAME = "heads.safetensors"


class Teacher:
    """A trained checkpoint with its auxiliary heads; computes on the CPU of the process that makes the batches."""

    def __init__(self, model: TickModel, heads: Auxiliary) -> None:
        self.model, self.heads = model.eval(), heads.eval()

    @classmethod
    def read(cls, checkpoint: Path, student: ModelConfig) -> Teacher:
        """The teacher in a checkpoint folder; raises CheckpointError where `student` does not hear, see and speak as it does."""
        config = read_config(checkpoint)
        for field in ("tick_ms", "audio", "video", "text"):
            if getattr(config, field) != getattr(student, field):
                raise CheckpointError(
                    f"{checkpoint / WEIGHTS_NAME}: config field '{field}' differs from the recipe's; teach with one that has the same"
                )
        teacher = cls(TickModel(config), Auxiliary(config))
        load_weights(teacher.model, checkpoint / WEIGHTS_NAME)
        load_weights(teacher.heads, checkpoint / HEADS_NAME)
        return teacher

    @torch.no_grad()
    def perceives(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Soft targets of a perception batch: soft_word f32[n, labels] and soft_hand f32[n, labels]."""
        with mixed_precision("cpu"):
            words, hands = perceived(self.model, self.heads, batch)
        return {"soft_word": words.float().softmax(-1), "soft_hand": hands.float().softmax(-1)}

    @torch.no_grad()
    def decides(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Soft targets of whole scenes: soft_say f32[B, T, words] and soft_act f32[B, T, acts]."""
        scene = batch | {"rope": torch.from_numpy(rope_table(self.model.config, batch["tick"].numpy()))}
        with mixed_precision("cpu"):
            x, _ = self.model.perceive_scene(self.model.embed(scene), scene)
            say, act = self.model.logits(self.model.present_scene(x, scene)[0])
        return {"soft_say": say[..., 0, :].float().softmax(-1), "soft_act": act.float().softmax(-1)}


def grow(model: TickModel, checkpoint: Path) -> None:
    """Give `model` the weights of a checkpoint folder that may have fewer present layers.

    Those that it lacks go on top and pass on what they get, until they have learned better (Net2DeeperNet, arXiv 1511.05641).
    Raises CheckpointError where anything else differs.
    """
    added = range(read_config(checkpoint).trunk.present_layers, len(model.present))
    for block in blocks(model.present)[added.start :]:
        for projection in (block.out, block.down):
            nn.init.zeros_(projection.weight)
    own = {name: value for name, value in model.state_dict().items() if name.startswith(tuple(f"present.{layer}." for layer in added))}
    load_weights(model, checkpoint / WEIGHTS_NAME, own)


def load_weights(module: nn.Module, path: Path, own: dict[str, Tensor] | None = None) -> None:
    """Read the module's weights, all but its `own`, from a safetensors file.

    Raises CheckpointError where they are not whole or not this module's.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; train the checkpoint again with copresence-export train, which writes it")
    try:
        module.load_state_dict({name: value.float() for name, value in load_file(path).items()} | (own or {}))
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {error}; train the checkpoint again") from error
