"""Signatures of bundles: who vouches for one, whose word this machine takes, and that no older one comes back.

What is signed is the manifest, byte for byte, with Ed25519 (RFC 8032). The manifest holds the size and the SHA-256 of every other
file, and a bundle with a file that is not listed is refused, so the signature covers all of it. It lies beside the manifest in
`manifest.sig`: the signer's public key, 32 bytes, then the signature, 64 bytes. Of fixed length, it needs no parser; with the key in
front, a stranger's signature can be told from a broken one. The key in the file is only a name: it is never the one verified with.
A compiled engine has the same over its record (device/engine/record.py).

A machine trusts the public keys in one folder: `--keys`, else $COPRESENCE_KEYS, else /etc/copresence/keys. Every file there must be an
Ed25519 public key in PEM: one that is skipped could be the one that was meant to protect the board. With at least one key there,
only bundles signed by one of them run, and the signature is checked over raw bytes before anything of the bundle is parsed. With no key
there (a developer's machine) every bundle runs, and the event log says that nobody vouched for it. A folder named by option or
environment must exist and hold a key, so that a slip of the pen does not open the board.

A signed manifest has a `version`, which `copresence-export sign` writes and which rises from release to release. The one that ran last
is kept in a file in `--state`, else $COPRESENCE_STATE, else /var/lib/copresence; a lower one is refused as soon as the signed manifest
is read, before any other file is opened. A version is remembered only when its engine has loaded, so that a release which this board
cannot load does not lock out the one before. `--allow-downgrade` permits a lower one and remembers *that*, so that a wanted return
outlives a reboot.

Not covered: who can write to the bundle's folder while it is being opened, or to the two folders above. They belong to root.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from device.errors import BundleError

SIGNATURE_NAME = "manifest.sig"
KEYS_FOLDER = Path("/etc/copresence/keys")
STATE_FOLDER = Path("/var/lib/copresence")
KEYS_VARIABLE, STATE_VARIABLE = "COPRESENCE_KEYS", "COPRESENCE_STATE"

PUBLIC_BYTES, SIGNATURE_BYTES = 32, 64  # RFC 8032
HIGHEST_VERSION = (1 << 63) - 1  # fits every reader's integers
_KEY_FILE_BYTES = 1 << 14  # a PEM of such a key has 120
_VERSION_NAME = "bundle-version"


class Unsigned(BundleError):
    """No signature where one is demanded. Remedy: sign the bundle."""


class UnknownKey(BundleError):
    """Signed by a key that this machine does not trust. Remedy: sign with a trusted key, or trust this one."""


class BadSignature(BundleError):
    """The manifest is not the one that was signed. Remedy: copy the bundle again, or sign it again."""


class Downgrade(BundleError):
    """Older than what ran here last. Remedy: a newer bundle, or --allow-downgrade."""


class KeyFileError(ValueError):
    """A key, or a folder of keys, that cannot be used. Remedy: put the right one there."""


class VersionMemoryError(ValueError):
    """The version that ran last cannot be read or kept. Remedy: mend the file or the folder."""


def key_id(public: bytes) -> str:
    """What people call a key by: the first 16 hexadecimal digits of the SHA-256 of its 32 bytes."""
    return hashlib.sha256(public).hexdigest()[:16]


def open_regular(path: Path) -> BinaryIO:
    """A regular file, open for reading; raises FileNotFoundError, OSError, and ValueError for a link, a folder, a pipe or a device."""
    # It neither follows a link out of its folder nor waits for the writer of a pipe.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("it is a link and not a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is not a regular file")
    return open(descriptor, "rb")


def read_bounded(path: Path, limit: int) -> bytes:
    """All of a regular file of up to `limit` bytes; raises as `open_regular`, and ValueError for a larger one."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit} bytes")
    return data


