"""Releases: the wheels that a board needs, collected on a workstation, and with a bundle and a firmware made into what is flashed.

A board has no internet. What it is, is one row of device/flash/targets.toml; uv resolves the extra of that row for the board's Python
and architecture, and everything is fetched as a wheel but for what the row calls compiled. What device/flash/releases.py checks
on the board is written here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from device.bundle import Bundle
from device.flash.releases import BUNDLE, FIRMWARE, FORMAT, RELEASE_NAME, SIGNATURE_NAME, WHEELS
from device.signature import key_id
from export.errors import ExportError
from export.replacing import replacing
from export.sign import read_private_key, sign

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[1]
REQUIREMENTS = "requirements.txt"
FIRMWARE_FILES = ("bridge.bin", "build.json")
TOOLS = ("pip", "setuptools", "wheel")  # beside what a target compiles with: pip itself, which Debian's Python lacks
_OLDEST_GLIBC = 17  # manylinux2014; older wheels are not for Python 3.10
_PYC_SHARE = 1.5  # installed and compiled, a wheel's files take so much more than they have bytes (measured on the twin: 1.3)


class ReleaseError(ExportError):
    """A release that cannot be made; the text ends with the remedy."""


@dataclass(frozen=True)
class FlashTarget:
    """A row of device/flash/targets.toml, which explains the fields."""

    name: str
    board: str
    machine: str
    soc: str
    python: str
    glibc: str
    extra: str
    distribution: list[str]
    compiled: dict[str, list[str]]
    needs: dict[str, str]
    image: dict[str, Any] | None = None

    @property
    def platforms(self) -> list[str]:
        """The wheel platforms that its glibc takes, newest first."""
        minors = range(int(self.glibc.partition(".")[2]), _OLDEST_GLIBC - 1, -1)
        return [f"manylinux_2_{minor}_{self.machine}" for minor in minors] + [f"manylinux2014_{self.machine}"]


def flash_targets() -> dict[str, FlashTarget]:
    """Every target by its name, in the table's order."""
    table = tomllib.loads(files("device.flash").joinpath("targets.toml").read_text(encoding="utf-8"))
    return {name: FlashTarget(name, **row) for name, row in table.items()}


def find_flash_target(name: str) -> FlashTarget:
    """The target of that name; raises ReleaseError."""
    known = flash_targets()
    if name not in known:
        raise ReleaseError(f"no target '{name}'; known are {', '.join(known)}")
    return known[name]


def target_of(machine: str, soc: str, python: str) -> FlashTarget:
    """The target that a board fits; raises ReleaseError."""
    for target in flash_targets().values():
        if (target.machine, target.soc, target.python) == (machine, soc, python):
            return target
    rows = ", ".join(f"{t.name} ({t.machine} {t.soc or 'no SoC'} Python {t.python})" for t in flash_targets().values())
    raise ReleaseError(f"no target for {machine} {soc or '(no SoC)'} Python {python}; add a row to targets.toml, which has {rows}")


