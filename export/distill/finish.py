"""From trained weights to a checkpoint: the vocoder, the margins, and the reference ticks that every bundle is proven against."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from device.config import ModelConfig
from device.positions import clock_features, rope_table, tick_noise
from device.tensors import layer_tokens, tensor_table
from export.checkpoint import write_checkpoint
from export.distill.losses import Auxiliary
from export.distill.model import TickModel
from export.distill.recipe import Recipe, RecipeError
from export.distill.teacher import HEADS_NAME
from export.distill.train import Processes, Source, train
from export.distill.voice import train_vocoder
from export.espeak import speak
from export.hands import draw_hand

REFERENCE_TICKS = 12  # more than the perceiving window, so that its rings wrap


def train_checkpoint(recipe_path: Path, source: Source, work: Path, out: Path) -> None:
    """Everything from the recipe to the checkpoint folder `out`, by the oracle alone; what is done already in `work` is not done again."""
    _train(Recipe.read(recipe_path), source, work, out)


def distill_checkpoint(recipe_path: Path, source: Source, work: Path, out: Path, teacher: Path | None = None) -> None:
    """The same with a teacher: a checkpoint folder, which teaches all stages, or the recipe's own, which are trained on the way.

    One that teaches from behind stage n is left in `work/teacher-n/checkpoint`, the weights that it grew from in `work/teacher-n/begun`;
    one without stages of its own is the latter. Raises RecipeError where there is no teacher.
    """
    recipe = Recipe.read(recipe_path)
    if teacher is None:
        if not recipe.teachers:
            raise RecipeError(f"{recipe_path}: there is no field teachers; add it, or name a checkpoint that teaches (--teacher)")
        for own in recipe.teachers:
            folder = work / f"teacher-{own.after}"
            begun = folder / "begun"
            last: Path | None = teacher
            teacher = folder / "checkpoint" if own.stages else begun
            if not (teacher / HEADS_NAME).is_file():  # the last thing that is written; until then it has taught nothing
                _train(replace(recipe, say_margin=0.0, act_margin=0.0), source, work, begun, last, until=own.after)
                if own.stages:
                    _train(recipe.of_teacher(own), source._replace(start=begun), folder, teacher)
    _train(recipe, source, work, out, teacher)


def _train(recipe: Recipe, source: Source, work: Path, out: Path, teacher: Path | None = None, until: int | None = None) -> None:
    model, heads = train(recipe, source, work, teacher, until=until)
    processes = Processes.join()
    if processes.first:
        vocoder = work / "vocoder.safetensors"
        if not vocoder.exists() and source.start is not None:  # nothing but the vocoder's own training changes it
            save_file(model.vocoder.state_dict(), vocoder)
        elif not vocoder.exists():
            train_vocoder(vocoder, recipe.model.text.words, recipe.vocoder_minutes, recipe.seed, recipe.model.voice.vocoder_width)
        finish(model, heads, recipe, vocoder, out)
    processes.wait()


def finish(model: TickModel, heads: Auxiliary, recipe: Recipe, vocoder: Path, out: Path) -> None:
    """Write the checkpoint: trunk and heads of `model`, the vocoder's weights, the recipe's margins, reference ticks.

    The auxiliary heads, which only a student of this checkpoint needs, go into a file of their own.
    """
    model.eval()
    model.vocoder.load_state_dict(load_file(vocoder))
    with torch.no_grad():
        # A reaction must beat "nothing" by the margin: chosen on the dev people, part of the checkpoint.
        model.say.bias[0] += recipe.say_margin
        model.act.bias[0] += recipe.act_margin
    weights = {name: value.detach().numpy().astype(np.float32) for name, value in model.state_dict().items()}
    write_checkpoint(out, recipe.model, weights, reference_ticks(model))
    scratch = out / f".{HEADS_NAME}"
    save_file({name: value.detach().contiguous() for name, value in heads.state_dict().items()}, scratch)
    scratch.replace(out / HEADS_NAME)  # whole or not at all: it says that the rest is there


def reference_ticks(model: TickModel, ticks: int = REFERENCE_TICKS, start: int = 0) -> dict[str, NDArray[np.generic]]:
    """Inputs and outputs of `ticks` ticks from an empty memory, as PyTorch computes them: {tensor name: [ticks, …]}.

    The input is synthetic: a spoken "up", a drawn hand, delivered text, and the speech of each tick played in the next.
    """
    c = model.config
    table = tensor_table(c)
    state = {row.name: torch.zeros(row.shape) for row in table if row.role == "state"}
    valid = {"perceive_valid": torch.zeros(c.trunk.perceive_window), "present_valid": torch.zeros(c.trunk.present_window)}
    mic, frames = _reference_sound(c, ticks), _reference_pictures(c, ticks)
    voice = np.zeros_like(mic)
    said, acted = np.zeros(c.text.say, np.int32), np.zeros(1, np.int32)
    kept: dict[str, list[NDArray[np.generic]]] = {row.name: [] for row in table if row.role in ("input", "output")}
    for tick in range(ticks):
        span = slice(tick * c.tick_samples, (tick + 1) * c.tick_samples + c.context_samples)
        text = np.zeros(c.text.text_in, np.int32)
        text[0] = (tick == 5) * (len(c.text.words) - 1)
        inputs: dict[str, NDArray[np.generic]] = {
            "mic": mic[span],
            "voice": voice[span],
            "frames": frames[tick],
            "frame_age": np.array([0.01 * tick], np.float32),
            "text_in": text,
            "said": said,
            "acted": acted,
            "clock": clock_features(c, start + tick),
            "rope": rope_table(c, start + tick),
            "noise": tick_noise(c, 0, start + tick),
        } | {name: value.numpy().copy() for name, value in valid.items()}
        outputs = model.step(state | {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()})
        for name in kept:
            kept[name].append(inputs[name] if name in inputs else outputs[name].numpy())
        absorb(c, state, valid, outputs, start + tick)
        said, acted = outputs["say"].numpy(), outputs["act"].numpy()
        after = (tick + 1) * c.tick_samples + c.context_samples
        voice[after : after + c.tick_samples] = outputs["speech"].numpy()[: len(voice) - after]
    return {name: np.ascontiguousarray(np.stack(values)) for name, values in kept.items()}


def absorb(
    c: ModelConfig, state: dict[str, torch.Tensor], valid: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], tick: int
) -> None:
    """What a session does after a tick, on tensors: slices into their slots, the vocoder's state, the slots valid."""
    for name in state:
        new = outputs[f"new_{name}"]
        if name.startswith("vocoder_"):
            state[name] = new
        else:
            tokens = layer_tokens(c, int(name.rsplit("_", 1)[1]))
            slot = tick % (state[name].shape[1] // tokens)
            state[name][:, slot * tokens : (slot + 1) * tokens] = new
    for slots in valid.values():
        slots[tick % len(slots)] = 1


def _reference_sound(c: ModelConfig, ticks: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    sound = (0.003 * rng.standard_normal(c.context_samples + ticks * c.tick_samples)).astype(np.float32)
    word = speak("up", rate_hz=c.audio.sample_rate_hz)[: len(sound) - c.tick_samples]
    sound[c.tick_samples : c.tick_samples + len(word)] += 0.5 * word
    return sound


def _reference_pictures(c: ModelConfig, ticks: int) -> NDArray[np.uint8]:
    v, rng = c.video, np.random.default_rng(0)
    side = min(v.height, v.width) * 3 // 4
    empty = rng.integers(90, 120, (v.height, v.width, 3)).astype(np.uint8)
    shown = empty.copy()
    shown[:side, :side] = cv2.resize(draw_hand(3, rng), (side, side))
    return np.stack([np.stack([shown if t >= ticks // 3 else empty] * v.frames) for t in range(ticks)])
