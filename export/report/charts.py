"""Small pictures as inline SVG: as wide as the screen lets them, with colours from the style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence

from export.report.markup import Markup, element

_LOWEST = 0.02  # of the height: a bin with a single value in it can still be seen


def bars(shares: Sequence[tuple[str, float]], label: str, mark: float | None = None) -> Markup:
    """Bars under each other on one track, (colour's name, share of the width); `mark` is a line across them."""
    height = 12 // len(shares)
    shapes = [element("rect", width="100%", height=12, rx=2, class_="track")]
    shapes += [element("rect", width=_percent(share), height=height, y=i * height, rx=2, class_=c) for i, (c, share) in enumerate(shares)]
    if mark is not None:
        shapes.append(element("rect", x=_percent(mark), y=-2, width=2, height=16, class_="mark"))
    return _picture(label, 12, *shapes)


def stacked(part: float, whole: float, label: str, mark: float | None = None) -> Markup:
    """A bar whose first part stands out; all are shares of the width."""
    shapes = [
        element("rect", width="100%", height=12, rx=2, class_="track"),
        element("rect", width=_percent(whole), height=12, rx=2, class_="faint"),
        element("rect", width=_percent(part), height=12, rx=2, class_="ours"),
    ]
    if mark is not None:
        shapes.append(element("rect", x=_percent(mark), y=-2, width=2, height=16, class_="mark"))
    return _picture(label, 12, *shapes)


def pair(low: float, high: float, label: str) -> Markup:
    """Two dots on one track, the reference hollow under the other one; both are shares of the width."""
    ends = sorted((low, high))
    return _picture(
        label,
        14,
        element("rect", y=6, width="100%", height=2, class_="track"),
        element("rect", x=_percent(ends[0]), y=5, width=_percent(ends[1] - ends[0]), height=4, class_="between"),
        element("circle", cx=_percent(low), cy=7, r=5, class_="reference"),
        element("circle", cx=_percent(high), cy=7, r=3.5, class_="ours"),
    )


def interval(value: float, low: float, high: float, limit: float, label: str) -> Markup:
    """A value with its interval, on an axis that has zero and the limit."""
    first, last = min(low, 0.0, value), max(high, limit, value)
    room = 0.12 * (last - first or 1.0)
    first, last = first - room, last + room

    def at(x: float) -> str:
        return _percent((x - first) / (last - first))

    return _picture(
        label,
        58,
        element("rect", y=24, width="100%", height=2, class_="track"),
        element("rect", x=at(limit), y=8, width=_percent(1 - (limit - first) / (last - first)), height=34, class_="beyond"),
        element("rect", x=at(0.0), y=8, width=1, height=34, class_="axis"),
        element("rect", x=at(limit), y=8, width=2, height=34, class_="mark"),
        element("rect", x=at(low), y=22, width=_percent((high - low) / (last - first)), height=6, rx=3, class_="between"),
        element("circle", cx=at(value), cy=25, r=6, class_="ours"),
        element("text", "no difference", x=at(0.0), y=56, text_anchor="middle"),
        element("text", f"limit {limit:g}", x=at(limit), y=56, text_anchor="middle"),
    )


def histogram(counts: Sequence[float], top: float, limit: float, label: str) -> Markup:
    """Counts from 0 to `top` on a logarithmic scale; what lies beyond `limit` is cut off there and coloured."""
    filled = max((i for i, count in enumerate(counts) if count > 0), default=0) + 1
    tallest = math.log1p(max([0.0, *counts])) or 1.0
    edge = limit / top * len(counts) if top > 0 else float(filled)
    shown = max(float(filled), min(edge * 1.05, float(len(counts))))
    kept: list[str] = []
    cut: list[str] = []
    for i, count in enumerate(counts[:filled]):
        if count > 0:
            tall = max(math.log1p(count) / tallest, _LOWEST)
            (cut if i >= edge else kept).append(f"M{i} 1h.92v-{tall:.3f}h-.92z")
    plot = element(
        "svg",
        element("path", d="".join(kept), class_="ours"),
        element("path", d="".join(cut), class_="cut"),
        viewBox=f"0 0 {shown:.2f} 1",
        preserveAspectRatio="none",
        width="100%",
        height=44,
    )
    line = element("rect", x=_percent(edge / shown), width=1.5, height=44, class_="mark")
    return _picture(label, 45, plot, element("rect", y=44, width="100%", height=1, class_="axis"), line)


def _picture(label: str, height: float, *shapes: Markup) -> Markup:
    return element("svg", *shapes, role="img", aria_label=label, width="100%", height=height, class_="chart")


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"
