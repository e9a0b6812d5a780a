"""The control socket: how `copresence dump` reaches the companion that runs on this machine.

A running companion listens on `PID.sock` in a folder that belongs to its user alone; one line of JSON is asked, one is answered.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUNTIME_VARIABLE = "COPRESENCE_RUNTIME"
UNIT_FOLDER = Path("/run/copresence")  # made by systemd for the unit's user; nobody but root makes folders in /run
LINE_BYTES = 65536
TALK_S = 5.0  # who has connected must have asked by then
ANSWER_S = 120.0  # writing a minute with sound and pictures takes seconds, on a slow card a minute


class ControlError(RuntimeError):
    """No companion answers. Remedy: the text names it."""


def runtime_folders() -> list[Path]:
    """Where a companion's socket may be, the most fitting first."""
    named = os.environ.get(RUNTIME_VARIABLE)
    if named:
        return [Path(named)]
    systemd, session = os.environ.get("RUNTIME_DIRECTORY"), os.environ.get("XDG_RUNTIME_DIR")
    folders = [Path(systemd.split(":")[0])] if systemd else []
    folders.append(UNIT_FOLDER)
    if session:
        folders.append(Path(session) / "copresence")
    return [*folders, Path(tempfile.gettempdir()) / f"copresence-{os.geteuid()}"]


class Control:
    """Answers on the socket, in a thread of its own: `answer` gets what was asked for, and gives what is said."""

    def __init__(self, answer: Callable[[str], dict[str, Any]]) -> None:
        """Raises OSError where no folder takes a socket."""
        self._answer = answer
        self._socket, self.path = _listen()
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take the socket away."""
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            with connection, contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # whoever it was talks nonsense, or went away
                connection.settimeout(TALK_S)
                asked = json.loads(_line(connection))["ask"]
                connection.sendall(json.dumps(self._answer(asked)).encode() + b"\n")


def ask(what: str, pid: int | None = None) -> dict[str, Any]:
    """The answer of the companion that runs here, or of the one with process id `pid`; raises ControlError."""
    folders = runtime_folders()
    # Root asks the unit's companion, too, whose folder is the unit's user's.
    found = [path for folder in folders if folder == UNIT_FOLDER or _own(folder) for path in folder.glob("*.sock") if path.stem.isdecimal()]
    alive: dict[int, socket.socket] = {}
    for path in found:
        with contextlib.suppress(OSError):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(str(path))
            except OSError:
                connection.close()
                raise
            alive.setdefault(int(path.stem), connection)
    try:
        return _talk(what, alive, pid, folders)
    finally:
        for connection in alive.values():
            connection.close()


def _talk(what: str, alive: dict[int, socket.socket], pid: int | None, folders: list[Path]) -> dict[str, Any]:
    if pid is None and len(alive) > 1:
        raise ControlError(f"several companions run here; name one with --pid: {', '.join(map(str, sorted(alive)))}")
    if not alive or (pid is not None and pid not in alive):
        which = "no companion runs here" if pid is None else f"no companion with process id {pid} runs here"
        looked = ", ".join(map(str, folders))
        raise ControlError(f"{which}, or it is another user's (looked in {looked}); start one with 'copresence run', or ask as its user")
    connection = alive[pid] if pid is not None else next(iter(alive.values()))
    connection.settimeout(ANSWER_S)
    try:
        connection.sendall(json.dumps({"ask": what}).encode() + b"\n")
        answer: dict[str, Any] = json.loads(_line(connection))
    except (OSError, ValueError) as error:
        raise ControlError(f"the companion does not answer ({error}); look at its log, and send it SIGUSR1 if it hangs") from error
    return answer


def _listen() -> tuple[socket.socket, Path]:
    fault: OSError | None = None
    for folder in runtime_folders():
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = folder / f"{os.getpid()}.sock"
        try:
            if not folder.exists():
                folder.mkdir(mode=0o700, parents=True)
            if not _own(folder):
                raise OSError(f"{folder} is not this user's own folder")
            path.unlink(missing_ok=True)  # left by a process that had this number and was killed
            server.bind(str(path))
            path.chmod(0o600)
            server.listen(1)
        except OSError as error:
            server.close()
            fault = fault or error
        else:
            return server, path
    raise fault or OSError("there is no folder for a socket")


def _own(folder: Path) -> bool:
    """Whether nobody else can have put something there: in /tmp anybody may make any folder."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid in (0, os.geteuid()) and not status.st_mode & stat.S_IWOTH


def _line(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n") and len(data) < LINE_BYTES:
        part = connection.recv(4096)
        if not part:
            break
        data += part
    return data
