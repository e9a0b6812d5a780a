"""Training by one recipe: perception first (words and hands alone), then scenes, then the voice; resumable, with a CSV of its progress."""

from __future__ import annotations

import copy
import csv
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from export.distill.batches import Batch, Batches
from export.distill.corpus import load_corpus
from export.distill.losses import Auxiliary, SpeechTarget, perception_loss, practice_loss, scene_loss, voice_loss
from export.distill.model import TickModel, mixed_precision
from export.distill.muon import Muon
from export.distill.recipe import Recipe, RecipeError, Stage
from export.distill.teacher import HEADS_NAME, Teacher, grow, load_weights

RESUME_EVERY_S = 120.0
LOG_EVERY = 25  # steps; the dev people are looked at every fourth time
HELD_OUT_BATCHES = 4
EMA = 0.998

Loss = Callable[[Batch], dict[str, Tensor]]


class Source(NamedTuple):
    """What is trained on: the training people of a corpus folder, scenes from shards (a glob pattern) in place of our own, or both.

    `start` is a checkpoint folder whose weights are gone on from, in place of random ones; the model may have more present layers.
    """

    data: Path | None
    shards: str | None = None
    start: Path | None = None


class Processes(NamedTuple):
    """The processes that train together, as torchrun starts them: each on scenes of its own, with one average of their gradients."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls) -> Processes:
        """Meet the others; alone when torchrun did not start this process. A GPU is used where there is one."""
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        if "RANK" not in os.environ:
            return cls(0, 1, device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all of them are here."""
        if self.size > 1:
            dist.barrier()

    def average(self, weights: Sequence[Tensor]) -> None:
        """Give every process the mean of all gradients."""
        if self.size > 1:
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            parts = (flat / self.size).split([gradient.numel() for gradient in gradients])
            for gradient, mean in zip(gradients, parts, strict=True):
                gradient.copy_(mean.view_as(gradient))


class Optimizer:
    """Muon on the matrices of the blocks and the hMLP, where they learn, AdamW on the rest, and an exponential average of the weights."""

    def __init__(self, modules: nn.Module, stage: Stage) -> None:
        learning = [(n, p) for n, p in modules.named_parameters() if p.requires_grad]
        matrices = [p for n, p in learning if p.ndim == 2 and any(s in n for s in ("perceive.", "present.", "hmlp."))]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in learning if id(p) not in chosen]
        self.stage, self.step, self.rest = stage, 0, rest
        self.rates = {"adam": stage.adam_lr}
        self.optimizers: dict[str, torch.optim.Optimizer] = {"adam": torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01)}
        if matrices:
            self.rates["muon"] = stage.muon_lr
            self.optimizers["muon"] = Muon(matrices, stage.muon_lr, momentum=0.95, weight_decay=0.01)
        self.weights = list(modules.parameters())
        self.average = [p.detach().clone() for p in self.weights]

    def gradients_are_numbers(self) -> bool:
        """Whether an update would leave weights that can be used."""
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        return bool(torch.nn.utils.get_total_norm(gradients).isfinite())

    def update(self) -> None:
        left = 1 - self.step / self.stage.steps
        factor = min(1.0, (self.step + 1) / 50, max(left, 0.0) / self.stage.decay)
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = self.rates[name] * factor
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        torch._foreach_lerp_(self.average, [p.detach() for p in self.weights], max(1 - EMA, 1 / (self.step + 1)))

    def state(self) -> dict[str, Any]:
        own = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return own | {"step": self.step, "average": self.average}

    def load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
        for mine, theirs in zip(self.average, state["average"], strict=True):
            mine.copy_(theirs)


