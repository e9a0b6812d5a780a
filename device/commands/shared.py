"""What commands that run a bundle have in common."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from device.bundle import Bundle, copresence_version
from device.config import ModelConfig
from device.loop import NoThinker, Thinker
from device.reach.endpoint import KEY_VARIABLE, Endpoint, read_key
from device.signature import KEYS_FOLDER, KEYS_VARIABLE, STATE_FOLDER, STATE_VARIABLE

BUNDLE_HELP = "a bundle made by 'copresence-export build'"
WRITE_ERROR = 1  # exit status of a run whose files are incomplete


class UsageError(ValueError):
    """Arguments that do not go together; the text says what to give instead."""


def add_shared(parser: argparse.ArgumentParser) -> None:
    """What every command takes that runs a bundle."""
    parser.add_argument(
        "--engine", type=Path, metavar="DIR", help="run this TensorRT engine, made by 'copresence-export compile' (default: ONNX Runtime)"
    )
    parser.add_argument("--no-priority", action="store_true", help="ask the kernel for no real-time priority, CPU or locked memory")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of the noise that the voice is made from (default: 0)")
    parser.add_argument(
        "--keys",
        metavar="FOLDER",
        help=f"public keys; with one there, only bundles signed by it run (default: ${KEYS_VARIABLE}, {KEYS_FOLDER})",
    )
    parser.add_argument(
        "--state",
        metavar="FOLDER",
        help=f"where the version of the signed bundle that ran last is kept (default: ${STATE_VARIABLE}, {STATE_FOLDER})",
    )
    parser.add_argument(
        "--allow-downgrade", action="store_true", help="go back to a signed bundle that is older than the one that ran last"
    )
    parser.add_argument("--unproven", action="store_true", help="run a quantized bundle that carries no passing proof; this is logged")


def add_think(parser: argparse.ArgumentParser) -> None:
    """The background model that a run may ask."""
    parser.add_argument(
        "--think",
        metavar="URL",
        help="ask the model behind this OpenAI-compatible address, such as http://127.0.0.1:8080/v1 (default: nobody)",
    )
    parser.add_argument("--think-model", default="default", metavar="NAME", help="what that model is called there (default: default)")
    parser.add_argument(
        "--think-key-file",
        type=Path,
        metavar="FILE",
        help=f"holds the key to it and is its owner's alone (default: ${KEY_VARIABLE}, or no key)",
    )
    parser.add_argument("--think-sound", action="store_true", help="also send it what the microphone heard in the last seconds")


def endpoint_of(arguments: argparse.Namespace) -> Endpoint | None:
    """Whom a run asks; raises UsageError, ReachError."""
    if arguments.think is None:
        if arguments.think_key_file or arguments.think_sound:
            raise UsageError("--think-key-file and --think-sound say how to ask a model; give --think URL with them")
        return None
    return Endpoint(arguments.think, arguments.think_model, read_key(arguments.think_key_file))


def open_thinker(arguments: argparse.Namespace, endpoint: Endpoint | None, config: ModelConfig, stack: ExitStack) -> Thinker:
    """Its client, closed with `stack`; raises ReachError."""
    if endpoint is None:
        return NoThinker()
    from device.reach.reach import Reach

    reach = Reach(config, endpoint, arguments.think_sound, patient=arguments.clock == "simulated")
    stack.callback(reach.close)
    return reach


def natural(text: str) -> int:
    """A type of argparse's: a whole number of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def stop_on_signals(stack: ExitStack) -> threading.Event:
    """An event that SIGINT or SIGTERM sets; the same signal again ends the process as usual."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        stack.callback(signal.signal, number, signal.signal(number, handle))
    return stop


def header_of(bundle: Bundle, arguments: argparse.Namespace) -> dict[str, Any]:
    """The first event of a run: what runs, on what, by which options."""
    return {
        "event": "header",
        "copresence": copresence_version(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        "engine": "onnxruntime" if arguments.engine is None else str(arguments.engine),
        "bundle": bundle.name,
        "bundle_sha256": bundle.digest,
        "bundle_version": bundle.version,
        "signature": bundle.signature,
        "signed_by": bundle.signed_by,
        "config": bundle.config.to_dict(),
        "seed": arguments.seed,
        "clock": arguments.clock,
        "master": arguments.master,
        "playout_offset_ms": arguments.playout_offset_ms,
        "echo_canceller": arguments.echo_canceller or "none",
        "mic": arguments.mic,
        "camera": arguments.camera or "none",
        "speaker": arguments.speaker,
        "bridge": arguments.bridge or "none",
        "body": None if arguments.body is None else str(arguments.body),
        "text": arguments.text,
        "record_raw": arguments.record_raw,
        "think": "none" if arguments.think is None else f"{arguments.think_model} at {arguments.think}",
    }


def notices_of(bundle: Bundle) -> list[dict[str, Any]]:
    """What the log must say of a bundle beyond the header."""
    return [{"event": "unproven", "bundle_sha256": bundle.digest, "reason": bundle.unproven}] if bundle.unproven else []
