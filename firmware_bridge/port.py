"""The serial port: found by a stable name, opened without resetting what is behind it."""

from __future__ import annotations

import contextlib
import errno
import termios
from pathlib import Path
from typing import Any

BAUD = 460_800
BY_ID = Path("/dev/serial/by-id")

_REMEDIES = {
    errno.ENOENT: "connect the microcontroller, or name another port",
    errno.EACCES: "add yourself to the group dialout",
    errno.EAGAIN: "end the other program that has it",
}


class PortError(OSError):
    """The port cannot be used; the text ends with the remedy (cable, name, rights)."""


def find_port() -> str:
    """The only serial port with a stable name; raises PortError when there is none or more than one."""
    names = sorted(BY_ID.glob("*")) if BY_ID.is_dir() else []
    ours = [name for name in names if "copresence" in name.name.lower()] or names
    if len(ours) == 1:
        return str(ours[0])
    if not ours:
        raise PortError(f"no serial port in {BY_ID}; connect the microcontroller, or name its port with --port")
    raise PortError(f"several serial ports: {', '.join(name.name for name in ours)}; name one with --port {BY_ID}/…")


def forget(port: Any) -> None:
    """Drop what waits to be read or written; raises PortError when the port is gone."""
    try:
        port.reset_input_buffer()
        port.reset_output_buffer()
    except termios.error as error:  # which is no OSError
        raise PortError(f"{port.port} is gone: {error.args[-1]}; check the cable") from error


def open_port(name: str) -> Any:
    """A non-blocking serial.Serial on `name`, which nobody else may open meanwhile; raises PortError."""
    import serial

    port = serial.Serial(baudrate=BAUD, timeout=0, write_timeout=0, exclusive=True)
    port.port = name
    port.dtr = port.rts = False  # many adapters wire these to reset and boot pins
    try:
        port.open()
    except (serial.SerialException, OSError, ValueError) as error:
        remedy = _REMEDIES.get(getattr(error, "errno", None) or 0, "check cable and name")
        raise PortError(f"cannot open {name}: {error}; {remedy}") from error
    with contextlib.suppress(termios.error):  # closing must not drop DTR either
        settings = termios.tcgetattr(port.fileno())
        settings[2] &= ~termios.HUPCL
        termios.tcsetattr(port.fileno(), termios.TCSANOW, settings)
    return port
