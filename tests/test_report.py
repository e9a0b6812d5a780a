"""The report: it says what the manifest says, nothing in a bundle can break out of its place, and a browser shows it without complaint."""

from __future__ import annotations

import copy
import dataclasses
import html.parser
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, browser
from quantized import float_bundle, float_model, lively, write_set
from test_verify import _pair
from ticks import SMALL

from device.bundle import GRAPH_NAME, MANIFEST_NAME, Bundle
from device.engine.record import RECORD_NAME, REPORT_NAME
from export import cli
from export.compile import compile_engine
from export.quantize.compare import ProbeEngine
from export.quantize.gates import judge
from export.quantize.verify import _LongRun, _measure, _write
from export.report.page import SECTIONS, render
from export.report.subject import Subject, read_subject
from export.report.untrusted import Record, Unreadable
from export.targets import targets

HOSTILE = "</title></style></code>\"'><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\u202e"
VOID = {"meta", "link", "wbr", "br"}


class Page(html.parser.HTMLParser):
    """What a browser would make of it: `text` as it is read, every tag with its attributes, and that what is opened is closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self._said: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open
        self.text = re.sub(r"\s+", " ", "".join(self._said))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
            self._said.append("" if tag in ("code", "span") and self._open[-2] == "code" else " ")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._said.append(" ")

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self._said.append(data)


def make_proof(bundle: Bundle, against: str) -> dict[str, Any]:
    """A proof as `verify` writes it, by its own counting, from scenes that were not played."""
    run = _LongRun(SMALL, [ProbeEngine(float_model(), SMALL), ProbeEngine(float_model(), SMALL)], 0)
    for record in lively()[:4]:
        run.step({name: record[name] for name in record.dtype.names or ()})
    say = np.zeros((10, 2), np.int32)
    say[3, 1] = 5
    pairs = (
        [_pair(([1, 1], [1, 1])) for _ in range(395)] + [_pair(([1], [0]), say) for _ in range(3)] + [_pair(([0], [1])) for _ in range(2)]
    )
    values, details = _measure(pairs, run)
    return {
        "against": against,
        "graph_sha256": bundle.manifest["files"]["graph.onnx"]["sha256"],
        "data": {"split": "test", "sha256": "5" * 64},
        "seed": 7,
        "gates": judge(values | {"long run": 3000.0}, "int8"),
        **details,
        "tools": {"numpy": np.__version__},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float bundle and an INT8 one with everything: scan, a layer kept in FP16, proof."""
    folder = tmp_path_factory.mktemp("bundles")
    float_bundle(folder / "float")
    data = write_set(folder / "set", [lively()])
    command = ["quantize", str(folder / "float"), "--calibration", str(data), "--out", str(folder / "int8")]
    assert cli.main([*command, "--sensitivity", str(folder / "scan")]) == 0
    bundle = Bundle.open(folder / "int8", unproven=True)
    _write(bundle, make_proof(bundle, Bundle.open(folder / "float").digest))
    return folder


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return read_subject(folder / "int8", None)


@pytest.fixture(scope="module")
def page(subject: Subject) -> Page:
    return Page(render(subject))


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as tab:
        yield tab


def spoilt(subject: Subject, manifest: dict[str, Any] | None = None, quantization: dict[str, Any] | None = None) -> Subject:
    """The same with other values in its files."""
    assert subject.quantization
    values = manifest or subject.manifest.values
    return dataclasses.replace(
        subject,
        bundle=dataclasses.replace(subject.bundle, manifest=values),
        manifest=dataclasses.replace(subject.manifest, values=values),
        quantization=dataclasses.replace(subject.quantization, values=quantization or subject.quantization.values),
    )


def test_the_page_says_what_the_manifest_says(folder: Path, page: Page) -> None:
    bundle = Bundle.open(folder / "int8")
    m, q = bundle.manifest, bundle.manifest["quantized"]
    shorts = [q["of"]["digest"], q["of"]["graph_sha256"], q["calibration"]["sha256"], m["proof"]["against"], m["proof"]["data"]["sha256"]]
    for said in [bundle.digest, *(f["sha256"] for f in m["files"].values()), *(digest[:16] for digest in shorts)]:
        assert said in page.text
    for name, version in m["tools"].items():
        assert f"{name} {version}" in page.text
    assert f"{q['calibration']['ticks']} ticks in 1 recordings" in page.text and "seed 7" in page.text


