"""The house rules: what lies where, what `make` lists, what the programs answer and what they depend on."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOP_LEVEL = {"device", "export", "firmware_bridge", "tests", "Makefile", "README.md", "LICENSE", "pyproject.toml"}
PROGRAMS = ("copresence", "copresence-export", "copresence-bridge")
ELSEWHERE = {"cuda": "cuda-bindings"}  # whose module is not called as the distribution, and that is not installed here
APART = {"modelopt"}  # what the exporter is compared with, in an environment of its own: export/README.md
PACKAGES = ("device", "export", "firmware_bridge")


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    with (repository / "pyproject.toml").open("rb") as file:
        return dict(tomllib.load(file)["project"])


def test_top_level_holds_what_the_design_names(repository: Path) -> None:
    if not (repository / ".git").exists():
        pytest.skip("not a git checkout: build products cannot be told from sources")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True).stdout
    names = {path.split("/")[0] for path in listing.split("\0") if path}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


def test_make_alone_lists_every_target(repository: Path) -> None:
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^\.PHONY: (.+)$", makefile, flags=re.MULTILINE)
    listing = subprocess.run(["make", "--no-print-directory"], cwd=repository, check=True, capture_output=True, text=True).stdout
    assert [line.split()[1] for line in listing.splitlines()] == targets
    assert all(len(line.split()) > 3 for line in listing.splitlines())


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_answer(name: str) -> None:
    program = shutil.which(name, path=Path(sys.executable).parent)
    assert program, f"{name} is not installed; run: make setup"
    shown = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    assert shown.strip() == f"{name} {version('copresence')}"
    usage = subprocess.run([program, "--help"], check=True, capture_output=True, text=True).stdout
    assert usage.startswith(f"usage: {name} ")


def test_every_library_is_a_dependency_of_its_role(repository: Path, project: dict[str, Any]) -> None:
    """What each package imports is what its extras install, so that a board or a workstation gets no ImportError."""
    roles = {
        "device": ("board", "echo", "jetson", "libcamera"),
        "device/boot": ("board",),
        "device/camera": ("board", "jetson", "libcamera"),
        "device/engine": ("jetson",),
        "device/field": ("board", "jetson"),
        "device/serve": ("serve",),
        "device/reach": ("reach",),
        "export": ("export",),
        "export/distill": ("distill", "dev"),
        "export/quantize": ("export",),
        "export/scoreboard": ("scoreboard",),
        "firmware_bridge": ("board",),
        "tests": ("board", "reach", "serve", "distill", "dev"),
    }
    extras = project["optional-dependencies"]
    distributions = packages_distributions()
    for folder, names in roles.items():
        declared: set[str] = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
        for name in names:
            declared |= _closure(name, extras)
        files = sorted((repository / folder).glob("*.py"))
        for path in files:
            for module in _imports(path) - sys.stdlib_module_names - set(PACKAGES) - APART - {file.stem for file in files}:
                installed_as = {canonicalize_name(name) for name in distributions.get(module, [ELSEWHERE.get(module, module)])}
                assert installed_as & declared, f"{path.relative_to(repository)} imports {module}, which extras {names} do not install"


def _closure(extra: str, extras: dict[str, list[str]]) -> set[str]:
    found: set[str] = set()
    for requirement in map(Requirement, extras[extra]):
        found.add(canonicalize_name(requirement.name))
        for inner in requirement.extras if requirement.name == "copresence" else ():
            found |= _closure(inner, extras)
    return found


def _imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names}
