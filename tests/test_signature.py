"""Signatures: what a board that trusts keys refuses, each by its own name, and that no reader trips over hostile bytes."""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_loop import CONFIG, echo_graph, write_bundle, write_manifest

from device import bundle as bundle_module
from device.bundle import (
    GRAPH_NAME,
    MANIFEST_BYTES,
    MANIFEST_NAME,
    Bundle,
    BundleError,
    ChangedFile,
    NotABundle,
    SwappedFile,
    UnlistedFile,
)
from device.cli import main as run_main
from device.config import ConfigError, ModelConfig
from device.engine import OnnxRuntimeEngine
from device.signature import (
    KEYS_VARIABLE,
    SIGNATURE_NAME,
    STATE_VARIABLE,
    BadSignature,
    Downgrade,
    KeyFileError,
    Trust,
    TrustedKeys,
    UnknownKey,
    Unsigned,
    VersionMemory,
    VersionMemoryError,
)
from device.tensors import TensorMismatch
from export.checkpoint import REFERENCE_NAME, WEIGHTS_NAME, CheckpointError, read_checkpoint
from export.cli import main as export_main
from export.sign import keygen, sign

EXTRA_NAME = "calibration.txt"
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


class Board:
    """A folder with a key pair, the board's folders and a signed bundle of version 5."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key, self.keys, self.state = folder, folder / "fleet.key", folder / "keys", folder / "state"
        self.keys.mkdir()
        keygen(self.key)
        shutil.copy(folder / "fleet.pub", self.keys)
        self.bundle = write_bundle(folder / "echo")
        (self.bundle / EXTRA_NAME).write_text("a second file")
        write_manifest(self.bundle, list_extra)
        sign(self.bundle, self.key, 5)

    def trust(self, allow_downgrade: bool = False) -> Trust:
        return Trust.of_machine(str(self.keys), str(self.state), allow_downgrade)

    def open(self) -> Bundle:
        return Bundle.open(self.bundle, self.trust())

    def run(self, *more: str) -> int:
        folders = ("--keys", str(self.keys), "--state", str(self.state))
        return run_main(["run", "--bundle", str(self.bundle), "--clock", "simulated", "--seconds", "0.2", *folders, *more])


def list_extra(manifest: dict[str, Any]) -> None:
    data = b"a second file"
    manifest["files"][EXTRA_NAME] = {"sha256": bundle_module.hashlib.sha256(data).hexdigest(), "bytes": len(data)}


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


@pytest.fixture(scope="module")
def shared_board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    """For tests that put back what they change."""
    return Board(tmp_path_factory.mktemp("board"))


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


# --- what is accepted ---------------------------------------------------------------------------------------------


def test_a_signed_bundle_opens_where_its_key_is_trusted(board: Board) -> None:
    opened = board.open()
    assert (opened.signature, opened.signed_by, opened.version) == ("valid", "fleet", 5)
    assert set(os.listdir(board.bundle)) == {MANIFEST_NAME, SIGNATURE_NAME, GRAPH_NAME, EXTRA_NAME}


def test_where_no_key_is_trusted_every_bundle_opens_and_says_so(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device.signature.KEYS_FOLDER", tmp_path / "absent")
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    trust = Trust.of_machine(None, str(board.state))
    assert not trust
    opened = Bundle.open(board.bundle, trust)
    assert (opened.signature, opened.signed_by) == ("not checked", None)
    (board.bundle / SIGNATURE_NAME).unlink()
    assert Bundle.open(board.bundle, trust).signature == "none"


def test_openssl_can_check_a_signature(board: Board, tmp_path: Path) -> None:
    """What is signed is the manifest, byte for byte: another implementation agrees."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    (tmp_path / "proof").write_bytes((board.bundle / SIGNATURE_NAME).read_bytes()[32:])
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(board.keys / "fleet.pub"), "-rawin"]
    files = ["-in", str(board.bundle / MANIFEST_NAME), "-sigfile", str(tmp_path / "proof")]
    assert subprocess.run(command + files, check=False, capture_output=True).returncode == 0
    flip(board.bundle / MANIFEST_NAME, 800)
    assert subprocess.run(command + files, check=False, capture_output=True).returncode != 0


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MANIFEST_NAME, SIGNATURE_NAME, GRAPH_NAME, EXTRA_NAME])
@FUZZ
@given(data=st.data())
def test_a_flipped_bit_is_refused_wherever_it_is(shared_board: Board, name: str, data: st.DataObject) -> None:
    file = shared_board.bundle / name
    bit = data.draw(st.integers(0, 8 * file.stat().st_size - 1))
    expected = {MANIFEST_NAME: BadSignature, SIGNATURE_NAME: UnknownKey if bit < 8 * 32 else BadSignature}.get(name, ChangedFile)
    flip(file, bit)
    try:
        with pytest.raises(expected) as caught:
            shared_board.open()
        assert type(caught.value) is expected and str(shared_board.bundle) in str(caught.value)
    finally:
        flip(file, bit)
    assert shared_board.open().signature == "valid"