def resolve(target: FlashTarget) -> list[str]:
    """`name==version` of all that the target's extra takes from the index; raises ReleaseError.

    What is not compiled on the board has to be there as a wheel.
    """
    with tempfile.TemporaryDirectory() as scratch:
        never = Path(scratch) / "never.txt"
        never.write_text("".join(f"{name} ; sys_platform == 'never'\n" for name in target.distribution), encoding="utf-8")
        more = Path(scratch) / "more.in"
        tools = {*TOOLS, *(name for names in target.compiled.values() for name in names)}
        more.write_text("\n".join(sorted(tools)) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "uv", "pip", "compile", str(REPOSITORY / "pyproject.toml"), str(more), "--extra", target.extra]
        command += ["--python-version", target.python, "--python-platform", f"{target.machine}-manylinux_{target.glibc.replace('.', '_')}"]
        command += ["--only-binary", ":all:", *(flag for name in target.compiled for flag in ("--no-binary", name))]
        command += ["--overrides", str(never), "--no-header", "--no-annotate", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise ReleaseError(f"{target.name}: its packages do not resolve: {_end_of(done.stderr)}; widen the range in pyproject.toml")
    return [line for line in done.stdout.splitlines() if line and not line.startswith("#")]


def wheelhouse(target: FlashTarget, out: Path) -> int:
    """Collect in `out` all that the target installs, and the wheel of this repository; returns how many files. Raises ReleaseError.

    As long as pyproject.toml and the target stay as they are, a second call only builds our own wheel anew and needs no index.
    """
    wanted = f"# for {hashlib.sha256((REPOSITORY / 'pyproject.toml').read_bytes() + repr(target).encode()).hexdigest()}\n"
    with contextlib.suppress(OSError):
        if (out / REQUIREMENTS).read_text(encoding="utf-8").startswith(wanted):
            _build_own_wheel(out)
            return len(list(out.iterdir())) - 1
    pins = resolve(target)
    with replacing(out) as folder:
        compiled = [pin for pin in pins if pin.partition("==")[0] in target.compiled]
        wheels = [pin for pin in pins if pin not in compiled]
        choice = ["--only-binary", ":all:", "--implementation", "cp", "--python-version", target.python]
        choice += [flag for platform in target.platforms for flag in ("--platform", platform)]
        cp = f"cp{target.python.replace('.', '')}"
        _pip("download", *choice, "--abi", cp, "--abi", "abi3", "--abi", "none", "--no-deps", "--dest", str(folder), *wheels)
        for pin in compiled:
            # Without isolation its build requirements, which are ours, are not fetched a second time only to read its name.
            _pip("download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder), pin)
        _build_own_wheel(folder)
        (folder / REQUIREMENTS).write_text(wanted + "\n".join(pins) + "\n", encoding="utf-8")
    return len(list(out.iterdir())) - 1


def make_release(target: FlashTarget, wheels: Path, bundle_path: Path, firmware: Path | None, key_file: Path, out: Path) -> Path:
    """Put wheels, bundle and firmware together as OUT/<target>/<version>-<hash>/ and sign it; raises ExportError or BundleError.

    A bundle that `key_file` has not signed yet is signed by it first. The same content gives the same release.
    """
    key = read_private_key(key_file)
    public = key.public_key().public_bytes_raw()
    bundle = Bundle.open(bundle_path)
    if bundle.key != key_id(public):
        sign(bundle_path, key_file)
        bundle = Bundle.open(bundle_path)
    own = next(wheels.glob("copresence-*.whl"), None)
    if own is None:
        raise ReleaseError(f"{wheels}: holds no wheel of copresence; make wheelhouse TARGET={target.name}")
    scratch = out / target.name / ".new"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for file in sorted(wheels.iterdir()):
        if file.name != REQUIREMENTS:
            _add(file, scratch / WHEELS / file.name)
    for file in sorted(bundle_path.iterdir()):
        _add(file, scratch / BUNDLE / file.name)
    (scratch / FIRMWARE).mkdir()
    for name in FIRMWARE_FILES if firmware else ():
        assert firmware is not None
        if not (firmware / name).is_file():
            raise ReleaseError(f"{firmware / name}: is not there; make firmware")
        _add(firmware / name, scratch / FIRMWARE / name)
    listed: dict[str, dict[str, Any]] = {
        str(path.relative_to(scratch)): {"sha256": _sha256(path), "bytes": path.stat().st_size}
        for path in sorted(scratch.rglob("*"))
        if path.is_file()
    }
    release = {
        "format": FORMAT,
        "version": own.name.split("-")[1],
        "target": target.name,
        "machine": target.machine,
        "python": target.python,
        "extra": target.extra,
        "needs": target.needs,
        "bundle_sha256": bundle.digest,
        "bundle_version": bundle.version,
        "firmware_build": json.loads((firmware / "build.json").read_text(encoding="utf-8"))["build"] if firmware else None,
        "bytes": sum(entry["bytes"] for entry in listed.values()),
        "installed_bytes": _installed_bytes(scratch),
        "files": listed,
    }
    text = (json.dumps(release, indent=1) + "\n").encode()
    (scratch / RELEASE_NAME).write_bytes(text)
    (scratch / SIGNATURE_NAME).write_bytes(public + key.sign(text))
    made = scratch.parent / f"{release['version']}-{hashlib.sha256(text).hexdigest()[:12]}"
    shutil.rmtree(made, ignore_errors=True)
    scratch.rename(made)
    return made


def _build_own_wheel(folder: Path) -> None:
    # The newest commit's time, so that the same sources give the same wheel and so the same release.
    git = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=REPOSITORY, capture_output=True, text=True)
    epoch = {"SOURCE_DATE_EPOCH": git.stdout.strip()} if git.returncode == 0 and git.stdout.strip() else {}
    with tempfile.TemporaryDirectory() as scratch:
        # From a copy: setuptools would find files of an older build in build/ and ship them.
        source = Path(scratch) / "copresence"
        source.mkdir()
        for name in ("device", "export", "firmware_bridge"):
            shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "checkpoints"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(REPOSITORY / name, source / name)
        command = [sys.executable, "-m", "uv", "build", "--wheel", "--quiet", "--out-dir", str(Path(scratch) / "out"), str(source)]
        done = subprocess.run(command, env={**os.environ, **epoch}, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise ReleaseError(f"the wheel of this repository cannot be built: {_end_of(done.stderr)}; mend pyproject.toml")
        for old in folder.glob("copresence-*.whl"):
            old.unlink()  # not overwritten: a release may hold it by a link
        for wheel in (Path(scratch) / "out").glob("*.whl"):
            shutil.copy(wheel, folder / wheel.name)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise ReleaseError(f"pip {arguments[0]} failed: {_end_of(done.stderr)}; is the package index reachable?")


def _end_of(text: str) -> str:
    return " / ".join([line.strip() for line in text.splitlines() if line.strip()][-3:]) or "without a word"


def _installed_bytes(folder: Path) -> int:
    """What the release takes on the board besides what is sent: estimated from the wheels' own lists of files."""
    wheels = 0
    for wheel in (folder / WHEELS).glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            wheels += sum(entry.file_size for entry in archive.infolist())
    others = sum(path.stat().st_size for part in (BUNDLE, FIRMWARE) for path in (folder / part).iterdir())
    return int(wheels * _PYC_SHARE) + others


def _add(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
