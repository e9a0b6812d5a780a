"""Writes the whole disk of a Jetson: checks what can be checked, then runs NVIDIA's l4t_initrd_flash.sh with two root file systems.

What it adds to NVIDIA's image: a unit that at the first boot makes the user `field` who is reached by key, and sets the board up to come up
without a display. Not verified on hardware: what is checked here is that the right command is given, and README.md tells the steps.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FLASH_TOOL = "tools/kernel_flash/l4t_initrd_flash.sh"
UNIT, SCRIPT = "copresence-first-boot.service", "copresence-first-boot.sh"
DISK = "nvme0n1"
RETRIES = 3  # boots of one slot that never get far enough to be called good; then the other one is taken (L4T's own default is 3)
FREE_GB = 40  # the images of two root file systems are made on this disk first


class ImageError(Exception):
    """Something is not as the flashing needs it; the text ends with the remedy."""


def main(argv: list[str] | None = None) -> int:
    """Check, stage the first boot, flash; 0, 1 when flashing failed, 2 when a check did."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", required=True, help="orin-jp6, orin-jp7 or thor")
    parser.add_argument("--board", required=True, help="NVIDIA's name of it, such as jetson-orin-nano-devkit")
    parser.add_argument("--l4t", type=Path, required=True, metavar="FOLDER", help="NVIDIA's Linux_for_Tegra, with its rootfs and binaries")
    parser.add_argument("--ssh-key", type=Path, required=True, metavar="FILE", help="public key of who may flash it later, user 'field'")
    parser.add_argument("--dry", action="store_true", help="check, and print the command instead of running it")
    a = parser.parse_args(argv)
    try:
        row = find_row(a.target)
        command, environment = plan(row, a.target, a.board, a.l4t)
        check_files(row, a.l4t, a.board)
        key = read_ssh_key(a.ssh_key)
        check_recovery(row, usb_devices(Path("/sys/bus/usb/devices")))
        print(" ".join([f"{name}={value}" for name, value in environment.items()] + [shlex.quote(word) for word in command]), flush=True)
        if a.dry:
            return 0
        if os.geteuid() != 0:
            raise ImageError("only root can write it; run it again with sudo")
        stage_first_boot(a.l4t / "rootfs", key)
    except (ImageError, OSError) as error:
        print(f"flash-image: {error}", file=sys.stderr)
        return 2
    return 1 if subprocess.run(command, cwd=a.l4t, env={**os.environ, **environment}).returncode else 0


def find_row(target: str) -> Mapping[str, Any]:
    """The row of targets.toml for `target`; raises ImageError where there is none or no image of it."""
    table = tomllib.loads(files("device.flash").joinpath("targets.toml").read_text(encoding="utf-8"))
    known = [name for name, row in table.items() if "image" in row]
    if target not in known:
        raise ImageError(f"TARGET={target or '(nothing)'} has no image; give one of {', '.join(known)}")
    return dict(table[target])


def plan(row: Mapping[str, Any], target: str, board: str, l4t: Path) -> tuple[list[str], dict[str, str]]:
    """The command, to be run in `l4t`, and what it needs in its environment; raises ImageError for a board of another target."""
    image = row["image"]
    if board not in image["boards"]:
        raise ImageError(f"BOARD={board or '(nothing)'} is none of {target}'s: {', '.join(image['boards'])}; give one of them")
    command = ["./" + FLASH_TOOL, "--external-device", DISK, "-c", image["layout"]]
    if "qspi" in image:
        command += ["-p", f"-c {image['qspi']}"]
    command += ["--showlogs", "--network", "usb0", board, "external"]
    return command, {"ROOTFS_AB": "1", "ROOTFS_RETRY_COUNT_MAX": str(RETRIES)}


