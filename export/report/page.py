"""The page, section by section: each is a function that yields what there is, and Missing for what there is not."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import NamedTuple

from device.bundle import copresence_version
from export.cost import COMPUTE_SHARE, LAUNCH_MS, Estimate, estimate
from export.quantize.compare import Difference
from export.quantize.gates import GATES, MOVED, spent
from export.report import charts
from export.report.markup import Markup, element, table
from export.report.subject import Subject
from export.report.untrusted import Record
from export.targets import precisions

DIGITS = 16  # of a SHA-256, where one is shown for people
LONGEST_LAYERS = 24  # that have a bar; all are in the table


class Missing(NamedTuple):
    """Something that the page would tell if there were anything to tell."""

    what: str
    remedy: str


Part = Markup | Missing


# --- what was built from what -------------------------------------------------------------------------------------------


def origin(s: Subject) -> Iterator[Part]:
    config, trunk = s.bundle.config, s.bundle.config.trunk
    steps = [("checkpoint", s.manifest.text("name") if "name" in s.manifest else s.bundle.name, _parity(s.manifest))]
    if s.quantization is not None:
        q = s.manifest.record("quantized")
        of, calibration = q.record("of"), q.record("calibration")
        found = ", ".join(f"{number:g} {name}" for name, number in calibration.record("found").each_number() if name != "length")
        steps.append(("float bundle", _short(of.text("digest")), f"named {of.text('name')}, graph {_short(of.text('graph_sha256'))}"))
        ticks = f"{calibration.whole('ticks')} ticks in {calibration.whole('recordings')} recordings: {found}"
        steps.append(("calibration set", _short(calibration.text("sha256")), ticks))
    size = sum(entry.whole("bytes") for _, entry in s.manifest.record("files").each())
    steps.append(("this bundle", _short(s.bundle.digest), f"{s.precision.name}, {size / 1e6:.1f} MB"))
    if s.engine:
        r = s.engine.record
        steps.append(("engine", f"TensorRT {r.text('tensorrt')}", f"for {s.engine.target.board}, SM {r.text('sm')}"))
    yield element("ol", *(_step(*step) for step in steps), class_="steps")
    tools = s.manifest.record("tools")
    versions = ", ".join(f"{name} {tools.text(name)}" for name in tools.values)
    yield _facts(
        [
            ("digest", s.bundle.digest),
            ("signature", s.signature.words),
            ("made with", versions or "the manifest names no tools"),
            ("tick", f"{config.tick_ms} ms, {config.tokens} tokens, {s.work.flops / 1e9:.2f} GFLOP, {s.work.parameters:,} parameters"),
            (
                "trunk",
                f"width {trunk.width}; {trunk.perceive_layers} perceiving layers over {trunk.perceive_window} ticks, "
                f"{trunk.present_layers} present layers over {trunk.present_window}",
            ),
        ]
    )
    rows = [[name, f"{f.whole('bytes'):,}", f.text("sha256")] for name, f in s.manifest.record("files").each()]
    yield _more("Files, with their SHA-256", table(["file", "bytes", "SHA-256"], rows))
    if s.bundle.key is None:
        yield Missing("a signature", "copresence-export sign")


def _parity(manifest: Record) -> str:
    parity = manifest.record("parity")
    errors = [error for _, error in parity.record("relative_error").each_number()]
    if not errors:
        return "not compared with the checkpoint"
    return f"float graph within {max(errors):.1e} of it over {parity.whole('reference_ticks')} reference ticks"


def _step(kind: str, name: str, detail: str) -> Markup:
    return element("li", element("b", kind), element("code", name), element("span", detail))


# --- the proof ----------------------------------------------------------------------------------------------------------


def proof(s: Subject) -> Iterator[Part]:
    if s.quantization is None:
        yield element("p", "A float bundle is its own reference: it needs no proof that it behaves like one.")
        return
    if "proof" not in s.manifest:
        yield Missing("the proof that it behaves like its float bundle", "copresence-export verify")
        return
    found = s.manifest.record("proof")
    if s.bundle.unproven:
        yield element("p", f"This proof does not count: {s.bundle.unproven}.", class_="alarm")
    gates = found.records("gates")
    yield element("p", "How much of what each gate allows was used; the line on a bar is the limit.")
    yield element("ul", *map(_gate, gates), class_="gates")
    closed = found.record("closed_loop")
    score, (low, high) = closed.record("score"), closed.numbers("loss_interval_95", 2)
    loss = next((g for g in gates if g.text("gate") == "scoreboard loss"), None)
    if loss is not None:
        value, limit = loss.number("value"), loss.number("limit")
        yield element("h3", "Scoreboard: points lost, with the 95 % interval")
        words = (
            f"float {score.number('float'):.2f}, quantized {score.number('quantized'):.2f}: {value:+.2f} points ({low:.2f} to {high:.2f})"
        )
        yield element("figure", charts.interval(value, low, high, limit, words), element("figcaption", words))
    behaviours = closed.record("behaviours")
    yield element("h3", "By behaviour: hits in %, float ○ and quantized ●")
    yield element("ul", *(_behaviour(name, *behaviours.numbers(name, 2)) for name in behaviours.values), class_="rows")
    false, run = closed.record("false_per_minute"), found.record("long_run")
    data = found.record("data")
    yield _facts(
        [
            ("closed loop", f"{closed.whole('scenes')} scenes, {closed.whole('ticks'):,} ticks, seed {found.whole('seed')}"),
            ("where either reacts", f"{closed.number('agreement_where_either_reacts'):.2f} % of those ticks alike"),
            ("false reactions", f"{false.number('float'):.2f} a minute as float, {false.number('quantized'):.2f} quantized"),
            ("long run", _difference(run).row()),
            (
                "memory",
                f"keys and values {run.number('memory_error_first_tenth'):.2f} % off in the first tenth, "
                f"{run.number('memory_error_last_tenth'):.2f} % in the last",
            ),
            ("people", f"{data.text('split')} split, {_short(data.text('sha256'))}"),
            ("against", _short(found.text("against"))),
        ]
    )


def _gate(gate: Record) -> Markup:
    name, unit, value, limit = gate.text("gate"), gate.text("unit"), gate.number("value"), gate.number("limit")
    at_most, passed = gate.flag("at_most"), gate.flag("passed")
    verdict = element("b", "passed" if passed else "failed", class_="passed" if passed else "failed")
    lines = [element("p", element("strong", name), verdict, class_="title"), element("p", f"{value:.4g} {unit}", class_="value")]
    used = _used(value, limit, at_most, unit)
    if used is not None:
        lines.append(charts.bars([("ours" if passed else "cut", used / 1.25)], f"{100 * used:.0f} % of what is allowed", mark=1 / 1.25))
    lines.append(element("p", f"{'at most' if at_most else 'at least'} {limit:g} {unit}", class_="quiet"))
    if name in GATES:
        lines.append(element("p", GATES[name].meaning, class_="quiet"))
    return element("li", *lines)


def _used(value: float, limit: float, at_most: bool, unit: str) -> float | None:
    """The share of what a gate allows that is used; None where there is no such thing, as for a number of scenes."""
    if at_most:
        return value / limit if limit > 0 else None
    return (100 - value) / (100 - limit) if unit.startswith("%") and limit < 100 else None


def _behaviour(name: str, reference: float, quantized: float) -> Markup:
    words = f"{reference:.1f} → {quantized:.1f}"
    return element("li", element("span", name), charts.pair(reference / 100, quantized / 100, f"{name}: {words}"), element("span", words))


def _difference(d: Record) -> Difference:
    moved, mel_db = d.number("moved"), d.number("mel_db")
    return Difference(d.whole("ticks"), d.number("say_agreement"), d.number("act_agreement"), moved, mel_db, d.whole("spoken_frames"))


# --- sensitivity --------------------------------------------------------------------------------------------------------


def sensitivity(s: Subject) -> Iterator[Part]:
    if s.quantization is None:
        yield Missing("a sensitivity scan: nothing is quantized", "copresence-export quantize --sensitivity FOLDER")
        return
    if "sensitivity" not in s.quantization:
        yield Missing("a sensitivity scan", "copresence-export quantize --sensitivity FOLDER")
        return
    found, precision = s.quantization.record("sensitivity"), s.precision.name
    if precision not in MOVED:
        return  # no gates for it, so no share of them
    alone = {name: _difference(row) for name, row in found.record("alone").each()}
    together = spent(_difference(found.record("together")), precision)
    kept = {y.text("weight") for y in s.quantization.records("layers") if y.text("precision") != precision}
    most = max((spent(d, precision) for d in alone.values()), default=0.0) or 1.0
    yield element(
        "p",
        "One layer quantized at a time: the share of what the gates allow that it alone uses up, by ",
        element("span", "what it chooses", class_="key ours"),
        " (probability moved) and by ",
        element("span", "how it sounds", class_="key other"),
        f" (mel distortion). All layers together: {100 * together:.0f} %.",
    )
    rows = []
    for name, d in sorted(alone.items(), key=lambda item: -spent(item[1], precision)):
        moved, mel = d.moved / MOVED[precision], d.mel_db / GATES["mel distortion"].limits[precision]
        words = f"{100 * spent(d, precision):.1f} %"
        stays = [element("em", " stays FP16")] if name in kept else []
        bar = charts.bars([("ours", moved / most), ("other", mel / most)], f"{name}: {words}")
        rows.append(element("li", element("span", _layer(name), *stays), bar, element("span", words)))
    yield element("ul", *rows, class_="rows")


# --- layers -------------------------------------------------------------------------------------------------------------


def layers(s: Subject) -> Iterator[Part]:
    if s.quantization is None:
        yield element("p", f"Every layer is in float32: {s.work.parameters:,} parameters.")
        yield Missing("precisions by layer: nothing is quantized", "copresence-export quantize")
    else:
        yield from _quantized_layers(s, s.quantization)
    if s.engine is None:
        yield Missing(
            "what TensorRT made of the layers, and measured time", "copresence-export compile on a board, and report --engine FOLDER here"
        )
        return
    report = s.engine.report
    time, rows = report.record("device_ms"), report.records("layers")
    bits = Counter(row.text("bits") for row in rows)
    yield element("h3", f"In the engine, on {s.engine.target.board}")
    compared = f"compared over {report.whole('ticks')} ticks" if "difference" in report else "not compared with ONNX Runtime"
    yield _facts(
        [
            ("measured", f"{time.number('p50'):.3f} ms p50, {time.number('p99'):.3f} ms p99, of the whole tick on the GPU"),
            ("launch", "one CUDA graph" if report.flag("graph_captured") else "enqueued, not captured as a graph"),
            ("layers", f"{len(rows)}: " + ", ".join(f"{count} with {name} bits" for name, count in bits.most_common())),
            ("ONNX Runtime", compared),
        ]
    )
    if "difference" in report:
        found = [[name, f"{value:.6g}"] for name, value in report.record("difference").each_number()]
        yield _more("Against ONNX Runtime: share of ticks alike, or largest error", table(["output", "value"], found))
    yield from _timed_layers(rows)


def _timed_layers(rows: Sequence[Record]) -> Iterator[Part]:
    """By time, the longest first; those that the profiler did not name come last."""
    ms = [row.number("ms") if "ms" in row else None for row in rows]
    known = [value for value in ms if value is not None]
    total, longest = sum(known), max(known, default=0.0) or 1.0
    order = sorted(range(len(rows)), key=lambda i: -(ms[i] or 0.0))
    if known:
        yield element(
            "p",
            f"Measured by layer, by TensorRT's profiler, which waits for each: {1000 * total:.0f} µs in all. The longest, with the bits of "
            "their narrowest input:",
        )
        bars = []
        for i in order[:LONGEST_LAYERS]:
            took = ms[i]
            if took is not None:
                row, words = rows[i], f"{1000 * took:.3g} µs"
                name = element("span", element("code", row.text("name")), element("small", f"{row.text('type')}, {row.text('bits')} bits"))
                share = element("small", f"{100 * took / (total or 1.0):.1f} %")
                bar = charts.bars([("ours", took / longest)], f"{row.text('name')}: {words}")
                bars.append(element("li", name, bar, element("span", words, share)))
        yield element("ul", *bars, class_="rows")
    else:
        yield Missing("measured time by layer: this engine was compiled before it was measured", "copresence-export compile on the board")
    told = [
        [element("code", rows[i].text("name")), rows[i].text("type"), rows[i].text("bits"), "–" if took is None else f"{1000 * took:.2f}"]
        for i in order
        for took in (ms[i],)
    ]
    head = ["layer", "type", "bits", "µs"]
    yield _more("Every layer of the engine, with the bits of its narrowest input and its time", table(head, told, words=2))


def _quantized_layers(s: Subject, quantization: Record) -> Iterator[Part]:
    found = quantization.records("layers")
    costs = [_layer_cost(s, layer) for layer in found]
    longest = max((cost.floor_ms for cost in costs if cost), default=0.0) or 1.0
    rows = []
    for layer, cost in zip(found, costs, strict=True):
        shape = "×".join(f"{size:g}" for size in layer.numbers("shape"))
        name = element("span", _layer(layer.text("weight")), element("small", f"{shape}, {layer.text('precision')}"))
        words = f"{1000 * cost.floor_ms:.2g} µs" if cost else "–"
        detail = f"{cost.weight_bytes / 1e3:.0f} kB, {cost.flops / 1e6:.1f} MFLOP" if cost else "not in this model's work"
        bar = charts.bars([("ours", cost.floor_ms / longest if cost else 0.0)], f"{words}; {detail}")
        rows.append(element("li", name, bar, element("span", words, element("small", detail))))
    counts = Counter(layer.text("precision") for layer in found)
    total = 1000 * sum(cost.floor_ms for cost in costs if cost)
    yield element(
        "p",
        "Layers by precision: " + ", ".join(f"{count} {name}" for name, count in counts.most_common()) + ". ",
        f"Time is the floor on {s.board.board}, estimated and not measured: weights and activations at its bandwidth or products at its "
        f"rate, whichever takes longer; {total:.0f} µs in all. Everything else (attention, norms, front end) is in floating point.",
    )
    yield element("ul", *rows, class_="rows")


def _layer_cost(s: Subject, layer: Record) -> Estimate | None:
    work, precision = s.work_of(layer.text("weight")), precisions().get(layer.text("precision"))
    return estimate(work, s.board, precision) if work and precision in s.board.precisions and precision else None


# --- calibration --------------------------------------------------------------------------------------------------------


def calibration(s: Subject) -> Iterator[Part]:
    if s.quantization is None or "activations" not in s.quantization:
        reason = "nothing is quantized" if s.quantization is None else f"{s.precision.name} leaves activations in floating point"
        yield Missing(f"ranges of activations: {reason}", "copresence-export quantize --precision int8")
        return
    found = list(s.quantization.record("activations").each())
    if not found:
        yield Missing(
            f"ranges of activations: {s.precision.name} leaves them in floating point", "copresence-export quantize --precision int8"
        )
        return
    methods = Counter(a.text("method") for _, a in found)
    yield element(
        "p",
        f"{len(found)} tensors: how large their values were on the calibration set (|x| from 0, counts on a logarithmic scale), ",
        element("span", "the range", class_="key marked"),
        " that was chosen, and ",
        element("span", "what it cuts off", class_="key cut"),
        ". Methods: " + ", ".join(f"{count} {name}" for name, count in methods.most_common()) + ".",
    )
    yield element("ul", *(_range(name, a) for name, a in found), class_="grid")


def _range(name: str, a: Record) -> Markup:
    h, limit, method = a.record("histogram"), a.number("limit"), a.text("method")
    tried = {way: (t.number("limit"), t.number("error")) for way, t in a.record("tried").each()}
    words = f"±{limit:.3g} by {method}, peak {a.number('peak'):.3g}"
    error = f"relative error {tried[method][1]:.1e}" if method in tried else "always zero"
    others = ", ".join(f"{way} ±{at:.3g} ({lost:.1e})" for way, (at, lost) in tried.items() if way != method)
    picture = charts.histogram(h.numbers("counts"), h.number("top"), limit, f"{name}: {words}")
    return element(
        "li",
        element("code", *_broken(name)),
        picture,
        element("p", words),
        element("p", error, class_="quiet"),
        *([element("p", f"not taken: {others}", class_="quiet")] if others else []),
    )


# --- cost ---------------------------------------------------------------------------------------------------------------


def cost(s: Subject) -> Iterator[Part]:
    estimates = [(board, estimate(s.work, board, s.precision)) for board in s.boards]
    measured = s.engine.report.record("device_ms").number("p50") if s.engine else None
    longest = max([e.needed_ms for _, e in estimates] + [measured or 0.0])
    yield element(
        "p",
        f"One tick of {s.bundle.config.tick_ms} ms in {s.precision.name}, as copresence-export plan estimates it: the ",
        element("span", "floor", class_="key ours"),
        " (bytes over bandwidth or operations over rate, whichever is longer) and, with ",
        element("span", "launches", class_="key faint"),
        f", what is expected. Shares of the bandwidth are in export/targets.toml, {100 * COMPUTE_SHARE:.0f} % of the GPU's rate and "
        f"{1000 * LAUNCH_MS:.1f} µs a launch in export/cost.py, with their sources.",
        *([" ", element("span", "Measured", class_="key marked"), f" on {s.engine.target.board}: {measured:.2f} ms."] if s.engine else []),
    )
    rows, numbers = [], []
    for board, e in estimates:
        here = measured if s.engine and board is s.engine.target else None
        words = f"{e.needed_ms:.2f} ms" if here is None else f"{e.needed_ms:.2f} ms, measured {here:.2f}"
        bar = charts.stacked(
            e.floor_ms / longest / 1.02, e.needed_ms / longest / 1.02, f"{board.board}: {words}", here and here / longest / 1.02
        )
        name = element("span", board.board.replace("Jetson ", ""), element("small", f"{board.bandwidth_gb_s:g} GB/s"))
        left = f"{e.left_ms / e.period_ms:.1%} of the tick is left"
        rows.append(element("li", name, bar, element("span", words, element("small", left))))
        numbers.append(
            [
                board.name,
                *(f"{size / 1e6:.1f}" for size in (e.weight_bytes, e.ring_bytes, e.activation_bytes)),
                *(f"{ms:.2f}" for ms in (e.bandwidth_ms, e.compute_ms, e.floor_ms, e.needed_ms)),
                "–" if here is None else f"{here:.2f}",
                f"{e.memory_bytes / 1e6:.0f}",
            ]
        )
    yield element("ul", *rows, class_="rows")
    heads = ["board", "weights MB", "rings MB", "activations MB", "bandwidth ms", "compute ms", "floor ms", "+ launches ms"]
    yield _more("In numbers", table([*heads, "measured ms", "memory MB"], numbers))
    if s.engine is None:
        yield Missing("measured time: these are estimates", "copresence-export compile on a board, and report --engine FOLDER here")


# --- the page -----------------------------------------------------------------------------------------------------------

SECTIONS: tuple[tuple[str, str, Callable[[Subject], Iterator[Part]]], ...] = (
    ("origin", "What was built from what", origin),
    ("proof", "The proof", proof),
    ("sensitivity", "Sensitivity", sensitivity),
    ("layers", "Layers: precision and time", layers),
    ("calibration", "Calibration", calibration),
    ("cost", "Cost against the floor", cost),
)


def render(s: Subject) -> str:
    """The whole page; the same subject gives the same bytes. Raises Unreadable."""
    style = files("export.report").joinpath("style.css").read_text(encoding="utf-8")
    sections, missing = [], []
    for name, title, section in SECTIONS:
        parts = list(section(s))
        missing += [(name, part) for part in parts if isinstance(part, Missing)]
        shown = [_absent(part) if isinstance(part, Missing) else part for part in parts]
        sections.append(element("section", element("h2", title), *shown, id=name))
    title = f"{s.bundle.name}, {s.precision.name}"
    # No script, and nothing from elsewhere: should text ever break out of its place, the browser still loads and runs nothing.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    head = element(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f"""<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{digest}'; img-src data:">"""),
        Markup('<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'),
        element("title", title),
        element("style", Markup(style)),
    )
    links = element("nav", *(element("a", title, href=f"#{name}") for name, title, _ in SECTIONS))
    header = element("header", element("p", "copresence bundle", class_="quiet"), element("h1", s.bundle.name), _badges(s), links)
    lacking = [element("li", element("a", part.what, href=f"#{name}")) for name, part in missing]
    gaps = [element("aside", element("h2", "Not in this report"), element("ul", *lacking))] if lacking else []
    footer = element("footer", f"Made by copresence-export report {copresence_version()} from the files of the bundle {s.bundle.digest}.")
    body = element("body", header, element("main", *sections, *gaps), footer)
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