class Trainer:
    """A training under way: the model, its auxiliary heads, its people, and the folder it can go on from."""

    def __init__(self, recipe: Recipe, source: Source, work: Path, teacher: Path | None, processes: Processes, compiled: bool) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.recipe, self.processes, self.compiled, self.resume_path = recipe, processes, compiled, work / "resume.pt"
        self.shards, self.people, self.dev = source.shards, None, None
        if source.data is not None:
            if not processes.first:  # made voices are kept in files: one process makes them for all
                processes.wait()
            self.people, self.dev = load_corpus(source.data, "train", work / "voices", recipe.people), load_corpus(source.data, "dev")
            if processes.first:
                processes.wait()
        elif recipe.practice or source.shards is None or any(stage.learns == "perception" and stage.steps for stage in recipe.stages):
            asked = f"{recipe.name}: the stages of perception and the field practice ask for recordings"
            raise RecipeError(f"{asked}; give --data, or set their steps and practice to 0 and give --scenes")
        torch.manual_seed(recipe.seed)
        self.model, self.heads = TickModel(recipe.model), Auxiliary(recipe.model)
        if source.start is not None:
            grow(self.model, source.start)
            load_weights(self.heads, source.start / HEADS_NAME)
        self.teacher = Teacher.read(teacher, recipe.model).to(processes.device, compiled) if teacher is not None else None
        self.before = self.model  # in a stage that keeps what is present: the weights before it
        self.actor = copy.deepcopy(self.model).eval()
        self.actor.share_memory()  # with the workers, which play scenes again with the weights of the moment
        self.modules = nn.ModuleDict({"model": self.model, "heads": self.heads}).to(processes.device)
        target = SpeechTarget(recipe.model).to(processes.device)
        self.losses: dict[str, Loss] = {
            "perception": lambda batch: perception_loss(self.model, self.heads, batch),
            "practice": lambda batch: practice_loss(self.model, self.heads, self.before, batch),
            "scenes": lambda batch: scene_loss(self.model, self.heads, target, batch),
            "voice": lambda batch: voice_loss(self.model, target, batch),
        }
        self.log = _Log(work / "progress.csv") if processes.first else None

    def run(self, until: int) -> None:
        """All of the first `until` stages that are not done yet; leaves the averaged weights in the model."""
        saved: dict[str, Any] = {"stage": 0}
        if self.resume_path.exists():
            saved = torch.load(self.resume_path, map_location=self.processes.device)
        if "modules" in saved:
            self.modules.load_state_dict(saved["modules"])
        if saved == {"stage": 0}:
            self._keep(0)
        for number in range(saved["stage"], len(self.recipe.stages)):
            for earlier in self._asked(number):
                if earlier <= saved["stage"] and not self._kept(earlier).is_file():
                    reason = (
                        f"stage {number + 1} goes back to stage {earlier}, whose weights were not kept when it ended, with another recipe"
                    )
                    remedy = "train in a new folder (--work), or leave its fields stages.joins and stages.keeps out"
                    raise RecipeError(f"{self._kept(earlier)}: {reason}; {remedy}")
        self.processes.wait()  # until all have read it
        for number in range(saved["stage"], until):
            self._choose(self.recipe.stages[number])
            optimizer = Optimizer(self.modules, self.recipe.stages[number])
            if number == saved["stage"] and "optimizer" in saved:
                optimizer.load(saved["optimizer"])
            self._run_stage(number, optimizer)
            _swap(self.modules, optimizer.average)
            self._join(number + 1)
            self._save({"stage": number + 1})

    def _choose(self, stage: Stage) -> None:
        """What learns in a stage."""
        m = self.model
        if stage.keeps == "present":
            m.requires_grad_(False)
            nn.ModuleList([m.audio, m.video, *m.perceive, self.heads]).requires_grad_()
            return
        self.modules.requires_grad_(stage.learns != "voice")
        if stage.keeps == "perceiving":
            nn.ModuleList([m.audio, m.video, m.text, *m.perceive[:-1]]).requires_grad_(False)
        m.flow.requires_grad_()

    def _join(self, number: int) -> None:
        """After stage `number`, the first being 1: the mean with an earlier one's weights."""
        joins = self.recipe.stages[number - 1].joins
        if joins is not None:
            earlier = self._after(joins)
            self.modules.load_state_dict({name: torch.lerp(value, earlier[name], 0.5) for name, value in self.modules.state_dict().items()})
        self._keep(number)

    def _asked(self, number: int) -> set[int]:
        """After which stages the weights were that stage `number`, the first being 0, goes back to; 0 are those that were begun with."""
        stage = self.recipe.stages[number]
        held_to = number if stage.keeps == "present" else None
        return {earlier for earlier in (held_to, stage.joins) if earlier is not None}

    def _keep(self, number: int) -> None:
        """Keep the weights after stage `number` where they are asked for later."""
        if self.processes.first and any(number in self._asked(later) for later in range(number, len(self.recipe.stages))):
            torch.save(self.modules.state_dict(), self._kept(number))
        self.processes.wait()

    def _kept(self, number: int) -> Path:
        return self.resume_path.with_name(f"stage-{number}.pt")

    def _after(self, number: int) -> dict[str, Tensor]:
        return cast("dict[str, Tensor]", torch.load(self._kept(number), map_location=self.processes.device))

    def _run_stage(self, number: int, optimizer: Optimizer) -> None:
        stage = optimizer.stage
        if stage.steps == 0:
            return
        name: str = "practice" if stage.keeps == "present" else stage.learns
        if name == "practice":
            self.before = copy.deepcopy(self.model).eval().requires_grad_(False)
            self.before.load_state_dict(
                {key.removeprefix("model."): value for key, value in self._after(number).items() if key.startswith("model.")}
            )
        device, cpu = self.processes.device, self.processes.device.type == "cpu"
        seed = (self.recipe.seed * 100 + number) * 100_000 + optimizer.step  # a resumed run goes on with fresh scenes
        torch.manual_seed(seed + self.processes.rank)
        part = self.processes.rank, self.processes.size
        source = Batches(self.people, self.recipe, stage, [seed, part[0]], self.actor, self.shards, part)
        workers = 2 if cpu else max((os.cpu_count() or 2) - 1, 1)
        batches = iter(DataLoader(source, batch_size=None, num_workers=workers, prefetch_factor=6))
        held_out: list[Batch] = []
        if self.log and self.dev is not None:
            dev_batches = iter(Batches(self.dev, self.recipe, stage, [1]))
            held_out = [_moved(next(dev_batches), device) for _ in range(HELD_OUT_BATCHES)]
        loss = torch.compile(self.losses[name], dynamic=False) if self.compiled else self.losses[name]
        first, started = optimizer.step, time.monotonic()
        saved, logged, sums = started, first, dict.fromkeys(_Log.LOSSES, 0.0)
        while optimizer.step < stage.steps:
            if optimizer.step % LOG_EVERY == 0:
                self.actor.load_state_dict(self.model.state_dict())
            batch = _moved(next(batches), device)
            if self.teacher is not None and name in ("perception", "scenes"):  # of the rest it has no opinion
                batch = self.teacher.teaches(batch)
            with mixed_precision(device.type):
                values = loss(batch)
            values["loss"].backward()
            self.processes.average(optimizer.weights)
            if not optimizer.gradients_are_numbers():
                where = f"{self.recipe.name}: step {optimizer.step + 1} of stage {number + 1}"
                remedy = f"lower its muon_lr and adam_lr in the recipe, then start it again: {self.resume_path} has weights from before"
                raise RecipeError(f"{where} has gradients that are no numbers; {remedy}")
            optimizer.update()
            for key, value in values.items():
                sums[key] += value.item()
            now, step = time.monotonic(), optimizer.step
            if step % LOG_EVERY == 0:
                left_s = (now - started) / (step - first) * (stage.steps - step)
                row: dict[str, Any] = {"stage": stage.learns, "step": step}
                row |= {"minutes": round((now - started) / 60, 2), "left_minutes": round(left_s / 60, 1)}
                row |= {key: round(sums[key] / (step - logged), 4) for key in values}  # fewer than LOG_EVERY after a resumption
                if held_out and step % (4 * LOG_EVERY) == 0:
                    row |= {f"dev_{key}": round(value, 4) for key, value in self._evaluate(name, optimizer, held_out).items()}
                if self.log:
                    self.log.write(row)
                logged, sums = step, dict.fromkeys(sums, 0.0)
            if now - saved > RESUME_EVERY_S:
                saved = now
                self._save({"stage": number, "optimizer": optimizer.state()})

    @torch.no_grad()
    def _evaluate(self, stage: str, optimizer: Optimizer, held_out: list[Batch]) -> dict[str, float]:
        """Losses and accuracies of the averaged weights on the dev people, teacher-forced."""
        _swap(self.modules, optimizer.average)
        self.modules.eval()
        with mixed_precision(self.processes.device.type):
            results = [self.losses[stage](batch) for batch in held_out]
        self.modules.train()
        _swap(self.modules, optimizer.average)
        return {key: sum(r[key].item() for r in results) / len(results) for key in results[0]}

    def _save(self, state: dict[str, Any]) -> None:
        if self.processes.first:
            scratch = self.resume_path.with_suffix(".tmp")
            torch.save(state | {"modules": self.modules.state_dict()}, scratch)
            os.replace(scratch, self.resume_path)


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {name: _moved(value, device) if isinstance(value, dict) else value.to(device) for name, value in batch.items()}


@torch.no_grad()
def _swap(modules: nn.Module, others: list[Tensor]) -> None:
    """Exchange the parameters of `modules` with `others`."""
    for weight, other in zip(modules.parameters(), others, strict=True):
        kept = weight.clone()
        weight.copy_(other)
        other.copy_(kept)


def train(
    recipe: Recipe, source: Source, work: Path, teacher: Path | None = None, compiled: bool = True, until: int | None = None
) -> tuple[TickModel, Auxiliary]:
    """Run the recipe, or its stages up to number `until`, from where `work/resume.pt` left off; model and heads with averaged weights.

    With `teacher`, a checkpoint folder, its probabilities are half of what is learned. `work/progress.csv` gets a row every 25
    steps. Started by torchrun, several processes train together; on several machines they need `work` on a shared disk.
    """
    trainer = Trainer(recipe, source, work, teacher, Processes.join(), compiled)
    trainer.run(len(recipe.stages) if until is None else until)
    return trainer.model.cpu(), trainer.heads.cpu()


class _Log:
    """A CSV with one row per report; the same goes to the terminal."""

    LOSSES = ("loss", "say", "act", "flow", "word", "hand", "say_hit", "act_hit", "false", "drift")

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
