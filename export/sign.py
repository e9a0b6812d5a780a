"""Keys and signatures: makes a pair of keys, and signs a bundle with one; what is signed is told in device/signature.py."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from device.bundle import MANIFEST_NAME, Bundle
from device.engine.record import RECORD_NAME, require_files
from device.engine.record import SIGNATURE_NAME as ENGINE_SIGNATURE_NAME
from device.signature import HIGHEST_VERSION, SIGNATURE_NAME, KeyFileError, Trust, TrustedKeys, VersionMemory, key_id, read_bounded
from export.errors import ExportError
from export.replacing import replacing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PUBLIC_SUFFIX = ".pub"
_KEY_FILE_BYTES = 1 << 14


class SignError(ExportError):
    """A bundle that could not be signed, or a key that could not be made; the text ends with the remedy."""


def keygen(out: Path) -> tuple[Path, str]:
    """Write a new private key to `out`, readable by its owner alone, and its public key beside it; path and id of the latter.

    Both are PEM (PKCS #8, SubjectPublicKeyInfo), which openssl reads too. Raises SignError; no file that was there is touched.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    public_file = out.with_suffix(PUBLIC_SUFFIX)
    if public_file == out:
        raise SignError(f"{out}: is what the public key will be called; give the private key another suffix, such as .key")
    key = Ed25519PrivateKey.generate()
    public = key.public_key()
    made: list[Path] = []
    try:
        for file, mode, data in (
            (out, 0o600, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())),
            (public_file, 0o644, public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)),
        ):
            # Never readable by others, not even for a moment; O_EXCL: a key that was lost cannot be made again.
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            made.append(file)
            with open(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(descriptor)
    except OSError as error:
        for file in made:
            file.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise SignError(f"{error.filename}: exists, and a key is never overwritten; give another --out") from error
        raise SignError(f"{out}: cannot be written ({error.strerror}); give another --out") from error
    return public_file, key_id(public.public_bytes_raw())


def sign(bundle_path: Path, key_file: Path, version: int | None = None) -> tuple[int, str]:
    """Write `version` (default: seconds since 1970, which rise by themselves) into the manifest and sign it; version and key id.

    Raises BundleError, KeyFileError or SignError; the bundle stays as it was until the signed one is whole.
    """
    version = int(time.time()) if version is None else version
    if not 0 < version <= HIGHEST_VERSION:
        raise SignError(f"--version {version} is not between 1 and {HIGHEST_VERSION}; give a number that rises from release to release")
    key = read_private_key(key_file)
    public = key.public_key().public_bytes_raw()
    bundle = Bundle.open(bundle_path)
    manifest = (json.dumps(bundle.manifest | {"version": version}, indent=1) + "\n").encode()
    try:
        with replacing(bundle_path.resolve()) as folder:
            for name in bundle.manifest["files"]:
                _link(bundle_path / name, folder / name)
            (folder / MANIFEST_NAME).write_bytes(manifest)
            (folder / SIGNATURE_NAME).write_bytes(public + key.sign(manifest))
            # What the board will check: with this key, and from this version on.
            signer = TrustedKeys(key_file, {public: key_file.stem})
            Bundle.open(folder, Trust(signer, VersionMemory(folder.parent)))
    except OSError as error:
        raise SignError(f"{bundle_path}: cannot be written ({error.strerror}); free space there or copy the bundle elsewhere") from error
    return version, key_id(public)


def sign_engine(folder: Path, key_file: Path) -> str:
    """Sign what `compile` made, by its record, which covers every file; the key's id. Raises KeyFileError, StaleEngine or SignError."""
    key = read_private_key(key_file)
    public = key.public_key().public_bytes_raw()
    record = (folder / RECORD_NAME).read_bytes()
    require_files(folder, record)
    scratch = folder / f".{ENGINE_SIGNATURE_NAME}"
    try:
        scratch.write_bytes(public + key.sign(record))
        scratch.replace(folder / ENGINE_SIGNATURE_NAME)
    except OSError as error:
        raise SignError(f"{folder}: cannot be written ({error.strerror}); free space there or copy the engine elsewhere") from error
    return key_id(public)


def read_private_key(file: Path) -> Ed25519PrivateKey:
    """The key that `keygen` wrote; raises KeyFileError, also for a file that others can read."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        # TypeError: the key is encrypted.
        key = load_pem_private_key(read_bounded(file, _KEY_FILE_BYTES), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise KeyFileError(f"{file}: not a private key ({reason}); make one with 'copresence-export keygen'") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{file}: not an Ed25519 key; make one with 'copresence-export keygen'")
    if mode & 0o077:
        raise KeyFileError(f"{file}: others can read it (mode {mode:04o}); chmod 600 it, or make another if it may have been read")
    return key


def _link(source: Path, target: Path) -> None:
    """The same file under a second name: a graph of gigabytes is not copied where the file system can do without."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
