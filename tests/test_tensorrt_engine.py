"""The TensorRT engine on a double of its libraries: the same bits as ONNX Runtime, and a clear error for each fault."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from ticks import SMALL, make_model, make_scene, tick_inputs

from device.bundle import FORMAT, GRAPH_NAME, MANIFEST_NAME, Bundle
from device.cli import main
from device.config import ModelConfig
from device.engine import (
    Engine,
    EngineFailure,
    NoAccelerator,
    OnnxRuntimeEngine,
    OutOfDeviceMemory,
    StaleEngine,
)
from device.engine.record import OWN_MAX, OWN_NAME, PLAN_NAME, RECORD_NAME, SIGNATURE_NAME, describe, load_plan, remember_own
from device.engine.tensorrt import TensorRtEngine
from device.session import Session
from device.signature import BadSignature, Trust, TrustedKeys, UnknownKey, Unsigned, VersionMemory
from device.tensors import TensorMismatch, tensor_table
from export.cli import main as exporter
from export.graph import build_graph
from export.sign import keygen, sign_engine

DIGEST = "a bundle's SHA-256"
TICKS = 23  # the longest ring of the small model, 5 ticks, wraps four times


@pytest.fixture(scope="module")
def graph() -> bytes:
    model = make_model(SMALL)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    return build_graph(SMALL, weights).SerializeToString()


@pytest.fixture(params=["graph", "plain"])
def captured(request: pytest.FixtureRequest) -> bool:
    """With cuda.bindings, and without."""
    return request.param == "graph"


def cuda_double() -> Any:
    return importlib.import_module("pycuda.driver")


def write_engine(folder: Path, graph: bytes, config: ModelConfig = SMALL, **changed: Any) -> Path:
    """What `compile` writes, with the double's plan."""
    plan = b"double of a TensorRT engine\n" + graph
    folder.mkdir(exist_ok=True)
    (folder / PLAN_NAME).write_bytes(plan)
    record = describe(DIGEST, config, "10.3.0", "8.7", {PLAN_NAME: plan})
    (folder / RECORD_NAME).write_text(json.dumps(record | changed))
    return folder


def run(engine: Engine, ticks: list[int]) -> dict[str, np.ndarray]:
    """Outputs of a session of these ticks."""
    scene, session = make_scene(SMALL, len(ticks)), Session(SMALL, engine, seed=3)
    kept: dict[str, list[np.ndarray]] = {}
    for i, tick in enumerate(ticks):
        given = tick_inputs(SMALL, scene, i)
        session.step(tick, given["mic"], given["voice"], given["frames"], float(given["frame_age"][0]), given["text_in"])
        for row in tensor_table(SMALL):
            if row.role == "output":
                kept.setdefault(row.name, []).append(engine.outputs[row.name].copy())
    return {name: np.stack(values) for name, values in kept.items()}


