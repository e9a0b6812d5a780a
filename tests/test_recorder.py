"""The flight recorder, its dumps, their replay, and how a dump is asked for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import soundfile
from mcap.reader import make_reader
from onnx import TensorProto, helper
from test_ladder import StretchedTicker
from test_loop import CONFIG, RATE, TICK, FakeEngine, echo_graph, noise, write_manifest
from test_sources import write_video

from device import recorder as recording
from device.bundle import GRAPH_NAME, Bundle
from device.cli import main
from device.control import Control, ControlError, ask
from device.dump import CHANNELS, PRIVATE, Dump, DumpError
from device.engine import OnnxRuntimeEngine
from device.ladder import LADDER
from device.recorder import EVENTS_PER_TICK, KEPT_DUMPS, FlightRecorder
from device.replay import Outcome, replay
from device.session import Session
from device.statistics import TickTimes
from device.tensors import tensor_table

TICK_NS = CONFIG.tick_ms * 1_000_000


def remembering_graph() -> onnx.ModelProto:
    """An engine whose every output depends on what it has heard and on its whole memory: sums of rings, valid slots and vocoder state."""
    model = echo_graph(CONFIG)
    graph = model.graph
    rows = tensor_table(CONFIG)
    for node in [node for node in graph.node if node.op_type == "Identity"]:
        graph.node.remove(node)
    graph.initializer.extend(
        [onnx.numpy_helper.from_array(np.float32(0.37), "share"), onnx.numpy_helper.from_array(np.int64([-1]), "flat")]
    )
    parts = ["mic", "voice", "frame_age", "perceive_valid", "present_valid"]
    parts += [row.name for row in rows if row.role == "state"]
    sums = []
    for name in parts:
        graph.node.append(helper.make_node("ReduceMean", [name], [f"{name}_mean"], keepdims=0))
        sums.append(f"{name}_mean")
    graph.node.append(helper.make_node("Cast", ["frames"], ["frames_float"], to=TensorProto.FLOAT))
    graph.node.append(helper.make_node("ReduceMean", ["frames_float"], ["frames_mean"], keepdims=0))
    graph.node.append(helper.make_node("Cast", ["said"], ["said_float"], to=TensorProto.FLOAT))
    graph.node.append(helper.make_node("ReduceMean", ["said_float"], ["said_mean"], keepdims=0))
    graph.node.append(helper.make_node("Sum", [*sums, "frames_mean", "said_mean"], ["all"]))
    graph.node.append(helper.make_node("Sin", ["all"], ["swing"]))
    for row in rows:
        if not row.enters and row.name not in ("speech", "say", "act"):
            graph.node.append(helper.make_node("Add", [f"{row.name}_value", "swing"], [row.name]))
    return model


def write_bundle(folder: Path) -> Path:
    folder.mkdir()
    (folder / GRAPH_NAME).write_bytes(remembering_graph().SerializeToString())
    write_manifest(folder)
    return folder


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets and dumps of this test alone."""
    monkeypatch.setenv("COPRESENCE_RUNTIME", str(tmp_path / "run"))
    monkeypatch.setenv("COPRESENCE_STATE", str(tmp_path / "state"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "remembering")


def outputs(tick: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(tick)
    made = {}
    for row in tensor_table(CONFIG):
        if not row.enters:
            values = rng.integers(0, 2, row.shape) if row.dtype == "int32" else rng.standard_normal(row.shape)
            made[row.name] = values.astype(row.dtype)
    return made


class ScriptedEngine(FakeEngine):
    """Puts out random numbers that depend on the run."""

    def run(self) -> None:
        self.given.append({"said": self.inputs["said"].copy()})
        for name, array in outputs(len(self.given)).items():
            self.outputs[name][...] = array


class Recorded:
    """A recorder, and a session that is shown to it tick by tick."""

    def __init__(self, folder: Path, raw: bool, watch: bool = False) -> None:
        self.recorder = FlightRecorder(CONFIG, folder, raw, watch)
        self.engine = ScriptedEngine()
        self.session = Session(CONFIG, self.engine, 0, self.recorder.launch)
        self.recorder.event(0, {"event": "header", "bundle": "scripted", "seed": 0})

    def step(self, tick: int, rung: int = 0) -> None:
        sound, video = np.full(TICK + CONFIG.context_samples, tick / 1e4, np.float32), CONFIG.video
        times = TickTimes(tick, (tick + 1) * TICK_NS, 1000, 2000, 3000 if LADDER[rung].engine else 0, 4000, 0, rung, 0, 0.05)
        if LADDER[rung].engine:
            decision = self.session.step(tick, sound, sound, np.full((2, video.height, video.width, 3), tick % 256, np.uint8), 0.05)
        else:
            self.session.skip(tick)
            decision = None  # type: ignore[assignment]
        self.recorder.tick(times, decision, self.session.memory, LADDER[rung].engine)
        self.recorder.event((tick + 1) * TICK_NS, {"event": "note", "tick": tick})

    def dump(self, reason: str = "command") -> Dump:
        wish = self.recorder.request(reason)
        assert wish.done.wait(60)
        assert wish.fault is None
        assert wish.file is not None
        return Dump.read(wish.file)


# --- the ring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True])
def test_a_dump_holds_the_last_minute_and_memory_is_fixed(tmp_path: Path, raw: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "KEPT_S", 4)
    monkeypatch.setattr(recording, "MARGIN_S", 1)
    run = Recorded(tmp_path, raw)
    slots = run.recorder._slots
    assert slots.size == 50
    for tick in range(130):
        run.step(tick)
    assert run.recorder._slots is slots and len(run.recorder._events) <= EVENTS_PER_TICK * 40
    dump = run.dump()
    run.recorder.close()
    assert [times.tick for times, *_ in dump.ticks] == list(range(90, 130))
    assert dump.header["bundle"] == "scripted", "the header stays though it is long ago"
    assert [event["tick"] for _, event in dump.events if event["event"] == "note"] == list(range(90, 130))
    times, launched, whole, tensors = dump.ticks[-1]
    assert (times, launched, whole) == (TickTimes(129, 130 * TICK_NS, 1000, 2000, 3000, 4000, 0, 0, 0, 0.05), True, True)
    for name, array in outputs(130).items():
        if raw or name in ("say", "act", "say_prob", "act_prob"):
            np.testing.assert_array_equal(tensors[name], array)
        else:
            assert name not in tensors
    assert (set(PRIVATE) <= set(tensors)) == raw
    if not raw:
        assert not set(PRIVATE) & set(tensors)
        assert dump.state == {}


def test_without_raw_no_sound_no_picture_and_nothing_made_of_them_is_in_the_file(tmp_path: Path) -> None:
    run = Recorded(tmp_path, raw=False)
    for tick in range(5):
        run.step(tick)
    dump = run.dump()
    run.recorder.close()
    with dump.path.open("rb") as file:
        topics = {channel.topic for _, channel, _ in make_reader(file).iter_messages()}
    assert topics == {"/tick", "/tensors", "/event"}
    rows = {row.name for row in tensor_table(CONFIG) if row.role in ("state", "update")}
    assert not rows & set(dump.ticks[0][3])


@pytest.mark.parametrize("ticks", [30, 60, 133])
def test_the_state_of_a_dump_is_that_of_the_session_before_its_first_tick(
    tmp_path: Path, ticks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "KEPT_S", 4)
    monkeypatch.setattr(recording, "MARGIN_S", 1)
    run, kept = Recorded(tmp_path, raw=True), []
    script = [(tick, 2 if tick % 31 in (7, 8) else 0) for tick in range(2 * ticks) if tick % 11 != 5][:ticks]  # with lost ticks
    for tick, rung in script:
        kept.append(({name: array.copy() for name, array in run.engine.inputs.items()}, run.session.past.next))
        run.step(tick, rung)
    dump = run.dump()
    run.recorder.close()
    before, following = kept[max(0, ticks - 40)]
    assert dump.next == following
    assert {"key_0", "value_1", "perceive_valid", "present_valid", "said", "acted", "vocoder_tail"} <= set(dump.state)
    for name, array in dump.state.items():
        np.testing.assert_array_equal(array, before[name], name)


def test_a_tick_never_waits_for_a_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun = threading.Event(), threading.Event()
    written = recording.DumpWriter.tick

    def slow(self: Any, slot: np.ndarray) -> None:
        begun.set()
        assert go.wait(60)
        written(self, slot)

    monkeypatch.setattr(recording.DumpWriter, "tick", slow)
    monkeypatch.setattr(recording, "KEPT_S", 4)
    monkeypatch.setattr(recording, "MARGIN_S", 1)
    run = Recorded(tmp_path, raw=True)
    for tick in range(100):
        run.step(tick)
    wish = run.recorder.request("command")
    assert begun.wait(60)
    for tick in range(100, 105):  # would hang here
        run.step(tick)
    assert not wish.done.is_set()
    go.set()
    assert wish.done.wait(60) and wish.file is not None
    assert [times.tick for times, *_ in Dump.read(wish.file).ticks] == list(range(60, 100))
    begun.clear()
    go.clear()
    wish = run.recorder.request("command")
    assert begun.wait(60)
    for tick in range(105, 200):  # all round: what was to be written is no longer there
        run.step(tick)
    go.set()
    assert wish.done.wait(60)
    assert "the disk was slower" in str(wish.fault), "not a mixture of old and new"
    assert len(list(tmp_path.iterdir())) == 1, "and no half of a file"
    assert [event["reason"] for event in run.recorder.take_events()] == ["command", "command"]
    run.recorder.close()


def test_a_loop_that_hangs_is_dumped_with_the_tick_it_hangs_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "STALL_S", 3600)
    run = Recorded(tmp_path, raw=True, watch=True)
    run.step(0)
    run.step(1)
    run.recorder.launch(2, run.engine.inputs)  # and never came back
    monkeypatch.setattr(recording, "STALL_S", 0.3)
    deadline = time.monotonic() + 60
    while not (events := run.recorder.take_events()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [event["reason"] for event in events] == ["stall"]
    dump = Dump.read(Path(events[0]["file"]))
    run.recorder.close()
    assert [(times.tick, launched, whole) for times, launched, whole, _ in dump.ticks] == [
        (0, True, True),
        (1, True, True),
        (2, True, False),
    ]
    assert "mic" in dump.ticks[2][3] and "speech" not in dump.ticks[2][3]


def test_faults_that_come_back_fill_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Recorded(tmp_path, raw=False)
    run.step(0)
    (tmp_path / "somebody's.mcap").write_text("stays")
    assert run.dump("overload").reason == "overload"
    again = run.recorder.request("stall")
    assert again.done.wait(60)
    assert "not a minute old" in str(again.fault), "automatic ones once a minute"
    assert run.dump("fault").reason == "fault", "but not the last one of a run"
    for _ in range(KEPT_DUMPS + 2):
        run.dump("command")
    run.recorder.close()
    assert len(list(tmp_path.glob("copresence-*.mcap"))) == KEPT_DUMPS
    assert (tmp_path / "somebody's.mcap").exists()
    late = run.recorder.request("command")
    assert late.done.wait(60) and late.fault == "the run is over"


def test_a_folder_that_cannot_be_written_is_an_event_and_not_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = Recorded(tmp_path / "file", raw=False)
    run.step(0)
    wish = run.recorder.request("command")
    assert wish.done.wait(60)
    assert "file" in str(wish.fault)
    run.step(1)
    run.recorder.close()


# --- the file -----------------------------------------------------------------------------------------------------


def test_every_channel_is_json_with_a_schema_and_stamped_with_the_edge(tmp_path: Path) -> None:
    run = Recorded(tmp_path, raw=True)
    for tick in range(3):
        run.step(tick)
    dump = run.dump()
    run.recorder.close()
    seen = set()
    with dump.path.open("rb") as file:
        reader = make_reader(file, validate_crcs=True)
        assert reader.get_summary() is not None, "indexed, as Foxglove likes it"
        for schema, channel, message in reader.iter_messages():
            assert schema is not None and (schema.encoding, channel.message_encoding) == ("jsonschema", "json")
            described, content = json.loads(schema.data), json.loads(message.data)
            assert described["type"] == "object" and schema.name == CHANNELS[channel.topic][0]
            kinds = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "array": list, "object": dict}
            for name, kind in described.get("properties", {}).items():
                if name in content:
                    assert isinstance(content[name], kinds[kind["type"]]), (channel.topic, name)
            if channel.topic == "/tick":
                assert message.log_time == (content["tick"] + 1) * TICK_NS
            seen.add(channel.topic)
    assert seen == set(CHANNELS)


@pytest.mark.parametrize("damage", ["absent", "text", "half", "flipped", "foreign"])
def test_what_is_no_whole_dump_is_one_clear_error(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    run = Recorded(tmp_path / "dumps", raw=True)
    for tick in range(3):
        run.step(tick)
    path = run.dump().path
    run.recorder.close()
    data = bytearray(path.read_bytes())
    if damage == "absent":
        path.unlink()
    elif damage == "text":
        path.write_text("nothing of the kind")
    elif damage == "half":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 3] ^= 0x40
        path.write_bytes(data)
    else:
        from mcap.writer import Writer

        writer = Writer(str(path))
        writer.start()
        writer.finish()
    with pytest.raises(DumpError, match="copresence dump"):
        Dump.read(path)
    assert main(["replay", str(path), "--bundle", str(bundle)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- replay -------------------------------------------------------------------------------------------------------


def recorded_run(bundle: Path, folder: Path, *options: str, seconds: str = "3") -> Path:
    """A simulated run of a few seconds that somebody asks for a dump of, near its end."""
    soundfile.write(folder / "in.wav", noise(round(float(seconds) * RATE) + 1), RATE)
    write_video(folder / "in.mkv", list(range(0, 250, 5)), 25)
    dumps = folder / "dumps"
    step = Session.step

    def signalled(self: Session, tick: int, *rest: Any) -> Any:
        if tick == round(float(seconds) * 10) - 1:
            signal.raise_signal(signal.SIGUSR1)
            deadline = time.monotonic() + 60  # simulated time goes on at once, and the dump would have more ticks or fewer
            while not list(dumps.glob("*-signal.mcap")) and time.monotonic() < deadline:
                time.sleep(0.001)
        return step(self, tick, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "step", signalled)
        arguments = ["run", "--bundle", str(bundle), "--mic", str(folder / "in.wav"), "--camera", str(folder / "in.mkv"), "--seed", "7"]
        more = ["--clock", "simulated", "--text", "0.5:one two", "--dumps", str(dumps), "--seconds", seconds, "--speaker", "none"]
        assert main([*arguments, *more, *options]) == 0
    (dump,) = dumps.glob("*-signal.mcap")
    return dump


@pytest.mark.parametrize("kept_s", [60, 1])
def test_a_replay_gives_every_output_bit_for_bit(
    bundle: Path, tmp_path: Path, kept_s: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "KEPT_S", kept_s)
    monkeypatch.setattr(recording, "MARGIN_S", 1)
    path = recorded_run(bundle, tmp_path, "--record-raw")
    dump = Dump.read(path)
    whole = [(times.tick, tensors) for times, _, whole, tensors in dump.ticks if whole]
    assert len(whole) in (29, 30) if kept_s == 60 else len(whole) == 10
    assert (dump.ticks[0][0].tick == 0) == (kept_s == 60)
    assert len({tensors["say_prob"].tobytes() for _, tensors in whole}) == len(whole), "the outputs depend on what is remembered"
    assert main(["replay", str(path), "--bundle", str(bundle)]) == 0
    out = capsys.readouterr().out
    assert f"{len(whole)} ticks, 0 lost: every output is bit for bit what was recorded" in out


def run_again(dump: Dump, bundle: Path) -> Outcome:
    return replay(dump, OnnxRuntimeEngine(Bundle.open(bundle).graph, CONFIG))


@pytest.mark.parametrize("name", ["mic", "frames", "key_1", "present_valid", "said", "next"])
def test_a_replay_from_anything_else_names_the_first_tick_and_tensor(
    bundle: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "KEPT_S", 1)
    monkeypatch.setattr(recording, "MARGIN_S", 1)
    dump = Dump.read(recorded_run(bundle, tmp_path, "--record-raw"))
    first = dump.ticks[0][0].tick
    expected = first, "say_prob"
    if name in ("mic", "frames"):
        changed = dump.ticks[3][3]
        changed[name] = np.roll(changed[name], 1) if name == "mic" else changed[name] ^ 1
        expected = first + 3, "speech" if name == "mic" else "say_prob"
    elif name == "next":
        assert dump.next is not None
        dump.next -= 1
    else:
        dump.state[name] = dump.state[name] + 1
        expected = (first, "said") if name == "said" else expected
    difference = run_again(dump, bundle).difference
    assert difference is not None
    assert (difference.tick, difference.tensor) == expected


def test_an_engine_that_differs_in_one_bit_is_found(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recorded_run(bundle, tmp_path, "--record-raw", seconds="2")
    run, runs = OnnxRuntimeEngine.run, []

    def faulty(self: OnnxRuntimeEngine) -> None:
        run(self)
        runs.append(1)
        if len(runs) == 12:  # the first is the engine's own
            self.outputs["speech"].view(np.uint32)[5] ^= 1

    monkeypatch.setattr(OnnxRuntimeEngine, "run", faulty)
    assert main(["replay", str(path), "--bundle", str(bundle)]) == 1
    out = capsys.readouterr().out
    assert "tick 10: 'speech' differs, first at [5]: " in out and "10 ticks before it were equal" in out


def test_a_dump_without_raw_sound_cannot_be_replayed_and_says_how(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recorded_run(bundle, tmp_path, seconds="1")
    assert main(["replay", str(path), "--bundle", str(bundle)]) == 2
    assert capsys.readouterr().err == (
        f"copresence: {path}: holds no sound and no pictures, so it cannot be replayed; record with 'copresence run --record-raw'\n"
    )


def test_another_bundle_is_refused(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recorded_run(bundle, tmp_path, "--record-raw", seconds="1")
    other = shutil.copytree(bundle, tmp_path / "other")
    write_manifest(other, lambda manifest: manifest.update(name="other"))
    assert main(["replay", str(path), "--bundle", str(other)]) == 2
    assert "is another" in capsys.readouterr().err


def test_lost_ticks_and_the_ladder_are_replayed_too(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine too slow in session time: ticks are lost, the ladder is walked down and up, and the replay finds the same bits."""
    ticker = StretchedTicker()
    run = OnnxRuntimeEngine.run

    def slow(self: OnnxRuntimeEngine) -> None:
        run(self)
        ticker.spend(1.5 if 20 <= ticker.now_ns() // TICK_NS < 100 else 0.1)

    monkeypatch.setattr(OnnxRuntimeEngine, "run", slow)
    monkeypatch.setattr("device.commands.run.SimulatedTicker", lambda tick_ns: ticker)
    dump = Dump.read(recorded_run(bundle, tmp_path, "--record-raw", seconds="25"))
    assert {times.rung for times, *_ in dump.ticks} == {0, 1, 2}
    monkeypatch.setattr(OnnxRuntimeEngine, "run", run)
    outcome = run_again(dump, bundle)
    assert outcome.difference is None
    assert outcome.lost > 100 and outcome.ticks > 100
    reasons = sorted(path.stem.rpartition("-")[2] for path in dump.path.parent.iterdir())
    assert reasons == ["overload", "signal"], "a step down is a fault; the second came within the minute"


# --- who asks -----------------------------------------------------------------------------------------------------


def test_an_engine_that_raises_leaves_a_dump_with_its_inputs(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, runs = OnnxRuntimeEngine.run, []

    def broken(self: OnnxRuntimeEngine) -> None:
        runs.append(1)
        if len(runs) == 8:
            raise RuntimeError("the GPU fell off the bus")
        run(self)

    monkeypatch.setattr(OnnxRuntimeEngine, "run", broken)
    arguments = ["run", "--bundle", str(bundle), "--clock", "simulated", "--seconds", "3", "--mic", "none", "--speaker", "none"]
    events = tmp_path / "events.jsonl"
    with pytest.raises(RuntimeError, match="fell off the bus"):
        main([*arguments, "--events", str(events), "--record-raw", "--dumps", str(tmp_path / "dumps")])
    (path,) = (tmp_path / "dumps").iterdir()
    assert f"the last minute is in {path}" in capsys.readouterr().err
    logged = [json.loads(line) for line in events.read_text().splitlines()]
    assert [event["event"] for event in logged[-2:]] == ["fault", "dump"]
    dump = Dump.read(path)
    assert [(times.tick, whole) for times, _, whole, _ in dump.ticks] == [*((tick, True) for tick in range(6)), (6, False)]
    assert dump.events[-1][1]["fault"] == "RuntimeError: the GPU fell off the bus"
    monkeypatch.setattr(OnnxRuntimeEngine, "run", run)
    assert run_again(dump, bundle).difference is None


def test_copresence_dump_asks_the_running_companion(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dump"]) == 2
    assert "no companion runs here" in capsys.readouterr().err
    events, dumps = tmp_path / "events.jsonl", tmp_path / "dumps"
    command = [sys.executable, "-m", "device.cli", "run", "--bundle", str(bundle), "--mic", "none", "--speaker", "none", "--no-priority"]
    child = subprocess.Popen(
        [*command, "--events", str(events), "--dumps", str(dumps)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (events.exists() and events.read_text().count("\n") > 5):
            time.sleep(0.05)
        assert main(["dump", "--pid", str(os.getpid())]) == 2
        assert f"no companion with process id {os.getpid()}" in capsys.readouterr().err
        assert main(["dump"]) == 0
        path = Path(capsys.readouterr().out.strip())
        assert path.parent == dumps and path.stat().st_mode & 0o777 == 0o600
        assert Dump.read(path).reason == "command"
        child.send_signal(signal.SIGUSR1)
        while time.monotonic() < deadline and not list(dumps.glob("*-signal.mcap")):
            time.sleep(0.05)
        assert Dump.read(next(dumps.glob("*-signal.mcap"))).ticks
    finally:
        child.terminate()
        _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (0, "")
    logged = [json.loads(line) for line in events.read_text().splitlines()]
    assert [event["reason"] for event in logged if event["event"] == "dump"] == ["command", "signal"]
    assert logged[-1]["event"] == "summary"
    assert list((tmp_path / "run").iterdir()) == [], "the socket is gone with its run"


def test_the_socket_bears_nonsense_and_old_sockets(tmp_path: Path) -> None:
    import socket

    control = Control(lambda asked: {"asked": asked})
    try:
        assert control.path.stat().st_mode & 0o777 == 0o600
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(str(tmp_path / "run" / "1.sock"))  # left by a process that was killed
        stale.close()
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(str(control.path))
            rude.sendall(b"[1, 2\n")
        assert ask("dump") == {"asked": "dump"}
    finally:
        control.close()
    with pytest.raises(ControlError, match="no companion runs here"):
        ask("dump")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_root_reaches_the_units_companion_and_no_other_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control = Control(lambda asked: {"asked": asked})
    try:
        os.chown(control.path.parent, 65534, 65534)
        with pytest.raises(ControlError, match="another user's"):
            ask("dump")
        monkeypatch.setattr("device.control.UNIT_FOLDER", control.path.parent)
        assert ask("dump") == {"asked": "dump"}
    finally:
        control.close()


def test_a_folder_that_others_can_write_takes_no_socket(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(OSError, match="own folder"):
        Control(lambda asked: {})
