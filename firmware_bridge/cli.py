"""`copresence-bridge`: look at the link to the microcontroller."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import version
from pathlib import Path

from firmware_bridge.framing import Decoder, Frame

_READ_BYTES = 4096


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 for input that cannot be read."""
    parser = argparse.ArgumentParser(prog="copresence-bridge", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('copresence')}")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("decode", help="print the frames in a raw capture of the serial line, and what was damaged")
    command.add_argument("file", metavar="FILE", help="the capture, or a serial port; - for standard input")
    return _decode(parser.parse_args(argv).file)


def _decode(name: str) -> int:
    decoder = Decoder()
    try:
        # Unbuffered: frames from a live port are shown when they arrive.
        with open(sys.stdin.fileno() if name == "-" else Path(name), "rb", buffering=0, closefd=name != "-") as capture:
            while data := capture.read(_READ_BYTES):
                _show(decoder.feed(data))
        _show(decoder.flush())
    except BrokenPipeError:  # the reader has seen enough (`| head`); keep Python from complaining when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        pass
    except OSError as error:
        print(f"copresence-bridge: cannot read {name}: {error.strerror}; name a capture file, or - for standard input", file=sys.stderr)
        return 2
    print(f"frames: {decoder.frames}, bytes outside of frames: {decoder.bad_bytes}, CRC errors: {decoder.crc_errors}")
    return 0


def _show(frames: list[Frame]) -> None:
    for frame in frames:
        print(f"{frame.sequence:2}  {len(frame.payload):2} bytes  {frame.payload.hex(' ')}".rstrip(), flush=True)
