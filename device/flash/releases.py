"""The releases of a board: check one that has come, install it beside the others, switch to it in one step, tidy up.

Runs on the board as root, from the playbook, before anything of a release is installed: the standard library and openssl only.
Prints one JSON object; what it refuses is one line on standard error, and exit status 1.

    /opt/copresence/flash/                  this tool
    /opt/copresence/incoming/               what rsync brought; means nothing by itself
    /opt/copresence/releases/<name>/        venv/, bundle/, firmware/; whole once it has a release.json, which comes last
    /opt/copresence/current → releases/…    what the units run
    /opt/copresence/good    → releases/…    what was confirmed last; what a bad release goes back to (device/boot/slots.py)

`release.json` lists every file of a release by size and SHA-256, and `release.sig` vouches for it: the signer's public key, 32 bytes,
and an Ed25519 signature, 64 bytes, as beside a bundle's manifest (device/signature.py). It is checked before any of it is parsed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path("/opt/copresence")
KEYS = Path("/etc/copresence/keys")
STATE = Path("/var/lib/copresence")
STATUS = Path("/run/copresence/status.json")  # what the running companion says of itself, every second

# What a release brings for the board's own system, from device/boot; a configuration that is there stays as it is.
SYSTEM_FILES = {
    "slots.py": ROOT / "boot" / "slots.py",
    "copresence-engine.service": Path("/etc/systemd/system/copresence-engine.service"),
    "copresence.service": Path("/etc/systemd/system/copresence.service"),
    "copresence-confirm.service": Path("/etc/systemd/system/copresence-confirm.service"),
    "copresence-rollback.service": Path("/etc/systemd/system/copresence-rollback.service"),
    "sysusers.conf": Path("/etc/sysusers.d/copresence.conf"),
    "udev.rules": Path("/etc/udev/rules.d/60-copresence.rules"),
    "journald.conf": Path("/etc/systemd/journald.conf.d/60-copresence.conf"),
    "watchdog.conf": Path("/etc/systemd/system.conf.d/60-copresence.conf"),
    "copresence.toml": Path("/etc/copresence/copresence.toml"),
}
CONFIGURATION = "copresence.toml"

CHANGING = ("room", "install", "firmware", "activate", "back", "prune")

FORMAT = 1  # of release.json; raised when an older tool would misunderstand a newer release
RELEASE_NAME, SIGNATURE_NAME = "release.json", "release.sig"
WHEELS, BUNDLE, FIRMWARE = "wheels", "bundle", "firmware"
SPARE_BYTES = 200 << 20  # what a board keeps for its journal and its state when a release is in
UNIT = "copresence.service"
POLL_S = 1.0
CONFIRM_S = 960.0  # slots.py gives a release 15 minutes to be healthy for five
STALE_NS = 5_000_000_000  # a status so old is nobody's: the unit's watchdog
PIP_TIMEOUT_S = 1800  # pycuda compiles for minutes on a small board

_LIST_BYTES = 8 << 20
_PUBLIC_BYTES, _SIGNATURE_BYTES = 32, 64  # RFC 8032
_ED25519_PREFIX = bytes.fromhex("302a300506032b6570032100")  # SubjectPublicKeyInfo of such a key, before its 32 bytes (RFC 8410)


class ReleaseError(Exception):
    """A release that is not taken, or a board that cannot take it; the text ends with the remedy."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0, or 1 with one line on standard error."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("facts", help="what this board is, and which releases it has")
    command = commands.add_parser("room", help="whether a release of so many bytes fits, once old ones are gone")
    command.add_argument("bytes", type=int)
    command = commands.add_parser("install", help="check what has come, and install it beside the others")
    command.add_argument("incoming", type=Path)
    command = commands.add_parser("activate", help="make an installed release the current one")
    command.add_argument("name")
    command = commands.add_parser("running", help="whether the process that runs is that release, by what it says of itself")
    command.add_argument("name")
    command.add_argument("--wait-s", type=float, default=0.0, help="give it so long to come up")
    command.add_argument("--good", action="store_true", help="wait until it is confirmed, too")
    command = commands.add_parser("firmware", help="bring an installed release's firmware onto the microcontroller, if another runs there")
    command.add_argument("name")
    command = commands.add_parser("back", help="start the last good release, or else the one named, unless it runs")
    command.add_argument("name")
    commands.add_parser("prune", help="remove all releases but the current and the last good one")
    a = parser.parse_args(argv)
    try:
        with _lock(ROOT) if a.command in CHANGING else contextlib.nullcontext():
            result = {
                "facts": lambda: facts(),
                "room": lambda: room(a.bytes),
                "install": lambda: install(a.incoming),
                "activate": lambda: activate(a.name),
                "running": lambda: running(a.name, a.wait_s, a.good),
                "firmware": lambda: firmware(a.name),
                "back": lambda: back(a.name),
                "prune": lambda: prune(),
            }[a.command]()
    except (ReleaseError, OSError) as error:
        print(f"releases: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


def facts() -> dict[str, Any]:
    """Machine, SoC and Python of this board, its free bytes, and the names of its releases; '' for a link that is not there."""
    try:
        compatible = Path("/proc/device-tree/compatible").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        compatible = []
    socs = [name.removeprefix("nvidia,") for name in compatible if name.startswith("nvidia,tegra")]
    return {
        "machine": platform.machine(),
        "soc": socs[0] if socs else "",
        "python": ".".join(platform.python_version_tuple()[:2]),
        "free_bytes": _free_bytes(),
        "releases": [path.name for path in _installed()],
        "current": _name_of("current"),
        "good": _name_of("good"),
        "keys": sorted(path.name for path in KEYS.glob("*")),
    }


def room(needed: int) -> dict[str, Any]:
    """Make room for `needed` bytes by removing old releases; raises ReleaseError when there is too little all the same."""
    removed = []
    if _free_bytes() < needed + SPARE_BYTES:
        removed = prune()["removed"]
    free = _free_bytes()
    if free < needed + SPARE_BYTES:
        raise ReleaseError(
            f"{ROOT}: has {free >> 20} MB free, and the release needs {needed >> 20} MB with {SPARE_BYTES >> 20} MB to spare; free space "
            "there, for instance with 'journalctl --vacuum-size=50M'"
        )
    return {"free_bytes": free, "removed": removed, "changed": bool(removed)}


def check(incoming: Path) -> dict[str, Any]:
    """release.json of what has come, after checking who signed it, every file, and that it is for this board; raises ReleaseError."""
    text = _read(incoming / RELEASE_NAME, _LIST_BYTES)
    _verify(text, _read(incoming / SIGNATURE_NAME, _PUBLIC_BYTES + _SIGNATURE_BYTES), incoming / SIGNATURE_NAME)
    release = json.loads(text)
    if release["format"] > FORMAT:
        raise ReleaseError(f"{incoming}: has format {release['format']}, this tool reads up to {FORMAT}; flash from a newer repository")
    here = (platform.machine(), ".".join(platform.python_version_tuple()[:2]))
    if (release["machine"], release["python"]) != here:
        raise ReleaseError(
            f"{incoming}: is for {release['machine']} with Python {release['python']}, and this board is {here[0]} with Python {here[1]}; "
            "flash it with the release of its own target"
        )
    _check_files(incoming, release["files"])
    missing = {file: package for file, package in release["needs"].items() if not Path(file).exists()}
    if missing:
        raise ReleaseError(f"this board lacks {', '.join(missing)}; install on it: {' '.join(sorted({*missing.values()}))}")
    _check_bundle_version(release)
    return dict(release, name=f"{release['version']}-{hashlib.sha256(text).hexdigest()[:12]}")


def install(incoming: Path) -> dict[str, Any]:
    """Install what has come as a release of its own, whole or not at all; raises ReleaseError."""
    release = check(incoming)
    target = ROOT / "releases" / release["name"]
    changed = not (target / RELEASE_NAME).is_file()
    if changed:
        shutil.rmtree(target, ignore_errors=True)  # what a kill left of an earlier attempt
        target.mkdir(parents=True, mode=0o755)
        try:
            for folder in (BUNDLE, FIRMWARE):
                shutil.copytree(incoming / folder, target / folder)
            _make_venv(target, incoming / WHEELS, release)
            _belongs_to_root(target)
            _sync(target)
            # Last: what has no release.json is no release.
            _write(target / RELEASE_NAME, (incoming / RELEASE_NAME).read_bytes())
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
    return {"name": release["name"], "changed": changed}


def firmware(name: str) -> dict[str, Any]:
    """Bring the firmware of release `name` onto the microcontroller if another one is there; raises ReleaseError.

    The release's own flasher asks the chip and compares. The companion is stopped for it, since two cannot talk over one line, and
    `activate` starts it again; where it runs and says that the firmware is this one already, it is left alone.
    """
    target = ROOT / "releases" / name
    build = _release(name)["firmware_build"]
    port = _in_release(target, ["-c", _BRIDGE_PORT, str(SYSTEM_FILES[CONFIGURATION])]).strip() if build is not None else "none"
    if port == "none" or _status().get("versions", {}).get("firmware") == f"{build:08x}":
        return {"changed": False}
    subprocess.run(["systemctl", "stop", UNIT], check=False)
    said = _in_release(
        target, ["-m", "firmware_bridge.cli", "flash", str(target / FIRMWARE), *([] if port == "auto" else ["--port", port])]
    )
    return {"changed": "nothing to do" not in said, "said": said.splitlines()}


def activate(name: str) -> dict[str, Any]:
    """Make release `name` the current one in one step, and start it if it was not; raises ReleaseError.

    The files that it brings for the system come first: those of the newest release fit the older ones too.
    """
    target = ROOT / "releases" / name
    _release(name)
    before = _name_of("current")
    files = _place_system_files(next((target / "venv" / "lib").glob("python3*/site-packages/device/boot")))
    changed = before != name or bool(files) or not _unit()["pid"]
    if before != name:
        _permit_bundle(target)
        scratch = ROOT / ".current"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(target.relative_to(ROOT))
        os.replace(scratch, ROOT / "current")
        _sync_folder(ROOT)
    if changed:
        _start(files)
    return {"current": name, "before": before, "files": files, "changed": changed}


def back(name: str) -> dict[str, Any]:
    """After a flash that failed: what was current before, `name`, is so again, or rather the last good one; and it runs."""
    if _name_of("current") == name and (not name or _unit()["pid"]):
        return {"current": name, "changed": False}
    target = _name_of("good") or name
    if not target:  # a board's first release, which does not run: there is nothing else
        return {"current": _name_of("current"), "changed": False}
    firmware(target)
    return activate(target)


def running(name: str, wait_s: float, good: bool) -> dict[str, Any]:
    """What the running companion says of itself, once that is release `name`; raises ReleaseError when it is not in time.

    Building an engine does not count as waiting; a board that went back by itself is not waited for.
    """
    release = _release(name)
    end_s = time.monotonic() + wait_s + (CONFIRM_S if good else 0.0)
    while True:
        fault = _differs(name, release)
        if not fault and good and _name_of("good") != name:
            fault = "it runs, but the board has not confirmed it"
        if not fault:
            return {"name": name, "status": _status(), "changed": False}
        if _name_of("current") != name:
            reason = _read_json(ROOT / "rolled-back.json").get("reason", "somebody switched")
            raise ReleaseError(f"{name} was given up by the board: {reason}; see 'journalctl -u copresence' there")
        if time.monotonic() >= end_s:
            raise ReleaseError(f"{name} is installed, but is not what runs: {fault}; see 'journalctl -u copresence' on the board")
        time.sleep(POLL_S)
        if _show("copresence-engine.service")["ActiveState"] == "activating":
            end_s += POLL_S


def _differs(name: str, release: dict[str, Any]) -> str:
    """What keeps the running process from being that release; empty if nothing does."""
    unit, status = _unit(), _status()
    if unit["state"] != "active":
        return f"{UNIT} is {unit['state']}"
    if time.monotonic_ns() - int(status.get("at_ns", 0)) > STALE_NS:
        return "it says nothing of itself"
    said = {"pid": status.get("pid"), **status.get("versions", {})}
    wanted = {"pid": unit["pid"], "release": name, "copresence": release["version"], "bundle_sha256": release["bundle_sha256"]}
    if "firmware" in said and release["firmware_build"] is not None:
        wanted["firmware"] = f"{release['firmware_build']:08x}"
    return ", ".join(f"its {field} is {said.get(field)} and not {value}" for field, value in wanted.items() if said.get(field) != value)


def _start(files: list[str]) -> None:
    """Let the system take notice of its files, and start the current release anew without waiting for it."""
    # All of it every time but for what disturbs others: a flash that was cut off here is done again, and finds its files in place.
    subprocess.run(["systemd-sysusers"], check=True, stdout=sys.stderr)
    if shutil.which("udevadm"):  # a container has no udev
        subprocess.run(["udevadm", "control", "--reload"], check=False)
    if "journald.conf" in files:
        subprocess.run(["systemctl", "restart", "systemd-journald"], check=True)
    # The SoC's watchdog is set when systemd itself starts.
    subprocess.run(["systemctl", "daemon-reexec" if "watchdog.conf" in files else "daemon-reload"], check=True)
    subprocess.run(["systemctl", "enable", "--quiet", UNIT], check=True)
    subprocess.run(["systemctl", "reset-failed", UNIT, "copresence-engine.service"], check=False, capture_output=True)
    subprocess.run(["systemctl", "restart", "--no-block", UNIT], check=True)


def _permit_bundle(target: Path) -> None:
    """A board refuses bundles older than the one that ran last (device/signature.py); a return that is asked for is meant."""
    memory = STATE / "bundle-version"
    with contextlib.suppress(OSError, ValueError):
        version = _read_json(target / BUNDLE / "manifest.json")["version"]
        if version < int(memory.read_text(encoding="ascii")):
            owner = memory.stat()
            _write(memory, f"{version}\n".encode())
            os.chown(memory, owner.st_uid, owner.st_gid)


def _unit() -> dict[str, Any]:
    shown = _show(UNIT)
    return {"state": shown["ActiveState"], "pid": int(shown["MainPID"])}


def _show(unit: str) -> dict[str, str]:
    command = ["systemctl", "show", "--property=MainPID,ActiveState", unit]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return {"MainPID": "0", "ActiveState": "unknown", **dict(line.split("=", 1) for line in lines)}


def _status() -> dict[str, Any]:
    return _read_json(STATUS)


def _release(name: str) -> dict[str, Any]:
    """release.json of an installed release; raises ReleaseError."""
    path = ROOT / "releases" / name / RELEASE_NAME
    if Path(name).name != name or not path.is_file():
        raise ReleaseError(f"{path.parent}: is not a whole release; flash it again")
    return dict(json.loads(path.read_bytes()))


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def prune() -> dict[str, Any]:
    """Remove every release but the current and the last good one, whole or not."""
    kept = {_name_of("current"), _name_of("good")}
    removed = []
    for path in sorted((ROOT / "releases").glob("*")):
        if path.name not in kept:
            (path / RELEASE_NAME).unlink(missing_ok=True)  # first: half a release must not look like a whole one
            shutil.rmtree(path)
            removed.append(path.name)
    return {"removed": removed, "changed": bool(removed)}


def _verify(text: bytes, signature: bytes, where: Path) -> None:
    """Raise ReleaseError unless one of the board's keys signed `text`."""
    keys = {_public_key(file): file for file in sorted(KEYS.glob("*"))}
    if not keys:
        raise ReleaseError(f"{KEYS}: holds no key, so nobody could vouch for a release; put the .pub of 'copresence-export keygen' there")
    if len(signature) != _PUBLIC_BYTES + _SIGNATURE_BYTES:
        raise ReleaseError(f"{where}: has {len(signature)} bytes and is no signature; make the release again")
    public, proof = signature[:_PUBLIC_BYTES], signature[_PUBLIC_BYTES:]
    if public not in keys:
        key = hashlib.sha256(public).hexdigest()[:16]
        raise ReleaseError(
            f"{where}: signed by the key {key}, which is not among those in {KEYS}; sign the release with a trusted key, or put that "
            "key's .pub there if you trust it"
        )
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in (("text", text), ("proof", proof)):
            (Path(scratch) / name).write_bytes(data)
        command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(keys[public]), "-rawin", "-in", "text", "-sigfile", "proof"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise ReleaseError(f"{where}: does not fit the {RELEASE_NAME} beside it, one of the two was changed; make the release again")


def _public_key(file: Path) -> bytes:
    """The 32 bytes of an Ed25519 public key in PEM; raises ReleaseError."""
    try:
        lines = file.read_text(encoding="ascii").split("\n")
        der = base64.b64decode("".join(line for line in lines if line and not line.startswith("-----")), validate=True)
    except (OSError, ValueError) as error:
        raise ReleaseError(f"{file}: is no public key ({error}); put a .pub of 'copresence-export keygen' there, or remove it") from error
    if not der.startswith(_ED25519_PREFIX) or len(der) != len(_ED25519_PREFIX) + _PUBLIC_BYTES:
        raise ReleaseError(f"{file}: is not an Ed25519 key; put a .pub of 'copresence-export keygen' there, or remove it")
    return der[len(_ED25519_PREFIX) :]


def _check_files(incoming: Path, files: dict[str, dict[str, Any]]) -> None:
    """Raise ReleaseError unless `incoming` holds just the listed files, as listed; links count as foreign."""
    there = {str(path.relative_to(incoming)) for path in incoming.rglob("*") if not stat.S_ISDIR(path.lstat().st_mode)}
    there -= {RELEASE_NAME, SIGNATURE_NAME}
    for name in sorted(there ^ files.keys()):
        what = "is not listed" if name in there else "is missing"
        raise ReleaseError(f"{incoming / name}: {what} in the release; send the release again")
    for name, entry in files.items():
        path = incoming / name
        if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
            raise ReleaseError(f"{path}: is not the file that was signed; send the release again")


def _check_bundle_version(release: dict[str, Any]) -> None:
    """Raise ReleaseError for a bundle that this board would refuse to run, because a newer one has run here."""
    with contextlib.suppress(OSError, ValueError):
        last = int((STATE / "bundle-version").read_text(encoding="ascii"))
        if release["bundle_version"] < last:
            raise ReleaseError(
                f"its bundle has version {release['bundle_version']}, and version {last} has run here; sign it again with a higher "
                f"version, or remove {STATE / 'bundle-version'} if you mean to go back"
            )


def _make_venv(target: Path, wheels: Path, release: dict[str, Any]) -> None:
    """An environment of the release's own, from its wheels alone; raises ReleaseError with the end of what pip said."""
    # pip comes along as a wheel: Debian's and Ubuntu's Python have none without python3-venv.
    pip = next(wheels.glob("pip-*.whl")) / "pip"
    packages = f"copresence[{release['extra']}]=={release['version']}"
    _run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(target / "venv")])
    _in_release(target, [str(pip), "install", "--no-index", "--no-cache-dir", "--find-links", str(wheels), packages])
    _in_release(target, ["-m", "device.cli", "--version"])  # whatever is missing shows here and not after the switch
    _in_release(target, ["-c", _CHECK_BUNDLE, str(target / BUNDLE)])