def swap_files(board: Board) -> None:
    one, other = board.bundle / GRAPH_NAME, board.bundle / EXTRA_NAME
    one.rename(board.folder / "between")
    other.rename(one)
    (board.folder / "between").rename(other)


def swap_in_another(board: Board) -> None:
    model = echo_graph(CONFIG)
    model.producer_name = "another"
    (board.bundle / GRAPH_NAME).write_bytes(model.SerializeToString())


def same_content_twice(board: Board) -> None:
    """Two listed files of one size, exchanged: only the hash tells them apart."""
    other = b"another file."
    (board.bundle / "other.txt").write_bytes(other)

    def change(manifest: dict[str, Any]) -> None:
        list_extra(manifest)
        manifest["files"]["other.txt"] = {"sha256": bundle_module.hashlib.sha256(other).hexdigest(), "bytes": len(other)}

    write_manifest(board.bundle, change)
    sign(board.bundle, board.key, 6)
    (board.bundle / EXTRA_NAME).write_bytes(other)


def add_a_file(board: Board) -> None:
    (board.bundle / "plan.engine").write_bytes(b"code")


def add_a_folder(board: Board) -> None:
    (board.bundle / "more").mkdir()


def remove_a_file(board: Board) -> None:
    (board.bundle / EXTRA_NAME).unlink()


def replace_by_a_link(board: Board) -> None:
    (board.bundle / EXTRA_NAME).rename(board.folder / EXTRA_NAME)
    (board.bundle / EXTRA_NAME).symlink_to(board.folder / EXTRA_NAME)


def replace_by_a_pipe(board: Board) -> None:
    (board.bundle / EXTRA_NAME).unlink()
    os.mkfifo(board.bundle / EXTRA_NAME)


def sign_by_a_stranger(board: Board) -> None:
    keygen(board.folder / "stranger.key")
    sign(board.bundle, board.folder / "stranger.key", 6)


def name_a_trusted_key(board: Board) -> None:
    """A stranger's signature under the name of the fleet's key."""
    fleet = (board.bundle / SIGNATURE_NAME).read_bytes()[:32]
    sign_by_a_stranger(board)
    (board.bundle / SIGNATURE_NAME).write_bytes(fleet + (board.bundle / SIGNATURE_NAME).read_bytes()[32:])


def remove_the_signature(board: Board) -> None:
    (board.bundle / SIGNATURE_NAME).unlink()


def cut_the_signature(board: Board) -> None:
    (board.bundle / SIGNATURE_NAME).write_bytes((board.bundle / SIGNATURE_NAME).read_bytes()[:-1])


def lengthen_the_signature(board: Board) -> None:
    (board.bundle / SIGNATURE_NAME).write_bytes((board.bundle / SIGNATURE_NAME).read_bytes() + b"\0")


def replay_an_older_one(board: Board) -> None:
    board.trust().memory.remember(9, board.bundle)


REFUSALS = [
    (swap_files, SwappedFile, r"graph\.onnx is another file than the one listed: it has 13 bytes"),
    (swap_in_another, SwappedFile, r"graph\.onnx is another file than the one listed"),
    (same_content_twice, SwappedFile, "the manifest has it under another name"),
    (add_a_file, UnlistedFile, r"plan\.engine is not listed in the manifest; remove it"),
    (add_a_folder, UnlistedFile, "more is not listed in the manifest; remove it"),
    (remove_a_file, ChangedFile, r"calibration\.txt is missing"),
    (replace_by_a_link, ChangedFile, "is a link"),
    (replace_by_a_pipe, ChangedFile, "not a regular file"),
    (sign_by_a_stranger, UnknownKey, "signed by the key [0-9a-f]{16}, which is not among those in .*keys; sign"),
    (name_a_trusted_key, BadSignature, "does not fit the manifest"),
    (remove_the_signature, Unsigned, "is not signed, and this machine runs only what the keys in .*keys signed; sign it"),
    (cut_the_signature, BadSignature, "has 95 bytes and not 96"),
    (lengthen_the_signature, BadSignature, "larger than 96 bytes"),
    (replay_an_older_one, Downgrade, "version 5 is older than 9, which ran here last; .*--allow-downgrade"),
]


