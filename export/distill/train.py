"""Training by one recipe: perception first (words and hands alone), then whole scenes; resumable, with a CSV of its progress."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from device.config import ModelConfig
from device.positions import clock_features, rope_table
from export.distill import scenes as scenes_module
from export.distill.corpus import Corpus, load_corpus
from export.distill.model import RMSNorm, TickModel, attend_windowed, blocks
from export.distill.voice import render_words, word_mels
from export.voice_tables import SILENCE

EVENT_WEIGHT = 2.0  # of a tick in which something is said or done; 3 fires falsely (measured on the prototype)
SILENT_WEIGHT = 0.1  # of a silent token in the flow loss
IGNORE = scenes_module.IGNORE  # a label that nobody could give
RESUME_EVERY_S = 120.0
LOG_EVERY = 25
EMA = 0.998

_T = TypeVar("_T")


@dataclass(frozen=True)
class Stage:
    """One stage: `batch` scenes (or words and as many hands), Muon and AdamW learning rates, linear decay at the end."""

    steps: int
    batch: int
    muon_lr: float
    adam_lr: float
    decay: float = 0.6  # fraction of the steps over which the rates fall to zero


@dataclass(frozen=True)
class Recipe:
    """What `copresence-export train` reads: the model's configuration and the two stages."""

    name: str
    seed: int
    ticks: int  # length of a scene
    model: ModelConfig
    perception: Stage
    scenes: Stage
    vocoder_minutes: float  # one thread
    say_margin: float = 0.0  # by how much a word must beat "nothing", in logits; chosen on the dev people
    act_margin: float = 0.0

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read the JSON file at `path`."""
        raw = json.loads(path.read_text())
        text = {"words": scenes_module.WORDS, "acts": scenes_module.ACTS}
        model = ModelConfig.from_dict(raw.pop("model") | {"text": text})
        return cls(model=model, perception=Stage(**raw.pop("perception")), scenes=Stage(**raw.pop("scenes")), **raw)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready copy with the whole configuration."""
        return dataclasses.asdict(self) | {"model": self.model.to_dict()}