def _in_release(target: Path, arguments: list[str]) -> str:
    """What the Python of a release prints; raises ReleaseError."""
    return _run([str(target / "venv" / "bin" / "python3"), *arguments])


def _run(command: list[str]) -> str:
    """What a command prints, without a person and away from any sources; raises ReleaseError with the end of what it said."""
    environment = {**os.environ, "PATH": f"/usr/local/cuda/bin:{os.environ.get('PATH', '')}"}
    done = subprocess.run(
        command, cwd="/", env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=PIP_TIMEOUT_S
    )
    if done.returncode != 0:
        said = " / ".join([line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-3:])
        raise ReleaseError(f"{' '.join(command[1:3])} failed ({said}); make the release again, or mend what it names")
    return done.stdout


# Where the board's microcontroller is, as its configuration says.
_BRIDGE_PORT = """
import sys
from pathlib import Path
from device.field.settings import Settings
print(Settings.read(Path(sys.argv[1]))["bridge.port"] if Path(sys.argv[1]).exists() else "none")
"""

# By the release's own reader, with this board's keys: the bundle is signed by itself, too.
_CHECK_BUNDLE = """
import sys
from device.bundle import Bundle
from device.signature import Trust
Bundle.open(sys.argv[1], Trust.of_machine())
"""


def _place_system_files(source: Path) -> list[str]:
    """Bring the files of SYSTEM_FILES up to date, each in one step; returns those that changed."""
    changed = []
    for name, place in SYSTEM_FILES.items():
        data = (source / name).read_bytes()
        if place.exists() and (name == CONFIGURATION or place.read_bytes() == data):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        _write(place, data)
        changed.append(name)
    return changed


def _belongs_to_root(folder: Path) -> None:
    """Nobody but root can write to it, whatever came with the files."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            os.chown(path, 0, 0)
            path.chmod(stat.S_IMODE(path.stat().st_mode) & 0o755 | (0o555 if path.is_dir() else 0o444))


def _sync(folder: Path) -> None:
    """Wait until all of `folder`'s file system is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), f"{folder} cannot be written to the disk")
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    """Write a file in one step that outlives a power cut."""
    scratch = path.with_name(f".{path.name}")
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.chmod(0o644)
    os.replace(scratch, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _installed() -> list[Path]:
    return sorted(path.parent for path in (ROOT / "releases").glob(f"*/{RELEASE_NAME}"))


def _name_of(link: str) -> str:
    try:
        return Path(os.readlink(ROOT / link)).name
    except OSError:
        return ""


def _free_bytes() -> int:
    return shutil.disk_usage(next(path for path in (ROOT, *ROOT.parents) if path.exists())).free


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ReleaseError(f"{path}: cannot be read ({error.strerror}); send the release again") from error
    if len(data) > limit:
        raise ReleaseError(f"{path}: is larger than {limit} bytes; make the release again")
    return data


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Only one of these tools at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
