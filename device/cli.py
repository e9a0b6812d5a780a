"""The command line of the board: `copresence run`."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import math
import platform
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from device import playout_offset
from device.audio import Canceller, Line, Playout, Silence, SoundFile, Source, SourceError, VirtualPlayout
from device.bundle import Bundle, BundleError, copresence_version
from device.calibration import CalibrationError, CalibrationRecorder
from device.camera import NoCamera, open_camera
from device.config import AudioConfig, ConfigError, ModelConfig, TextConfig
from device.echo_canceller import CancellerMissing, WebRtcCanceller
from device.engine import Engine, EngineError, OnnxRuntimeEngine
from device.events import EventLog, Recording
from device.live_audio import LiveMicrophone, LiveSpeaker, open_sound
from device.loop import Actuator, Loop, NoActuator, TextQueue
from device.loopback import LoopbackError, measure_loopback, render
from device.portaudio import AudioDeviceError, available
from device.realtime import RealTime
from device.session import Session
from device.signature import KEYS_FOLDER, KEYS_VARIABLE, STATE_FOLDER, STATE_VARIABLE, KeyFileError, Trust, VersionMemoryError
from device.steering import MASTERS, McuMaster, Steering
from device.tensors import TensorMismatch
from device.ticker import RealtimeTicker, SimulatedTicker, Ticker
from firmware_bridge.bridge import Bridge, BridgeError
from firmware_bridge.port import find_port

PLAYOUT_OFFSET_MS = 60  # covers an engine of 12 ms (p99) with a wide margin on a busy two-core machine
LIVE, AUTO = "live", "auto"

USAGE_ERROR = 2
WRITE_ERROR = 1


class UsageError(ValueError):
    """Arguments that do not go together; the text says what to give instead."""


# Anything else is a defect and keeps its traceback.
USER_ERRORS = (
    UsageError,
    BundleError,
    KeyFileError,
    VersionMemoryError,
    ConfigError,
    EngineError,
    TensorMismatch,
    SourceError,
    AudioDeviceError,
    LoopbackError,
    CancellerMissing,
    BridgeError,
    CalibrationError,
    OSError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """The program `copresence`; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except USER_ERRORS as error:
        print(f"copresence: {error}", file=sys.stderr)
        return USAGE_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="copresence", description="Runs an interaction model: one engine launch per tick.")
    parser.add_argument("--version", action="version", version=f"copresence {copresence_version()}")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="run a bundle on microphone and camera",
        description="Runs a bundle until the microphone file (or, without one, the camera file) ends, or Ctrl-C.",
    )
    run.add_argument("--bundle", required=True, help="a bundle made by 'copresence-export build'")
    run.add_argument(
        "--engine", type=Path, metavar="DIR", help="run this TensorRT engine, made by 'copresence-export compile' (default: ONNX Runtime)"
    )
    run.add_argument(
        "--mic",
        metavar="SRC",
        help="sound file of any rate and channels, 'live', 'live:DEVICE' (index or name) or 'none' (default: live where there is one)",
    )
    run.add_argument(
        "--camera", metavar="SRC", help="video file, or a folder of images shown in order of name, 10 a second (default: none)"
    )
    run.add_argument(
        "--speaker", metavar="DST", help="WAV file to write, 'live', 'live:DEVICE' or 'none' (default: live where there is one)"
    )
    run.add_argument("--bridge", metavar="PORT", help="serial port of the microcontroller, or 'auto' (default: none; nothing moves)")
    run.add_argument("--events", metavar="FILE", help="JSON lines, one a tick; '-' is standard output")
    run.add_argument("--clock", choices=("realtime", "simulated"), default="realtime", help="simulated: as fast as it computes")
    run.add_argument(
        "--master", choices=MASTERS, help="whose clock the ticks follow (default: audio with a live microphone or speaker, otherwise soc)"
    )
    run.add_argument("--no-priority", action="store_true", help="ask the kernel for no real-time priority, CPU or locked memory")
    run.add_argument("--seed", type=_natural, default=0, metavar="N", help="of the noise that the voice is made from (default: 0)")
    run.add_argument(
        "--text",
        action="extend",
        nargs="+",
        default=[],
        metavar="SECONDS:TOKENS",
        help="words to deliver as text at a time, such as '2.5:count three'",
    )
    run.add_argument(
        "--playout-offset-ms",
        type=_offset,
        metavar="MS",
        help=f"from a tick's edge to its speech; 'auto': from the engine's measured time, and raised when ticks come late"
        f" (default: auto on live devices, {PLAYOUT_OFFSET_MS} on files)",
    )
    run.add_argument("--echo-canceller", choices=("webrtc",), help="in front of the model, for rooms that need one (extra 'echo')")
    run.add_argument("--seconds", type=float, metavar="N", help="end after so long")
    run.add_argument(
        "--keys",
        metavar="FOLDER",
        help=f"public keys; with one there, only bundles signed by it run (default: ${KEYS_VARIABLE}, {KEYS_FOLDER})",
    )
    run.add_argument(
        "--state",
        metavar="FOLDER",
        help=f"where the version of the signed bundle that ran last is kept (default: ${STATE_VARIABLE}, {STATE_FOLDER})",
    )
    run.add_argument("--allow-downgrade", action="store_true", help="go back to a signed bundle that is older than the one that ran last")
    run.add_argument("--record-calibration", type=Path, metavar="DIR", help="add the inputs of every tick to a data set for quantization")
    run.add_argument("--unproven", action="store_true", help="run a quantized bundle that carries no passing proof; this is logged")
    run.set_defaults(run=_run)
    doctor = commands.add_parser("doctor", help="measure this machine")
    doctor.add_argument("--loopback", action="store_true", required=True, help="latency and level from speaker to microphone, by chirps")
    doctor.add_argument("--bundle", help="whose tick and engine the reaction floor is for (default: a tick of 200 ms)")
    doctor.add_argument("--mic", metavar="SRC", default=LIVE, help="'live' (default) or 'live:DEVICE'")
    doctor.add_argument("--speaker", metavar="DST", default=LIVE, help="'live' (default) or 'live:DEVICE'")
    doctor.add_argument(
        "--playout-offset-ms", type=_natural, metavar="MS", help=f"default: measured with a bundle, otherwise {PLAYOUT_OFFSET_MS}"
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _offset(text: str) -> int | str:
    return text if text == AUTO else _natural(text)


def _run(arguments: argparse.Namespace) -> int:
    trust = Trust.of_machine(arguments.keys, arguments.state, arguments.allow_downgrade)
    bundle = Bundle.open(arguments.bundle, trust, arguments.unproven)
    config, realtime = bundle.config, arguments.clock == "realtime"
    rate_hz, tick_ns = config.audio.sample_rate_hz, config.tick_ms * 1_000_000
    _check_arguments(arguments)
    _choose_audio(arguments)
    _choose_master(arguments)
    text = TextQueue([parse_text(entry, config.text) for entry in arguments.text], config.text.text_in)
    with ExitStack() as stack:
        stop = _stop_on_signals(stack)
        ticker: Ticker = RealtimeTicker(tick_ns) if realtime else SimulatedTicker(tick_ns)
        stack.callback(ticker.close)
        engine = _open_engine(arguments.engine, bundle, stack)
        if trust:
            trust.memory.remember(bundle.version, bundle.path)
        calibration = None
        if arguments.record_calibration is not None:
            calibration = CalibrationRecorder(arguments.record_calibration, config, bundle.digest, arguments.seed, patient=not realtime)
        guard = _choose_offset(arguments, config, engine)
        session = Session(config, engine, arguments.seed, None if calibration is None else calibration.record)
        source, playout = _open_audio(arguments, config, ticker, stack)
        camera = open_camera(arguments.camera, config, patient=not realtime) if _is_file(arguments.camera) else NoCamera(config)
        stack.callback(camera.close)
        recording = Recording(arguments.speaker, rate_hz, patient=not realtime) if _is_file(arguments.speaker) else None
        events = EventLog(arguments.events, patient=not realtime)
        offset_samples = arguments.playout_offset_ms * rate_hz // 1000
        canceller: Canceller | None = None if arguments.echo_canceller is None else WebRtcCanceller(rate_hz)
        actuator = _open_bridge(arguments.bridge, stack)
        loop = Loop(
            config=config,
            session=session,
            ticker=ticker,
            steering=_steer(arguments.master, tick_ns, ticker, source, playout, actuator),
            line=Line(config, source, playout, offset_samples, canceller),
            camera=camera,
            text=text,
            actuator=actuator,
            events=events,
            recording=recording,
            seconds=arguments.seconds,
            stop=stop,
            offset=guard,
        )
        try:
            notices = _notices(bundle)
            if realtime and not arguments.no_priority:
                privileges = stack.enter_context(RealTime())
                notices.append(privileges.event)
                if advice := privileges.advice():
                    print(f"copresence: {advice}", file=sys.stderr)
            summary = loop.run(_header(bundle, arguments), *notices)
        finally:
            events.close()
            if calibration is not None:
                calibration.close()
    faults = [("--events", events.fault), ("--speaker", recording.fault if recording else None)]
    if calibration is not None:
        lost = f"{calibration.dropped} ticks came faster than they could be written" if calibration.dropped else None
        faults.append(("--record-calibration", calibration.fault or lost))
    return _report(arguments, summary, faults)


def _doctor(arguments: argparse.Namespace) -> int:
    rate_hz, tick_ms, offset_ms = AudioConfig().sample_rate_hz, ModelConfig.tick_ms, arguments.playout_offset_ms
    mic, speaker = _live_device(arguments.mic), _live_device(arguments.speaker)
    if mic is None or speaker is None:
        raise UsageError("doctor --loopback: --mic and --speaker are 'live' or 'live:DEVICE'; a file returns no sound")
    if arguments.bundle is not None:
        bundle = Bundle.open(arguments.bundle, unproven=True)
        rate_hz, tick_ms = bundle.config.audio.sample_rate_hz, bundle.config.tick_ms
        if offset_ms is None:
            offset_ms = _measured_offset_ms(bundle.config, OnnxRuntimeEngine(bundle.graph, bundle.config))
    print(render(measure_loopback(rate_hz, tick_ms, PLAYOUT_OFFSET_MS if offset_ms is None else offset_ms, mic, speaker)))
    return 0


def _open_engine(folder: Path | None, bundle: Bundle, stack: ExitStack) -> Engine:
    if folder is None:
        return OnnxRuntimeEngine(bundle.graph, bundle.config)
    from device.engine.tensorrt import TensorRtEngine

    return stack.enter_context(TensorRtEngine(folder, bundle.config, bundle.digest))


def _is_file(choice: str | None) -> bool:
    return choice not in (None, "none") and not _is_live(choice)


def _is_live(choice: str | None) -> bool:
    return choice is not None and (choice == LIVE or choice.startswith(f"{LIVE}:"))


def _live(arguments: argparse.Namespace) -> bool:
    return _is_live(arguments.mic) or _is_live(arguments.speaker)


def _live_device(choice: str | None) -> str | None:
    """The index or name in 'live:DEVICE', "" for the default device; None for what is not live."""
    return choice.removeprefix(LIVE).removeprefix(":") if choice is not None and _is_live(choice) else None


def _choose_audio(arguments: argparse.Namespace) -> None:
    """Settle what was left open: this machine's own microphone and speaker where it has them. Raises UsageError."""
    options = ("mic", "speaker")
    wanted = any(getattr(arguments, option) in (None, LIVE) for option in options)
    there = available() if wanted and arguments.clock == "realtime" else (False, False)
    for option, has in zip(options, there, strict=True):
        choice = getattr(arguments, option)
        if choice == LIVE and not has:
            raise UsageError(f"--{option} live: this machine has no such device; connect one, or give a file or 'none'")
        if choice is None:
            setattr(arguments, option, LIVE if has else "none")


def _choose_offset(arguments: argparse.Namespace, config: ModelConfig, engine: Engine) -> playout_offset.OffsetGuard | None:
    """Settle the offset, and who watches it; a session begins after it, for its launches leave traces."""
    if arguments.playout_offset_ms is None:
        arguments.playout_offset_ms = AUTO if _live(arguments) else PLAYOUT_OFFSET_MS
    if arguments.playout_offset_ms != AUTO:
        return None
    arguments.playout_offset_ms = _measured_offset_ms(config, engine)
    return playout_offset.OffsetGuard(arguments.playout_offset_ms, config.tick_ms)


def _measured_offset_ms(config: ModelConfig, engine: Engine) -> int:
    trial, ticks = Session(config, engine), itertools.count()
    hush = np.zeros(config.tick_samples + config.context_samples, np.float32)
    frames = NoCamera(config).frames_at(0.0)
    return playout_offset.choose(lambda: trial.step(next(ticks), hush, hush, *frames).engine_ns)


def _open_audio(arguments: argparse.Namespace, config: ModelConfig, ticker: Ticker, stack: ExitStack) -> tuple[Source, Playout]:
    rate_hz = config.audio.sample_rate_hz
    microphone, speaker = open_sound(
        rate_hz, config.tick_samples, _live_device(arguments.mic), _live_device(arguments.speaker), arguments.master, stack
    )
    source: Source = microphone or (SoundFile(arguments.mic, rate_hz) if _is_file(arguments.mic) else Silence())
    return source, speaker or VirtualPlayout(rate_hz, ticker.now_ns)


def _choose_master(arguments: argparse.Namespace) -> None:
    """Settle whose clock it is, once the devices are known. Raises UsageError."""
    live, body = _live(arguments), arguments.bridge not in (None, "none")
    if arguments.master is None:
        arguments.master = "audio" if live else "soc"
    if arguments.master == "audio" and not live:
        raise UsageError("--master audio: neither microphone nor speaker is a live device; give one, or --master soc")
    if arguments.master == "mcu" and not body:
        raise UsageError("--master mcu: there is no microcontroller; give --bridge, or --master soc")


def _steer(master: str, tick_ns: int, ticker: Ticker, source: Source, playout: Playout, actuator: Actuator) -> Steering:
    if master == "audio":
        device = source if isinstance(source, LiveMicrophone) else playout
        assert isinstance(device, LiveMicrophone | LiveSpeaker)
        return Steering(tick_ns, device, master)
    if master == "mcu":
        bridge = actuator
        assert isinstance(bridge, Bridge)
        return Steering(tick_ns, McuMaster(lambda: bridge.tick, lambda ns: ns - ticker.origin_ns), master)
    return Steering(tick_ns)


def _open_bridge(port: str | None, stack: ExitStack) -> Actuator:
    if port is None or port == "none":
        return NoActuator()
    bridge = Bridge(find_port() if port == "auto" else port)
    bridge.start()
    stack.callback(bridge.close)
    return bridge


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UsageError for what would only show later, or never."""
    if isinstance(arguments.playout_offset_ms, int) and arguments.playout_offset_ms > playout_offset.LONGEST_MS:
        raise UsageError(f"--playout-offset-ms {arguments.playout_offset_ms} is beyond {playout_offset.LONGEST_MS}; give less")
    if arguments.seconds is not None and not 0 < arguments.seconds < math.inf:
        raise UsageError(f"--seconds {arguments.seconds} is not a length of time; give more than 0")
    if arguments.clock == "simulated":
        if _live(arguments):
            raise UsageError("a simulated clock cannot pace a live device; give a file or 'none', or --clock realtime")
        if arguments.bridge not in (None, "none"):
            raise UsageError("a simulated clock cannot pace a body; leave --bridge out, or give --clock realtime")
        if arguments.seconds is None and not _is_file(arguments.mic) and not _is_file(arguments.camera):
            raise UsageError("nothing would end this simulated run; give --seconds, a microphone file or a camera file")
    if arguments.camera == "live":
        raise UsageError("--camera live: no camera driver is built in; give a video file or a folder of images")
    inputs, outputs = (arguments.mic, arguments.camera), (arguments.speaker, arguments.events)
    named = [Path(choice).resolve() for choice in outputs if _is_file(choice) and choice != "-"]
    read = [Path(choice).resolve() for choice in inputs if _is_file(choice)]
    if len({*named}) < len(named) or {*named} & {*read}:
        raise UsageError("--speaker or --events would overwrite another file of this run; give it a name of its own")


def parse_text(entry: str, config: TextConfig) -> tuple[float, list[int]]:
    """`SECONDS:TOKENS` as (seconds, word ids); raises UsageError."""
    at, colon, words = entry.partition(":")
    try:
        at_s = float(at)
    except ValueError:
        at_s = math.nan
    if not (colon and at_s >= 0):
        raise UsageError(f"--text {entry!r} is not SECONDS:TOKENS; give it as in '2.5:count three'")
    unknown = [word for word in words.split() if word not in config.words]
    if unknown:
        raise UsageError(f"--text: the bundle has no word {unknown[0]!r}; it knows: {', '.join(config.words[1:])}")
    return at_s, [config.words.index(word) for word in words.split()]


def _stop_on_signals(stack: ExitStack) -> threading.Event:
    """An event that SIGINT or SIGTERM sets; the same signal again ends the process as usual."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        stack.callback(signal.signal, number, signal.signal(number, handle))
    return stop


def _header(bundle: Bundle, arguments: argparse.Namespace) -> dict[str, Any]:
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
        "text": arguments.text,
    }


def _notices(bundle: Bundle) -> list[dict[str, Any]]:
    """What the log must say of a bundle beyond the header."""
    return [{"event": "unproven", "bundle_sha256": bundle.digest, "reason": bundle.unproven}] if bundle.unproven else []


def _report(arguments: argparse.Namespace, summary: dict[str, Any], faults: list[tuple[str, str | None]]) -> int:
    if arguments.events != "-":
        engine = summary["engine_ms"]
        print(
            f"{summary['ticks']} ticks, {summary['gap_ticks']} lost; engine {engine['p50']} ms (p99 {engine['p99']}); "
            f"late speech in {summary['late_speech_ticks']} ticks; ended by {summary['ended_by']}"
        )
    if summary["camera_fault"]:
        print(f"copresence: --camera {arguments.camera} broke off: {summary['camera_fault']}; check the file", file=sys.stderr)
    status = 0
    for option, fault in faults:
        if fault:
            print(f"copresence: {option} is incomplete: {fault}; free space or name another place", file=sys.stderr)
            status = WRITE_ERROR
    return status


if __name__ == "__main__":
    sys.exit(main())
