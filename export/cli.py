"""`copresence-export`: what is done on a workstation, one subcommand per step."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from device.bundle import BundleError, copresence_version
from device.calibration import CalibrationError
from device.config import ConfigError
from device.engine import EngineError
from device.errors import complain
from device.field.settings import SETTINGS_FILE, Settings, SettingsError
from device.reach.endpoint import KEY_VARIABLE, read_key
from device.reach.limits import ReachError
from device.signature import KeyFileError, VersionMemoryError
from device.tensors import TensorMismatch
from export.errors import ExportError
from export.quantize import PRECISIONS

# Anything else is a defect and keeps its traceback.
USER_ERRORS = (
    ExportError,
    BundleError,
    CalibrationError,
    KeyFileError,
    VersionMemoryError,
    SettingsError,
    ConfigError,
    EngineError,
    TensorMismatch,
    ReachError,
    OSError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0 when it did what was asked, 2 with one line on stderr when the input does not allow it."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except USER_ERRORS as error:
        complain(f"copresence-export {arguments.command}: {error}")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="copresence-export", description="Checkpoints to bundles, and what belongs to it.")
    parser.add_argument("--version", action="version", version=f"copresence-export {copresence_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="checkpoint to bundle: graph, vocabulary and manifest, proven against the reference ticks")
    build.add_argument("checkpoint", type=Path, help="folder with model.safetensors and reference.safetensors")
    build.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="BUNDLE",
        help="folder to write; an older bundle there is replaced when the new one is whole",
    )
    build.set_defaults(run=_build)

    compile_ = commands.add_parser("compile", help="bundle to TensorRT engine, on the board that will run it; compared with ONNX Runtime")
    compile_.add_argument("bundle", type=Path)
    compile_.add_argument("--target", required=True, metavar="NAME", help="board, as in export/targets.toml")
    compile_.add_argument("--out", type=Path, metavar="FOLDER", help="default: BUNDLE.NAME.engine; an older engine there stays until then")
    compile_.set_defaults(run=_compile)

    prepare = commands.add_parser(
        "prepare", help="on a board, before the companion starts: build its engine, or check the one that is there"
    )
    prepare.add_argument("--config", type=Path, default=SETTINGS_FILE, metavar="FILE", help=f"default: {SETTINGS_FILE}")
    prepare.set_defaults(run=_prepare)

    show = commands.add_parser("show", help="print a bundle readably, after checking it")
    show.add_argument("bundle", type=Path)
    show.set_defaults(run=_show)

    keygen = commands.add_parser("keygen", help="make a pair of keys: the private one signs bundles, boards trust the public one")
    keygen.add_argument("--out", type=Path, required=True, metavar="NAME.key", help="private key to write; NAME.pub is written beside it")
    keygen.set_defaults(run=_keygen)

    sign = commands.add_parser("sign", help="sign a bundle or a compiled engine, so that boards which trust the key run it")
    sign.add_argument("bundle", type=Path)
    sign.add_argument("--key", type=Path, required=True, metavar="NAME.key", help="private key that `keygen` wrote")
    sign.add_argument(
        "--version", type=int, metavar="N", help="of this release; a board refuses a lower one than its last (default: seconds since 1970)"
    )
    sign.set_defaults(run=_sign)

    wheelhouse = commands.add_parser("wheelhouse", help="collect the wheels that a board installs ('make wheelhouse')")
    wheelhouse.add_argument("--target", required=True, metavar="NAME", help="one of device/flash/targets.toml")
    wheelhouse.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    wheelhouse.set_defaults(run=_wheelhouse)

    release = commands.add_parser("release", help="wheels, bundle and firmware to a signed release, which 'make flash' brings to boards")
    release.add_argument("--target", metavar="NAME", help="one of device/flash/targets.toml")
    release.add_argument("--board", metavar="MACHINE,SOC,PYTHON", help="instead of --target: what the board says it is")
    release.add_argument("--bundle", type=Path, required=True)
    release.add_argument("--firmware", type=Path, metavar="FOLDER", help="what 'make firmware' built (default: none)")
    release.add_argument("--key", type=Path, required=True, help="private key of 'keygen'; signs the bundle too, if it has not yet")
    release.add_argument("--wheels", type=Path, required=True, metavar="FOLDER", help="wheels are collected in FOLDER/TARGET")
    release.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the release goes to FOLDER/TARGET/VERSION-HASH")
    release.set_defaults(run=_release)

    features = commands.add_parser("features", help="dMel levels of a sound file, u8[frames, 80]")
    features.add_argument("sound", type=Path, metavar="IN.wav", help="any rate and channels")
    features.add_argument("--out", type=Path, required=True, metavar="LEVELS.npy")
    features.add_argument("--checkpoint", type=Path, help="take the level range of this checkpoint instead of the published [-7, 2]")
    features.set_defaults(run=_features)

    record = commands.add_parser("record", help="add scenes with people of the training split to a calibration data set")
    record.add_argument("bundle", type=Path, help="a float bundle, which plays them")
    record.add_argument("--data", type=Path, required=True, help="corpus folder")
    record.add_argument("--scenes", type=int, default=16, help="of 19.2 s (default 16)")
    record.add_argument("--seed", type=int, default=0)
    record.add_argument("--out", type=Path, required=True, metavar="DIR", help="as 'copresence run --record-calibration DIR' writes it")
    record.set_defaults(run=_record)

    quantize = commands.add_parser("quantize", help="float bundle to quantized bundle, calibrated on recorded ticks")
    quantize.add_argument("bundle", type=Path, help="a float bundle made by 'build'")
    quantize.add_argument("--precision", choices=PRECISIONS, default="int8", help="int8: weights, and most of what they multiply (default)")
    quantize.add_argument(
        "--calibration", type=Path, required=True, metavar="DIR", help="data set made by 'copresence run --record-calibration DIR'"
    )
    quantize.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="folder to write")
    quantize.add_argument(
        "--method",
        choices=("auto", "max", "percentile", "entropy"),
        default="auto",
        help="of finding ranges; auto: for each tensor the one that loses least",
    )
    quantize.add_argument("--sensitivity", type=Path, metavar="FOLDER", help="scan layer by layer; table and picture go there")
    quantize.add_argument(
        "--budget",
        type=float,
        metavar="SHARE",
        help="keep the dearest layers in FP16 until the error is below this share of what the gates allow",
    )
    quantize.set_defaults(run=_quantize)

    verify = commands.add_parser(
        "verify", help="prove that a quantized bundle behaves like its float bundle; the proof goes into its manifest"
    )
    verify.add_argument("bundle", type=Path, help="a bundle made by 'quantize'")
    verify.add_argument("--against", type=Path, required=True, metavar="BUNDLE", help="the float bundle it was made from")
    verify.add_argument("--data", type=Path, required=True, help="corpus folder")
    verify.add_argument("--split", choices=("dev", "test"), default="test")
    verify.add_argument("--scenes", type=int, default=25, help="in closed loop, at least so many that ask for each behaviour (default 25)")
    verify.add_argument("--ticks", type=int, default=3000, help="of the long run, for speech and memory (default 3000)")
    verify.add_argument("--seed", type=int, default=0)
    verify.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    verify.set_defaults(run=_verify)

    report = commands.add_parser("report", help="one HTML page: what a bundle was made from, the proof, precisions, calibration and cost")
    report.add_argument("bundle", type=Path)
    report.add_argument("--engine", type=Path, metavar="FOLDER", help="made of this bundle by 'compile': its layers and its measured time")
    report.add_argument("--out", type=Path, metavar="PAGE.html", help="default: BUNDLE.html; an older page there stays until then")
    report.set_defaults(run=_report)

    train = commands.add_parser("train", help="train by a recipe on a corpus (needs the extra 'distill'); resumes where it left off")
    train.set_defaults(run=_train)
    distill = commands.add_parser("distill", help="the same with a teacher, whose probabilities are half of what is learned")
    distill.add_argument(
        "--teacher", type=Path, metavar="CHECKPOINT", help="checkpoint folder that `train` wrote (default: the recipe's own, trained first)"
    )
    distill.set_defaults(run=_distill)
    for command in (train, distill):
        command.add_argument("recipe", type=Path, help="JSON file, such as export/recipes/companion-nano.json")
        command.add_argument("--data", type=Path, help="corpus folder with words/, other_words/, noise/ and signs/")
        command.add_argument("--scenes", metavar="PATTERN", help="shards with scenes to take instead of made ones, such as 'scenes/*.tar'")
        command.add_argument(
            "--start", type=Path, metavar="CHECKPOINT", help="go on from its weights and voice; the recipe may have more present layers"
        )
        command.add_argument("--work", type=Path, required=True, help="folder for progress.csv and the state to resume from")
        command.add_argument("--out", type=Path, required=True, metavar="CHECKPOINT", help="checkpoint folder to write at the end")

    scenes = commands.add_parser("scenes", help="make training scenes as WebDataset shards (export/distill/SCENES.md)")
    scenes.add_argument("recipe", type=Path, help="whose model and length of scenes they are for")
    scenes.add_argument("--data", type=Path, required=True, help="corpus folder")
    scenes.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="shards that are there already are kept")
    scenes.add_argument("--count", type=int, default=1000)
    scenes.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    scenes.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    scenes.set_defaults(run=_scenes)

    evaluate = commands.add_parser("evaluate", help="the scoreboard: closed loop, with people of the corpus that training never met")
    evaluate.add_argument("bundle", type=Path)
    evaluate.add_argument("--data", type=Path, required=True, help="corpus folder")
    evaluate.add_argument("--split", choices=("dev", "test"), default="test", help="dev is for choosing, test for reporting")
    evaluate.add_argument("--scenes", type=int, default=50, help="at least so many that ask for each behaviour (default 50)")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument(
        "--systems", nargs="+", metavar="NAME", help="default: presence telephone walkie-talkie; oracle: what the scenes want"
    )
    evaluate.add_argument("--ablations", action="store_true", help="also without video, own voice, clock, text, or one of the two frames")
    evaluate.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    evaluate.add_argument("--out", type=Path, metavar="FOLDER", help="for scoreboard.json, scoreboard.md and three.png")
    evaluate.set_defaults(run=_evaluate)

    teacher = commands.add_parser(
        "serve-teacher",
        help="a background model for 'copresence run --think': reads a hand again with more compute (needs the extra 'distill')",
    )
    teacher.add_argument("checkpoint", type=Path, help="checkpoint folder that `train` wrote")
    teacher.add_argument("--port", type=int, default=8009, help="of this machine's own address, 127.0.0.1 (default: 8009)")
    teacher.add_argument(
        "--key-file", type=Path, metavar="FILE", help=f"who asks must know the key in it (default: ${KEY_VARIABLE}, or no key)"
    )
    teacher.set_defaults(run=_serve_teacher)

    rethink = commands.add_parser(
        "rethink", help="how often a teacher puts right what a student misread: shows hands, says 'no', and counts"
    )
    rethink.add_argument("bundle", type=Path, help="the student")
    rethink.add_argument("--teacher", type=Path, required=True, metavar="CHECKPOINT", help="as `serve-teacher` serves it")
    rethink.add_argument("--data", type=Path, required=True, help="corpus folder")
    rethink.add_argument("--split", choices=("dev", "test"), default="test")
    rethink.add_argument("--pictures", type=int, metavar="N", help="only the first so many photographs")
    rethink.add_argument("--rooms", type=int, default=3, metavar="N", help="that each of them is shown in (default: 3)")
    rethink.set_defaults(run=_rethink)
    echo = commands.add_parser("echo", help="how often it reacts to itself in rooms that return its speech; with a canceller too")
    echo.add_argument("bundle", type=Path)
    echo.add_argument("--data", type=Path, required=True, help="corpus folder")
    echo.add_argument("--split", choices=("dev", "test"), default="test")
    echo.add_argument("--scenes", type=int, default=40, help="of 19.2 s, each in a room of its own (default 40)")
    echo.add_argument("--seed", type=int, default=0)
    echo.add_argument("--out", type=Path, metavar="FOLDER", help="for echo.json and echo.md")
    echo.set_defaults(run=_echo)

    scene = commands.add_parser("scene", help="make the demonstration's scene: synthetic voices and drawn hands")
    scene.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    scene.set_defaults(run=_scene)

    timeline = commands.add_parser("timeline", help="tell what became of a demonstration and draw it on one time axis")
    timeline.add_argument("folder", type=Path, help="folder with the scene, out.wav and events.jsonl")
    timeline.set_defaults(run=_timeline)

    plan = commands.add_parser("plan", help="what a model would cost on each board, before anything is trained or built")
    plan.add_argument("model", type=Path, help="checkpoint folder, recipe or configuration (JSON)")
    what = plan.add_mutually_exclusive_group(required=True)
    what.add_argument("--target", metavar="NAME", help="a board of export/targets.toml, or all")
    what.add_argument(
        "--validate", action="store_true", help="measure ticks of six sizes on this machine instead, beside their predictions"
    )
    plan.add_argument("--precision", help="only this one (default: all that the board runs)")
    plan.add_argument("--out", type=Path, metavar="PICTURE", help="also draw it (.png, .svg, .pdf)")
    plan.add_argument("--json", action="store_true", help="print JSON instead of the table")
    plan.set_defaults(run=_plan)

    bench = commands.add_parser("bench", help="print the table of engine, loop, start-up, memory and timer figures")
    bench.add_argument("bundle", type=Path)
    bench.add_argument("--repeats", type=int, default=5)
    bench.add_argument("--firmware", type=Path, metavar="ELF", help="let it move a body: this firmware, in QEMU ('make firmware')")
    bench.set_defaults(run=_bench)
    return parser


# Each command imports what it needs: `show` must not wait for matplotlib, nor `build` need torch.


def _build(a: argparse.Namespace) -> None:
    from export.build import build

    parity = build(a.checkpoint, a.out)
    print(f"{a.out}: built; largest relative error against the reference: " + ", ".join(f"{n} {e:.1e}" for n, e in parity.items()))


def _compile(a: argparse.Namespace) -> None:
    from export.compile import compile_engine

    engine = compile_engine(a.bundle, a.target, a.out)
    print(f"\n{engine}: compiled; run it with: copresence run --bundle {a.bundle} --engine {engine}")


def _prepare(a: argparse.Namespace) -> None:
    from export.prepare import prepare

    prepare(Settings.read(a.config), lambda text: print(text, flush=True))


def _show(a: argparse.Namespace) -> None:
    from device.bundle import Bundle
    from export.build import show

    print(show(Bundle.open(a.bundle, unproven=True)))


def _record(a: argparse.Namespace) -> None:
    from export.quantize.scenes import record_scenes

    print(f"{a.out}: {record_scenes(a.bundle, a.data, a.scenes, a.seed, a.out)} ticks added")


def _quantize(a: argparse.Namespace) -> None:
    from export.quantize.quantize import quantize

    difference = quantize(a.bundle, a.out, a.precision, a.calibration, a.method, a.sensitivity, a.budget)
    print(f"{a.out}: quantized; on calibration ticks {difference.row()}; prove it with 'copresence-export verify'")


def _verify(a: argparse.Namespace) -> None:
    from export.quantize.verify import table, verify

    print(table(verify(a.bundle, a.against, a.data, a.split, a.scenes, a.ticks, a.seed, a.jobs)))


def _report(a: argparse.Namespace) -> None:
    from export.report.report import report

    print(f"{report(a.bundle, a.out, a.engine)}: written; open it in any browser")


def _keygen(a: argparse.Namespace) -> None:
    from export.sign import keygen

    public, key = keygen(a.out)
    print(f"{a.out}: private key, keep it secret and safe; {public}: public key {key}, put it into /etc/copresence/keys of every board")


def _sign(a: argparse.Namespace) -> None:
    from device.engine.record import RECORD_NAME
    from export.sign import sign, sign_engine

    if (a.bundle / RECORD_NAME).is_file():
        print(f"{a.bundle}: engine signed by key {sign_engine(a.bundle, a.key)}")
        return
    version, key = sign(a.bundle, a.key, a.version)
    print(f"{a.bundle}: signed by key {key} as version {version}")


def _wheelhouse(a: argparse.Namespace) -> None:
    from export.release import find_flash_target, wheelhouse

    count = wheelhouse(find_flash_target(a.target), a.out)
    print(f"{a.out}: {count} files for {a.target}")


def _release(a: argparse.Namespace) -> None:
    from export.release import ReleaseError, find_flash_target, make_release, target_of, wheelhouse

    if (a.target is None) == (a.board is None) or (a.board and a.board.count(",") != 2):
        raise ReleaseError("give either --target NAME or --board MACHINE,SOC,PYTHON")
    target = find_flash_target(a.target) if a.target else target_of(*a.board.split(","))
    wheels = a.wheels / target.name
    wheelhouse(target, wheels)
    print(make_release(target, wheels, a.bundle, a.firmware, a.key, a.out))


def _features(a: argparse.Namespace) -> None:
    import numpy as np

    from export.checkpoint import read_config
    from export.features import FrontEnd, read_audio

    front_end = FrontEnd(read_config(a.checkpoint).audio if a.checkpoint else None)
    levels = front_end.levels(read_audio(a.sound, front_end.config.audio.sample_rate_hz))
    with a.out.open("wb") as file:
        np.save(file, levels)
    print(f"{a.out}: u8{list(levels.shape)}, levels {levels.min(initial=255)} to {levels.max(initial=0)}")


def _train(a: argparse.Namespace) -> None:
    from export.distill.finish import train_checkpoint
    from export.distill.train import Source

    train_checkpoint(a.recipe, Source(a.data, a.scenes, a.start), a.work, a.out)


def _distill(a: argparse.Namespace) -> None:
    from export.distill.finish import distill_checkpoint
    from export.distill.train import Source

    distill_checkpoint(a.recipe, Source(a.data, a.scenes, a.start), a.work, a.out, a.teacher)


def _scenes(a: argparse.Namespace) -> None:
    from tqdm import tqdm

    from export.distill.recipe import Recipe
    from export.distill.shards import write_scenes

    with tqdm(unit="shard") as bar:

        def progress(done: int, of: int) -> None:
            bar.total, bar.n = of, done
            bar.refresh()

        shards = write_scenes(a.out, a.data, Recipe.read(a.recipe), a.count, a.seed, a.jobs, progress)
    print(f"{a.out}: {a.count} scenes in {len(shards)} shards")


def _evaluate(a: argparse.Namespace) -> None:
    from export.scoreboard.board import SYSTEMS
    from export.scoreboard.evaluate import evaluate
    from export.scoreboard.systems import ABLATIONS

    names = [*(a.systems or SYSTEMS), *(ABLATIONS if a.ablations else ())]
    print(evaluate(a.bundle, a.data, a.split, a.scenes, a.seed, names, a.jobs, a.out))


def _serve_teacher(a: argparse.Namespace) -> None:
    from export.distill.rereading import Rereader
    from export.serve_teacher import Teacher, TeacherServer, serve

    key, reader = read_key(a.key_file), Rereader.read(a.checkpoint)
    video = reader.config.video
    serve(TeacherServer(Teacher(reader, (video.height, video.width)), a.checkpoint.resolve().name, a.port, key), print)


def _rethink(a: argparse.Namespace) -> None:
    from export.distill.rereading import Rereader
    from export.rethink import rethink

    reader = Rereader.read(a.teacher)
    print(rethink(a.bundle, reader, a.data, a.split, a.pictures, a.rooms, lambda line: print(line, file=sys.stderr, flush=True)))


def _echo(a: argparse.Namespace) -> None:
    from export.scoreboard.board import Progress
    from export.scoreboard.echo import measure

    print(measure(a.bundle, a.data, a.split, a.scenes, a.seed, a.out, Progress()))


def _scene(a: argparse.Namespace) -> None:
    from export.demo import make_scene

    cues = make_scene(a.out)
    print(f"{a.out}: a scene of {len(cues)} cues")


def _timeline(a: argparse.Namespace) -> None:
    from export.demo import draw_timeline, report

    draw_timeline(a.folder)
    print(report(a.folder))


def _plan(a: argparse.Namespace) -> None:
    from export.plan import PlanError, draw, make_plan, read_model

    if a.validate:
        if a.precision or a.out or a.json:
            raise PlanError("--validate prints its own table of this machine in float32; leave out --precision, --out and --json")
        from export.validate import validate

        print(validate(read_model(a.model)[1]))
        return
    plan = make_plan(a.model, a.target, a.precision)
    print(plan.to_json() if a.json else plan)
    if a.out:
        draw(plan, a.out)


def _bench(a: argparse.Namespace) -> None:
    from export.bench import run_bench

    run_bench(a.bundle, a.repeats, a.firmware)


if __name__ == "__main__":
    sys.exit(main())
