"""The firmware in QEMU behind a pty, for tests, `make bench` and a desk without a body: `python -m firmware_bridge.qemu ELF [PORT]`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

COMMAND = ("qemu-system-arm", "-M", "netduinoplus2", "-nographic", "-monitor", "none", "-serial", "pty", "-kernel")

ALONE = ("chrt", "--fifo", "50")


class Machine:
    """A microcontroller; `port` is a link that always leads to the pty of the newest start.

    A chip shares its processor with nobody: `alone` asks the kernel to let QEMU run before everything else (chrt, as root).
    """

    def __init__(self, elf: Path, port: Path, alone: bool = False) -> None:
        self._command = [*(ALONE if alone else ()), *COMMAND, str(elf)]
        self._elf, self.port = elf, port
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._process.stdout is not None
        said = ""
        for line in self._process.stdout:
            said += line
            found = re.search(r"/dev/pts/\d+", line)
            if found:
                fresh = self.port.with_suffix(".new")
                fresh.unlink(missing_ok=True)
                fresh.symlink_to(found[0])
                os.replace(fresh, self.port)
                return
        raise RuntimeError(f"QEMU did not start: {said.strip()}; is {self._elf} built (make firmware)?")

    @property
    def waited_ns(self) -> int:
        """How long QEMU's threads were ready and the kernel gave them no processor, in all: its own account."""
        assert self._process is not None
        waited_ns = 0
        for task in Path(f"/proc/{self._process.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended just now
                waited_ns += int((task / "schedstat").read_text().split()[1])
        return waited_ns

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._process = None

    def wait(self) -> None:
        if self._process is not None:
            self._process.wait()


def main(arguments: list[str]) -> int:
    machine = Machine(Path(arguments[0]), Path(arguments[1] if len(arguments) > 1 else "build/bridge-port"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # not SIGINT alone: what a shell runs in the background never gets that
    machine.start()
    print(machine.port, flush=True)
    try:
        machine.wait()
    except KeyboardInterrupt:
        pass
    finally:
        machine.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