_SIGNED = {
    "none": ("not signed", "failed"),
    "not checked": ("signed, not checked", "plain"),
    "valid": ("signature valid", "passed"),
    "refused": ("signature refused", "failed"),
}


def _badges(s: Subject) -> Markup:
    badges = [(s.precision.name, "plain")]
    if s.quantization is not None:
        gates = s.manifest.record("proof").records("gates") if "proof" in s.manifest else []
        passed = sum(gate.flag("passed") for gate in gates)
        badges.append((f"proven: {passed} of {len(gates)} gates", "passed") if not s.bundle.unproven else ("not proven", "failed"))
    badges.append(_SIGNED[s.signature.state])
    if s.engine:
        badges.append((f"engine for {s.engine.target.name}", "plain"))
    return element("p", *(element("b", words, class_=f"badge {kind}") for words, kind in badges))


def _absent(part: Missing) -> Markup:
    return element("p", f"Not here: {part.what}. ", element("span", "To have it: ", element("code", part.remedy)), class_="missing")


def _facts(rows: list[tuple[str, str]]) -> Markup:
    return element("dl", *(element("div", element("dt", name), element("dd", value)) for name, value in rows))


def _more(summary: str, content: Markup) -> Markup:
    return element("details", element("summary", summary), content)


def _short(sha256: str) -> str:
    return sha256[:DIGITS]


def _layer(weight: str) -> Markup:
    return element("code", *_broken(weight.removesuffix(".weight")))


def _broken(name: str) -> list[str]:
    """A long name that may go on in the next line after each dot and slash."""
    marked = name.replace("/", "/\n").replace(".", ".\n").split("\n")
    return [part for piece in marked for part in (piece, Markup("<wbr>"))][:-1]
