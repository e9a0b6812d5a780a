"""Which layers cost most when they are quantized: each by itself, as a table, a picture and a choice under a budget."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from tqdm import tqdm

from export.quantize.compare import Difference, Ticks, compare
from export.quantize.gates import spent
from export.quantize.placement import Precision, QuantizeError, place
from export.quantize.recordings import DataSet, outputs_of

SCAN_TICKS = 100  # of the calibration set, for every layer


@dataclass(frozen=True)
class Scan:
    """What each layer costs by itself, and all together; `alone` is sorted, the dearest first."""

    precision: str
    together: Difference
    alone: dict[str, Difference]

    def cost(self, layer: str) -> float:
        return spent(self.alone[layer], self.precision)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "together": asdict(self.together) | {"spent": spent(self.together, self.precision)},
            "alone": {name: asdict(difference) | {"spent": self.cost(name)} for name, difference in self.alone.items()},
        }

    def table(self) -> str:
        """As Markdown."""
        rows = [("all of them", self.together), *self.alone.items()]
        lines = [
            f"{self.precision}, {self.together.ticks} ticks of the calibration set. Spent: the share of what the gates allow.",
            "",
            "| layer | spent | probability moved, % | speech, dB | say alike, % | act alike, % |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {name} | {spent(d, self.precision):.3f} | {100 * d.moved:.3f} | {d.mel_db:.3f} "
            f"| {100 * d.say_agreement:.1f} | {100 * d.act_agreement:.1f} |"
            for name, d in rows
        ]
        return "\n".join(lines) + "\n"


def scan(model: onnx.ModelProto, data: DataSet, chosen: Mapping[str, Precision], scales: Mapping[str, float], precision: Precision) -> Scan:
    """Quantize one layer at a time and compare with the float graph."""
    reference = outputs_of(model, data, SCAN_TICKS, "float")
    together = _difference(model, data, chosen, scales, reference)
    layers = tqdm(chosen, "sensitivity", unit="layer", leave=False, disable=not sys.stderr.isatty())
    alone = {name: _difference(model, data, {name: chosen[name]}, scales, reference) for name in layers}
    return Scan(precision, together, dict(sorted(alone.items(), key=lambda item: -spent(item[1], precision))))


def keep_under_budget(
    model: onnx.ModelProto, data: DataSet, chosen: Mapping[str, Precision], scales: Mapping[str, float], found: Scan, budget: float
) -> dict[str, Precision]:
    """The choice with the fewest layers in FP16, the dearest first, whose error stays below `budget` of what the gates allow."""
    if spent(found.together, found.precision) <= budget:
        return dict(chosen)
    reference = outputs_of(model, data, SCAN_TICKS, "float")
    order = list(found.alone)

    def kept(count: int) -> dict[str, Precision]:
        return {name: "fp16" if name in order[:count] else precision for name, precision in chosen.items()}

    def cost(count: int) -> float:
        return spent(_difference(model, data, kept(count), scales, reference), found.precision)

    if (least := cost(len(order))) > budget:
        raise QuantizeError(f"--budget {budget}: with every layer in FP16 the error is {least:.3f} of what the gates allow; give more")
    too_few, enough = 0, len(order)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if cost(middle) <= budget else (middle, enough)
    return kept(enough)


def _difference(
    model: onnx.ModelProto, data: DataSet, chosen: Mapping[str, Precision], scales: Mapping[str, float], reference: Ticks
) -> Difference:
    return compare(reference, outputs_of(place(model, chosen, scales), data, SCAN_TICKS, "quantized"), data.config)


def write_scan(found: Scan, folder: Path) -> None:
    """sensitivity.md and sensitivity.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sensitivity.md").write_text(found.table())
    names = list(found.alone)[::-1]
    mel = [spent(Difference(d.ticks, 1, 1, 0.0, d.mel_db, d.spoken_frames), found.precision) for d in map(found.alone.get, names) if d]
    moved = [spent(Difference(d.ticks, 1, 1, d.moved, 0.0, d.spoken_frames), found.precision) for d in map(found.alone.get, names) if d]
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.2 * len(names)), layout="constrained")
    places = range(len(names))
    axis.barh([p + 0.2 for p in places], moved, 0.4, color="#2f6f9f", label="what it chooses (probability moved)")
    axis.barh([p - 0.2 for p in places], mel, 0.4, color="#c2563a", label="how it sounds (mel distortion)")
    axis.set(
        yticks=list(places), yticklabels=names, xlabel="share of what the gates allow, one layer quantized at a time", ylim=(-1, len(names))
    )
    axis.tick_params(axis="y", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower right", frameon=False)
    axis.set_title(f"{found.precision}: all together {spent(found.together, found.precision):.2f}", weight="bold")
    figure.savefig(folder / "sensitivity.png", dpi=110)
    plt.close(figure)
