"""Training by one recipe: perception first (words and hands alone), then whole scenes; resumable, with a CSV of its progress."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from device.positions import clock_features, rope_table
from export.distill.corpus import Corpus, load_corpus
from export.distill.losses import Auxiliary, SpeechTarget, perception_loss, scene_loss
from export.distill.model import TickModel
from export.distill.recipe import Recipe, Stage
from export.distill.scenes import hand_frames, make_scene, word_windows
from export.distill.voice import render_words

RESUME_EVERY_S = 120.0
LOG_EVERY = 25  # steps; the dev people are looked at every fourth time
HELD_OUT_BATCHES = 4
EMA = 0.998
STAGES = ("perception", "scenes")

Loss = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Batches(IterableDataset[dict[str, Tensor]]):
    """Endless batches made in a worker process; worker and seed decide what they hold."""

    def __init__(self, corpus: Corpus, recipe: Recipe, stage: str, seed: int) -> None:
        self.corpus, self.recipe, self.stage, self.seed = corpus, recipe, stage, seed
        self.words = render_words(recipe.model.text.words[1:])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            torch.set_num_threads(1)
            os.nice(5)
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        make = self._perception if self.stage == "perception" else self._scenes
        while True:
            yield {k: torch.from_numpy(v) for k, v in make(rng).items()}

    def _perception(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        c, n = self.recipe.model, self.recipe.perception.batch
        mic, word, end_tick = word_windows(self.corpus, rng, n, c)
        frames, hand = hand_frames(self.corpus, rng, n, c)
        return {
            "mic": mic,
            "word": word.astype(np.int64),
            "end_tick": end_tick.astype(np.int64),
            "frames": frames,
            "hand": hand.astype(np.int64),
        }

    def _scenes(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        c = self.recipe.model
        made = [make_scene(self.corpus, self.words, rng, c, self.recipe.ticks) for _ in range(self.recipe.scenes.batch)]
        names = [name for name in vars(made[0]) if name not in ("start_tick", "echo", "events")]
        batch = {name: np.stack([getattr(s, name) for s in made]) for name in names}
        ticks = np.array([s.start_tick for s in made])[:, None] + np.arange(self.recipe.ticks)
        return batch | {"clock": clock_features(c, ticks), "rope": rope_table(c, ticks)}


class Optimizer:
    """Muon on the matrices of the blocks and the hMLP, AdamW on the rest, and an exponential average of the weights."""

    def __init__(self, modules: nn.Module, stage: Stage) -> None:
        matrices = [p for n, p in modules.named_parameters() if p.ndim == 2 and any(s in n for s in ("perceive.", "present.", "hmlp."))]
        chosen = {id(p) for p in matrices}
        rest = [p for p in modules.parameters() if id(p) not in chosen and p.requires_grad]
        self.stage, self.step = stage, 0
        self.muon = torch.optim.Muon(matrices, lr=stage.muon_lr, momentum=0.95, weight_decay=0.01)
        self.adam = torch.optim.AdamW(rest, lr=stage.adam_lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.weights = list(modules.parameters())
        self.average = [p.detach().clone() for p in self.weights]

    def update(self) -> None:
        left = 1 - self.step / self.stage.steps
        factor = min(1.0, (self.step + 1) / 50, max(left, 0.0) / self.stage.decay)
        for optimizer, lr in ((self.muon, self.stage.muon_lr), (self.adam, self.stage.adam_lr)):
            optimizer.param_groups[0]["lr"] = lr * factor
        torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        self.muon.step()
        self.adam.step()
        self.muon.zero_grad()
        self.adam.zero_grad()
        self.step += 1
        torch._foreach_lerp_(self.average, [p.detach() for p in self.weights], max(1 - EMA, 1 / (self.step + 1)))

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "muon": self.muon.state_dict(), "adam": self.adam.state_dict(), "average": self.average}

    def load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        for mine, theirs in zip(self.average, state["average"], strict=True):
            mine.copy_(theirs)


class Trainer:
    """A training under way: the model, its auxiliary heads, its people, and the folder it can go on from."""

    def __init__(self, recipe: Recipe, data: Path, work: Path, compiled: bool) -> None:
        work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(recipe.seed)
        self.recipe, self.compiled, self.resume_path = recipe, compiled, work / "resume.pt"
        self.people, self.dev = (load_corpus(data, split, work / "synthetic") for split in ("train", "dev"))
        self.model, self.heads = TickModel(recipe.model), Auxiliary(recipe.model)
        self.modules = nn.ModuleDict({"model": self.model, "heads": self.heads})
        target = SpeechTarget(recipe.model)
        self.losses: dict[str, Loss] = {
            "perception": lambda batch: perception_loss(self.model, self.heads, batch),
            "scenes": lambda batch: scene_loss(self.model, self.heads, target, batch),
        }
        self.log = _Log(work / "progress.csv")

    def run(self) -> TickModel:
        """All stages that are not done yet; the model with its averaged weights."""
        saved: dict[str, Any] = torch.load(self.resume_path) if self.resume_path.exists() else {"stage": 0}
        if "modules" in saved:
            self.modules.load_state_dict(saved["modules"])
        for number in range(saved["stage"], len(STAGES)):
            optimizer = Optimizer(self.modules, getattr(self.recipe, STAGES[number]))
            if number == saved["stage"] and "optimizer" in saved:
                optimizer.load(saved["optimizer"])
            self._run_stage(number, optimizer)
            _swap(self.modules, optimizer.average)
            self._save({"stage": number + 1})
        return self.model

    def _run_stage(self, number: int, optimizer: Optimizer) -> None:
        name = STAGES[number]
        seed = self.recipe.seed * 1000 + number * 100 + optimizer.step  # a resumed run goes on with fresh scenes
        batches = iter(DataLoader(Batches(self.people, self.recipe, name, seed), batch_size=None, num_workers=1, prefetch_factor=6))
        dev_batches = iter(Batches(self.dev, self.recipe, name, 1))
        held_out = [next(dev_batches) for _ in range(HELD_OUT_BATCHES)]
        loss = torch.compile(self.losses[name]) if self.compiled else self.losses[name]
        first, started = optimizer.step, time.monotonic()
        saved, sums = started, dict.fromkeys(_Log.LOSSES, 0.0)
        while optimizer.step < optimizer.stage.steps:
            with torch.autocast("cpu", torch.bfloat16):
                values = loss(next(batches))
            values["loss"].backward()
            optimizer.update()
            for key, value in values.items():
                sums[key] += value.item() / LOG_EVERY
            now, step = time.monotonic(), optimizer.step
            if step % LOG_EVERY == 0:
                left_s = (now - started) / (step - first) * (optimizer.stage.steps - step)
                row = {"stage": name, "step": step, "minutes": round((now - started) / 60, 2), "left_minutes": round(left_s / 60, 1)}
                row |= {key: round(sums[key], 4) for key in values}
                if step % (4 * LOG_EVERY) == 0:
                    row |= {f"dev_{key}": round(value, 4) for key, value in self._evaluate(name, optimizer, held_out).items()}
                self.log.write(row)
                sums = dict.fromkeys(sums, 0.0)
            if now - saved > RESUME_EVERY_S:
                saved = now
                self._save({"stage": number, "optimizer": optimizer.state()})

    @torch.no_grad()
    def _evaluate(self, stage: str, optimizer: Optimizer, held_out: list[dict[str, Tensor]]) -> dict[str, float]:
        """Losses and accuracies of the averaged weights on the dev people, teacher-forced."""
        _swap(self.modules, optimizer.average)
        with torch.autocast("cpu", torch.bfloat16):
            results = [self.losses[stage](batch) for batch in held_out]
        _swap(self.modules, optimizer.average)
        return {key: sum(r[key].item() for r in results) / len(results) for key in results[0]}

    def _save(self, state: dict[str, Any]) -> None:
        scratch = self.resume_path.with_suffix(".tmp")
        torch.save(state | {"modules": self.modules.state_dict()}, scratch)
        os.replace(scratch, self.resume_path)


@torch.no_grad()
def _swap(modules: nn.Module, others: list[Tensor]) -> None:
    """Exchange the parameters of `modules` with `others`."""
    for weight, other in zip(modules.parameters(), others, strict=True):
        kept = weight.clone()
        weight.copy_(other)
        other.copy_(kept)


def train(recipe: Recipe, data: Path, work: Path, compiled: bool = True) -> TickModel:
    """Run the recipe on the training people below `data`, from where `work/resume.pt` left off; the model with averaged weights.

    `work/progress.csv` gets a row every 25 steps.
    """
    return Trainer(recipe, data, work, compiled).run()


class _Log:
    """A CSV with one row per report; the same goes to the terminal."""

    LOSSES = ("loss", "say", "act", "flow", "word", "hand", "say_hit", "act_hit", "false")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = ["stage", "step", "minutes", "left_minutes", *self.LOSSES, *(f"dev_{name}" for name in self.LOSSES)]
        if not path.exists():
            with path.open("w", newline="") as f:
                csv.writer(f).writerow(self.columns)

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", newline="") as f:
            csv.DictWriter(f, self.columns, restval="").writerow(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
