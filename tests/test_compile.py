"""`copresence-export compile` on the doubles: an engine that has proven itself takes the place of the last, and nothing else does."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ticks import SMALL, make_model

from device.bundle import FORMAT, GRAPH_NAME, MANIFEST_NAME, Bundle, ChangedFile, Unproven
from device.engine import OnnxRuntimeEngine
from device.engine.record import PLAN_NAME, RECORD_NAME, REPORT_NAME, TIMING_CACHE_NAME
from device.engine.tensorrt import TensorRtEngine
from device.field.settings import Settings
from device.signature import Unsigned
from device.tensors import tensor_table
from export.cli import main
from export.compile import QUANTIZATION_NAME, compile_engine
from export.graph import build_graph
from export.prepare import PROGRESS_S, PrepareError, prepare, progress
from export.sign import keygen, sign
from export.tensorrt_builder import CompileError, find_level
from export.ticks import TICKS_NAME, store_ticks

TARGET = "orin-nano-super"
TICKS = 25


def quiet(phase: str, done: int, steps: int) -> None:
    pass


def write_manifest(folder: Path, **more: Any) -> None:
    files = {f.name: f.read_bytes() for f in folder.iterdir() if f.name != MANIFEST_NAME}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "config": SMALL.to_dict(),
        "tensors": [{"name": t.name, "dtype": t.dtype, "shape": t.shape} for t in tensor_table(SMALL)],
        "files": {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()},
    }
    if "quantized" in more and "proof" not in more:
        more["proof"] = {"gates": [{"gate": "all", "passed": True}], "graph_sha256": manifest["files"][GRAPH_NAME]["sha256"]}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest | more))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Graph and stored ticks of a small model."""
    folder = tmp_path_factory.mktemp("files")
    weights = {name: value.numpy() for name, value in make_model(SMALL).state_dict().items()}
    (folder / GRAPH_NAME).write_bytes(build_graph(SMALL, weights).SerializeToString())
    store_ticks(OnnxRuntimeEngine(folder / GRAPH_NAME, SMALL), SMALL, folder / TICKS_NAME, TICKS)
    return {name: (folder / name).read_bytes() for name in (GRAPH_NAME, TICKS_NAME)}


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.compile.WARM_UP_TICKS", 2)


