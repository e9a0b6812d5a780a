"""Calibration recordings: what the running loop writes, what the exporter reads, and which sets it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from quantized import fake_ticks, float_bundle, float_model, lively, write_set
from ticks import SMALL

from device import cli
from device.calibration import FORMAT, INDEX_NAME, RECORDED, CalibrationError, CalibrationRecorder, read_index, record_dtype
from device.engine import Buffers
from device.session import Session
from export.quantize.compare import ProbeEngine
from export.quantize.recordings import NEEDS, DataSet


class _Engine:
    """Puts out nothing, and keeps a copy of the inputs of every launch."""

    def __init__(self) -> None:
        self._engine = ProbeEngine(float_model(), SMALL)
        self.inputs, self.outputs, self.memory = self._engine.inputs, self._engine.outputs, self._engine.memory
        self.seen: list[Buffers] = []

    def run(self) -> None:
        self.seen.append({name: values.copy() for name, values in self.inputs.items()})
        self._engine.run()


def test_a_recording_played_back_gives_every_launch_the_inputs_of_the_run(tmp_path: Path) -> None:
    """Rings, clock, positions and noise too, also after lost ticks."""
    ran, again = _Engine(), _Engine()
    recorder = CalibrationRecorder(tmp_path / "set", SMALL, "digest", 5, patient=True)
    session = Session(SMALL, ran, 5, recorder.record)
    for number, record in enumerate(fake_ticks(12)):
        tick = number + (number > 6) * 3
        session.step(tick, record["mic"], record["voice"], record["frames"], float(record["frame_age"][0]), [1])
    recorder.close()
    assert recorder.fault is None
    index = read_index(tmp_path / "set")
    data = DataSet(tmp_path, SMALL, [_recording(tmp_path / "set", index, 5)], {}, "")
    assert len(list(data.play(again))) == 12
    for launch, copy in zip(ran.seen, again.seen, strict=True):
        for name in launch:
            np.testing.assert_array_equal(launch[name], copy[name], err_msg=name)


def _recording(folder: Path, index: dict, seed: int):  # type: ignore[no-untyped-def]
    from export.quantize.recordings import Recording

    return Recording(np.fromfile(folder / index["recordings"][0]["file"], record_dtype(SMALL)), seed)


def test_run_adds_one_recording_after_the_other(tmp_path: Path) -> None:
    bundle = float_bundle(tmp_path / "bundle")
    arguments = ["run", "--bundle", str(bundle), "--mic", "none", "--speaker", "none", "--clock", "simulated"]
    for seconds in ("1", "2"):
        assert cli.main([*arguments, "--seconds", seconds, "--record-calibration", str(tmp_path / "set")]) == 0
    index = read_index(tmp_path / "set")
    assert index["format"] == FORMAT
    assert [entry["ticks"] for entry in index["recordings"]] == [5, 10]
    sizes = [(tmp_path / "set" / entry["file"]).stat().st_size for entry in index["recordings"]]
    assert sizes == [5 * record_dtype(SMALL).itemsize, 10 * record_dtype(SMALL).itemsize]


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, folder = float_bundle(tmp_path / "bundle"), tmp_path / "letters"
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    arguments = ["run", "--bundle", str(bundle), "--mic", "none", "--speaker", "none", "--clock", "simulated", "--seconds", "1"]
    assert cli.main([*arguments, "--record-calibration", str(folder)]) == 2
    assert INDEX_NAME in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["letter.txt"]


def test_what_a_killed_run_left_is_no_part_of_the_set(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [lively()])
    (folder / "0001.ticks").write_bytes(b"half a tick")
    assert len(DataSet.open(folder, SMALL)) == len(lively())


def test_a_set_that_has_everything_is_taken_and_its_digest_covers_every_byte(tmp_path: Path) -> None:
    one, two = DataSet.open(write_set(tmp_path / "a", [lively()]), SMALL), DataSet.open(write_set(tmp_path / "b", [lively()]), SMALL)
    other = lively()
    other["mic"][0, 0] += 1e-3
    assert one.digest == two.digest != DataSet.open(write_set(tmp_path / "c", [other]), SMALL).digest
    assert all(one.found[name] >= need.ticks for name, need in NEEDS.items())


def _mute(ticks: np.ndarray) -> None:
    ticks["voice"] = 0


def _deaf(ticks: np.ndarray) -> None:
    ticks["mic"] = 1e-4 * np.random.default_rng(0).standard_normal(ticks["mic"].shape)


def _blind(ticks: np.ndarray) -> None:
    ticks["frames"] = 0


def _restless(ticks: np.ndarray) -> None:
    """It speaks all the time, and where it does not, somebody else does."""
    _deaf(ticks)
    ticks["voice"] = 0.2
    ticks["voice"][100:130] = 0
    ticks["mic"][100:130] = 0.1


@pytest.mark.parametrize(
    ("lacking", "change"),
    [("own speech", _mute), ("speech of others", _deaf), ("hands", _blind), ("silence", _restless)],
)
def test_what_a_set_lacks_is_named_with_the_remedy(tmp_path: Path, lacking: str, change) -> None:  # type: ignore[no-untyped-def]
    ticks = lively()
    change(ticks)
    with pytest.raises(CalibrationError, match=f"lacks {lacking}: .*{NEEDS[lacking].remedy}"):
        DataSet.open(write_set(tmp_path / "set", [ticks]), SMALL)


def test_a_set_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"lacks length: 100 ticks in all, at least 200 are needed; record for longer"):
        DataSet.open(write_set(tmp_path / "set", [lively()[:100]]), SMALL)


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [lively()])
    data = bytearray((folder / "0000.ticks").read_bytes())
    data[1000] ^= 1
    (folder / "0000.ticks").write_bytes(data)
    with pytest.raises(CalibrationError, match=r"0000\.ticks is not what was recorded"):
        DataSet.open(folder, SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": FORMAT + 1}, "update copresence"),
        ({"recordings": 3}, "not the index"),
        ({"record": []}, "another shape"),
        ({"recordings": [{"file": "../0000.ticks", "sha256": "", "seed": 0}]}, "leads out of the folder"),
        ({"recordings": [{"file": "9999.ticks", "sha256": "", "seed": 0}]}, "is missing"),
        ({"recordings": [{}]}, "lacks 'file'"),
    ],
)
def test_an_index_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = write_set(tmp_path / "set", [lively()])
    index = json.loads((folder / INDEX_NAME).read_text())
    (folder / INDEX_NAME).write_text(json.dumps(index | change))
    with pytest.raises(CalibrationError, match=message):
        DataSet.open(folder, SMALL)


def test_every_recorded_tensor_is_an_input_and_no_ring(tmp_path: Path) -> None:
    assert record_dtype(SMALL).names == ("tick", *RECORDED)
    assert record_dtype(SMALL).itemsize < 200_000  # 1 MB a second at 200 ms