def test_every_gate_is_there_with_value_limit_and_verdict(subject: Subject, page: Page) -> None:
    gates = subject.manifest.values["proof"]["gates"]
    for gate in gates:
        beside = "at most" if gate["at_most"] else "at least"
        line = f"{gate['gate']} passed {gate['value']:.4g} {gate['unit']} .*?{beside} {gate['limit']:g} {gate['unit']}"
        assert re.search(re.sub(r"\s+", r"\\s+", line), page.text), line
    assert f"proven: {len(gates)} of {len(gates)} gates" in page.text
    low, high = subject.manifest.values["proof"]["closed_loop"]["loss_interval_95"]
    loss = next(gate["value"] for gate in gates if gate["gate"] == "scoreboard loss")
    assert low < loss < high and f"{loss:+.2f} points ({low:.2f} to {high:.2f})" in page.text


def test_every_layer_and_every_range_is_there(subject: Subject, page: Page) -> None:
    assert subject.quantization
    written = subject.quantization.values
    for layer in written["layers"]:
        shape = "×".join(map(str, layer["shape"]))
        assert f"{layer['weight'].removesuffix('.weight')} {shape}, {layer['precision']}" in page.text.replace("  ", " ")
    for name, activation in written["activations"].items():
        assert name in page.text
        assert f"±{activation['limit']:.3g} by {activation['method']}, peak {activation['peak']:.3g}" in page.text
    pictures = [attributes["aria-label"] or "" for tag, attributes in page.tags if tag == "svg" and "aria-label" in attributes]
    assert sum(" by " in label for label in pictures) == len(written["activations"])
    for name, cost in written["sensitivity"]["alone"].items():
        assert f"{name}: {100 * cost['spent']:.1f} %" in pictures


def test_layers_cost_what_plan_says(subject: Subject, page: Page) -> None:
    from export.cost import count, estimate

    for target in targets().values():
        cost = estimate(count(SMALL), target, target.require("int8"))
        assert re.search(rf"{target.name} .{{1,80}} {cost.floor_ms:.2f} {cost.needed_ms:.2f} – ", page.text)
    assert subject.quantization
    parts = [subject.work_of(layer["weight"]) for layer in subject.quantization.values["layers"]]
    assert all(part is not None and part.flops > 0 for part in parts)
    assert sum(part.flops for part in parts if part) < subject.work.flops


def test_a_layer_that_stays_in_fp16_is_marked(subject: Subject) -> None:
    assert subject.quantization
    values = copy.deepcopy(subject.quantization.values)
    kept = next(iter(values["sensitivity"]["alone"]))
    for layer in values["layers"]:
        if layer["weight"] == kept:
            layer["precision"] = "fp16"
    text = Page(render(spoilt(subject, quantization=values))).text
    assert text.count("stays FP16") == 1 and f"{kept.removesuffix('.weight')} stays FP16" in re.sub(" +", " ", text)


def test_a_float_bundle_gets_what_there_is_and_is_told_what_is_missing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "float.html"
    assert cli.main(["report", str(folder / "float"), "--out", str(out)]) == 0
    page = Page(out.read_text())
    assert "it needs no proof" in page.text and "not proven" not in page.text and "fp32" in page.text
    for missing in ("a signature", "a sensitivity scan", "precisions by layer", "ranges of activations", "measured time"):
        assert f"Not here: {missing}" in page.text
    assert "orin-nano-8gb" in page.text


def test_a_bundle_without_proof_says_so(subject: Subject) -> None:
    unproven = {name: value for name, value in subject.manifest.values.items() if name != "proof"}
    text = Page(render(spoilt(subject, unproven))).text
    assert "not proven" in text and "Not here: the proof" in text and "copresence-export verify" in text
    failed = copy.deepcopy(subject.manifest.values)
    failed["proof"]["gates"][1]["passed"] = False
    text = Page(render(spoilt(subject, failed))).text
    assert "not proven" in text and "did not pass: scoreboard loss" in text and "failed" in text


def test_the_page_asks_for_nothing_from_elsewhere(subject: Subject, page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "style")
            assert name not in ("href", "xlink:href") or (value or "").startswith(("#", "data:"))
    source = render(subject)
    assert not re.search(r"https?:|url\(|@import", source)
    assert "default-src 'none'" in next(a["content"] or "" for tag, a in page.tags if "http-equiv" in a)


