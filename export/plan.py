"""What a model would cost on each board: a table, a picture and JSON, beside a codec-frame model of equal size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from device.config import ConfigError, ModelConfig
from export.checkpoint import read_config, require_buildable
from export.cost import (
    COMPUTE_SHARE,
    LAUNCH_MS,
    RESERVED_GB,
    USABLE_SHARE,
    Estimate,
    Work,
    codec_estimate,
    count,
    estimate,
    largest,
    largest_codec,
)
from export.errors import ExportError
from export.targets import Precision, Target, find_target, targets


class PlanError(ExportError):
    """Something that no model can be read from. Remedy: give a checkpoint, a configuration or a recipe."""


@dataclass(frozen=True)
class Row:
    """One board in one precision: this model, the codec-frame model of its size, and the largest of each that fits, in parameters."""

    target: Target
    precision: Precision
    ours: Estimate
    codec: Estimate
    largest: int
    largest_codec: int


@dataclass(frozen=True)
class Plan:
    """A model and what it would cost."""

    name: str
    work: Work
    rows: tuple[Row, ...]

    @property
    def memory_s(self) -> float:
        """How far back the model remembers; the codec-frame model is given the same."""
        return _memory_s(self.work.config)

    def __str__(self) -> str:
        c, work = self.work.config, self.work
        columns = (
            "| board | precision | weights MB | rings MB | activations MB | bandwidth ms | compute ms | floor ms | + launches ms | left of "
            f"{c.tick_ms} ms | memory MB | largest that fits | codec-frame: + launches ms | its largest |"
        )
        return "\n".join(
            [
                f"{self.name}: {_size(work.parameters)} parameters, width {c.trunk.width}; a tick of {c.tick_ms} ms: {c.tokens} tokens, "
                f"{work.flops / 1e9:.3g} GFLOP in {len(work.products)} products, {work.ring_bytes / 1e6:.1f} MB of rings",
                "",
                columns,
                "|---|---|" + "---:|" * (columns.count("|") - 3),
                *(_line(row) for row in self.rows),
                "",
                "Estimates; nothing here was measured on a board. Per tick; 'floor' is the larger of bandwidth and compute.",
                "Bandwidth: "
                + ", ".join(f"{p.name} {100 * p.bandwidth_share:.0f} %" for p in {row.precision: 0 for row in self.rows})
                + " of the board's (sources: export/targets.toml).",
                f"Compute: {100 * COMPUTE_SHARE:.0f} % of the GPU's dense rate; launch: {1000 * LAUNCH_MS:.1f} µs (see export/cost.py).",
                f"'fits': at most {100 * USABLE_SHARE:.0f} % of the tick, and all but {RESERVED_GB:.0f} GB of the board's memory.",
                f"Codec-frame: Moshi's proportions, a frame of 80 ms with 8 depth steps, over the same {c.tick_ms} ms, "
                f"{self.memory_s:.0f} s of past, its codec not counted.",
            ]
        )

    def to_json(self) -> str:
        """All of it, for programs."""
        return json.dumps(
            {
                "name": self.name,
                "parameters": self.work.parameters,
                "flops": self.work.flops,
                "tick_ms": self.work.config.tick_ms,
                "rows": [
                    {
                        "target": row.target.name,
                        "precision": row.precision.name,
                        "ours": _values(row.ours),
                        "codec_frame": _values(row.codec),
                        "largest_parameters": row.largest,
                        "largest_codec_frame_parameters": row.largest_codec,
                    }
                    for row in self.rows
                ],
            },
            indent=1,
        )


def make_plan(model: Path, target: str, precision: str | None = None) -> Plan:
    """Plan the model at `model` for one board or for "all".

    Raises PlanError, CheckpointError, RecipeError, ConfigError or TargetError. With "all", boards that lack the precision are left out.
    """
    boards = tuple(targets().values()) if target == "all" else (find_target(target),)
    if precision is None:
        pairs = [(board, p) for board in boards for p in board.precisions]
    elif target == "all":
        pairs = [(board, p) for board in boards for p in board.precisions if p.name == precision]
        if not pairs:
            boards[0].require(precision)
    else:
        pairs = [(boards[0], boards[0].require(precision))]
    name, config = read_model(model)
    work = count(config)
    return Plan(name, work, tuple(_row(work, board, p) for board, p in pairs))


def read_model(path: Path) -> tuple[str, ModelConfig]:
    """Name and configuration of a checkpoint folder, a recipe (JSON with a "model") or a configuration (JSON)."""
    if path.is_dir() or path.suffix == ".safetensors":
        return (path if path.is_dir() else path.parent).resolve().name, read_config(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PlanError(f"{path}: no such file; give a checkpoint folder, a recipe or a configuration") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: not JSON ({error}); give a checkpoint folder, a recipe or a configuration") from error
    if isinstance(values, dict) and "model" in values:
        from export.distill.recipe import Recipe

        recipe = Recipe.read(path)
        name, config = recipe.name, recipe.model
    else:
        try:
            name, config = path.stem, ModelConfig.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    require_buildable(path, config)
    return name, config


def draw(plan: Plan, out: Path) -> None:
    """The picture: the time that each board needs, and the largest model that it could run, beside the codec-frame model's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ink, ours, other, faint = "#22252a", "#2f6f9f", "#c2563a", "#e6e8eb"
    plt.rcParams.update(
        {"font.size": 9, "axes.edgecolor": "#b8bcc2", "text.color": ink, "axes.labelcolor": ink, "font.family": "DejaVu Sans"}
    )
    rows = plan.rows
    figure, (time, size) = plt.subplots(1, 2, figsize=(14, 1.9 + 0.27 * len(rows)), sharey=True, layout="constrained")
    period = float(plan.work.config.tick_ms)
    places, place = [], 0.0
    for i, row in enumerate(rows):
        place += 1.0 if i == 0 or row.target is rows[i - 1].target else 1.8  # boards stand apart
        places.append(place)
    for axis, pairs in (
        (time, [(r.ours.needed_ms, r.codec.needed_ms) for r in rows]),
        (size, [(r.largest / 1e6, r.largest_codec / 1e6) for r in rows]),
    ):
        for place, (mine, theirs) in zip(places, pairs, strict=True):
            axis.plot([mine, theirs], [place, place], color=faint, lw=5, solid_capstyle="round", zorder=1)
        axis.scatter([p[0] for p in pairs], places, s=42, color=ours, zorder=3, label="copresence: one launch a tick")
        axis.scatter(
            [p[1] for p in pairs], places, s=42, color=other, marker="D", zorder=2, label="codec frames: 12.5 a second, 8 depth steps each"
        )
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.grid(axis="x", color=faint, lw=0.6)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    time.axvline(period, color=ink, lw=1)
    time.annotate(
        f"the tick: {period:.0f} ms", (period, places[0] - 0.9), xytext=(-4, 0), textcoords="offset points", ha="right", va="center"
    )
    time.set_yticks(places, [row.precision.name for row in rows])
    time.set_ylim(places[-1] + 0.8, places[0] - 1.5)
    for target in {row.target.name: row.target for row in rows}.values():
        span = [p for p, row in zip(places, rows, strict=True) if row.target is target]
        text = target.board.replace("Jetson ", "").replace(", ", "\n")
        time.annotate(
            f"{text}\n{target.bandwidth_gb_s:.0f} GB/s",
            (0, sum(span) / len(span)),
            xytext=(-84, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            annotation_clip=False,
            weight="bold",
        )
    time.set_xlabel(f"ms of every {period:.0f} ms, launches included")
    size.set_xlabel("million parameters: the largest model of this shape that fits")
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"{plan.name}, {_size(plan.work.parameters)} parameters: estimated from its graph, not measured on these boards", x=0.5)
    kind, kinds = out.suffix.lstrip(".") or "png", figure.canvas.get_supported_filetypes()
    if kind not in kinds:
        plt.close(figure)
        raise PlanError(f"{out}: a picture cannot be written as .{kind}; name it as one of {', '.join(kinds)}")
    scratch = out.with_name(f".{out.name}.new")
    try:
        figure.savefig(scratch, dpi=130, format=kind)
        scratch.replace(out)
    finally:
        scratch.unlink(missing_ok=True)
        plt.close(figure)


