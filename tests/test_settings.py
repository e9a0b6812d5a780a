"""The board's configuration file: every mistake is named with its line, and what is shipped is what the table says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.cli import main
from device.field.settings import SECTIONS, SETTINGS, Settings, SettingsError, example, mistakes


def write(folder: Path, text: str) -> Path:
    path = folder / "copresence.toml"
    path.write_text(text)
    return path


def test_the_shipped_file_is_that_of_the_table_and_has_no_mistake(repository: Path) -> None:
    shipped = repository / "device" / "boot" / "copresence.toml"
    assert shipped.read_text() == example(), "renew it: copresence config --example > device/boot/copresence.toml"
    assert mistakes(shipped) == []
    settings = Settings.read(shipped)
    assert {row.name: settings[row.name] for row in SETTINGS} == {row.name: row.default for row in SETTINGS}


def test_every_key_belongs_to_a_section_and_every_section_has_a_key() -> None:
    assert {row.name.split(".")[0] for row in SETTINGS} == set(SECTIONS)
    assert len({row.name for row in SETTINGS}) == len(SETTINGS)
    assert all(row.allows(row.default) for row in SETTINGS)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[audio]\n\nmicrofone = 'live'\n", 3, "no key 'audio.microfone' (did you mean 'audio.microphone'?)"),
        ("# first\n[audio]\nplayout_offset_ms = 1001\n", 3, "'audio.playout_offset_ms' must be a whole number from 0 to 1000, not 1001"),
        ("[audio]\nplayout_offset_ms = true\n", 2, "a whole number from 0 to 1000, not true"),
        ("[audio]\nplayout_offset_ms = 60.0\n", 2, "not 60.0"),
        ("[bundle]\npath = 7\n", 2, "'bundle.path' must be a text, not 7"),
        ("[bundle]\nunproven = 'no'\n", 2, 'must be true or false, not "no"'),
        ("[clock]\n  master = 'moon' # far away\n", 2, "one of 'auto', 'audio', 'mcu', 'soc', not \"moon\""),
        ("audio.speaker = 3\n", 1, "'audio.speaker' must be a text"),
        ("[soul]\n", 1, "no key 'soul'"),
        ("\n[audio.far]\nx = 1\n", 2, "no key 'audio.far'"),
        ("microphone = 'live'\n", 1, "no key 'microphone'"),
        ("[audio]\nmicrophone = 'live'\nmicrophone = 'none'\n", 3, "is not TOML"),
        ("[audio\n", 1, "is not TOML"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = write(tmp_path, text)
    (mistake,) = mistakes(path)
    assert f"line {line}" in mistake and words in mistake and str(path) in mistake
    with pytest.raises(SettingsError) as raised:
        Settings.read(path)
    assert str(raised.value) == mistake


def test_all_mistakes_are_named_in_the_order_of_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "[voice]\nseed = -1\n[audio]\nspeaker = 1\n[bridge]\nbaud = 9600\n")
    assert [text.split(",")[1].split(":")[0] for text in mistakes(path)] == [" line 2", " line 4", " line 6"]


def test_what_cannot_be_read_is_one_mistake(tmp_path: Path) -> None:
    (absent,) = mistakes(tmp_path / "absent.toml")
    assert "cannot be read" in absent and "--example" in absent
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (binary,) = mistakes(tmp_path / "binary")
    assert "is not TOML" in binary


def test_what_the_file_leaves_out_is_the_default(tmp_path: Path) -> None:
    settings = Settings.read(write(tmp_path, '[audio]\nspeaker = "none"\n'))
    arguments = settings.arguments()
    assert (arguments["speaker"], arguments["mic"], arguments["playout_offset_ms"]) == ("none", "live", "auto")
    assert (arguments["no_priority"], arguments["master"]) == (False, None)


@given(
    st.sampled_from(SETTINGS),
    st.one_of(st.integers(), st.booleans(), st.text(), st.floats(allow_subnormal=False), st.none(), st.lists(st.integers())),
)
def test_a_row_allows_only_its_type_and_range(row, value) -> None:  # type: ignore[no-untyped-def]
    if row.allows(value):
        assert type(value) is type(row.default)
        assert value in row.choices or not row.choices
        if type(value) is int:
            assert row.low <= value <= row.high


def test_config_checks_explains_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--check", str(write(tmp_path, example()))]) == 0
    assert "good" in capsys.readouterr().out
    assert main(["config", "--check", str(write(tmp_path, "[voice]\nsed = 1\nseed = 'x'\n"))]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 2 and "line 2" in errors and "line 3" in errors
    assert main(["config", "--explain"]) == 0
    explained = capsys.readouterr().out
    assert all(row.name in explained for row in SETTINGS)
    assert main(["config", "--explain", "clock.master"]) == 0
    assert "One of 'auto', 'audio', 'mcu', 'soc'." in capsys.readouterr().out
    assert main(["config", "--explain", "clock.mastr"]) == 2
    assert "did you mean 'clock.master'?" in capsys.readouterr().err
    assert main(["config", "--example"]) == 0
    assert capsys.readouterr().out == example()