def hostile(values: Any) -> Any:
    """The same, with something in every text and every name that wants to be more than text; what is looked up stays."""
    if isinstance(values, dict):
        known = ("tried", "relative_error", "found", "score", "false_per_minute")
        return {name: hostile(value) if name not in known else value for name, value in values.items()}
    if isinstance(values, list):
        return [hostile(value) for value in values]
    return values + HOSTILE if isinstance(values, str) else values


def test_whatever_a_bundle_says_stays_text(subject: Subject, page: Page, tmp_path: Path, tab: Browser) -> None:
    assert subject.quantization
    manifest, quantization = (hostile(copy.deepcopy(values)) for values in (subject.manifest.values, subject.quantization.values))
    for names in (manifest["tools"], manifest["files"], manifest["proof"]["closed_loop"]["behaviours"], quantization["activations"]):
        for name in list(names):
            if name != GRAPH_NAME:
                names[name + HOSTILE] = names.pop(name)
    spoiled = render(spoilt(subject, manifest, quantization))
    found = Page(spoiled)
    shown = HOSTILE.replace("\u202e", "\N{REPLACEMENT CHARACTER}")
    assert found.text.count(shown) > 20 and "\u202e" not in spoiled
    assert {tag for tag, _ in found.tags} <= {tag for tag, _ in page.tags}
    assert all(name in {name for _, attributes in page.tags for name in attributes} for _, a in found.tags for name in a)
    (tmp_path / "hostile.html").write_text(spoiled)
    tab.open(tmp_path / "hostile.html", 360)
    assert tab.value("typeof window.hacked") == "undefined" and not tab.complaints
    assert tab.value("document.documentElement.scrollWidth") <= 360


