"""`copresence-export`: what is done on a workstation, one subcommand per step."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from device.bundle import BundleError, copresence_version
from device.config import ConfigError
from device.engine import EngineError
from device.tensors import TensorMismatch
from export.errors import ExportError

# Anything else is a defect and keeps its traceback.
USER_ERRORS = (ExportError, BundleError, ConfigError, EngineError, TensorMismatch, OSError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0 when it did what was asked, 2 with one line on stderr when the input does not allow it."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except USER_ERRORS as error:
        print(f"copresence-export {arguments.command}: {error}", file=sys.stderr)
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

    show = commands.add_parser("show", help="print a bundle readably, after checking it")
    show.add_argument("bundle", type=Path)
    show.set_defaults(run=_show)

    features = commands.add_parser("features", help="dMel levels of a sound file, u8[frames, 80]")
    features.add_argument("sound", type=Path, metavar="IN.wav", help="any rate and channels")
    features.add_argument("--out", type=Path, required=True, metavar="LEVELS.npy")
    features.add_argument("--checkpoint", type=Path, help="take the level range of this checkpoint instead of the published [-7, 2]")
    features.set_defaults(run=_features)

    train = commands.add_parser("train", help="train by a recipe on a corpus (needs the extra 'distill'); resumes where it left off")
    distill = commands.add_parser("distill", help="the same with a teacher, whose probabilities are half of what is learned")
    distill.add_argument("--teacher", type=Path, required=True, metavar="CHECKPOINT", help="checkpoint folder that `train` wrote")
    for command in (train, distill):
        command.add_argument("recipe", type=Path, help="JSON file, such as export/recipes/companion-nano.json")
        command.add_argument("--data", type=Path, help="corpus folder with words/, other_words/, noise/ and signs/")
        command.add_argument("--scenes", metavar="PATTERN", help="shards with scenes to take instead of made ones, such as 'scenes/*.tar'")
        command.add_argument("--start", type=Path, metavar="CHECKPOINT", help="go on from its weights; for a recipe of the same model")
        command.add_argument("--work", type=Path, required=True, help="folder for progress.csv and the state to resume from")
        command.add_argument("--out", type=Path, required=True, metavar="CHECKPOINT", help="checkpoint folder to write at the end")
        command.set_defaults(run=_train, teacher=None)

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
    evaluate.add_argument("--systems", nargs="+", metavar="NAME", help="default: presence telephone walkie-talkie")
    evaluate.add_argument("--ablations", action="store_true", help="also without video, own voice, clock, text, or one of the two frames")
    evaluate.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    evaluate.add_argument("--out", type=Path, metavar="FOLDER", help="for scoreboard.json, scoreboard.md and three.png")
    evaluate.set_defaults(run=_evaluate)

    scene = commands.add_parser("scene", help="make the demonstration's scene: synthetic voices and drawn hands")
    scene.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    scene.set_defaults(run=_scene)

    timeline = commands.add_parser("timeline", help="tell what became of a demonstration and draw it on one time axis")
    timeline.add_argument("folder", type=Path, help="folder with the scene, out.wav and events.jsonl")
    timeline.set_defaults(run=_timeline)

    bench = commands.add_parser("bench", help="print the table of engine, loop, start-up, memory and timer figures")
    bench.add_argument("bundle", type=Path)
    bench.add_argument("--repeats", type=int, default=5)
    bench.set_defaults(run=_bench)
    return parser


# Each command imports what it needs: `show` must not wait for matplotlib, nor `build` need torch.


def _build(a: argparse.Namespace) -> None:
    from export.build import build

    parity = build(a.checkpoint, a.out)
    print(f"{a.out}: built; largest relative error against the reference: " + ", ".join(f"{n} {e:.1e}" for n, e in parity.items()))


def _compile(a: argparse.Namespace) -> None:
    from export.compile import compile_engine

    print(f"\n{compile_engine(a.bundle, a.target, a.out)}: compiled; run it with: copresence run --bundle {a.bundle} --engine DIR")


def _show(a: argparse.Namespace) -> None:
    from device.bundle import Bundle
    from export.build import show

    print(show(Bundle.open(a.bundle)))


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

    train_checkpoint(a.recipe, Source(a.data, a.scenes, a.start), a.work, a.out, a.teacher)


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


def _scene(a: argparse.Namespace) -> None:
    from export.demo import make_scene

    cues = make_scene(a.out)
    print(f"{a.out}: a scene of {len(cues)} cues")


def _timeline(a: argparse.Namespace) -> None:
    from export.demo import draw_timeline, report

    draw_timeline(a.folder)
    print(report(a.folder))


def _bench(a: argparse.Namespace) -> None:
    from export.bench import run_bench

    run_bench(a.bundle, a.repeats)


if __name__ == "__main__":
    sys.exit(main())