def test_the_device_loop_gives_the_same_bits_as_onnx_runtime(
    double: Any, captured: bool, graph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not captured:
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    ticks = [*range(TICKS), TICKS + 3, TICKS + 4, TICKS + 40]  # with lost ones
    (tmp_path / "graph.onnx").write_bytes(graph)
    expected = run(OnnxRuntimeEngine(tmp_path / "graph.onnx", SMALL), ticks)
    with TensorRtEngine(write_engine(tmp_path / "engine", graph), SMALL, DIGEST) as engine:
        assert engine.captured == captured
        found, again = run(engine, ticks), run(engine, ticks)
        assert engine.device_ms > 0
    assert np.abs(expected["speech"]).max() > 0.01 and len(np.unique(expected["say_prob"])) > len(ticks)
    for name, values in expected.items():
        assert np.array_equal(found[name], values), name
        assert np.array_equal(again[name], values), f"{name}: a second session remembers the first"


def test_memory_can_be_read_and_restored_as_the_hosts(double: Any, graph: bytes, tmp_path: Path) -> None:
    """What the flight recorder keeps of a tick and what a replay begins with are the same on both engines."""
    (tmp_path / "graph.onnx").write_bytes(graph)
    host, scene = OnnxRuntimeEngine(tmp_path / "graph.onnx", SMALL), make_scene(SMALL, 6)
    rows = [row for row in tensor_table(SMALL) if row.role == "update"]

    def step(session: Session, tick: int) -> dict[str, np.ndarray]:
        given = tick_inputs(SMALL, scene, tick)
        decision = session.step(tick, given["mic"], given["voice"], given["frames"], float(given["frame_age"][0]), given["text_in"])
        found = {row.name: np.full(row.shape, np.nan, row.dtype) for row in rows}
        session.memory.copy_updates(found)
        return {"speech": decision.speech.copy(), **found}

    recorded = Session(SMALL, host, seed=3)
    for tick in range(3):
        step(recorded, tick)
    state = {name: array.copy() for name, array in host.inputs.items()}
    with TensorRtEngine(write_engine(tmp_path / "engine", graph), SMALL, DIGEST) as engine:
        session = Session(SMALL, engine, seed=3)
        session.past.restore(state, 3)
        for tick in range(3, 6):
            expected, found = step(recorded, tick), step(session, tick)
            assert np.abs(expected["new_key_0"]).max() > 0
            for name, array in expected.items():
                np.testing.assert_array_equal(found[name], array, name)


def test_a_tick_allocates_nothing_and_moves_nothing(double: Any, graph: bytes, tmp_path: Path) -> None:
    with TensorRtEngine(write_engine(tmp_path, graph), SMALL, DIGEST) as engine:
        cuda, session, scene = cuda_double(), Session(SMALL, engine), tick_inputs(SMALL, make_scene(SMALL, 1), 0)
        before = (cuda._allocations, [a.ctypes.data for a in (*engine.inputs.values(), *engine.outputs.values())])
        for tick in range(5):
            session.step(tick, scene["mic"], scene["voice"], scene["frames"], 0.1)
        assert before == (cuda._allocations, [a.ctypes.data for a in (*engine.inputs.values(), *engine.outputs.values())])


def test_leaving_hands_the_context_back_and_frees_everything(double: Any, graph: bytes, tmp_path: Path) -> None:
    with TensorRtEngine(write_engine(tmp_path, graph), SMALL, DIGEST):
        cuda = cuda_double()
        assert cuda._blocks and cuda._context is not None
    assert not cuda._blocks and cuda._context is None and cuda._retained == 0


def write_small_bundle(folder: Path, graph: bytes) -> Bundle:
    folder.mkdir()
    (folder / GRAPH_NAME).write_bytes(graph)
    manifest = {
        "format": FORMAT,
        "config": SMALL.to_dict(),
        "tensors": [{"name": t.name, "dtype": t.dtype, "shape": t.shape} for t in tensor_table(SMALL)],
        "files": {GRAPH_NAME: {"sha256": hashlib.sha256(graph).hexdigest(), "bytes": len(graph)}},
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return Bundle.open(folder)


def test_copresence_runs_an_engine(double: Any, graph: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_small_bundle(tmp_path / "bundle", graph)
    folder = write_engine(tmp_path / "engine", graph, bundle_sha256=bundle.digest)
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "mic.wav", 0.1 * rng.standard_normal(16000 * 4), 16000)
    command = ["run", "--bundle", str(bundle.path), "--mic", str(tmp_path / "mic.wav"), "--clock", "simulated"]
    for name, options in (("host", []), ("board", ["--engine", str(folder)])):
        assert main([*command, "--speaker", str(tmp_path / f"{name}.wav"), *options]) == 0
    voices = [soundfile.read(tmp_path / f"{name}.wav")[0] for name in ("host", "board")]
    assert np.array_equal(*voices) and np.abs(voices[0]).max() > 0.01
    assert cuda_double()._context is None
    changed_plan(folder)
    assert main([*command, "--speaker", "none", "--engine", str(folder)]) == 2
    assert "compile the bundle again" in capsys.readouterr().err


def changed_plan(folder: Path) -> None:
    plan = bytearray((folder / PLAN_NAME).read_bytes())
    plan[-1] ^= 1
    (folder / PLAN_NAME).write_bytes(plan)


@pytest.mark.parametrize(("spoil", "said"), [
    (changed_plan, "SHA-256 differs"),
    (lambda f: (f / PLAN_NAME).unlink(), "cannot be read"),
    (lambda f: (f / RECORD_NAME).unlink(), "cannot be read"),
    (lambda f: (f / RECORD_NAME).write_text("{}"), "not the record"),
    (lambda f: (f / RECORD_NAME).write_text("[1]"), "not the record"),
    (lambda f: rewrite(f, tensorrt="10.13.3"), "'tensorrt' is '10.13.3'"),
    (lambda f: rewrite(f, sm="11.0"), "'sm' is '11.0'"),
    (lambda f: rewrite(f, bundle_sha256="another"), "'bundle_sha256' is 'another'"),
    (lambda f: rewrite(f, format=2), "'format' is 2"),
])  # fmt: skip
def test_an_engine_that_is_not_what_was_compiled_is_never_deserialised(
    spoil: Callable[[Path], None], said: str, double: Any, graph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_engine(tmp_path / "engine", graph)
    spoil(folder)
    monkeypatch.setattr(double.Runtime, "deserialize_cuda_engine", lambda *_: pytest.fail("deserialised"))
    with pytest.raises(StaleEngine, match=said) as error:
        TensorRtEngine(folder, SMALL, DIGEST)
    assert "copresence-export compile" in str(error.value)
    assert cuda_double()._context is None and cuda_double()._retained == 0


def rewrite(folder: Path, **changed: Any) -> None:
    record = json.loads((folder / RECORD_NAME).read_text())
    (folder / RECORD_NAME).write_text(json.dumps(record | changed))


OTHER = dataclasses.replace(SMALL, trunk=dataclasses.replace(SMALL.trunk, present_window=6))


def test_a_record_of_other_tensors_is_refused_before_deserialising(double: Any, graph: bytes, tmp_path: Path) -> None:
    with pytest.raises(TensorMismatch, match="present_valid"):
        TensorRtEngine(write_engine(tmp_path, graph, OTHER), SMALL, DIGEST)


def test_an_engine_of_another_shape_is_refused_by_name(double: Any, graph: bytes, tmp_path: Path) -> None:
    with pytest.raises(TensorMismatch, match=r"present_valid.*float32\[6\].*float32\[5\]"):
        TensorRtEngine(write_engine(tmp_path, graph, OTHER), OTHER, DIGEST)
    assert cuda_double()._context is None and not cuda_double()._blocks


def test_an_engine_that_tensorrt_cannot_read_is_an_error_with_its_words(double: Any, tmp_path: Path) -> None:
    folder = write_engine(tmp_path, b"")
    (folder / PLAN_NAME).write_bytes(b"rubbish")
    (folder / RECORD_NAME).write_text(json.dumps(describe(DIGEST, SMALL, "10.3.0", "8.7", {PLAN_NAME: b"rubbish"})))
    with pytest.raises(EngineFailure, match=r"magic tag does not match.*compile"):
        TensorRtEngine(folder, SMALL, DIGEST)


def test_a_failed_enqueue_ends_in_an_error_with_tensorrts_words(
    double: Any, graph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_engine(tmp_path, graph)
    double._fail_launch_from = 1
    with pytest.raises(EngineFailure, match=r"enqueueV3: launch failed.*start again"):
        TensorRtEngine(folder, SMALL, DIGEST)
    assert cuda_double()._context is None and not cuda_double()._blocks
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)  # a graph would not ask TensorRT again
    double._fail_launch_from = double._launches + 3
    with TensorRtEngine(folder, SMALL, DIGEST) as engine, pytest.raises(EngineFailure, match="enqueueV3: launch failed"):
        engine.run()
    assert cuda_double()._context is None and not cuda_double()._blocks


def test_a_failed_capture_is_an_error(double: Any, graph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = importlib.import_module("cuda.bindings.driver")
    monkeypatch.setattr(driver, "cuGraphInstantiate", lambda hGraph, flags: (driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None))
    with pytest.raises(EngineFailure, match=r"CAPTURE_INVALIDATED.*without graphs"):
        TensorRtEngine(write_engine(tmp_path, graph), SMALL, DIGEST)
    assert cuda_double()._context is None and not cuda_double()._blocks


@pytest.mark.parametrize(("what", "left"), [("_device_bytes_left", 1000), ("_device_bytes_left", 150_000), ("_pinned_bytes_left", 1000)])
def test_out_of_memory_ends_in_an_error_and_frees_what_was_taken(what: str, left: int, double: Any, graph: bytes, tmp_path: Path) -> None:
    cuda = cuda_double()
    setattr(cuda, what, left)
    with pytest.raises(OutOfDeviceMemory, match=r"used up while.*smaller model"):
        TensorRtEngine(write_engine(tmp_path, graph), SMALL, DIGEST)
    assert cuda._context is None and not cuda._blocks and cuda._retained == 0


def test_no_memory_for_activations_is_an_error(double: Any, graph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(double.ICudaEngine, "create_execution_context", lambda self: None)
    with pytest.raises(EngineFailure, match=r"execution context.*stop other programs"):
        TensorRtEngine(write_engine(tmp_path, graph), SMALL, DIGEST)


@pytest.mark.parametrize("library", ["tensorrt", "pycuda"])
def test_a_missing_library_is_named(library: str, double: Any, graph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(NoAccelerator, match=library):
        TensorRtEngine(write_engine(tmp_path, graph), SMALL, DIGEST)


def test_nobody_takes_pycudas_own_context(repository: Path) -> None:
    sources = [path.read_text() for folder in ("device", "export") for path in (repository / folder).rglob("*.py")]
    assert sources and not any("autoinit" in source for source in sources)


# --- who vouches for it -------------------------------------------------------------------------------------------


@pytest.fixture
def trust(tmp_path: Path) -> Trust:
    """A machine that takes the word of one key, `ours.key`."""
    (tmp_path / "keys").mkdir()
    for name in ("ours", "theirs"):
        keygen(tmp_path / f"{name}.key")
    (tmp_path / "ours.pub").rename(tmp_path / "keys" / "ours.pub")
    return Trust(TrustedKeys.read(tmp_path / "keys"), VersionMemory(tmp_path / "state"))


def load(folder: Path, trust: Trust | None) -> bytes:
    return load_plan(folder, DIGEST, SMALL, "10.3.0", "8.7", trust)


def test_an_engine_is_taken_from_a_trusted_key_alone(trust: Trust, graph: bytes, tmp_path: Path) -> None:
    folder = write_engine(tmp_path / "engine", graph)
    with pytest.raises(Unsigned, match=r"the engine is not signed.*copresence-export sign"):
        load(folder, trust)
    sign_engine(folder, tmp_path / "theirs.key")
    with pytest.raises(UnknownKey, match="sign the engine with a trusted key"):
        load(folder, trust)
    assert exporter(["sign", str(folder), "--key", str(tmp_path / "ours.key")]) == 0
    assert load(folder, trust).endswith(graph)
    assert {file.name for file in folder.iterdir()} == {PLAN_NAME, RECORD_NAME, SIGNATURE_NAME}


@pytest.mark.parametrize("flip", [0, 31, 40, 95])
def test_a_flipped_bit_is_found_before_the_record_is_parsed(
    flip: int, trust: Trust, graph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_engine(tmp_path / "engine", graph)
    sign_engine(folder, tmp_path / "ours.key")
    signature, record = (bytearray((folder / name).read_bytes()) for name in (SIGNATURE_NAME, RECORD_NAME))
    spoilt = signature.copy()
    spoilt[flip] ^= 1
    (folder / SIGNATURE_NAME).write_bytes(spoilt)
    monkeypatch.setattr("json.loads", lambda *_: pytest.fail("parsed"))
    with pytest.raises((UnknownKey, BadSignature)):
        load(folder, trust)
    record[flip] ^= 1
    (folder / SIGNATURE_NAME).write_bytes(signature)
    (folder / RECORD_NAME).write_bytes(record)
    with pytest.raises(BadSignature):
        load(folder, trust)
    (folder / SIGNATURE_NAME).write_bytes(signature[:-1])
    with pytest.raises(BadSignature, match="has 95 bytes"):
        load(folder, trust)


def test_the_boards_own_build_needs_nobodys_word_and_the_newest_are_remembered(trust: Trust, graph: bytes, tmp_path: Path) -> None:
    folder = write_engine(tmp_path / "engine", graph)
    record = (folder / RECORD_NAME).read_bytes()
    remember_own(record, trust)
    assert load(folder, trust).endswith(graph)
    for number in range(OWN_MAX):
        remember_own(b"%d" % number, trust)
    with pytest.raises(Unsigned):
        load(folder, trust)
    assert len((tmp_path / "state" / OWN_NAME).read_text().split()) == OWN_MAX


def test_nothing_but_what_was_compiled_is_signed(trust: Trust, graph: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_engine(tmp_path / "engine", graph)
    (folder / PLAN_NAME).write_bytes(b"another")
    assert exporter(["sign", str(folder), "--key", str(tmp_path / "ours.key")]) == 2
    assert "is not the file that was compiled" in capsys.readouterr().err
    assert not (folder / SIGNATURE_NAME).exists()