@pytest.mark.parametrize(("attack", "error", "text"), REFUSALS)
def test_each_attack_is_refused_by_its_name(
    board: Board, attack: Callable[[Board], None], error: type[Exception], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    attack(board)
    with pytest.raises(error, match=text) as caught:
        board.open()
    assert type(caught.value) is error
    assert board.run() == 2
    message = capsys.readouterr().err
    assert message == f"copresence: {caught.value}\n"


@pytest.mark.parametrize(
    ("attack", "error"), [(remove_the_signature, Unsigned), (sign_by_a_stranger, UnknownKey), (cut_the_signature, BadSignature)]
)
def test_nothing_is_parsed_before_the_signature_holds(
    board: Board, attack: Callable[[Board], None], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    attack(board)

    def parsed(*arguments: object, **more: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(bundle_module.json, "loads", parsed)
    with pytest.raises(error):
        board.open()
    monkeypatch.undo()
    (board.bundle / MANIFEST_NAME).write_text("{")  # no manifest either, and still the signature comes first
    with pytest.raises(BundleError) as caught:
        board.open()
    assert not isinstance(caught.value, NotABundle)


def test_a_downgrade_is_refused_before_another_file_is_opened(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    replay_an_older_one(board)

    def opened(*arguments: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(bundle_module, "_check_files", opened)
    with pytest.raises(Downgrade):
        board.open()


def test_a_signed_manifest_without_a_version_is_refused(board: Board) -> None:
    from export.sign import read_private_key

    write_manifest(board.bundle, list_extra)
    key = read_private_key(board.key)
    proof = key.sign((board.bundle / MANIFEST_NAME).read_bytes())
    (board.bundle / SIGNATURE_NAME).write_bytes(key.public_key().public_bytes_raw() + proof)
    with pytest.raises(NotABundle, match="signed but has no 'version'"):
        board.open()


# --- the version that ran last ------------------------------------------------------------------------------------


def test_a_run_remembers_its_version_and_a_downgrade_needs_permission(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    events = board.folder / "events.jsonl"
    assert board.run("--events", str(events)) == 0
    header = json.loads(events.read_text().splitlines()[0])
    assert (header["signature"], header["signed_by"], header["bundle_version"]) == ("valid", "fleet", 5)
    assert board.trust().memory.last() == 5
    sign(board.bundle, board.key, 4)
    assert board.run() == 2
    assert "--allow-downgrade" in capsys.readouterr().err
    assert board.trust().memory.last() == 5
    assert board.run("--allow-downgrade") == 0
    assert board.trust().memory.last() == 4
    assert board.run() == 0  # a wanted return outlives a reboot
    assert os.listdir(board.state) == ["bundle-version"]


def test_a_bundle_whose_engine_does_not_load_leaves_the_memory(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    (board.bundle / GRAPH_NAME).write_bytes(b"nonsense")
    write_manifest(board.bundle, list_extra)
    sign(board.bundle, board.key, 7)
    assert board.run() == 2
    assert "not a graph" in capsys.readouterr().err
    assert board.trust().memory.last() == 0


def test_an_unsigned_bundle_runs_without_keys_and_the_log_says_so(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device.signature.KEYS_FOLDER", tmp_path / "absent")
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    monkeypatch.setenv(STATE_VARIABLE, str(board.state))
    remove_the_signature(board)
    events = tmp_path / "events.jsonl"
    assert run_main(["run", "--bundle", str(board.bundle), "--clock", "simulated", "--seconds", "0.2", "--events", str(events)]) == 0
    header = json.loads(events.read_text().splitlines()[0])
    assert (header["signature"], header["signed_by"]) == ("none", None)
    assert not board.state.exists()  # where nothing is trusted nothing is remembered


def test_environment_names_the_folders(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, str(board.keys))
    monkeypatch.setenv(STATE_VARIABLE, str(board.state))
    command = ["run", "--bundle", str(board.bundle), "--clock", "simulated", "--seconds", "0.2"]
    assert run_main(command) == 0
    assert (board.state / "bundle-version").read_text() == "5\n"
    remove_the_signature(board)
    assert run_main(command) == 2


@pytest.mark.parametrize("text", ["", "five\n", "-1\n", "5\n5\n", "9" * 40, "²\n"])
def test_a_damaged_memory_is_refused_and_not_taken_for_none(board: Board, text: str) -> None:
    board.state.mkdir()
    board.trust().memory.file.write_text(text)
    with pytest.raises(VersionMemoryError, match="bundle-version"):
        board.open()


def test_a_memory_that_cannot_be_written_is_an_error_and_keeps_the_old(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = VersionMemory(board.state)
    memory.remember(3, board.bundle)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("device.signature.os.replace", full)
    with pytest.raises(VersionMemoryError, match=r"No space left on device.*--state"):
        memory.remember(4, board.bundle)
    assert memory.last() == 3
    assert os.listdir(board.state) == ["bundle-version"]
    (board.folder / "file").write_text("")
    with pytest.raises(VersionMemoryError):
        VersionMemory(board.folder / "file").remember(4, board.bundle)


# --- keys ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_keys_that_was_named_must_hold_some(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="no such folder"):
        TrustedKeys.read(tmp_path / "absent")
    with pytest.raises(KeyFileError, match="holds no key"):
        TrustedKeys.read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyFileError, match="cannot be read"):
        TrustedKeys.read(tmp_path / "file")


def test_an_empty_option_does_not_open_the_board(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    remove_the_signature(board)
    monkeypatch.setattr("device.signature.KEYS_FOLDER", board.folder / "absent")
    monkeypatch.chdir(board.folder)
    with pytest.raises(KeyFileError):
        Trust.of_machine("")


def rsa_public() -> bytes:
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (lambda board: b"", "not a public key"),
        (lambda board: board.key.read_bytes(), "not a public key"),
        (lambda board: rsa_public(), "Ed25519"),
    ],
)
def test_what_is_no_key_among_the_keys_is_an_error_and_not_skipped(board: Board, content: Callable[[Board], bytes], text: str) -> None:
    (board.keys / "other.pem").write_bytes(content(board))
    with pytest.raises(KeyFileError, match=text):
        board.open()
    assert board.run() == 2


@FUZZ
@given(data=st.binary(max_size=200))
def test_random_bytes_as_a_key_end_in_the_one_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.pub").write_bytes(data)
    with pytest.raises(KeyFileError):
        TrustedKeys.read(tmp_path)


def test_keygen_writes_a_private_key_for_its_owner_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fleet.key"
    old = os.umask(0)
    try:
        assert export_main(["keygen", "--out", str(out)]) == 0
    finally:
        os.umask(old)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["fleet.key", "fleet.pub"]
    assert "PRIVATE" in out.read_text() and "PRIVATE" not in (tmp_path / "fleet.pub").read_text()
    assert "PRIVATE KEY" not in capsys.readouterr().out


@pytest.mark.parametrize("there", ["fleet.key", "fleet.pub"])
def test_keygen_overwrites_nothing(tmp_path: Path, there: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / there).write_text("of old")
    assert export_main(["keygen", "--out", str(tmp_path / "fleet.key")]) == 2
    assert f"{there}: exists, and a key is never overwritten" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [there] and (tmp_path / there).read_text() == "of old"


def test_keygen_needs_two_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_main(["keygen", "--out", str(tmp_path / "fleet.pub")]) == 2
    assert "another suffix" in capsys.readouterr().err and not os.listdir(tmp_path)
    assert export_main(["keygen", "--out", str(tmp_path / "no" / "fleet.key")]) == 2
    assert "cannot be written" in capsys.readouterr().err


# --- signing ------------------------------------------------------------------------------------------------------


def test_sign_writes_the_version_and_keeps_the_rest(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    before = Bundle.open(board.bundle)
    assert export_main(["sign", str(board.bundle), "--key", str(board.key), "--version", "12"]) == 0
    assert "as version 12" in capsys.readouterr().out
    after = board.open()
    assert after.version == 12 and after.manifest == before.manifest | {"version": 12}
    assert export_main(["sign", str(board.bundle), "--key", str(board.key)]) == 0
    assert board.open().version > 1_700_000_000  # seconds since 1970
    assert sorted(os.listdir(board.folder)) == ["echo", "fleet.key", "fleet.pub", "keys"]  # no scratch folders


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda b: b.key.chmod(0o640), "others can read it"),
        (lambda b: b.key.unlink(), "not a private key"),
        (lambda b: shutil.copy(b.keys / "fleet.pub", b.key), "not a private key"),
        (add_a_file, "not listed in the manifest"),
        (lambda b: flip(b.bundle / GRAPH_NAME, 99), "SHA-256 differs"),
    ],
)
def test_what_cannot_be_signed_stays_as_it_was(
    board: Board, spoil: Callable[[Board], object], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(board)
    before = {file.name: file.read_bytes() for file in board.bundle.iterdir()}
    assert export_main(["sign", str(board.bundle), "--key", str(board.key)]) == 2
    message = capsys.readouterr().err
    assert text in message and message.count("\n") == 1 and "PRIVATE" not in message
    assert {file.name: file.read_bytes() for file in board.bundle.iterdir()} == before


@pytest.mark.parametrize("version", ["0", "-3", str(1 << 63)])
def test_a_version_must_be_a_number_that_every_reader_has(board: Board, version: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_main(["sign", str(board.bundle), "--key", str(board.key), "--version", version]) == 2
    assert f"--version {version} is not between" in capsys.readouterr().err


def test_a_kill_between_manifest_and_signature_leaves_the_old_bundle(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes, digest = Path.write_bytes, board.open().digest

    def killed(path: Path, data: bytes) -> int:
        if path.name == SIGNATURE_NAME:
            raise KeyboardInterrupt
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        sign(board.bundle, board.key, 6)
    assert board.open().digest == digest


# --- hostile bytes ------------------------------------------------------------------------------------------------

# No subnormal numbers: ONNX Runtime, once loaded, has the processor take them for zero.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**400), 10**400) | st.floats(allow_subnormal=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
REFUSED = (BundleError, ConfigError, TensorMismatch)


def opens(bundle: Path) -> bool:
    """Whether `bundle` opens; anything but a typed error of one short line is a crash."""
    message = ""
    try:
        Bundle.open(bundle)
    except REFUSED as error:
        message = str(error)
    assert len(message) < 2000 and "\n" not in message
    return not message


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every field and element of parsed JSON is."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, child in children for found in paths_of(child, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@FUZZ
@given(data=st.data())
def test_any_field_of_a_manifest_may_hold_anything(shared_board: Board, data: st.DataObject) -> None:
    file = shared_board.bundle / MANIFEST_NAME
    original = file.read_bytes()
    manifest = json.loads(original)
    path = data.draw(st.sampled_from(paths_of(manifest)))
    try:
        file.write_text(json.dumps(replaced(manifest, path, data.draw(JSON))))
        opens(shared_board.bundle)
    finally:
        file.write_bytes(original)


@FUZZ
@given(noise=st.binary(max_size=64), at=st.integers(0, 1 << 14), cut=st.integers(0, 64))
def test_any_bytes_may_be_a_manifest(shared_board: Board, noise: bytes, at: int, cut: int) -> None:
    file = shared_board.bundle / MANIFEST_NAME
    original = file.read_bytes()
    try:
        file.write_bytes(original[: at % len(original)] + noise + original[at % len(original) + cut :])
        opens(shared_board.bundle)
        file.write_bytes(noise)
        assert not opens(shared_board.bundle)
    finally:
        file.write_bytes(original)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, '{"format": ' + "9" * 200_000 + "}", '{"format": NaN}', '{"format": 1e999}', "\ud800", ""]
)
def test_a_manifest_that_attacks_its_parser(shared_board: Board, text: str) -> None:
    file = shared_board.bundle / MANIFEST_NAME
    original = file.read_bytes()
    try:
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        assert not opens(shared_board.bundle)
    finally:
        file.write_bytes(original)


GIGANTIC = [
    ("trunk", "perceive_layers", 1 << 40),
    ("trunk", "present_layers", 1 << 20),
    ("trunk", "present_window", 1 << 50),
    ("trunk", "present_window", 1 << 20),
    ("trunk", "heads", 0),
    ("audio", "hop_samples", 0),
    ("voice", "hop_samples", -200),
    ("voice", "flow_width", 10**300),
    ("video", "height", 40 << 14),
]


@pytest.mark.parametrize(("section", "name", "value"), GIGANTIC)
def test_a_gigantic_size_is_refused_without_allocating(board: Board, section: str, name: str, value: int) -> None:
    def change(manifest: dict[str, Any]) -> None:
        list_extra(manifest)
        manifest["config"][section][name] = value
        if value == 1 << 20 and name == "present_window":  # the manifest is consistent, and the bound alone refuses it
            from device.tensors import tensor_table

            config = ModelConfig.from_dict(manifest["config"])
            manifest["tensors"] = [{"name": r.name, "dtype": r.dtype, "shape": list(r.shape)} for r in tensor_table(config)]

    def widen(manifest: dict[str, Any]) -> None:
        manifest["config"]["trunk"] |= {"width": 1 << 16}
        change(manifest)

    write_manifest(board.bundle, widen if value == 1 << 20 and name == "present_window" else change)
    tracemalloc.start()
    try:
        with pytest.raises((ConfigError, TensorMismatch)):
            Bundle.open(board.bundle)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_manifest_larger_than_any_is_not_read(board: Board) -> None:
    os.truncate(board.bundle / MANIFEST_NAME, 1 << 40)  # a hole: no disk is used
    with pytest.raises(NotABundle, match=f"larger than {MANIFEST_BYTES}"):
        Bundle.open(board.bundle)
    (board.bundle / MANIFEST_NAME).unlink()
    os.mkfifo(board.bundle / MANIFEST_NAME)
    with pytest.raises(NotABundle, match="not a regular file"):
        Bundle.open(board.bundle)
    (board.bundle / MANIFEST_NAME).unlink()
    (board.bundle / MANIFEST_NAME).symlink_to("/dev/zero")
    with pytest.raises(NotABundle, match="a link"):
        Bundle.open(board.bundle)


@pytest.mark.parametrize("change", [{"tools": None}, {"parity": {}}, {"parity": {"reference_ticks": 1, "relative_error": {"speech": "x"}}}])
def test_show_names_what_a_manifest_lacks(board: Board, change: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    proof = {"tools": {}, "parity": {"reference_ticks": 1, "relative_error": {"speech": 0.0}}}
    for values in (proof, proof | change):
        write_manifest(board.bundle, lambda manifest, values=values: (list_extra(manifest), manifest.update(values)))  # type: ignore[misc]
        assert export_main(["show", str(board.bundle)]) == (0 if values is proof else 2)
    message = capsys.readouterr().err
    assert "cannot be shown" in message and "export the bundle again" in message


def test_show_tells_who_signed(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(board.bundle, lambda m: (list_extra(m), m.update(tools={}, parity={"reference_ticks": 1, "relative_error": {}})))
    sign(board.bundle, board.key, 8)
    assert export_main(["show", str(board.bundle)]) == 0
    assert f"signed    by key {board.open().key} as version 8, not checked here" in capsys.readouterr().out


# --- hostile checkpoints ------------------------------------------------------------------------------------------


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "U8", "BOOL", "F8_E4M3", "I64", "C64", "X"]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 1 << 31, 1 << 62, 1 << 63]) | st.integers(-3, 1 << 65), max_size=4),
        "data_offsets": st.lists(st.sampled_from([0, 2, 4, 8, 16, 1 << 40]), min_size=2, max_size=2),
    }
)
METADATA = st.dictionaries(st.just("config") | st.text(max_size=4), st.text(max_size=20) | JSON.map(json.dumps), max_size=2)


def read_hostile(folder: Path, weights: bytes, reference: bytes) -> None:
    (folder / WEIGHTS_NAME).write_bytes(weights)
    (folder / REFERENCE_NAME).write_bytes(reference)
    with pytest.raises(CheckpointError):
        read_checkpoint(folder)


@FUZZ
@given(
    names=st.dictionaries(st.sampled_from(["norm.weight", "mic", "x"]) | st.text(max_size=4), TENSOR, max_size=3),
    metadata=METADATA,
    size=st.sampled_from([0, 2, 4, 8, 16]),
)
def test_any_safetensors_header_ends_in_the_one_error(tmp_path: Path, names: dict[str, Any], metadata: dict[str, str], size: int) -> None:
    read_hostile(tmp_path, safetensors(names | {"__metadata__": metadata}, bytes(size)), b"")


@FUZZ
@given(data=st.binary(max_size=64), length=st.sampled_from([0, 1, 8, 100, 1 << 20, 1 << 40, (1 << 64) - 1]))
def test_any_bytes_may_be_a_checkpoint(tmp_path: Path, data: bytes, length: int) -> None:
    read_hostile(tmp_path, data, b"")
    read_hostile(tmp_path, struct.pack("<Q", length) + data, b"")


@FUZZ
@given(data=st.data())
def test_any_field_of_a_configuration_may_hold_anything(data: st.DataObject) -> None:
    values = CONFIG.to_dict()
    path = data.draw(st.sampled_from(paths_of(values)))
    changed = replaced(values, path, data.draw(JSON | st.sampled_from([0, -1, 1, 2, 40, 1 << 19, 1 << 40])))
    try:
        config = ModelConfig.from_dict(changed)
    except ConfigError:
        return
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_types_that_numpy_lacks_and_scalars_are_named(repository: Path, tmp_path: Path) -> None:
    """Found by the fuzzers above: both ended in a traceback."""
    nano = repository / "export" / "checkpoints" / "companion-nano"
    bf16 = {"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
    with (nano / WEIGHTS_NAME).open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(length))["__metadata__"]
    read_hostile(tmp_path, safetensors(bf16 | {"__metadata__": metadata}, bytes(2)), b"")
    shutil.copy(nano / WEIGHTS_NAME, tmp_path)
    (tmp_path / REFERENCE_NAME).write_bytes(safetensors({"mic": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4)))
    with pytest.raises(CheckpointError, match="reference tensor"):
        read_checkpoint(tmp_path)


# --- hostile graphs -----------------------------------------------------------------------------------------------

FUZZ_GRAPHS = """
import resource, sys
import numpy as np
from pathlib import Path
sys.path.insert(0, "tests")
from test_loop import CONFIG, echo_graph
from device.engine import OnnxRuntimeEngine
from device.tensors import TensorMismatch

resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
file, rng = Path(sys.argv[1]), np.random.default_rng(0)
original = echo_graph(CONFIG).SerializeToString()
# The header of each protobuf message is where lengths, types and shapes are; the last bytes are those of the tensors' values.
refused = 0
for trial in range(int(sys.argv[2])):
    data = bytearray(original)
    for place in rng.integers(0, len(data), rng.integers(1, 4)):
        data[place] = rng.integers(0, 256)
    if trial % 4 == 0:
        del data[rng.integers(0, len(data)) :]
    file.write_bytes(data)
    try:
        OnnxRuntimeEngine(file, CONFIG)
    except TensorMismatch:
        refused += 1
# Not getrusage: its peak is inherited from the process that started this one.
peak_mb = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
print(refused, round(peak_mb))
"""


def test_a_changed_graph_ends_in_the_one_error(repository: Path, tmp_path: Path) -> None:
    """In a process of its own, so that a crash in native code is seen: flipped bytes and cut ends, as no bundle reader lets through."""
    command = [sys.executable, "-c", FUZZ_GRAPHS, str(tmp_path / GRAPH_NAME), "200"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    refused, peak_mb = map(int, result.stdout.splitlines()[-1].split())  # ONNX Runtime prints, too
    assert refused > 20 and peak_mb < 1000


def test_a_graph_that_asks_for_gigabytes_ends_in_the_one_error(tmp_path: Path) -> None:
    from onnx import helper, numpy_helper

    model = echo_graph(CONFIG)
    speech = next(node for node in model.graph.node if node.output[0] == "speech")
    model.graph.initializer.append(numpy_helper.from_array(np.array([1 << 40, 1 << 10]), "huge"))
    model.graph.node.extend(
        [
            helper.make_node("ConstantOfShape", ["huge"], ["gigantic"]),
            helper.make_node("ReduceSum", ["gigantic"], ["total"], keepdims=0),
            helper.make_node("Add", ["calm", "total"], ["speech"]),
        ]
    )
    speech.output[0] = "calm"
    (tmp_path / GRAPH_NAME).write_bytes(model.SerializeToString())
    with pytest.raises(TensorMismatch):
        OnnxRuntimeEngine(tmp_path / GRAPH_NAME, CONFIG)
