"""The recipe of a checkpoint: one JSON file with the model's configuration, the stages of its training and their numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from device.config import ConfigError, ModelConfig
from export.distill.behaviours import ACTS, WORDS
from export.errors import ExportError


class RecipeError(ExportError):
    """A recipe that cannot be followed; the text names file and field. Remedy: correct the file."""


@dataclass(frozen=True)
class Stage:
    """One stage: `batch` scenes (or windows with words, and as many hands) a step, Muon's and AdamW's learning rates.

    They fall linearly at the end. A stage of the voice has nothing for Muon. One of scenes that keeps "perceiving" leaves the embeddings
    and all perceiving layers but the last as they are. One of perception that keeps "present" leaves all else as it is, and what that
    gets to read in scenes nearly so: a scene with every step holds it to what it was.
    """

    learns: Literal["perception", "scenes", "voice"]  # words and hands alone, all of it, or the flow head alone: how every word is said
    steps: int
    batch: int
    muon_lr: float
    adam_lr: float
    decay: float = 0.6  # fraction of the steps over which the rates fall to zero
    ticks: int | None = None  # length of a scene, where it is not the recipe's
    keeps: Literal["perceiving", "present"] | None = None  # above
    hands: int | None = None  # in a stage of perception: how many a step, where they are not as many as windows
    chatter: float = 0.0  # share of the scenes (not of those in shards) in which the companion says any word at any time
    joins: int | None = None  # ends in the mean with the weights after this stage, the first being 1 (model soups, arXiv 2203.05482)

    def __post_init__(self) -> None:
        if self.learns not in ("perception", "scenes", "voice"):
            raise RecipeError(f"the field stages.learns must be 'perception', 'scenes' or 'voice', not {self.learns!r}")
        if self.keeps is not None and (self.learns, self.keeps) not in (("scenes", "perceiving"), ("perception", "present")):
            reason = "must be 'perceiving' in a stage of scenes, or 'present' in one of perception"
            raise RecipeError(f"the field stages.keeps {reason}, not {self.keeps!r} in one of {self.learns}; or leave it out")
        if self.hands is not None and (self.learns != "perception" or self.hands < 1):
            raise RecipeError(f"the field stages.hands is how many a stage of perception shows, not {self.hands} in one of {self.learns}")
        if not 0 <= self.chatter <= 1 or (self.chatter and self.learns == "perception"):
            raise RecipeError(f"the field stages.chatter is a share, 0 to 1, of a stage's scenes, not {self.chatter} of {self.learns}")


@dataclass(frozen=True)
class TeacherRecipe:
    """A model grown from the weights after stage `after` (0: those that are begun with); it teaches the stages behind that, up to the next.

    Without stages of its own it is those weights themselves, which hold their student to what they knew (born-again networks,
    arXiv 1805.04770); then its depth and seed do not matter.
    """

    after: int
    present_layers: int
    seed: int
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Recipe:
    """What `copresence-export train` and `distill` read."""

    name: str
    seed: int
    ticks: int  # length of a scene
    model: ModelConfig
    stages: tuple[Stage, ...]  # one after the other
    vocoder_minutes: float  # on one thread
    practice: int  # windows with words, and as many hands, that are practised along with every step of scenes
    replays: float  # share of the scenes that are played again with the model's own choices in their past
    say_margin: float = 0.0  # by how much a word must beat "nothing", in logits; chosen on the dev people
    act_margin: float = 0.0
    people: float = 1.0  # share of the training people (`clips.belongs`) that are trained on: fewer tell what more would bring
    teachers: tuple[TeacherRecipe, ...] = ()  # of `distill`, one after the other

    def __post_init__(self) -> None:
        if not 0 < self.people <= 1:
            raise RecipeError(f"the field people is a share of the training people, above 0 and up to 1, not {self.people}")

    def of_teacher(self, teacher: TeacherRecipe) -> Recipe:
        """What the teacher is trained by: its own depth, seed and stages, no margins; the rest is its student's."""
        deeper = replace(self.model, trunk=replace(self.model.trunk, present_layers=teacher.present_layers))
        own = replace(self, name=f"{self.name}-teacher-{teacher.after}", model=deeper, seed=teacher.seed, stages=teacher.stages)
        return replace(own, say_margin=0.0, act_margin=0.0, teachers=())

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read the JSON file at `path`; the vocabulary is the scenes'. Raises RecipeError."""
        try:
            raw = json.loads(path.read_text())
            model = ModelConfig.from_dict(raw.pop("model") | {"text": {"words": WORDS, "acts": ACTS}})
            stages = _stages(raw.pop("stages"))
            teachers = tuple(TeacherRecipe(stages=_stages(own.pop("stages")), **own) for own in raw.pop("teachers", []))
            begins = [teacher.after for teacher in teachers]
            if begins != sorted(set(begins)) or not set(begins) <= set(range(len(stages))):
                raise RecipeError("the field teachers.after must be a rising number of a stage before the last, or 0")
            if any(teacher.present_layers < model.trunk.present_layers for teacher in teachers):
                raise RecipeError(f"the field teachers.present_layers must be at least the model's {model.trunk.present_layers}")
            return cls(model=model, stages=stages, teachers=teachers, **raw)
        except (ConfigError, RecipeError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            reason = f"lacks the field {error}" if isinstance(error, KeyError) else str(error)
            raise RecipeError(f"{path}: not a training recipe: {reason}; see export/recipes/companion-nano.json") from error


def _stages(raw: list[dict[str, Any]]) -> tuple[Stage, ...]:
    stages = tuple(Stage(**stage) for stage in raw)
    if any(stage.joins is not None and stage.joins not in range(1, number) for number, stage in enumerate(stages, 1)):
        raise RecipeError("the field stages.joins must be the number of a stage before it, the first being 1")
    return stages