def places(values: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where something is in a JSON value, but of a long list of alike things only in the first."""
    if path:
        yield path
    children: list[tuple[str | int, Any]] = []
    if isinstance(values, dict):
        children = list(values.items())[: 2 if path and path[-1] in ("activations", "alone") else None]
    elif isinstance(values, list):
        children = list(enumerate(values))[:1]
    for name, value in children:
        yield from places(value, (*path, name))


CHECKED = ("config", "tensors", "format", "files")  # by the bundle's own reader, before anybody else sees them
WRONG: tuple[Any, ...] = (None, True, -1, 0, 10**400, 1e300, "word", [], [None], {}, {"word": None}, "\ud800")


@pytest.mark.parametrize("which", ["manifest", "quantization"])
def test_a_field_of_the_wrong_kind_is_named_or_does_no_harm(subject: Subject, which: str) -> None:
    """Every field of both files with every kind of wrong value: a page, or one error that says which file and how to mend it."""
    assert subject.quantization
    refused: list[str] = []
    original: dict[str, Any] = getattr(subject, which).values
    for path in places({name: value for name, value in original.items() if name not in CHECKED}):
        for wrong in WRONG:
            values = copy.deepcopy(original)
            inner: Any = values
            for step in path[:-1]:
                inner = inner[step]
            inner[path[-1]] = wrong
            try:
                render(spoilt(subject, **{which: values})).encode()
            except Unreadable as error:
                refused.append(str(error))
    assert len(refused) > 300
    for error in refused:
        assert re.search(r"\.json: field '.+' is not .+; export the bundle again$", error)


def test_a_list_that_no_page_could_hold_is_refused() -> None:
    with pytest.raises(Unreadable, match="'long' is not a list"):
        Record({"long": [0] * 5000}, Path("x.json"), "export again").numbers("long")


def test_the_engine_tells_layers_and_measured_time(
    double: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("export.compile.WARM_UP_TICKS", 2)
    engine = compile_engine(folder / "float", "orin-nano-super", tmp_path / "engine", show=lambda *_: None)
    out = tmp_path / "with.html"
    assert cli.main(["report", str(folder / "float"), "--engine", str(engine), "--out", str(out)]) == 0
    written, page = json.loads((engine / REPORT_NAME).read_text()), Page(out.read_text())
    times = written["device_ms"]
    assert f"{times['p50']:.3f} ms p50, {times['p99']:.3f} ms p99" in page.text and "TensorRT 10.3.0" in page.text
    for layer in written["layers"]:
        assert re.search(rf"{layer['name']}\s+{layer['type']}\s+{layer['bits']}\s+{1000 * layer['ms']:.2f}", page.text)
    assert "250 µs in all" in page.text and "Not here: measured time by layer" not in page.text
    assert re.search(rf"orin-nano-super .{{1,90}} {times['p50']:.2f} ", page.text)
    subject = read_subject(folder / "float", engine)
    assert subject.engine
    untimed = [{name: value for name, value in layer.items() if name != "ms"} for layer in written["layers"]]
    old = dataclasses.replace(subject.engine.report, values=written | {"layers": untimed})
    text = Page(render(dataclasses.replace(subject, engine=dataclasses.replace(subject.engine, report=old)))).text
    assert "Not here: measured time by layer: this engine was compiled before" in text and "µs in all" not in text
    before = out.read_bytes()
    for bundle, message in (("int8", "was compiled from another bundle"), ("float", "is not the report of this engine")):
        (engine / REPORT_NAME).write_text(json.dumps(written | {"layers": []}))
        assert cli.main(["report", str(folder / bundle), "--engine", str(engine), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    record = json.loads((engine / RECORD_NAME).read_text())
    (engine / RECORD_NAME).write_text(json.dumps(record | {"target": "toaster"}))
    assert cli.main(["report", str(folder / "float"), "--engine", str(engine), "--out", str(out)]) == 2
    assert "'toaster' and none of orin-nano-8gb" in capsys.readouterr().err
    assert out.read_bytes() == before, "the last page stays"
    assert {file.name for file in tmp_path.iterdir()} == {"engine", "with.html"}, "nothing half-written is left"


def test_the_same_bundle_gives_the_same_page_beside_it(folder: Path) -> None:
    pages = []
    for _ in range(2):
        assert cli.main(["report", str(folder / "int8")]) == 0
        pages.append((folder / "int8.html").read_bytes())
    assert pages[0] == pages[1]
    Bundle.open(folder / "int8")


def test_a_page_never_goes_where_it_would_do_harm(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out, message in ((folder / "int8" / "page.html", "is within the bundle"), (folder / "float", "is a folder")):
        assert cli.main(["report", str(folder / "int8"), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    Bundle.open(folder / "int8")


def test_the_signature_is_checked_where_a_key_is_trusted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        assert cli.main(["keygen", "--out", str(tmp_path / f"{name}.key")]) == 0
        (tmp_path / f"{name}.pub").rename(tmp_path / name / f"{name}.pub")
    float_bundle(tmp_path / "signed")
    assert cli.main(["sign", str(tmp_path / "signed"), "--key", str(tmp_path / "ours.key"), "--version", "3"]) == 0
    monkeypatch.delenv("COPRESENCE_KEYS", raising=False)
    for keys, badge, said in (("", "signed, not checked", "as version 3; not checked"), ("ours", "signature valid", "valid, by 'ours'")):
        if keys:
            monkeypatch.setenv("COPRESENCE_KEYS", str(tmp_path / keys))
        text = Page(render(read_subject(tmp_path / "signed", None))).text
        assert badge in text and said in text
    monkeypatch.setenv("COPRESENCE_KEYS", str(tmp_path / "theirs"))
    text = Page(render(read_subject(tmp_path / "signed", None))).text
    assert "signature refused" in text and MANIFEST_NAME not in text.split("signature refused")[0]


@pytest.mark.parametrize("width", [360, 1100])
@pytest.mark.parametrize("script", [True, False], ids=["script", "no script"])
def test_a_browser_shows_it_without_complaint(folder: Path, tab: Browser, width: int, script: bool, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert cli.main(["report", str(folder / "int8"), "--out", str(out)]) == 0
    grounds = []
    for dark in (False, True):
        tab.open(out, width, dark, script)
        assert tab.complaints == []
        assert [url for url in tab.requests if not url.startswith("data:")] == [out.as_uri()]
        assert tab.value("document.documentElement.scrollWidth") <= width
        # What sticks out of its own box would be cut off or lie over its neighbour; tables scroll in theirs.
        outside = "[...document.querySelectorAll('section *')].filter(e => !e.closest('.scroll') && !e.closest('svg') && "
        assert tab.value(outside + "e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 80))") == []
        grounds.append(tab.value("getComputedStyle(document.body).backgroundColor"))
        assert tab.value("document.querySelectorAll('section').length") == len(SECTIONS)
    assert grounds[0] != grounds[1], "light and dark"


def test_the_browser_does_hear_complaints(tab: Browser, tmp_path: Path) -> None:
    """Lest the tests above pass because nobody listens."""
    (tmp_path / "bad.html").write_text("<p style='width:999px'>wide</p><script>console.error('x'); nothing()</script><img src=gone.png>")
    tab.open(tmp_path / "bad.html", 360)
    assert len(tab.complaints) >= 3 and any("gone.png" in url for url in tab.requests)
    assert tab.value("document.documentElement.scrollWidth") > 360
