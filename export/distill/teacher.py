"""The teacher: a bigger checkpoint whose probabilities a student learns from (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from device.config import ModelConfig
from device.positions import rope_table
from export.checkpoint import WEIGHTS_NAME, CheckpointError, read_config
from export.distill.losses import Auxiliary, perceived
from export.distill.model import TickModel, blocks, mixed_precision

HEADS_NAME = "heads.safetensors"

Asked = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # a batch to its soft targets


class Teacher:
    """A trained checkpoint with its auxiliary heads; computes where it lies, as its student does."""

    def __init__(self, model: TickModel, heads: Auxiliary) -> None:
        self.model, self.heads = model.eval(), heads.eval()
        self._perceives: Asked = self.perceives
        self._decides: Asked = self.decides

    def to(self, device: torch.device, compiled: bool) -> Teacher:
        """The same one on another device, compiled if it is to be asked often."""
        self.model.to(device)
        self.heads.to(device)
        if compiled:
            self._perceives, self._decides = (torch.compile(f, dynamic=False) for f in (self.perceives, self.decides))
        return self

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
    def teaches(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of `Batches` with soft targets of everything in it; scenes that bring their own keep them."""
        with mixed_precision(batch["mic"].device.type):
            if "frame_age" not in batch:
                return batch | self._perceives(batch)
            if "practice" in batch:
                batch = batch | {"practice": batch["practice"] | self._perceives(batch["practice"])}
            if "soft_say" in batch:
                return batch
            rope = torch.from_numpy(rope_table(self.model.config, batch["tick"].cpu().numpy())).to(batch["tick"].device)
            return batch | self._decides({name: value for name, value in batch.items() if name != "practice"} | {"rope": rope})

    def perceives(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Soft targets of words and hands: soft_word f32[n, T, labels] and soft_hand f32[n, labels]."""
        words, hands = perceived(self.model, self.heads, batch)
        return {"soft_word": words.float().softmax(-1), "soft_hand": hands.float().softmax(-1)}

    def decides(self, scene: dict[str, Tensor]) -> dict[str, Tensor]:
        """Soft targets of whole scenes, with `rope` as this model has it: soft_say f32[B, T, words] and soft_act f32[B, T, acts]."""
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