class Auxiliary(nn.Module):
    """Heads that exist in training only: which word just ended, which hand is shown, read from the perception tokens."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        width = c.trunk.width
        self.word_norm, self.hand_norm = RMSNorm(c.audio_tokens * width), RMSNorm(width)
        self.word = nn.Linear(c.audio_tokens * width, 12)
        self.hand = nn.Linear(width, 11)

    def words(self, audio: Tensor) -> Tensor:
        """Audio tokens [..., audio_tokens, width] to logits [..., 12]: none, the corpus' ten words, another word."""
        return self.word(self.word_norm(audio.flatten(-2)))

    def hands(self, video: Tensor) -> Tensor:
        """Video tokens [..., video_tokens, width] to logits [..., 11]: none, digits 0 to 9."""
        return self.hand(self.hand_norm(video.mean(-2)))


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
        mic, word, end_tick = scenes_module.word_windows(self.corpus, rng, n, c)
        frames, hand = scenes_module.hand_frames(self.corpus, rng, n, c)
        return {
            "mic": mic,
            "word": word.astype(np.int64),
            "end_tick": end_tick.astype(np.int64),
            "frames": frames,
            "hand": hand.astype(np.int64),
        }

    def _scenes(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        c = self.recipe.model
        made = [scenes_module.make_scene(self.corpus, self.words, rng, c, self.recipe.ticks) for _ in range(self.recipe.scenes.batch)]
        names = [f.name for f in dataclasses.fields(made[0]) if f.name not in ("start_tick", "echo", "events")]
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


def perceive_kind(model: TickModel, tokens: Tensor, rope: Tensor) -> Tensor:
    """One kind of perception token alone, [B, T, n, width], through all perceiving layers but the last: what it is in a whole scene too."""
    valid = torch.ones(tokens.shape[:2], dtype=torch.bool)
    for block in blocks(model.perceive)[:-1]:
        q, k, v = block.keys_values(tokens, rope)
        tokens = block.finish(tokens, attend_windowed(q, k, v, valid, model.config.trunk.perceive_window))
    return tokens


def perception_loss(model: TickModel, heads: Auxiliary, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses and accuracies of the first stage."""
    c = model.config
    n, ticks = batch["mic"].shape[0], (batch["mic"].shape[1] - c.context_samples) // c.tick_samples
    rope = torch.from_numpy(rope_table(c, np.arange(ticks)))
    audio = model.audio(batch["mic"], torch.zeros_like(batch["mic"]), ticks)
    audio = perceive_kind(model, audio, rope[:, : c.audio_tokens].expand(n, -1, -1, -1, -1))
    words = heads.words(audio[torch.arange(n), batch["end_tick"]])
    video = model.video(batch["frames"][:, None], torch.zeros(n, 1, 1))
    hands = heads.hands(
        perceive_kind(model, video, rope[:1, c.audio_tokens : c.audio_tokens + c.video_tokens].expand(n, -1, -1, -1, -1))[:, 0]
    )
    pairs = ((words.float(), batch["word"]), (hands.float(), batch["hand"]))
    return {
        "loss": torch.stack([F.cross_entropy(x, label, ignore_index=IGNORE, label_smoothing=0.05) for x, label in pairs]).sum(),
        "word": _accuracy(*pairs[0]),
        "hand": _accuracy(*pairs[1]),
    }


class SpeechTarget:
    """Which mel frames belong to which tick, given the words that were begun."""

    def __init__(self, c: ModelConfig) -> None:
        mels = word_mels(c.text.words[1:], c.mel_frames)
        frames, channels = c.mel_frames, c.voice.mel_channels
        self.longest = max(len(m) for m in mels.values()) // frames
        table = np.full((len(c.text.words), self.longest * frames, channels), SILENCE, dtype=np.float32)
        self.lengths = torch.zeros(len(c.text.words), dtype=torch.long)
        for i, word in enumerate(c.text.words):
            if i:
                table[i, : len(mels[word])] = mels[word]
                self.lengths[i] = len(mels[word]) // frames
        self.table = torch.from_numpy(table).reshape(
            len(c.text.words), self.longest, c.trunk.summary_tokens, frames // c.trunk.summary_tokens * channels
        )

    def __call__(self, say: Tensor) -> tuple[Tensor, Tensor]:
        """say i64[B, T] to mel f32[B, T, summary_tokens, flow_dim] and bool[B, T], true where a word sounds."""
        word, phase = torch.zeros_like(say), torch.zeros_like(say)
        for t in range(say.shape[1]):
            if t:
                word[:, t], phase[:, t] = word[:, t - 1], phase[:, t - 1] + 1
            begins = say[:, t] > 0
            word[:, t] = torch.where(begins, say[:, t], word[:, t])
            phase[:, t] = torch.where(begins, 0, phase[:, t])
        sounds = phase < self.lengths[word]
        return self.table[torch.where(sounds, word, 0), torch.where(sounds, phase, 0)], sounds


def scene_loss(model: TickModel, heads: Auxiliary, target: SpeechTarget, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses of the second stage: what to say and do, the speech itself, and the auxiliary heads."""
    c = model.config
    scene = batch | {"valid": ~batch["lost"]}
    probe: list[Tensor] = []
    x, _ = model.perceive_scene(model.embed(scene), scene["rope"], scene["valid"], probe)
    top, _ = model.present_scene(x, scene["rope"], scene["valid"])
    say, act = (logits.float() for logits in model.logits(top))

    heard = scene["valid"].float()
    first, rest = say[..., 0, :], say[..., 1:, :]
    say_loss = _events(first, batch["say_target"].long(), batch["say_weight"] * heard)
    act_loss = _events(act, batch["act_target"].long(), batch["act_weight"] * heard)
    rest_loss = -rest.log_softmax(-1)[..., 0].mean()

    mel, sounds = target(batch["say_now"][..., 0].long())
    conditions = model.flow.conditions(top, batch["say_now"].long())
    weight = torch.where(sounds, 1.0, SILENT_WEIGHT)[..., None] * heard[..., None]
    flow_loss = (model.flow.loss(conditions.float(), mel) * weight).sum() / (weight.sum() * c.trunk.summary_tokens)

    a = c.audio_tokens
    words, hands = heads.words(probe[0][:, :, :a]).float(), heads.hands(probe[0][:, :, a : a + c.video_tokens]).float()
    word_label, hand_label = (torch.where(scene["valid"], batch[k].long(), IGNORE) for k in ("word_label", "hand_label"))
    weights = torch.ones(12)
    weights[0] = 0.2  # most ticks end no word
    word_loss = F.cross_entropy(words.flatten(0, 1), word_label.flatten(), weight=weights, ignore_index=IGNORE)
    hand_loss = F.cross_entropy(hands.flatten(0, 1), hand_label.flatten(), ignore_index=IGNORE)
    return {
        "loss": 4 * (say_loss + act_loss + rest_loss) + flow_loss + 0.5 * (word_loss + hand_loss),
        "say": say_loss,
        "act": act_loss,
        "flow": flow_loss,
        "word": _accuracy(words, word_label),
        "hand": _accuracy(hands, hand_label),
        "say_hit": _accuracy(first, torch.where(batch["say_weight"] > 0, batch["say_target"].long(), 0)),
        "act_hit": _accuracy(act, torch.where(batch["act_weight"] > 0, batch["act_target"].long(), 0)),
        "false": ((first.argmax(-1) > 0) & (batch["say_target"] == 0) & (batch["say_weight"] > 0)).float().mean()
        + ((act.argmax(-1) > 0) & (batch["act_target"] == 0) & (batch["act_weight"] > 0)).float().mean(),
    }


def _events(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    weight = weight * torch.where(target > 0, EVENT_WEIGHT, 1.0)
    return (F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none") * weight.flatten()).sum() / weight.sum()


def _accuracy(logits: Tensor, label: Tensor) -> Tensor:
    asked = label > 0
    return ((logits.argmax(-1) == label) & asked).float().sum() / asked.float().sum().clamp_min(1)


def train(recipe: Recipe, data: Path, out: Path, compiled: bool = True) -> TickModel:
    """Run the recipe on the training people below `data`; `out` receives progress.csv, resume.pt and, at the end, average.pt.

    Training goes on where `out/resume.pt` left off. Returns the model with its averaged weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    corpus, dev = (load_corpus(data, split, out / "synthetic") for split in ("train", "dev"))
    model, heads = TickModel(recipe.model), Auxiliary(recipe.model)
    target = SpeechTarget(recipe.model)
    resume = torch.load(out / "resume.pt") if (out / "resume.pt").exists() else None
    if resume:
        model.load_state_dict(resume["model"])
        heads.load_state_dict(resume["heads"])
    both = nn.ModuleDict({"model": model, "heads": heads})
    losses = {
        "perception": lambda batch: perception_loss(model, heads, batch),
        "scenes": lambda batch: scene_loss(model, heads, target, batch),
    }
    for number, name in enumerate(("perception", "scenes")):
        if resume and resume["stage"] > number:
            continue
        stage: Stage = getattr(recipe, name)
        optimizer = Optimizer(both, stage)
        if resume and resume["stage"] == number and "optimizer" in resume:
            optimizer.load(resume["optimizer"])
        _run_stage(recipe, name, number, stage, both, optimizer, losses[name], corpus, dev, out, compiled)
        for weight, average in zip(both.parameters(), optimizer.average, strict=True):
            weight.data.copy_(average)
        torch.save({"stage": number + 1, "model": model.state_dict(), "heads": heads.state_dict()}, out / "resume.pt")
        resume = None
    torch.save(model.state_dict(), out / "average.pt")
    return model


def _run_stage(
    recipe: Recipe,
    name: str,
    number: int,
    stage: Stage,
    both: nn.ModuleDict,
    optimizer: Optimizer,
    loss: Any,
    corpus: Corpus,
    dev: Corpus,
    out: Path,
    compiled: bool,
) -> None:
    seed = recipe.seed * 1000 + number * 100 + optimizer.step  # a resumed run goes on with fresh scenes
    batches = iter(DataLoader(Batches(corpus, recipe, name, seed), batch_size=None, num_workers=1, prefetch_factor=6))
    dev_batches = iter(Batches(dev, recipe, name, 1))
    held_out = [next(dev_batches) for _ in range(4)]
    run = torch.compile(loss) if compiled else loss
    log, started, saved, first = _Log(out / "progress.csv"), time.monotonic(), time.monotonic(), optimizer.step
    sums: dict[str, float] = {}
    while optimizer.step < stage.steps:
        with torch.autocast("cpu", torch.bfloat16):
            values = run(next(batches))
        values["loss"].backward()
        optimizer.update()
        for key, value in values.items():
            sums[key] = sums.get(key, 0.0) + value.item() / LOG_EVERY
        now, step = time.monotonic(), optimizer.step
        if step % LOG_EVERY == 0:
            row = {"stage": name, "step": step, "minutes": round((now - started) / 60, 2)}
            row["left_minutes"] = round((now - started) / (step - first) * (stage.steps - step) / 60, 1)
            row |= {k: round(v, 4) for k, v in sums.items()}
            if step % (4 * LOG_EVERY) == 0:
                row |= {f"dev_{k}": round(v, 4) for k, v in _evaluate(both, optimizer, loss, held_out).items()}
            log.write(row)
            sums = {}
        if now - saved > RESUME_EVERY_S:
            saved = now
            state = {
                "stage": number,
                "model": both["model"].state_dict(),
                "heads": both["heads"].state_dict(),
                "optimizer": optimizer.state(),
            }
            torch.save(state, out / "resume.tmp")
            os.replace(out / "resume.tmp", out / "resume.pt")


@torch.no_grad()
def _evaluate(both: nn.ModuleDict, optimizer: Optimizer, loss: Any, held_out: list[dict[str, Tensor]]) -> dict[str, float]:
    raw = [p.detach().clone() for p in both.parameters()]
    for weight, average in zip(both.parameters(), optimizer.average, strict=True):
        weight.copy_(average)
    with torch.autocast("cpu", torch.bfloat16):
        results = [loss(batch) for batch in held_out]
    for weight, value in zip(both.parameters(), raw, strict=True):
        weight.copy_(value)
    return {key: float(sum(r[key] for r in results)) / len(results) for key in results[0]}


class _Log:
    """A CSV with one row per report; the same goes to the terminal."""

    COLUMNS = ("stage", "step", "minutes", "left_minutes", "loss", "say", "act", "flow", "word", "hand", "say_hit", "act_hit", "false")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = [*self.COLUMNS, *(f"dev_{c}" for c in self.COLUMNS[4:])]
        if not path.exists():
            with path.open("w", newline="") as f:
                csv.writer(f).writerow(self.columns)

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", newline="") as f:
            csv.DictWriter(f, self.columns, restval="").writerow(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
