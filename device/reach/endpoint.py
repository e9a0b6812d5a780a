"""Where the background model is, and the key to it: from the environment or from a file that only its owner can read."""

from __future__ import annotations

import ipaddress
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from device.reach.limits import ReachError
from device.signature import open_regular

KEY_VARIABLE = "COPRESENCE_THINK_KEY"
_KEY_BYTES = 4096  # the longest keys in use are tokens of some 2 kB


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server; `url` is its base, such as http://127.0.0.1:8080/v1."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)  # in no log

    def __post_init__(self) -> None:
        """Raises ReachError."""
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port  # which raises for a port that is none
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https") or not self.url.isprintable():
            raise ReachError("--think: not the address of a server; give one such as http://127.0.0.1:8080/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:  # the address is in the event log
            raise ReachError(
                f"--think: the address must hold nothing but server and path; a key goes into ${KEY_VARIABLE} or --think-key-file"
            )
        if self.key and parts.scheme == "http" and not is_loopback(host):
            raise ReachError(f"--think {self.url}: the key would cross the network in clear; give an https address, or no key")

    @property
    def local(self) -> bool:
        """Whether it is on this machine."""
        return is_loopback(urlsplit(self.url).hostname or "")


def is_loopback(host: str) -> bool:
    """Whether what is sent to `host` stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_key(file: Path | None) -> str | None:
    """The key in `file`, else in $COPRESENCE_THINK_KEY, else none; raises ReachError."""
    if file is None:
        return _clean(os.environ.get(KEY_VARIABLE, ""), f"${KEY_VARIABLE}") or None
    try:
        with open_regular(file) as stream:
            status = os.fstat(stream.fileno())
            data = stream.read(_KEY_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ReachError(f"{file}: not a key file ({reason}); give a file with the key in it") from error
    if stat.S_IMODE(status.st_mode) & 0o077 or status.st_uid not in (0, os.geteuid()):
        raise ReachError(f"{file}: others can read this key or change it; make it yours alone with 'chmod 600 {file}'")
    key = _clean(data.decode("ascii", errors="replace"), str(file))
    if not key:
        raise ReachError(f"{file}: holds no key; write the key into it, or leave --think-key-file out")
    return key


def _clean(key: str, where: str) -> str:
    """Without the line end of a file; raises ReachError for what no header can hold."""
    key = key.strip()
    if len(key) > _KEY_BYTES or any(not "!" <= character <= "~" for character in key):
        raise ReachError(f"{where}: not a key; it must be one line of visible ASCII characters, {_KEY_BYTES} at most")
    return key
