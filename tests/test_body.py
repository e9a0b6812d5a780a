"""The file that describes a body, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_loop import write_bundle

from device.cli import main as copresence
from firmware_bridge.body import BodyError, read_body
from firmware_bridge.cli import main as bridge
from firmware_bridge.dictionary import SETTINGS

DEFAULTS = {name: values[0] for name, values in SETTINGS.items()}


def body(folder: Path, text: str) -> Path:
    path = folder / "body.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_left_out_is_the_default(tmp_path: Path) -> None:
    assert read_body(body(tmp_path, "")) == DEFAULTS
    text = "[tilt]\nzero_us = 1480\nlow_deg = -12.5\nrest_deg = -5\n[battery]\ndivider = 5.7\n[board]\nreset = false"
    told = {"TILT_ZERO_US": 1480, "TILT_LOW": -1250, "TILT_REST": -500, "BATTERY_MILLI": 5700, "BOARD_RESET": 0}
    assert read_body(body(tmp_path, text)) == DEFAULTS | told


def test_every_setting_has_its_field_and_the_example_names_them_all(tmp_path: Path) -> None:
    from firmware_bridge import body as module

    fields = {name: (section, field) for section, known in module.FIELDS.items() for field, (name, _) in known.items()}
    assert fields.keys() == SETTINGS.keys()
    example = "\n".join(line.strip() for line in (module.__doc__ or "").splitlines() if line.startswith("    "))
    assert read_body(body(tmp_path, example)) == DEFAULTS, "the example is the plain body"
    assert all(f"{field} =" in example for section, field in fields.values() if section != "tilt")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[pan", "is not TOML"),
        ("[arm]\nzero_us = 1", r"no section \[arm\]; there are: pan, tilt, battery, board"),
        ("pan = 3", r"no section \[pan\]"),
        ("[pan]\nzero = 1", r"\[pan\] has no field 'zero'; it has: zero_us"),
        ("[pan]\nzero_us = 'x'", r"\[pan\] zero_us = 'x' is not a number; give one from 1000 to 2000"),
        ("[pan]\nzero_us = true", "is not a number"),
        ("[pan]\nzero_us = nan", "out of range"),
        ("[pan]\nhigh_deg = 71", r"high_deg = 71 is out of range; give a number from 0 to 70"),
        ("[tilt]\nrest_deg = 20\nhigh_deg = 10", r"rest_deg = 20 is beyond the ends, -35 and 10"),
        ("[pan]\nus_per_90 = 1500\nzero_us = 2000", r"at high_deg = 70 the pulse is 3167 µs.*\(500 to 2500\)"),
        ("[board]\nreset = 1", "neither true nor false"),
    ],
)
def test_a_wrong_file_is_one_clear_error(text: str, said: str, tmp_path: Path) -> None:
    path = body(tmp_path, text)
    with pytest.raises(BodyError, match=said) as raised:
        read_body(path)
    assert str(path) in str(raised.value)


def test_the_programs_refuse_a_wrong_file_before_they_open_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = body(tmp_path, "[pan]\nzero_us = 1")
    assert bridge(["send", "get_state", "--port", str(tmp_path / "none"), "--body", str(path)]) == 2
    assert "zero_us = 1 is out of range" in capsys.readouterr().err
    assert bridge(["send", "get_state", "--port", str(tmp_path / "none"), "--body", str(tmp_path / "gone.toml")]) == 2
    assert "gone.toml: cannot be read" in capsys.readouterr().err
    run = ["run", "--bundle", str(write_bundle(tmp_path / "echo")), "--mic", "none", "--speaker", "none", "--seconds", "1"]
    assert copresence([*run, "--bridge", str(tmp_path / "none"), "--body", str(path)]) == 2
    assert "zero_us = 1 is out of range" in capsys.readouterr().err
    assert copresence([*run, "--body", str(body(tmp_path, ""))]) == 2
    assert "--body: there is no body without --bridge" in capsys.readouterr().err