@dataclass(frozen=True)
class TrustedKeys:
    """The public keys that this machine takes the word of, {32 bytes: name of the file without its suffix}."""

    folder: Path
    keys: Mapping[bytes, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path | None = None) -> TrustedKeys:
        """The keys in `folder`, or in this machine's; raises KeyFileError."""
        # An option that is there but empty, as from an unset variable, names the working folder and so ends in an error.
        named = folder is not None or bool(os.environ.get(KEYS_VARIABLE))
        path = Path(folder if folder is not None else os.environ.get(KEYS_VARIABLE) or KEYS_FOLDER)
        try:
            files = sorted(path.iterdir())
        except FileNotFoundError as error:
            if not named:
                return cls(path)
            raise KeyFileError(f"{path}: no such folder of keys; make it, and put the public keys to trust there") from error
        except OSError as error:
            raise KeyFileError(f"{path}: cannot be read ({error.strerror}); it must be a folder of public keys") from error
        if named and not files:
            raise KeyFileError(f"{path}: holds no key; put the public keys to trust there")
        return cls(path, {read_public_key(file): file.stem for file in files})

    def verify(self, manifest: bytes, signature: bytes | None, where: Path, what: str = "bundle") -> str:
        """Name of the trusted key that signed `manifest`; raises Unsigned, UnknownKey or BadSignature."""
        if signature is None:
            raise Unsigned(
                f"{where}: the {what} is not signed, and this machine runs only what the keys in {self.folder} signed; "
                "sign it with 'copresence-export sign'"
            )
        if len(signature) != PUBLIC_BYTES + SIGNATURE_BYTES:
            raise BadSignature(
                f"{where}: has {len(signature)} bytes and not {PUBLIC_BYTES + SIGNATURE_BYTES}; copy the {what} again or sign it again"
            )
        public, proof = signature[:PUBLIC_BYTES], signature[PUBLIC_BYTES:]
        if public not in self.keys:
            raise UnknownKey(
                f"{where}: signed by the key {key_id(public)}, which is not among those in {self.folder}; "
                f"sign the {what} with a trusted key, or put that key's .pub there if you trust it"
            )
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(public).verify(proof, manifest)
        except InvalidSignature as error:
            raise BadSignature(
                f"{where}: does not fit the manifest beside it, one of the two was changed; copy the {what} again or sign it again"
            ) from error
        return self.keys[public]


def read_public_key(file: Path) -> bytes:
    """The 32 bytes of an Ed25519 public key in PEM; raises KeyFileError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(read_bounded(file, _KEY_FILE_BYTES))
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise KeyFileError(f"{file}: not a public key ({reason}); put a .pub of 'copresence-export keygen' there, or remove it") from error
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(f"{file}: not an Ed25519 key; put a .pub of 'copresence-export keygen' there, or remove it")
    return key.public_bytes_raw()


@dataclass(frozen=True)
class VersionMemory:
    """The version of the bundle that ran here last, as a line of text in a file that is replaced in one step."""

    folder: Path
    allow_downgrade: bool = False

    @classmethod
    def of(cls, folder: str | Path | None = None, allow_downgrade: bool = False) -> VersionMemory:
        """The memory in `folder`, or this machine's."""
        return cls(Path(folder or os.environ.get(STATE_VARIABLE) or STATE_FOLDER), allow_downgrade)

    @property
    def file(self) -> Path:
        return self.folder / _VERSION_NAME

    def last(self) -> int:
        """The version that ran last, 0 if none did; raises VersionMemoryError."""
        try:
            text = read_bounded(self.file, 32).decode("ascii").removesuffix("\n")
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            raise VersionMemoryError(
                f"{self.file}: cannot be read ({error}); mend it, or delete it if no bundle ran here before"
            ) from error
        if not text.isdecimal():
            raise VersionMemoryError(f"{self.file}: {text!r} is not a version; write the last one there, or delete the file")
        return int(text)

    def check(self, version: int, where: Path) -> None:
        """Raise Downgrade if `version` is lower than the last one and a lower one is not permitted, or VersionMemoryError."""
        last = self.last()
        if version < last and not self.allow_downgrade:
            raise Downgrade(
                f"{where}: version {version} is older than {last}, which ran here last; "
                "take a newer bundle, or give --allow-downgrade if you mean to go back"
            )

    def remember(self, version: int, where: Path) -> None:
        """Check again, and keep `version`; raises Downgrade or VersionMemoryError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)  # two runs at once must not lower it between them
                self.check(version, where)
                if version != self.last():  # a board that restarts every day spares its flash
                    self._replace(f"{version}\n")
                    os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise VersionMemoryError(
                f"{self.file}: the version that ran last cannot be kept ({error.strerror}); "
                f"name a folder that can be written with --state or ${STATE_VARIABLE}"
            ) from error

    def _replace(self, text: str) -> None:
        descriptor, scratch = tempfile.mkstemp(prefix=f".{_VERSION_NAME}.", dir=self.folder)
        try:
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(text)
                file.flush()
                os.fsync(descriptor)
            os.replace(scratch, self.file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
            raise


@dataclass(frozen=True)
class Trust:
    """What a machine asks of a bundle before it parses any of it; without a trusted key it asks nothing."""

    keys: TrustedKeys
    memory: VersionMemory

    @classmethod
    def of_machine(cls, keys: str | None = None, state: str | None = None, allow_downgrade: bool = False) -> Trust:
        """What this machine asks, or with the two folders given instead of its own; raises KeyFileError."""
        return cls(TrustedKeys.read(keys), VersionMemory.of(state, allow_downgrade))

    def __bool__(self) -> bool:
        return bool(self.keys.keys)
