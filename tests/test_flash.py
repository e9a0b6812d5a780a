"""Releases: collected for every board, signed, checked and switched without ever leaving a board with none; and a disk's image."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_loop import write_bundle

from device.flash import image, releases
from device.flash.releases import ReleaseError
from export import release as release_module
from export.release import FlashTarget, flash_targets, make_release, resolve, target_of
from export.sign import keygen

HERE = {"machine": releases.platform.machine(), "python": ".".join(releases.platform.python_version_tuple()[:2])}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="what belongs to root can be made by root only")
with_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


class Board:
    """A board in a folder: /opt/copresence, keys, state, status; systemctl is a script that says what `unit` holds and notes its calls."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.unit = folder, folder / "unit"
        for part in ("opt", "keys", "state", "run", "bin", "etc"):
            (folder / part).mkdir()
        files = {name: folder / "etc" / name for name in releases.SYSTEM_FILES}
        values = {"ROOT": folder / "opt", "KEYS": folder / "keys", "STATE": folder / "state", "STATUS": folder / "run/status.json"}
        for name, value in {**values, "SYSTEM_FILES": files, "POLL_S": 0.01, "CONFIRM_S": 0.1}.items():
            monkeypatch.setattr(releases, name, value)
        script = f'#!/bin/sh\necho "$0 $@" >> {folder}/calls\n[ "$1" != show ] || cat {self.unit}\n'
        for program in ("systemctl", "systemd-sysusers", "udevadm"):
            (folder / "bin" / program).write_text(script)
            (folder / "bin" / program).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        self.runs(0)

    @property
    def calls(self) -> str:
        file = self.folder / "calls"
        return file.read_text() if file.exists() else ""

    def runs(self, pid: int, **said: Any) -> None:
        """Let the companion run as process `pid`, 0 for not at all, and say this of itself."""
        self.unit.write_text(f"MainPID={pid}\nActiveState={'active' if pid else 'inactive'}\n")
        versions = {name: said[name] for name in ("copresence", "bundle_sha256", "firmware", "release") if name in said}
        releases.STATUS.write_text(json.dumps({"pid": pid, "at_ns": said.get("at_ns", time.monotonic_ns()), "versions": versions}))

    def installed(self, name: str, **values: Any) -> str:
        """A release that is there."""
        folder = releases.ROOT / "releases" / name
        boot = folder / "venv/lib/python3.11/site-packages/device/boot"
        boot.mkdir(parents=True)
        for file in releases.SYSTEM_FILES:
            (boot / file).write_text(f"{file} of {name}")
        (folder / "bundle").mkdir()
        (folder / "bundle" / "manifest.json").write_text(json.dumps({"version": values.get("bundle_version", 1)}))
        content = {"version": "1.0", "bundle_sha256": "ab", "firmware_build": None} | values
        (folder / "release.json").write_text(json.dumps(content))
        return name

    def link(self, **links: str) -> None:
        for link, name in links.items():
            (releases.ROOT / link).unlink(missing_ok=True)
            (releases.ROOT / link).symlink_to(Path("releases") / name)

    def leads(self, link: str) -> str:
        return Path(os.readlink(releases.ROOT / link)).name


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    (tmp_path / "board").mkdir()
    return Board(tmp_path / "board", monkeypatch)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A release for this machine, of a wheel that is none, signed by the key in keys/."""
    return make(tmp_path)


def make(folder: Path, **changes: Any) -> Path:
    row: dict[str, Any] = {"board": "this", "soc": "", "glibc": "2.28", "extra": "loop", "distribution": [], "compiled": {}, "needs": {}}
    target = FlashTarget(**({"name": "here", **HERE, **row} | changes))
    key = folder / "release.key"
    if not key.exists():
        keygen(key)
        (folder / "wheels").mkdir()
        import zipfile

        with zipfile.ZipFile(folder / "wheels" / "copresence-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("device/__init__.py", "x" * 1000)
        write_bundle(folder / "bundle")
    return make_release(target, folder / "wheels", folder / "bundle", None, key, folder / "out")


def trust(board: Board, public: Path) -> None:
    shutil.copy(public, board.folder / "keys")


@with_openssl
def test_a_release_that_a_trusted_key_signed_is_taken(board: Board, made: Path, tmp_path: Path) -> None:
    trust(board, tmp_path / "release.pub")
    assert releases.check(made)["name"] == made.name


@with_openssl
def test_the_same_content_gives_the_same_release(made: Path, tmp_path: Path) -> None:
    text = (made / "release.json").read_bytes()
    assert make(tmp_path) == made
    assert (made / "release.json").read_bytes() == text
    assert made.name == f"1.0-{hashlib.sha256(text).hexdigest()[:12]}"


def spoil(name: str, text: str | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        file.unlink(missing_ok=True)  # a link to the original, which must stay
        if text is not None:
            file.write_text(text)

    return change


def link_out(folder: Path) -> None:
    file = folder / "bundle" / "graph.onnx"
    data = file.read_bytes()
    file.unlink()
    (folder.parent / "elsewhere").write_bytes(data)
    file.symlink_to(folder.parent / "elsewhere")


def change_list(folder: Path) -> None:
    file = folder / "release.json"
    file.write_text(file.read_text().replace('"extra": "loop"', '"extra": "jets"'))


@with_openssl
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (spoil("bundle/graph.onnx", "another"), "graph.onnx: is not the file that was signed"),
        (spoil("bundle/more", "x"), "more: is not listed in the release"),
        (spoil("wheels/copresence-1.0-py3-none-any.whl", None), "any.whl: is missing in the release"),
        (spoil("release.sig", "x" * 96), "is not among those in"),
        (spoil("release.sig", "x"), "has 1 bytes and is no signature"),
        (spoil("release.sig", None), "release.sig: cannot be read"),
        (spoil("release.json", "{}"), "does not fit the release.json beside it"),
        (change_list, "does not fit the release.json beside it"),
        (link_out, "graph.onnx: is not the file that was signed"),
    ],
)
def test_a_release_that_was_changed_is_refused(
    board: Board, made: Path, tmp_path: Path, change: Callable[[Path], None], reason: str
) -> None:
    trust(board, tmp_path / "release.pub")
    change(made)
    with pytest.raises(ReleaseError, match=reason):
        releases.install(made)
    assert not (releases.ROOT / "releases").exists(), "nothing of it was installed"


@with_openssl
def test_a_release_of_another_key_is_refused_and_one_without_any_key_to_trust(board: Board, made: Path, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="holds no key, so nobody could vouch"):
        releases.check(made)
    public, _ = keygen(tmp_path / "other.key")
    trust(board, public)
    with pytest.raises(ReleaseError, match=r"signed by the key [0-9a-f]{16}, which is not among those"):
        releases.check(made)
    (board.folder / "keys" / "note.txt").write_text("not a key")
    with pytest.raises(ReleaseError, match=r"note.txt: is no"):
        releases.check(made)


@with_openssl
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"machine": "riscv64"}, "is for riscv64 with Python"),
        ({"python": "3.9"}, "with Python 3.9, and this board"),
        ({"needs": {"/nowhere/portaudio.h": "portaudio19-dev"}}, "install on it: portaudio19-dev"),
    ],
)
def test_a_release_that_this_board_cannot_run_is_refused(board: Board, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    foreign = make(tmp_path, **changes)
    trust(board, tmp_path / "release.pub")
    with pytest.raises(ReleaseError, match=reason):
        releases.check(foreign)


@with_openssl
def test_a_release_with_an_older_bundle_than_ran_here_is_refused(board: Board, made: Path, tmp_path: Path) -> None:
    trust(board, tmp_path / "release.pub")
    (releases.STATE / "bundle-version").write_text(f"{(1 << 62)}\n")
    with pytest.raises(ReleaseError, match="has run here; sign it again with a higher version"):
        releases.check(made)


@as_root
@with_openssl
def test_an_installation_that_breaks_off_leaves_nothing_and_a_kill_leaves_no_release(
    board: Board, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(board, tmp_path / "release.pub")
    target = releases.ROOT / "releases" / made.name

    def full(*_: object) -> None:
        (target / "venv").mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(releases, "_make_venv", full)
    with pytest.raises(OSError, match="No space left"):
        releases.install(made)
    assert not target.exists()
    (target / "venv").mkdir(parents=True)  # as a kill leaves it
    (target / "venv" / "half").write_text("")
    assert releases.facts()["releases"] == []
    with pytest.raises(ReleaseError, match="is not a whole release"):
        releases.activate(made.name)
    monkeypatch.setattr(releases, "_make_venv", lambda *_: (target / "venv").mkdir())
    assert releases.install(made) == {"name": made.name, "changed": True}
    assert not (target / "venv" / "half").exists()
    assert releases.facts()["releases"] == [made.name]
    assert releases.install(made)["changed"] is False
    assert all(path.stat().st_mode & 0o022 == 0 for path in target.rglob("*"))


def test_current_leads_to_a_whole_release_at_every_moment(board: Board) -> None:
    names = [board.installed("1"), board.installed("2")]
    releases.activate("1")
    seen: set[str] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            (releases.ROOT / "current" / "release.json").read_bytes()
            seen.add(board.leads("current"))

    thread = threading.Thread(target=look)
    thread.start()
    for k in range(30):
        releases.activate(names[(k + 1) % 2])
    assert thread.is_alive(), "it never found the link broken"
    stop.set()
    thread.join()
    assert seen == {"1", "2"}


def test_a_switch_brings_the_systems_files_and_starts_what_is_new_once(board: Board) -> None:
    board.installed("1")
    result = releases.activate("1")
    assert result["changed"] and sorted(result["files"]) == sorted(releases.SYSTEM_FILES)
    assert "restart --no-block copresence.service" in board.calls and "enable --quiet copresence.service" in board.calls
    (board.folder / "etc" / "copresence.toml").write_text("mine")
    board.runs(7)
    board.installed("2")
    assert "copresence.toml" not in releases.activate("2")["files"]
    assert (board.folder / "etc" / "copresence.toml").read_text() == "mine", "a board keeps its configuration"
    assert (board.folder / "etc" / "copresence.service").read_text() == "copresence.service of 2"
    (board.folder / "calls").unlink()
    assert releases.activate("2")["changed"] is False
    assert "restart" not in board.calls


def test_old_releases_go_but_never_the_running_or_the_last_good_one(board: Board) -> None:
    board.link(current=board.installed("3"), good=board.installed("1"))
    board.installed("2")
    (releases.ROOT / "releases" / "half").mkdir()
    assert releases.prune()["removed"] == ["2", "half"]
    assert releases.facts()["releases"] == ["1", "3"]
    assert releases.prune()["changed"] is False


def test_room_is_made_or_else_named(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    board.link(current=board.installed("2"))
    board.installed("1")
    monkeypatch.setattr(releases, "_free_bytes", lambda: releases.SPARE_BYTES + (100 if not (releases.ROOT / "releases/1").exists() else 0))
    assert releases.room(100)["removed"] == ["1"]
    with pytest.raises(ReleaseError, match=r"has 200 MB free, and the release needs 2 MB with 200 MB to spare; free space"):
        releases.room(2 << 20)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({}, ""),
        ({"pid": 0}, "copresence.service is inactive"),
        ({"copresence": "0.9"}, "its copresence is 0.9 and not 1.0"),
        ({"bundle_sha256": "cd"}, "its bundle_sha256 is cd and not ab"),
        ({"release": "0"}, "its release is 0 and not 1"),
        ({"firmware": "0000000a"}, "its firmware is 0000000a and not 0000000b"),
        ({"at_ns": 1}, "it says nothing of itself"),
    ],
)
def test_what_runs_is_believed_only_by_its_own_word(board: Board, said: dict[str, Any], reason: str) -> None:
    board.link(current=board.installed("1", firmware_build=11))
    right = {"pid": 7, "copresence": "1.0", "bundle_sha256": "ab", "release": "1", "firmware": "0000000b"}
    board.runs(**(right | said))
    if not reason:
        assert releases.running("1", 0.0, good=False)["name"] == "1"
        with pytest.raises(ReleaseError, match="the board has not confirmed it"):
            releases.running("1", 0.0, good=True)
        board.link(good="1")
        assert releases.running("1", 0.0, good=True)["name"] == "1"
        return
    with pytest.raises(ReleaseError, match=reason):
        releases.running("1", 0.0, good=False)


def test_a_board_that_went_back_by_itself_is_not_waited_for(board: Board) -> None:
    board.installed("2")
    board.link(current=board.installed("1"))
    (releases.ROOT / "rolled-back.json").write_text(json.dumps({"reason": "its restarts are spent"}))
    with pytest.raises(ReleaseError, match="2 was given up by the board: its restarts are spent"):
        releases.running("2", 1000.0, good=False)


def test_after_a_flash_that_failed_the_last_good_release_runs(board: Board) -> None:
    board.link(current=board.installed("3"), good=board.installed("1", bundle_version=5))
    board.installed("2")
    (releases.STATE / "bundle-version").write_text("9\n")
    assert releases.back("2")["current"] == "1"
    assert board.leads("current") == "1"
    assert (releases.STATE / "bundle-version").read_text() == "5\n", "its older bundle is permitted"
    (board.folder / "calls").unlink()
    board.runs(7)
    assert releases.back("1") == {"current": "1", "changed": False}
    assert "restart" not in board.calls, "what runs well is left alone"


def test_a_board_whose_first_release_failed_has_nothing_to_go_back_to(board: Board) -> None:
    board.link(current=board.installed("1"))
    assert releases.back("") == {"current": "1", "changed": False}


def test_firmware_is_flashed_only_where_another_one_is_and_a_port_is_named(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    board.link(current=board.installed("1", firmware_build=0xAB))
    ports, asked = ["none"], []

    def in_release(target: Path, arguments: list[str]) -> str:
        if arguments[0] == "-c":
            return f"{ports[0]}\n"
        asked.append(arguments)
        return "build 000000ab answers\n"

    monkeypatch.setattr(releases, "_in_release", in_release)
    assert releases.firmware("1") == {"changed": False}
    ports[0] = "/dev/ttyTHS1"
    board.runs(7, firmware="000000ab")
    assert releases.firmware("1") == {"changed": False}
    assert not asked
    board.runs(7, firmware="000000aa")
    assert releases.firmware("1")["changed"] is True
    assert asked == [["-m", "firmware_bridge.cli", "flash", str(releases.ROOT / "releases/1/firmware"), "--port", "/dev/ttyTHS1"]]
    assert "stop copresence.service" in board.calls, "the line must be free"


def test_every_target_is_found_by_what_its_board_says() -> None:
    for target in flash_targets().values():
        assert target_of(target.machine, target.soc, target.python) == target
    with pytest.raises(release_module.ReleaseError, match=r"no target for aarch64 tegra194 Python 3.8; add a row"):
        target_of("aarch64", "tegra194", "3.8")


@pytest.fixture(scope="module")
def index() -> None:
    """Skips where no package index is reached."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--quiet", "--no-header"]
    done = subprocess.run(command, input="pip", capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no package index is reached: {done.stderr.strip().splitlines()[-1:]}")


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("name", list(flash_targets()))
def test_all_that_a_board_installs_is_in_the_index_as_wheels_but_for_what_it_compiles(name: str) -> None:
    target = flash_targets()[name]
    pins = {pin.partition("==")[0]: pin.partition("==")[2] for pin in resolve(target)}
    assert {"numpy", "onnxruntime", "cryptography", "pyserial", "pip", *target.compiled} <= pins.keys()
    assert not pins.keys() & {*target.distribution}, "what the board's own system brings is not shipped"
    if target.python == "3.10":
        assert pins["onnxruntime"].startswith("1.23.") and pins["cuda-bindings"].startswith("12."), "the last that fit"


@pytest.mark.usefixtures("index")
def test_a_package_without_a_wheel_for_the_board_is_named() -> None:
    import dataclasses

    target = dataclasses.replace(flash_targets()["orin-jp6"], compiled={"pycuda": []})
    with pytest.raises(release_module.ReleaseError, match=r"(?i)orin-jp6: its packages do not resolve: .*pyaudio"):
        resolve(target)


def test_the_playbook_is_one_that_ansible_reads(repository: Path) -> None:
    program = shutil.which("ansible-playbook", path=Path(sys.executable).parent)
    if program is None:
        pytest.skip("ansible-core is not installed (extra 'flash')")
    playbook = repository / "device" / "flash" / "flash.yml"
    environment = {**os.environ, "ANSIBLE_CONFIG": str(playbook.with_name("ansible.cfg"))}
    command = [program, "--syntax-check", "-i", str(playbook.with_name("fleet.ini")), str(playbook)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class Nvidia:
    """NVIDIA's Linux_for_Tegra as far as we look at it; its tool notes what it was asked."""

    def __init__(self, folder: Path, target: str) -> None:
        self.folder, row = folder, image.find_row(target)
        self.row = row
        names = [image.FLASH_TOOL, row["image"]["layout"], *([row["image"]["qspi"]] if "qspi" in row["image"] else [])]
        for name in [*names, f"{row['image']['boards'][0]}.conf", "rootfs/etc/nv_tegra_release", f"rootfs/usr/bin/python{row['python']}"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("")
        tool = folder / image.FLASH_TOOL
        tool.write_text(f'#!/bin/sh\nprintf "%s\\n" "$ROOTFS_AB" "$ROOTFS_RETRY_COUNT_MAX" "$@" > {folder}/asked\n')
        tool.chmod(0o755)
        (folder / "key.pub").write_text("ssh-ed25519 AAAAC3Nza somebody\n")

    def arguments(self, target: str, *more: str) -> list[str]:
        board = self.row["image"]["boards"][0]
        return ["--target", target, "--board", board, "--l4t", str(self.folder), "--ssh-key", str(self.folder / "key.pub"), *more]


@pytest.fixture
def recovery(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is on USB."""
    devices = ["1d6b:0002", "0955:7523"]
    monkeypatch.setattr(image, "usb_devices", lambda folder: devices)
    monkeypatch.setattr(image, "FREE_GB", 0)
    return devices


@as_root
def test_a_disk_is_written_with_two_root_file_systems_and_a_first_boot(tmp_path: Path, recovery: list[str]) -> None:
    nvidia = Nvidia(tmp_path, "orin-jp6")
    (tmp_path / "rootfs/etc/systemd/system").mkdir(parents=True)
    (tmp_path / "rootfs/etc/systemd/system/default.target").symlink_to("/lib/systemd/system/nv-oem-config.target")
    assert image.main(nvidia.arguments("orin-jp6")) == 0
    # As workflow 4 of NVIDIA's README_initrd_flash.txt, with Orin's QSPI layout.
    assert (tmp_path / "asked").read_text().split("\n")[:-1] == [
        "1",
        "3",
        *("--external-device", "nvme0n1", "-c", "tools/kernel_flash/flash_l4t_t234_nvme_rootfs_ab.xml"),
        *("-p", "-c bootloader/generic/cfg/flash_t234_qspi.xml", "--showlogs", "--network", "usb0"),
        *("jetson-orin-nano-devkit", "external"),
    ]
    system = tmp_path / "rootfs/etc/systemd/system"
    assert os.readlink(system / "default.target") == "/lib/systemd/system/multi-user.target", "no dialogue that waits for a person"
    assert (system / "multi-user.target.wants" / image.UNIT).is_symlink() and (system / image.UNIT).is_file()
    assert (tmp_path / "rootfs/usr/local/sbin" / image.SCRIPT).stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "rootfs/etc/copresence/field.pub").read_text() == "ssh-ed25519 AAAAC3Nza somebody\n"


def remove(name: str) -> Callable[[Nvidia, list[str]], None]:
    return lambda nvidia, usb: (nvidia.folder / name).unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (remove(image.FLASH_TOOL), "l4t_initrd_flash.sh: is not there; unpack NVIDIA's driver package"),
        (remove("tools/kernel_flash/flash_l4t_t264_nvme_rootfs_ab.xml"), "nvme_rootfs_ab.xml: is not there"),
        (remove("jetson-agx-thor-devkit.conf"), "jetson-agx-thor-devkit.conf: is not there"),
        (remove("rootfs/etc/nv_tegra_release"), "run 'sudo ./apply_binaries.sh --openrm'"),
        (remove("rootfs/usr/bin/python3.12"), "so this is another JetPack than Jetson Thor"),
        (lambda nvidia, usb: shutil.rmtree(nvidia.folder / "rootfs"), "holds no root file system"),
        (remove("key.pub"), "cannot be read"),
        (lambda nvidia, usb: (nvidia.folder / "key.pub").write_text("-----BEGIN OPENSSH PRIVATE KEY-----"), "is not one ssh public key"),
        (lambda nvidia, usb: usb.clear(), "no Jetson Thor .* in recovery mode on USB .*hold RECOVERY"),
        (lambda nvidia, usb: usb.__setitem__(slice(None), ["0955:7523"]), "what is connected is 0955:7523, which is not of this target"),
        (lambda nvidia, usb: usb.append("0955:7226"), "2 boards are in recovery mode"),
    ],
)
def test_a_disk_is_not_touched_when_something_is_missing(
    tmp_path: Path, recovery: list[str], capsys: pytest.CaptureFixture[str], change: Callable[[Nvidia, list[str]], None], reason: str
) -> None:
    import re

    nvidia = Nvidia(tmp_path, "thor")
    recovery[:] = ["0955:7026"]
    assert image.main(nvidia.arguments("thor", "--dry")) == 0
    change(nvidia, recovery)
    assert image.main(nvidia.arguments("thor")) == 2
    assert re.search(reason, capsys.readouterr().err)
    assert not (tmp_path / "asked").exists()


def test_a_disk_is_for_a_board_of_its_target(tmp_path: Path, recovery: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    nvidia = Nvidia(tmp_path, "thor")
    assert image.main([*nvidia.arguments("thor"), "--board", "jetson-orin-nano-devkit"]) == 2
    assert image.main([*nvidia.arguments("thor"), "--target", "twin"]) == 2
    said = capsys.readouterr().err
    assert "BOARD=jetson-orin-nano-devkit is none of thor's: jetson-agx-thor-devkit" in said
    assert "TARGET=twin has no image; give one of orin-jp6, orin-jp7, thor" in said


def test_usb_devices_are_read_from_sysfs(tmp_path: Path) -> None:
    (tmp_path / "1-3").mkdir()
    (tmp_path / "1-3" / "idVendor").write_text("0955\n")
    (tmp_path / "1-3" / "idProduct").write_text("7026\n")
    assert image.usb_devices(tmp_path) == ["0955:7026"]
