"""Puts a firmware onto the microcontroller: compare, write, verify, reboot, identify."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from firmware_bridge.bridge import Bridge
from firmware_bridge.dictionary import dictionary_hash, value_of
from firmware_bridge.errors import BridgeError, WrongDictionary
from firmware_bridge.port import PortError, find_port
from firmware_bridge.session import Identity

FLASH_START = "0x08000000"
IMAGE, BUILD = "bridge.bin", "build.json"
TOOL_TIMEOUT_S = 120  # a full chip at 115200 baud takes 40
BOOT_S = 2.0  # the chip's own loader needs so long to show up on USB


class FlashError(Exception):
    """The firmware is not, or not surely, on the chip; the text names the likely causes in order and the next step."""


@dataclass(frozen=True)
class Way:
    """One way to the chip's flash: the program, its calls one after the other, and why it usually fails.

    A call that writes the file that it is given last reads the flash back, for us to compare; the others verify by themselves.
    """

    program: str
    package: str
    calls: Callable[[Path, str, Path], list[list[str]]]
    causes: str


def _dfu(image: Path, port: str, back: Path) -> list[list[str]]:
    """It stays in its loader until what was written has been compared: nothing half-written is ever started."""
    loader, size = ["-d", "0483:df11", "-a", "0", "-s"], image.stat().st_size
    return [
        [*loader, FLASH_START, "-D", str(image)],
        [*loader, f"{FLASH_START}:{size}", "-U", str(back)],
        [*loader, f"{FLASH_START}:leave"],
    ]


WAYS = {
    "dfu": Way(
        "dfu-util",
        "dfu-util",
        _dfu,
        "the chip is not in its loader (hold BOOT0, press reset), the USB cable has no data wires, or you may not use the device "
        "(udev rule for 0483:df11). Then: make flash-mcu DFU=1",
    ),
    "uart": Way(
        "stm32flash",
        "stm32flash",
        lambda image, port, back: [["-w", str(image), "-v", "-g", FLASH_START, "-S", FLASH_START, "-b", "115200", port]],
        "the chip is not in its loader (hold BOOT0, press reset), the two data wires are swapped, ground is missing, or another "
        "program holds the port. Then: make flash-mcu PORT=…",
    ),
    "swd": Way(
        "openocd",
        "openocd",
        lambda image, port, back: [
            [
                *("-f", "interface/stlink.cfg", "-f", "target/stm32f4x.cfg"),
                *("-c", f"program {image} {FLASH_START} verify reset exit"),
            ]
        ],
        "the probe is not connected, SWDIO and SWCLK are swapped, the board has no power of its own, or the reset wire is missing. "
        "Then: make flash-mcu SWD=1",
    ),
}


def flash(folder: Path, port: str | None, by: str | None, say: Callable[[str], None]) -> None:
    """Bring the build in `folder` onto the chip, by `by` or by what is connected; raises FlashError."""
    image, build = _read_build(folder)
    name = _port(port)
    running = _running(name)
    if running is not None:
        say(f"running: build {running.build:08x}; here: build {build['build']:08x} ({build['version']})")
        if running.build == build["build"]:
            say("the same build: nothing to do")
            return
    by = by or _detect(name)
    way = WAYS[by]
    if shutil.which(way.program) is None:
        raise FlashError(f"{way.program} is not installed; install the package {way.package}, or take another way: DFU=1, PORT=… or SWD=1")
    if running is not None and by != "swd":
        say("the chip goes into its loader")
        _enter_loader(name)
    say(f"writing {image.stat().st_size} bytes with {way.program}")
    _write(way, image, name or "", say)
    _confirm(name, build, say)


def _read_build(folder: Path) -> tuple[Path, dict[str, int]]:
    image = folder / IMAGE
    try:
        build = json.loads((folder / BUILD).read_text(encoding="utf-8"))
        fits = isinstance(build["build"], int) and isinstance(build["dictionary"], int) and isinstance(build["version"], str)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FlashError(f"{folder} holds no firmware: {error}; build it: make firmware") from error
    if not fits or not image.is_file():
        raise FlashError(f"{folder} holds no firmware: {BUILD} or {IMAGE} is damaged; build it again: make firmware")
    if build["dictionary"] != dictionary_hash():
        raise FlashError(f"{image} has another dictionary than this copresence, which would refuse it; build it again: make firmware")
    return image, build


def _port(port: str | None) -> str | None:
    if port is not None:
        return port
    try:
        return find_port()
    except PortError:
        return None  # a chip in its loader, or one behind a probe, has none


def _running(name: str | None) -> Identity | None:
    """Who answers now; None when nobody does: an empty chip, or one in its loader."""
    if name is None:
        return None
    bridge = Bridge(name)
    try:
        bridge.start()
        return bridge.identity
    except WrongDictionary:
        return bridge.identity
    except (BridgeError, PortError):
        return None
    finally:
        bridge.close()


def _detect(name: str | None) -> str:
    """USB loader if one is there, else a probe, else the serial port."""
    for by, usb in (("dfu", "0483:df11"), ("swd", "0483:374")):
        if any(_usb_ids(usb)):
            return by
    if name is not None:
        return "uart"
    raise FlashError(
        "no microcontroller found: no serial port, no chip in its USB loader, no probe; in this order: is the board powered, does the USB "
        "cable carry data, is BOOT0 held while reset is pressed? Then: make flash-mcu DFU=1, or PORT=/dev/serial/by-id/…, or SWD=1"
    )


def _usb_ids(prefix: str) -> list[str]:
    ids = []
    for path in Path("/sys/bus/usb/devices").glob("*/idVendor"):
        with contextlib.suppress(OSError):  # unplugged just now
            ids.append(f"{path.read_text().strip()}:{(path.parent / 'idProduct').read_text().strip()}")
    return [found for found in ids if found.startswith(prefix)]


def _enter_loader(name: str | None) -> None:
    if name is None:
        return
    bridge = Bridge(name)
    try:
        bridge.start()
        bridge.send("disarm")
        bridge.send("reboot", how=value_of("REBOOT", "BOOTLOADER"))
        time.sleep(0.3)
    except (BridgeError, PortError):
        return  # a firmware of another dictionary cannot be asked; BOOT0 and reset do it
    finally:
        bridge.close()
    time.sleep(BOOT_S)


def _write(way: Way, image: Path, port: str, say: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        back = Path(folder) / "read-back.bin"
        for arguments in way.calls(image, port, back):
            _run_tool(way, arguments)
            if back.is_file():
                _compare(image.read_bytes(), back.read_bytes())
                say("read back: the same")
                back.unlink()
            elif str(back) in arguments:
                raise FlashError(f"{way.program} read nothing back; likely, in this order: {way.causes}")


def _compare(written: bytes, read: bytes) -> None:
    if read == written:
        return
    at = next((i for i, (a, b) in enumerate(zip(written, read, strict=False)) if a != b), min(len(written), len(read)))
    raise FlashError(
        f"what was written reads back otherwise from byte {at} of {len(written)} on, and was not started; likely, in this order: the "
        "supply sags while it writes, the chip's flash is write-protected (STM32CubeProgrammer takes that away), or it is worn. "
        "Then: make flash-mcu once more, or SWD=1"
    )


def _run_tool(way: Way, arguments: list[str]) -> None:
    command = [way.program, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise FlashError(f"{way.program} did not end in {TOOL_TIMEOUT_S} s; likely, in this order: {way.causes}") from error
    if done.returncode != 0:
        last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-3:]
        raise FlashError(f"{way.program} failed ({' / '.join(last) or 'without a word'}); likely, in this order: {way.causes}")


def _confirm(name: str | None, build: dict[str, int], say: Callable[[str], None]) -> None:
    time.sleep(0.5)
    name = name or _port(None)
    running = _running(name)
    if running is None:
        raise FlashError(
            "written, but nobody answers; likely, in this order: BOOT0 is still held (release it, press reset), the serial "
            "wires are not connected (out to in, in to out, ground), or it is another port. Then: copresence-bridge identify --port …"
        )
    if running.build != build["build"]:
        raise FlashError(
            f"written, but build {running.build:08x} answers and not {build['build']:08x}; likely, in this order: another board is on this "
            "port, or the chip was not restarted (press reset). Then: copresence-bridge identify --port …"
        )
    say(f"build {running.build:08x} answers")