def _row(work: Work, target: Target, precision: Precision) -> Row:
    c = work.config
    past = (_memory_s(c), float(c.tick_ms), target, precision)
    widest = largest(c, target, precision)
    return Row(
        target,
        precision,
        estimate(work, target, precision),
        codec_estimate(work.parameters, *past),
        count(widest).parameters if widest else 0,
        round(largest_codec(*past)),
    )


def _memory_s(c: ModelConfig) -> float:
    return c.trunk.present_window * c.tick_ms / 1000


def _line(row: Row) -> str:
    e = row.ours
    cells = [
        *(row.target.name, row.precision.name),
        *(f"{size / 1e6:.1f}" for size in (e.weight_bytes, e.ring_bytes, e.activation_bytes)),
        *(f"{ms:.2f}" for ms in (e.bandwidth_ms, e.compute_ms, e.floor_ms, e.needed_ms)),
        *(f"{e.left_ms:.1f}", f"{e.memory_bytes / 1e6:.0f}", _size(row.largest), f"{row.codec.needed_ms:.2f}", _size(row.largest_codec)),
    ]
    return "| " + " | ".join(cells) + " |"


def _values(e: Estimate) -> dict[str, float]:
    derived = {"floor_ms": e.floor_ms, "needed_ms": e.needed_ms, "left_ms": e.left_ms}
    return {**vars(e), **derived}


def _size(parameters: float) -> str:
    return f"{parameters / 1e9:.1f} G" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
