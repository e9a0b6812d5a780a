"""`make engine` says what is missing before anything is built: here, in the arguments, or on the board."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TARGET = "orin-nano-super"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A PATH with what the script itself needs, and no more."""
    for program in ("bash", "sed", "grep"):
        found = shutil.which(program)
        assert found
        (tmp_path / program).symlink_to(found)
    return tmp_path


def program(path: Path, name: str, script: str = "exit 0") -> None:
    (path / name).write_text(f"#!/bin/sh\n{script}\n")
    (path / name).chmod(0o755)


def check(repository: Path, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = str(repository / ".ci" / "board")
    return subprocess.run(["bash", script, *arguments], cwd=repository, env={"PATH": str(path)}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "which board? Give HOST=user@board and TARGET, one of: orin-nano-8gb, orin-nano-super"),
        (("me@board", ""), "there is no target ''"),
        (("me@board", "toaster"), "there is no target 'toaster'; give TARGET, one of: orin-nano-8gb"),
        (("me@board", "orin"), "there is no target 'orin'"),
        (("me@board", TARGET), "ssh is not installed here; on Debian or Ubuntu: sudo apt-get install openssh-client rsync"),
    ],
)
def test_wrong_arguments_and_missing_programs_are_named(arguments: tuple[str, ...], said: str, repository: Path, path: Path) -> None:
    done = check(repository, path, *arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("ssh", "said"),
    [
        ("exit 255", "me@board cannot be reached over ssh; try by hand: ssh me@board"),
        ("printf 'rsync\\ntensorrt\\n'", "me@board lacks rsync, tensorrt; tensorrt comes with JetPack"),
    ],
)
def test_a_board_that_cannot_compile_is_named_with_what_it_lacks(ssh: str, said: str, repository: Path, path: Path) -> None:
    program(path, "ssh", ssh)
    assert "rsync is not installed here" in check(repository, path, "me@board", TARGET).stderr
    program(path, "rsync")
    done = check(repository, path, "me@board", TARGET)
    assert done.returncode == 2 and said in done.stderr


def test_a_board_that_has_everything_is_taken(repository: Path, path: Path) -> None:
    # The question itself is run, by this machine in the board's place, whose python3 has every module.
    program(path, "ssh", 'for question; do :; done; exec sh -c "$question"')
    for name in ("rsync", "python3"):
        program(path, name)
    (path / "sh").symlink_to("/bin/sh")
    done = check(repository, path, "me@board", TARGET)
    assert (done.returncode, done.stderr) == (0, "")
    program(path, "python3", 'case "$*" in *pycuda* | *toml*) exit 1; esac')
    assert "me@board lacks pycuda, tomli;" in check(repository, path, "me@board", TARGET).stderr


def test_nothing_is_built_for_a_board_that_is_not_known(repository: Path) -> None:
    command = ["make", "--no-print-directory", "engine", "HOST=me@board", "TARGET=toaster"]
    done = subprocess.run(command, cwd=repository, env=os.environ | {"MAKEFLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no target 'toaster'" in done.stderr
    assert done.stdout == "", "not one step was begun"
