"""The statistics line, the board's heat in it, and the streams table that both take their numbers from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_loop import CONFIG, write_bundle

from device.camera import source
from device.cli import main
from device.dump import PRIVATE, RECORDED
from device.statistics import Statistics, TickTimes
from device.streams import STREAMS
from device.tensors import tensor_table
from device.thermal import Thermometer, read


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    """The parts of an Orin's sysfs that are read; zone 1's file is there and cannot be read, as that of a GPU that is switched off."""
    root = write(
        tmp_path / "sys",
        {
            "class/thermal/thermal_zone0/type": "cpu-thermal",
            "class/thermal/thermal_zone0/temp": "51234",
            "class/thermal/thermal_zone1/type": "gpu-thermal",
            "class/thermal/thermal_zone10/type": "tj-thermal",
            "class/thermal/thermal_zone10/temp": "-1500",
            "class/thermal/cooling_device0/type": "pwm-fan",
            "class/thermal/cooling_device0/cur_state": "2",
            "class/thermal/cooling_device0/max_state": "4",
            "class/thermal/cooling_device1/type": "cpufreq-cpu0",
            "class/thermal/cooling_device1/cur_state": "3",
            "class/thermal/cooling_device1/max_state": "28",
            "class/thermal/cooling_device2/type": "devfreq-17000000.gpu",
            "class/thermal/cooling_device2/cur_state": "0",
            "class/thermal/cooling_device2/max_state": "10",
            "class/hwmon/hwmon1/name": "ina3221",
            "class/hwmon/hwmon1/in1_label": "VDD_IN",
            "class/hwmon/hwmon1/in1_input": "5080",
            "class/hwmon/hwmon1/curr1_input": "1200",
            "class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV",
            "class/hwmon/hwmon1/in2_input": "5000",
            "class/hwmon/hwmon1/curr2_input": "nonsense",
            "class/hwmon/hwmon2/name": "pmic",
            "class/hwmon/hwmon2/power1_input": "2500000",
            "devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1190400",
            "devices/system/cpu/cpufreq/policy0/cpuinfo_max_freq": "1728000",
        },
    )
    (root / "class/thermal/thermal_zone1/temp").mkdir()
    return root


def test_heat_power_clocks_and_what_is_held_back_are_read(jetson: Path) -> None:
    assert read(jetson) == {
        "zones_c": {"cpu": 51.2, "tj": -1.5},
        "rails_w": {"VDD_IN": 6.1, "pmic power1": 2.5},
        "cpu_mhz": {"policy0": [1190, 1728]},
        "held_back": {"cpufreq-cpu0 1": [3, 28]},
    }


def test_a_machine_without_any_of_it_says_nothing(tmp_path: Path) -> None:
    assert read(tmp_path) == {}
    assert isinstance(read(), dict), "whatever this machine has"


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.01)


def test_the_newest_reading_is_there_at_once_and_not_for_ever(jetson: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thermometer = Thermometer(jetson)
    until(thermometer.newest)
    thermometer.close()
    assert thermometer.newest()["zones_c"]["cpu"] == 51.2
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + 60)
    assert thermometer.newest() == {}


def test_a_sensor_that_hangs_holds_nobody_up(jetson: Path) -> None:
    sensor = jetson / "class/thermal/thermal_zone0/temp"
    sensor.unlink()
    os.mkfifo(sensor)  # whoever opens it waits for a writer
    thermometer = Thermometer(jetson)
    assert thermometer.newest() == {}
    thermometer.close()  # leaves the thread behind
    assert thermometer._thread.is_alive()
    with sensor.open("w") as writer:
        writer.write("40000")
    until(lambda: not thermometer._thread.is_alive())
    assert thermometer.newest()["zones_c"]["cpu"] == 40.0


def times(tick: int, late_ms: float, engine_ms: float, missed: int = 0, gather_ms: float = 1.0) -> TickTimes:
    ns = (round(value * 1e6) for value in (late_ms, gather_ms, engine_ms, 1.0))
    return TickTimes(tick, (tick + 1) * 100_000_000, *ns, missed, 0, 0, 0.0)


def test_once_a_second_of_session_time() -> None:
    statistics, lines = Statistics(tick_ms=100), []
    for tick in [*range(15), *range(35, 50)]:  # twenty lost ticks make no burst of lines
        statistics.add(times(tick, 1.0, 10.0 + tick, missed=20 if tick == 35 else 0, gather_ms=9.0 if tick == 3 else 1.0))
        if event := statistics.due(tick):
            lines.append(event)
    assert [line["tick"] for line in lines] == [9, 35, 39, 49]
    assert lines[0]["engine_ms"] == {"p50": 14.5, "p99": 18.91, "max": 19.0}
    assert (lines[-1]["ticks"], lines[-1]["gap_ticks"], lines[-1]["late_ms"]["max"]) == (30, 20, 1.0)
    assert lines[-1]["over_budget"] == {"microphone": 1}


def test_times_are_those_of_the_last_minute() -> None:
    statistics = Statistics(tick_ms=1000)
    for tick in range(100):
        statistics.add(times(tick, 50.0 if tick == 30 else 0.0, 500.0 if tick < 35 else 10.0))
    last = statistics.due(99)
    assert last is not None and last["engine_ms"]["max"] == 10.0 and last["late_ms"]["max"] == 0.0
    assert last["over_budget"] == {"edge": 1}, "counts are those of the run"


def test_a_run_has_the_line_in_its_log(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    arguments = ["run", "--bundle", str(write_bundle(tmp_path / "echo")), "--clock", "simulated", "--seconds", "2.5"]
    assert main([*arguments, "--mic", "none", "--speaker", "none", "--events", str(events)]) == 0
    lines = [event for event in map(json.loads, events.read_text().splitlines()) if event["event"] == "statistics"]
    assert [(line["tick"], line["ticks"], line["rung"]) for line in lines] == [(9, 10, "full"), (19, 20, "full")]
    assert not {"zones_c", "rails_w"} & set(lines[0]), "a simulated run is the same on a hot machine"


def test_the_streams_table_covers_every_input_and_output_that_is_kept() -> None:
    rows = {row.name: row for row in tensor_table(CONFIG)}
    # Clock, positions, noise and what is valid follow from the tick numbers and the seed.
    followed = {"clock", "rope", "noise", "perceive_valid", "present_valid"}
    assert set(RECORDED) == {row.name for row in rows.values() if row.role in ("input", "output")} - followed
    assert len(set(RECORDED)) == len(RECORDED)
    assert set(PRIVATE) == {"mic", "voice", "frames", "speech"}
    assert {name for name in RECORDED if np.prod(rows[name].shape) >= CONFIG.tick_samples} == set(PRIVATE), "nothing large is always kept"
    assert all(stream.safe and stream.log and stream.rate for stream in STREAMS.values())
    assert STREAMS["camera"].stale_s == source.STALE_S
