"""Batches to train on, made while training runs: words and hands alone, and whole scenes, generated or read from shards."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from device.config import ModelConfig
from device.positions import clock_features, rope_table
from export.distill.corpus import Corpus
from export.distill.model import TickModel, mixed_precision
from export.distill.recipe import Recipe, Stage
from export.distill.scenes import Scene, chatter, hand_frames, make_scene, replay, word_windows
from export.distill.shards import endless_scenes
from export.spoken_words import render_words

Batch = dict[str, Any]  # tensors by name; "practice" is a batch of words and hands alone


class Batches(IterableDataset[Batch]):
    """Endless batches made in worker processes; seed, process and worker decide what they hold.

    With `actor`, a model in shared memory that the trainer keeps up to date, a part of the scenes is played again as that model
    would have gone on in them: scheduled sampling (Bengio et al. 2015, arXiv 1506.03099) in two passes (Mihaylova & Martins
    2019, arXiv 1906.07651). With `shards`, a glob pattern, scenes are read instead of made; `part` is the number of this process
    and how many there are.
    """

    def __init__(
        self,
        corpus: Corpus | None,
        recipe: Recipe,
        stage: Stage,
        seed: list[int],
        actor: TickModel | None = None,
        shards: str | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.corpus, self.recipe, self.stage, self.seed, self.actor = corpus, recipe, stage, seed, actor
        self.shards, self.part = shards, part
        self.words = render_words(recipe.model.text.words[1:])

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            torch.set_num_threads(1)
            os.nice(5)
            _give_memory_back()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        rng = np.random.default_rng([*self.seed, number])
        if self.stage.learns == "perception" and self.stage.keeps is None:
            while True:
                yield self._perception(rng, self.stage.batch)
        elif self.shards is None:
            while True:
                yield self._with_practice(self._scenes(rng), rng)
        else:
            first, processes = self.part
            scenes = endless_scenes(self.shards, self.recipe.model, rng, first * workers + number, processes * workers)
            while True:
                read = [next(scenes) for _ in range(self._count)]
                yield self._with_practice(scene_batch(read, self.recipe.model), rng)

    @property
    def _count(self) -> int:
        """Scenes in a batch."""
        return 1 if self.stage.learns == "perception" else self.stage.batch

    @property
    def _practice(self) -> int:
        """Windows with words that come along with them, and as many hands, unless the stage says how many."""
        if self.stage.learns == "perception":
            return self.stage.batch
        return 0 if self.stage.keeps or self.stage.learns == "voice" else self.recipe.practice

    def _perception(self, rng: np.random.Generator, n: int) -> Batch:
        c = self.recipe.model
        assert self.corpus is not None
        mic, voice, word = word_windows(self.corpus, self.words, rng, n, c)
        frames, hand = hand_frames(self.corpus, rng, self.stage.hands or n, c)
        return tensors(
            {
                "mic": mic,
                "voice": voice,
                "word": word.astype(np.int64),
                "frames": frames,
                "hand": hand.astype(np.int64),
            }
        )

    def _with_practice(self, batch: Batch, rng: np.random.Generator) -> Batch:
        return batch | {"practice": self._perception(rng, self._practice)} if self._practice else batch

    def _scenes(self, rng: np.random.Generator) -> Batch:
        c = self.recipe.model
        assert self.corpus is not None
        made = [make_scene(self.corpus, self.words, rng, c, self.stage.ticks or self.recipe.ticks) for _ in range(self._count)]
        return scene_batch([self._played(scene, rng).arrays for scene in made], c)

    def _played(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """The scene, or sometimes the same with another companion in it."""
        if rng.random() < self.stage.chatter:
            return chatter(scene, self.recipe.model, rng)
        if self.actor is not None and self.stage.learns != "perception" and rng.random() < self.recipe.replays:
            return self._replayed(scene, rng)
        return scene

    def _replayed(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """The scene with the actor's own choices in its past, once it has learned to make the better part of them."""
        assert self.actor is not None
        with torch.no_grad(), mixed_precision("cpu"):
            say, act = self.actor.choices(scene_batch([scene.arrays], self.recipe.model))
        say_now, act_now = say[0, :, 0].numpy(), act[0, :, 0].numpy()
        wanted = (scene.say_target > 0) | (scene.act_target > 0)
        right = (scene.say_target == say_now) & (scene.act_target == act_now)
        if wanted.any() and right[wanted].mean() < 0.5:
            return scene
        return replay(scene, self.recipe.model, say_now, act_now, rng)


def _give_memory_back(after_ms: int = 10_000) -> None:
    """Where jemalloc keeps freed blocks for ever, as the trainer wants it, this process would grow until there is no memory left."""
    mallctl = getattr(ctypes.CDLL(None), "mallctl", None)
    if mallctl is None:
        return
    arenas, value = ctypes.c_uint(), ctypes.c_ssize_t(after_ms)
    mallctl(b"arenas.narenas", ctypes.byref(arenas), ctypes.byref(ctypes.c_size_t(ctypes.sizeof(arenas))), None, 0)
    for where in ("arenas", *(f"arena.{i}" for i in range(arenas.value))):
        for kind in ("dirty", "muzzy"):  # one that nothing was taken from yet is refused, and follows the first
            mallctl(f"{where}.{kind}_decay_ms".encode(), None, None, ctypes.byref(value), ctypes.sizeof(value))


def scene_batch(scenes: list[dict[str, np.ndarray]], c: ModelConfig) -> Batch:
    """The arrays of scenes of one length as the model takes them."""
    batch = {name: np.stack([scene[name] for scene in scenes]) for name in scenes[0]}
    # Not bool: compiled for a CPU, padding a tensor of bools reads up to 16 bytes in front of it (PyTorch 2.13), now and then another page.
    valid = (~batch["lost"]).astype(np.int64)
    return tensors(batch | {"clock": clock_features(c, batch["tick"]), "rope": rope_table(c, batch["tick"]), "valid": valid})


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The same arrays as tensors."""
    return {name: torch.from_numpy(value) for name, value in arrays.items()}