def check_files(row: Mapping[str, Any], l4t: Path, board: str) -> None:
    """Raise ImageError unless NVIDIA's folder is whole: the tool, the layouts, NVIDIA's root file system, of the right release."""
    wanted = [FLASH_TOOL, row["image"]["layout"], f"{board}.conf", *([row["image"]["qspi"]] if "qspi" in row["image"] else [])]
    for name in wanted:
        if not (l4t / name).is_file():
            raise ImageError(
                f"{l4t / name}: is not there; unpack NVIDIA's driver package (Jetson_Linux_…_aarch64.tbz2) and give L4T=…/Linux_for_Tegra"
            )
    if not (l4t / "rootfs" / "etc").is_dir():
        raise ImageError(f"{l4t / 'rootfs'}: holds no root file system; unpack NVIDIA's sample file system there, with sudo tar")
    release = l4t / "rootfs" / "etc" / "nv_tegra_release"
    if not release.is_file():
        raise ImageError(
            f"{release}: is not there; run 'sudo ./apply_binaries.sh{' --openrm' if row['soc'] == 'tegra264' else ''}' in {l4t}"
        )
    python = l4t / "rootfs" / "usr" / "bin" / f"python{row['python']}"
    if not python.exists():
        raise ImageError(f"{python}: is not there, so this is another JetPack than {row['board']}; give another TARGET or L4T")
    free_gb = shutil.disk_usage(l4t).free / 1e9
    if free_gb < FREE_GB:
        raise ImageError(f"{l4t}: has {free_gb:.0f} GB free, and the images need {FREE_GB} GB; free space there")


def read_ssh_key(path: Path) -> str:
    """The line of an ssh public key; raises ImageError."""
    try:
        line = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ImageError(f"PUBLIC_KEY={path}: cannot be read ({error}); give an ssh public key, such as ~/.ssh/id_ed25519.pub") from error
    if not re.fullmatch(r"(ssh|ecdsa)-\S+ [A-Za-z0-9+/=]+( [^\n]*)?", line):
        raise ImageError(f"PUBLIC_KEY={path}: is not one ssh public key; give the .pub file, such as ~/.ssh/id_ed25519.pub")
    return line


def usb_devices(folder: Path) -> list[str]:
    """`vendor:product` of all USB devices that sysfs lists."""
    ids = []
    for vendor in folder.glob("*/idVendor"):
        with contextlib.suppress(OSError):  # unplugged just now
            ids.append(f"{vendor.read_text().strip()}:{(vendor.parent / 'idProduct').read_text().strip()}")
    return ids


def check_recovery(row: Mapping[str, Any], usb: list[str]) -> None:
    """Raise ImageError unless just one board of this target is in recovery mode: with two, NVIDIA's tool would take either."""
    found = [device for device in usb if device in row["image"]["usb"]]
    if len(found) == 1:
        return
    if found:
        raise ImageError(f"{len(found)} boards are in recovery mode ({', '.join(found)}); leave one connected")
    others = [device for device in usb if device.startswith("0955:")]
    seen = f"; what is connected is {', '.join(others)}, which is not of this target" if others else ""
    raise ImageError(
        f"no {row['board']} in recovery mode on USB ({', '.join(row['image']['usb'])}){seen}; hold RECOVERY, press RESET, let go "
        "of both, and look with 'lsusb -d 0955:'"
    )


def stage_first_boot(rootfs: Path, ssh_key: str) -> None:
    """Put the unit of the first boot into NVIDIA's root file system; both slots are made from it. Raises OSError."""
    source = files("device.flash").joinpath("first_boot")
    _place(rootfs / "etc/systemd/system" / UNIT, source.joinpath(UNIT).read_text(encoding="utf-8"), 0o644)
    _place(rootfs / "usr/local/sbin" / SCRIPT, source.joinpath(SCRIPT).read_text(encoding="utf-8"), 0o755)
    _place(rootfs / "etc/copresence/field.pub", ssh_key + "\n", 0o644)
    system = rootfs / "etc/systemd/system"
    (system / "multi-user.target.wants").mkdir(parents=True, exist_ok=True)
    # default.target: apply_binaries.sh lets it lead to NVIDIA's first-boot dialogue, which waits for a person before anything else.
    for link, target in (
        (system / "multi-user.target.wants" / UNIT, f"/etc/systemd/system/{UNIT}"),
        (system / "default.target", "/lib/systemd/system/multi-user.target"),
    ):
        link.unlink(missing_ok=True)
        link.symlink_to(target)


def _place(path: Path, text: str, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
        file.write(text)
    os.chmod(file.name, mode)
    os.replace(file.name, path)


if __name__ == "__main__":
    sys.exit(main())