@pytest.fixture
def bundle(files: dict[str, bytes], tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    write_manifest(folder)
    return folder


def test_a_bundle_becomes_an_engine_that_runs(double: Any, bundle: Path) -> None:
    shown: list[tuple[str, int, int]] = []
    folder = compile_engine(bundle, TARGET, show=lambda *step: shown.append(step))
    assert shown == [("Building", step, 4) for step in (1, 2, 3, 4)]
    assert folder == bundle.with_name(f"small.{TARGET}.engine")
    record = json.loads((folder / RECORD_NAME).read_text())
    assert (record["tensorrt"], record["sm"], record["target"], record["precision"]) == ("10.3.0", "8.7", TARGET, "fp32")
    assert set(record["files"]) == {PLAN_NAME, TIMING_CACHE_NAME, REPORT_NAME} == {f.name for f in folder.iterdir()} - {RECORD_NAME}
    for name, entry in record["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
    report = json.loads((folder / REPORT_NAME).read_text())
    assert report["ticks"] == TICKS and report["difference"]["say"] == 1 and report["difference"]["speech"] == 0
    assert report["device_ms"]["p50"] > 0 and report["layers"] == [{"name": "all", "type": "kgen", "bits": "32"}]
    opened = Bundle.open(bundle)
    with TensorRtEngine(folder, opened.config, opened.digest) as engine:
        engine.run()


def test_a_bundle_that_has_not_proven_itself_is_not_compiled(double: Any, bundle: Path) -> None:
    write_manifest(bundle, quantized={"precision": "int8"}, proof={})
    with pytest.raises(Unproven, match="carries no proof"):
        compile_engine(bundle, TARGET)


def test_a_board_with_keys_compiles_nothing_that_they_did_not_sign(
    double: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public, _ = keygen(tmp_path / "ours.key")
    (tmp_path / "keys").mkdir()
    public.rename(tmp_path / "keys" / public.name)
    monkeypatch.setenv("COPRESENCE_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("COPRESENCE_STATE", str(tmp_path / "state"))
    with pytest.raises(Unsigned):
        compile_engine(bundle, TARGET)
    sign(bundle, tmp_path / "ours.key")
    assert (compile_engine(bundle, TARGET) / RECORD_NAME).is_file()


def test_the_stored_ticks_are_worth_comparing(files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / TICKS_NAME).write_bytes(files[TICKS_NAME])
    stored = np.load(tmp_path / TICKS_NAME)
    assert len(stored["speech"]) == TICKS and np.abs(stored["speech"]).max() > 0.01
    assert len(np.unique(stored["say_prob"], axis=0)) > TICKS - 3


def test_the_next_build_starts_from_the_last_timing_cache(double: Any, bundle: Path) -> None:
    for expected in (b"", b"timed;"):
        folder = compile_engine(bundle, TARGET, show=quiet)
        assert double._given_caches[-1] == expected
    assert (folder / TIMING_CACHE_NAME).read_bytes() == b"timed;timed;"


@pytest.mark.parametrize(("version", "flags"), [("10.3.0", 2), ("10.13.3.9", 2), ("10.16.2", 2), ("11.4.1", 0)])
def test_every_version_builds_strongly_typed_by_one_path(version: str, flags: int, double: Any, bundle: Path) -> None:
    double.__version__ = version
    compile_engine(bundle, TARGET, show=quiet)
    assert double._creation_flags == [flags]


@pytest.mark.parametrize("version", ["8.6.1", "10.1.0", "12.0"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(CompileError, match="not supported; install"):
        find_level(version)


def spoil_parser(double: Any) -> None:
    double._refused = double.ParserError("Erf", "perceive.0/mlp/gelu/Erf", "unsupported")


def spoil_memory(double: Any) -> None:
    double._build_error = "Requested amount of GPU memory could not be allocated"


def spoil_plan(double: Any) -> None:
    double._MAGIC = b"something else"
    double.Runtime.deserialize_cuda_engine = lambda self, serialized_engine: None


@pytest.mark.parametrize(("spoil", "said"), [
    (spoil_parser, "does not take Erf 'perceive.0/mlp/gelu/Erf': unsupported"),
    (spoil_memory, "GPU memory could not be allocated"),
    (spoil_plan, "cannot read the engine"),
    (lambda double: setattr(double, "_layers", ["only a name"]), "tells no precisions"),
    (lambda double: setattr(double, "_fail_launch_from", 1), "did not launch"),
])  # fmt: skip
def test_a_build_that_fails_leaves_the_last_engine(
    spoil: Callable[[Any], Any], said: str, double: Any, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = compile_engine(bundle, TARGET, show=quiet)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    spoil(double)
    assert main(["compile", str(bundle), "--target", TARGET]) == 2
    assert said in capsys.readouterr().err
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert {f.name for f in bundle.parent.iterdir()} == {bundle.name, folder.name}, "nothing half-written is left"


def test_a_full_disk_leaves_the_last_engine(double: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compile_engine(bundle, TARGET, show=quiet)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(CompileError, match=r"No space left on device.*free space"):
            compile_engine(bundle, TARGET, show=quiet)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_end_in_mid_build_leaves_the_last_engine(number: int, double: Any, bundle: Path, repository: Path) -> None:
    folder = compile_engine(bundle, TARGET, show=quiet)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    argv = ["compile", str(bundle), "--target", TARGET]
    script = f"import tensorrt; tensorrt._stall = True; from export.cli import main; main({argv!r})"
    paths = os.pathsep.join(map(str, (repository / "tests" / "doubles", repository)))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths}, cwd=bundle.parent
    )
    assert process.stderr is not None
    seen = b""
    while b"2/4" not in seen:
        more = process.stderr.read1(100)
        assert more, seen
        seen += more
    process.send_signal(number)
    process.communicate()
    assert process.returncode != 0
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert {f.name for f in bundle.parent.iterdir()} == {bundle.name, folder.name}


def test_an_engine_that_chooses_otherwise_is_refused(double: Any, bundle: Path, files: dict[str, bytes]) -> None:
    (bundle / TICKS_NAME).write_bytes(files[TICKS_NAME])
    stored = dict(np.load(bundle / TICKS_NAME))
    stored["act"][:1] += 1
    np.savez_compressed(bundle / TICKS_NAME, **stored)
    write_manifest(bundle)
    with pytest.raises(CompileError, match=r"'act' of the engine is ONNX Runtime's in 96.0% of 25 ticks"):
        compile_engine(bundle, TARGET, show=quiet)
    assert not bundle.with_name(f"small.{TARGET}.engine").exists()


def layer(name: str, kind: str, metadata: str = "") -> dict[str, Any]:
    return {"Name": name, "LayerType": "gemm", "Inputs": [{"Format/Datatype": kind}, {"Format/Datatype": "Float"}], "Metadata": metadata}


@pytest.mark.parametrize(("layers", "said"), [
    ([layer("a + present.0/qkv", "Row major Int8 format")], None),
    ([layer("__myl_1", "INT8", "[ONNX Layer: other]\x1e[ONNX Layer: present.0/qkv]")], None),
    ([layer("present.0/qkv", "Row major linear FP16 format")], "came out with 16 bits"),
    ([layer("present.0/qkv", "Float")], "came out with 32 bits"),
    ([layer("present.0/qkv", "N/A due to dynamic shapes") | {"Inputs": []}], "came out with 64 bits"),
    ([layer("another", "Int8")], "does not tell"),
])  # fmt: skip
def test_a_layer_that_came_out_wider_is_named(layers: list[Any], said: str | None, double: Any, bundle: Path) -> None:
    double._layers = layers
    rows = {"layers": [{"weight": "w", "precision": "int8", "nodes": ["present.0/qkv"], "inputs": []}]}
    (bundle / QUANTIZATION_NAME).write_text(json.dumps(rows))
    write_manifest(bundle, quantized={"precision": "int8"})
    if said is None:
        compile_engine(bundle, TARGET, show=quiet)
    else:
        with pytest.raises(CompileError, match=f"'present.0/qkv'.*{said}"):
            compile_engine(bundle, TARGET, show=quiet)


@pytest.mark.parametrize(("arguments", "more", "said"), [
    (["--target", "toaster"], {}, "no target 'toaster'"),
    (["--target", TARGET], {"quantized": {"precision": "fp8"}}, "has no fp8"),
    (["--target", "thor-t5000"], {}, "SM 8.7"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_built(
    arguments: list[str], more: dict[str, Any], said: str, double: Any, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_manifest(bundle, **more)
    double.Builder = lambda logger: pytest.fail("built")
    assert main(["compile", str(bundle), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_is_no_engine_is_not_overwritten(double: Any, bundle: Path) -> None:
    with pytest.raises(CompileError, match="not an engine"):
        compile_engine(bundle, TARGET, bundle, quiet)


def test_the_board_needs_only_tensorrt_pycuda_and_numpy(bundle: Path, repository: Path) -> None:
    script = f"""
import sys
from importlib.abc import MetaPathFinder

class Only(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        ours = ("device", "export", "numpy", "tensorrt", "pycuda", "cuda", *sys.stdlib_module_names)
        # The double of tensorrt runs on ONNX Runtime, which no module of ours may ask for.
        caller = sys._getframe(1)
        while caller.f_globals.get("__name__", "").startswith(("importlib", "_frozen", "__main__")) and caller.f_back:
            caller = caller.f_back
        by = caller.f_globals.get("__name__", "")
        if name.split(".")[0] not in ours and by.split(".")[0] in ("device", "export", "numpy"):
            raise ImportError(f"{{by}} imports {{name}}")
        return None

sys.meta_path.insert(0, Only())
from export.cli import main
sys.exit(main(["compile", {str(bundle)!r}, "--target", {TARGET!r}]))
"""
    paths = os.pathsep.join(map(str, (repository / "tests" / "doubles", repository)))
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, cwd=bundle.parent
    )
    assert run.returncode == 0, run.stderr
    assert "compiled" in run.stdout


# --- before the companion starts ----------------------------------------------------------------------------------


@pytest.fixture
def board(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """A board's configuration, with other values for some keys."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))

    def settings(**changes: Any) -> Settings:
        values = {"bundle.path": str(bundle), "bundle.keys": "", "bundle.state": str(tmp_path), "engine.folder": str(tmp_path / "engine")}
        return Settings({**values, **{name.replace("__", "."): value for name, value in changes.items()}})

    return settings


def verified(tmp_path: Path) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "run" / "verified.json").read_text()))


def test_without_tensorrt_the_bundle_is_checked_with_the_cpus_engine(board: Callable[..., Settings], bundle: Path, tmp_path: Path) -> None:
    said: list[str] = []
    prepare(board(), said.append)
    found = verified(tmp_path)
    assert (found["bundle_sha256"], found["engine"]) == (Bundle.open(bundle).digest, "onnxruntime")
    assert found["agreement"] == {"say": 1.0, "act": 1.0} and 0 < found["p50_ms"] < SMALL.tick_ms
    assert len(said) == 2
    prepare(board(), said.append)
    assert "verified since the boot" in said[2] and len(said) == 3


def test_a_bundle_that_does_not_behave_as_stored_leaves_nothing_verified(
    board: Callable[..., Settings], bundle: Path, tmp_path: Path
) -> None:
    prepare(board(), lambda text: None)
    with np.load(bundle / TICKS_NAME) as arrays:
        stored = dict(arrays)
    stored["act"][::2] += 1
    np.savez(bundle / TICKS_NAME, **stored)
    write_manifest(bundle)
    with pytest.raises(PrepareError, match="its 'act' is the one stored in small in"):
        prepare(board(), lambda text: None)
    assert not (tmp_path / "run" / "verified.json").exists()


def test_a_changed_bundle_is_refused_though_it_was_verified(board: Callable[..., Settings], bundle: Path) -> None:
    prepare(board(), lambda text: None)
    graph = bundle / GRAPH_NAME
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    with pytest.raises(ChangedFile):
        prepare(board(), lambda text: None)


def test_an_engine_is_built_once_and_then_checked(double: Any, board: Callable[..., Settings], tmp_path: Path) -> None:
    said: list[str] = []
    settings = board(engine__backend="tensorrt", engine__target=TARGET)
    prepare(settings, said.append)
    assert any(text.startswith("building: ") for text in said) and any("built in" in text for text in said)
    assert verified(tmp_path)["engine"] == str(tmp_path / "engine")
    (tmp_path / "run" / "verified.json").unlink()  # the next boot
    built = (tmp_path / "engine" / PLAN_NAME).stat().st_mtime_ns
    said.clear()
    prepare(settings, said.append)
    assert not any(text.startswith("building: ") for text in said)
    (tmp_path / "run" / "verified.json").unlink()
    plan = tmp_path / "engine" / PLAN_NAME
    plan.write_bytes(plan.read_bytes() + b"x")
    prepare(settings, said.append)
    assert any("SHA-256 differs" in text for text in said), "why it is built again"
    assert plan.stat().st_mtime_ns != built and verified(tmp_path)["bundle"] == "small"


def test_an_engine_needs_the_name_of_the_board(double: Any, board: Callable[..., Settings]) -> None:
    with pytest.raises(PrepareError, match=r"engine\.target"):
        prepare(board(engine__backend="tensorrt"), lambda text: None)


def test_progress_is_a_line_for_each_phase_and_every_few_seconds() -> None:
    said: list[str] = []
    times_s = iter([0.0, 1.0, PROGRESS_S, PROGRESS_S + 1, PROGRESS_S + 2])
    show = progress(said.append, lambda: next(times_s))
    for phase, done in (("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 0)):
        show(phase, done, 4)
    assert said == ["building: a 0/4", "building: a 2/4", "building: b 0/4"]


def test_prepare_answers_in_one_line(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wrong.toml").write_text("[bundle]\npaht = 'x'\n")
    assert main(["prepare", "--config", str(tmp_path / "wrong.toml")]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "line 2" in errors and "did you mean 'bundle.path'?" in errors
