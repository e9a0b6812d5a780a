"""Checkpoint to bundle: what is built, and that nothing unfit gets through or destroys what was there."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from ticks import SMALL, make_model

from device.bundle import GRAPH_NAME, MANIFEST_NAME, Bundle
from export import replacing
from export.build import PARITY_LIMIT
from export.checkpoint import REFERENCE_NAME, WEIGHTS_NAME, read_checkpoint, write_checkpoint
from export.cli import main
from export.distill.finish import reference_ticks


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, model = tmp_path_factory.mktemp("checkpoint") / "tiny", make_model(SMALL)
    write_checkpoint(path, SMALL, {name: value.numpy() for name, value in model.state_dict().items()}, reference_ticks(model))
    return path


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def build(checkpoint: Path, out: Path) -> int:
    return main(["build", str(checkpoint), "--out", str(out)])


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="numpy") as f:
        return dict(f.metadata() or {})


def rewrite(file: Path, change: dict[str, np.ndarray | None], config: dict[str, object] | None = None) -> None:
    """Replace (or, with None, remove) tensors, and keys of the configuration."""
    tensors, metadata = load_file(file), metadata_of(file)
    for name, value in change.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    if config is not None:
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | config)
    save_file(tensors, file, metadata=metadata)


def test_a_bundle_carries_its_proof(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    assert build(checkpoint, out) == 0
    bundle = Bundle.open(out)
    assert bundle.config == SMALL
    assert set(bundle.manifest["files"]) == {p.name for p in out.iterdir()} - {MANIFEST_NAME}
    parity = bundle.manifest["parity"]
    assert parity["reference_ticks"] == 12
    assert set(parity["relative_error"]) == {"speech", "say", "act", "say_prob", "act_prob"}
    assert 0 < parity["relative_error"]["speech"] <= PARITY_LIMIT
    assert {"copresence", "onnx", "onnxruntime", "numpy", "python"} <= set(bundle.manifest["tools"])
    assert (bundle.manifest["format"], bundle.manifest["tick_ms"]) == (1, 200)
    capsys.readouterr()
    assert main(["show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("200 ms", "look_up", "present_valid", "sha256", "12 reference ticks", GRAPH_NAME))


def test_no_torch_is_needed(checkpoint: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\nfrom export.cli import main\nsys.exit(main(['build', sys.argv[1], '--out', sys.argv[2]]))"
    )
    subprocess.run([sys.executable, "-c", program, str(checkpoint), str(tmp_path / "bundle")], check=True, cwd=Path(__file__).parents[1])


def test_building_twice_gives_the_same_graph(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert build(checkpoint, tmp_path / name) == 0
    assert (tmp_path / "one" / GRAPH_NAME).read_bytes() == (tmp_path / "two" / GRAPH_NAME).read_bytes()


def corrupt_nothing_there(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)


def corrupt_truncated(checkpoint: Path) -> None:
    data = (checkpoint / WEIGHTS_NAME).read_bytes()
    (checkpoint / WEIGHTS_NAME).write_bytes(data[: len(data) // 2])


def corrupt_garbage(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS_NAME).write_bytes(b"\xff" * 64)


def corrupt_missing(checkpoint: Path) -> None:
    rewrite(checkpoint / WEIGHTS_NAME, {"norm.weight": None})


def corrupt_extra(checkpoint: Path) -> None:
    rewrite(checkpoint / WEIGHTS_NAME, {"surplus.weight": np.zeros(3, np.float32)})


def corrupt_shape(checkpoint: Path) -> None:
    rewrite(checkpoint / WEIGHTS_NAME, {"say.weight": np.zeros((2, 32), np.float32)})


def corrupt_dtype(checkpoint: Path) -> None:
    rewrite(checkpoint / WEIGHTS_NAME, {"norm.weight": np.ones(32, np.int64)})


def corrupt_nan(checkpoint: Path) -> None:
    rewrite(checkpoint / WEIGHTS_NAME, {"norm.weight": np.full(32, np.nan, np.float32)})


def corrupt_config_key(checkpoint: Path) -> None:
    rewrite(checkpoint / WEIGHTS_NAME, {}, {"tick_mss": 200})


def corrupt_config_value(checkpoint: Path) -> None:
    rewrite(checkpoint / WEIGHTS_NAME, {}, {"tick_ms": 190})


def corrupt_bands(checkpoint: Path) -> None:
    rewrite(checkpoint / WEIGHTS_NAME, {}, {"voice": SMALL.to_dict()["voice"] | {"vocoder_bands": 32}})


def corrupt_rate(checkpoint: Path) -> None:
    rewrite(checkpoint / WEIGHTS_NAME, {}, {"audio": SMALL.to_dict()["audio"] | {"sample_rate_hz": 24000}})


def corrupt_window(checkpoint: Path) -> None:
    rewrite(checkpoint / WEIGHTS_NAME, {}, {"audio": SMALL.to_dict()["audio"] | {"hop_samples": 640, "window_samples": 1280}})


def corrupt_no_config(checkpoint: Path) -> None:
    save_file(load_file(checkpoint / WEIGHTS_NAME), checkpoint / WEIGHTS_NAME)


def corrupt_no_reference(checkpoint: Path) -> None:
    (checkpoint / REFERENCE_NAME).unlink()


def corrupt_reference_shape(checkpoint: Path) -> None:
    rewrite(checkpoint / REFERENCE_NAME, {"mic": np.zeros((12, 7), np.float32)})


def corrupt_other_weights(checkpoint: Path) -> None:
    weights = load_file(checkpoint / WEIGHTS_NAME)
    rewrite(checkpoint / WEIGHTS_NAME, {"norm.weight": weights["norm.weight"] * 1.5})


@pytest.mark.parametrize(
    ("corrupt", "named"),
    [
        (corrupt_nothing_there, "no such checkpoint"),
        (corrupt_truncated, "model.safetensors: not a whole safetensors file"),
        (corrupt_garbage, "model.safetensors: not a whole safetensors file"),
        (corrupt_missing, "weight 'norm.weight' of shape (32,) is missing"),
        (corrupt_extra, "weight 'surplus.weight' is none of this model's"),
        (corrupt_shape, "weight 'say.weight' has shape (2, 32), its configuration says (5, 32)"),
        (corrupt_dtype, "weight 'norm.weight' is int64"),
        (corrupt_nan, "weight 'norm.weight' holds NaN"),
        (corrupt_config_key, "unknown config key 'tick_mss'"),
        (corrupt_config_value, "config field 'audio.hop_samples'"),
        (corrupt_bands, "config field 'voice.vocoder_bands' is 32 and must be 64"),
        (corrupt_rate, "config field 'audio.sample_rate_hz' is 24000 and must be 16000"),
        (corrupt_window, "config field 'audio.window_samples'"),
        (corrupt_no_config, "no 'config'"),
        (corrupt_no_reference, "reference.safetensors: no such file"),
        (corrupt_reference_shape, "reference tensor 'mic'"),
        (corrupt_other_weights, "differs from the reference ticks"),
    ],
)
def test_an_unfit_checkpoint_is_refused_and_loses_nothing(
    corrupt: object, named: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert build(checkpoint, out) == 0
    before = Bundle.open(out).digest
    corrupt(checkpoint)  # type: ignore[operator]
    capsys.readouterr()
    assert build(checkpoint, out) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert Bundle.open(out).digest == before
    assert sorted(p.name for p in tmp_path.iterdir() if p != checkpoint) == ["bundle"]  # no scratch folders


def test_a_bundle_is_replaced_in_one_step(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "bundle"
    assert build(checkpoint, out) == 0
    inode, seen = out.stat().st_ino, []
    exchange = replacing._exchange

    def watched(new: Path, old: Path) -> None:
        seen.append(Bundle.open(old).digest)  # whole until the very step
        exchange(new, old)
        seen.append(Bundle.open(old).digest)  # and at once after it

    monkeypatch.setattr(replacing, "_exchange", watched)
    assert build(checkpoint, out) == 0
    assert len(seen) == 2 and out.stat().st_ino != inode
    assert sorted(os.listdir(tmp_path)) == ["bundle", "tiny"]


def test_what_is_no_bundle_is_not_overwritten(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1").write_text("years of work")
    assert build(checkpoint, out) == 2
    assert "is not a bundle" in capsys.readouterr().err
    assert (out / "chapter1").read_text() == "years of work"


def test_a_full_disk_leaves_the_old_bundle(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    assert build(checkpoint, out) == 0
    before = Bundle.open(out).digest

    def small_files_only() -> None:  # a disk that takes 64 KiB of a file: what a full one does, for every user
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))

    result = subprocess.run(
        [sys.executable, "-m", "export.cli", "build", str(checkpoint), "--out", str(out)],
        capture_output=True,
        text=True,
        preexec_fn=small_files_only,
        cwd=Path(__file__).parents[1],
    )
    assert result.returncode == 2
    assert "free space" in result.stderr and "Traceback" not in result.stderr
    assert Bundle.open(out).digest == before
    assert sorted(os.listdir(tmp_path)) == ["bundle", "tiny"]


def damage_newer(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    (bundle / MANIFEST_NAME).write_text(json.dumps(manifest | {"format": 99}))


def damage_graph(bundle: Path) -> None:
    data = bytearray((bundle / GRAPH_NAME).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / GRAPH_NAME).write_bytes(data)


def damage_tensors(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    next(t for t in manifest["tensors"] if t["name"] == "mic")["shape"] = [4001]
    (bundle / MANIFEST_NAME).write_text(json.dumps(manifest))


def damage_no_manifest(bundle: Path) -> None:
    (bundle / MANIFEST_NAME).unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (damage_newer, ["format 99", "update"]),
        (damage_graph, [GRAPH_NAME, "export"]),
        (damage_tensors, ["mic", "4001", "4000"]),
        (damage_no_manifest, ["not a bundle"]),
        (shutil.rmtree, ["bundle"]),
    ],
)
def test_a_damaged_bundle_is_refused(
    damage: object, named: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    assert build(checkpoint, bundle) == 0
    damage(bundle)  # type: ignore[operator]
    capsys.readouterr()
    assert main(["show", str(bundle)]) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in named) and error.count("\n") == 1


def test_the_shipped_checkpoint_is_whole(repository: Path) -> None:
    checkpoint = read_checkpoint(repository / "export" / "checkpoints" / "companion-nano")
    assert checkpoint.config.tick_ms == 200
    assert sum(value.size for value in checkpoint.weights.values()) <= 10e6
