"""The command line of the board: `copresence run` and `serve`, and what a field engineer asks (device/field/)."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import platform
import re
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from device import after, playout_offset
from device.audio import Canceller, Line, Playout, Silence, SoundFile, Source, SourceError, VirtualPlayout
from device.bundle import Bundle, BundleError, copresence_version
from device.calibration import CalibrationError, CalibrationRecorder
from device.camera import DEVICES, is_device, is_recording, open_camera
from device.config import ConfigError, ModelConfig, TextConfig
from device.control import RUNTIME_VARIABLE, Control
from device.echo_canceller import CancellerMissing, WebRtcCanceller
from device.engine import Buffers, Engine, EngineError
from device.engine.opening import open_engine
from device.errors import complain
from device.events import EventLog, Recording
from device.field import board, doctor, logs, pull, settings, top
from device.field.journal import Journal
from device.field.settings import SETTINGS_FILE, Settings, SettingsError
from device.field.statistics import Senses, Statistics, bridge_state, calls_back
from device.field.watch import Watch
from device.live_audio import LIVE, LiveMicrophone, LiveSpeaker, is_live, live_device, open_sound
from device.loop import Actuator, Loop, NoActuator, NoThinker, TextQueue, Thinker
from device.loopback import LoopbackError
from device.mcu_clock import McuFollower, McuMaster
from device.notify import Notifier
from device.portaudio import AudioDeviceError, available
from device.reach.endpoint import KEY_VARIABLE, Endpoint, read_key
from device.reach.limits import ReachError
from device.realtime import RealTime
from device.recorder import FlightRecorder
from device.session import Session
from device.signature import KEYS_FOLDER, KEYS_VARIABLE, STATE_FOLDER, STATE_VARIABLE, KeyFileError, Trust, VersionMemoryError
from device.steering import MASTERS, Steering
from device.tensors import TensorMismatch
from device.thermal import Thermometer
from device.ticker import RealtimeTicker, SimulatedTicker, Ticker
from firmware_bridge.body import BodyError, read_body
from firmware_bridge.bridge import Bridge
from firmware_bridge.errors import BridgeError
from firmware_bridge.port import find_port

AUTO = "auto"
JITTER_BUFFER_MS = 80  # four packets of 20 ms: covers 50 ms of jitter, measured (README)
TOKEN_VARIABLE = "COPRESENCE_TOKEN"
BUNDLE_HELP = "a bundle made by 'copresence-export build'"

USAGE_ERROR = 2
WRITE_ERROR = 1


class UsageError(ValueError):
    """Arguments that do not go together; the text says what to give instead."""


# Anything else is a defect and keeps its traceback.
USER_ERRORS = (
    UsageError,
    SettingsError,
    logs.JournalError,
    top.TerminalError,
    BundleError,
    KeyFileError,
    VersionMemoryError,
    ConfigError,
    EngineError,
    TensorMismatch,
    SourceError,
    AudioDeviceError,
    BodyError,
    LoopbackError,
    CancellerMissing,
    BridgeError,
    CalibrationError,
    *after.ERRORS,
    ReachError,
    OSError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """The program `copresence`; returns its exit status."""
    parser, run = _parser()
    try:
        arguments = parser.parse_args(argv)
        if arguments.command == "run" and arguments.config is not None:
            run.set_defaults(**Settings.read(arguments.config).arguments())
            arguments = parser.parse_args(argv)  # what stands on the command line wins
        return int(arguments.command_function(arguments))
    except USER_ERRORS as error:
        complain(f"copresence: {error}")
        return USAGE_ERROR


def _parser() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The whole, and the part that is `run`."""
    parser = argparse.ArgumentParser(prog="copresence", description="Runs an interaction model: one engine launch per tick.")
    parser.add_argument("--version", action="version", version=f"copresence {copresence_version()}")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="run a bundle on microphone and camera",
        description="Runs a bundle until the microphone file (or, without one, the camera file) ends, or Ctrl-C.",
    )
    run.add_argument(
        "--config", type=Path, metavar="FILE", help=f"take the options from it, as on a board ({SETTINGS_FILE}); those given here win"
    )
    run.add_argument("--bundle", help=BUNDLE_HELP)
    _add_shared(run)
    run.add_argument(
        "--mic",
        metavar="SRC",
        help="sound file of any rate and channels, 'live', 'live:DEVICE' (index or name) or 'none' (default: live where there is one)",
    )
    run.add_argument(
        "--camera",
        metavar="SRC",
        help="video file; a folder of images, shown in order of name, 10 a second; 'pattern', a moving test picture; or a camera: "
        "'picamera2[:NUMBER]' on libcamera boards, 'argus[:NUMBER]' on a Jetson's CSI port, 'v4l2[:/dev/videoN]' on USB (default: none)",
    )
    run.add_argument(
        "--speaker", metavar="DST", help="WAV file to write, 'live', 'live:DEVICE' or 'none' (default: live where there is one)"
    )
    run.add_argument("--bridge", metavar="PORT", help="serial port of the microcontroller, or 'auto' (default: none; nothing moves)")
    run.add_argument(
        "--body",
        type=Path,
        metavar="FILE",
        help="what the body is like, as TOML: its servos' calibration, ends and rest (default: a plain one)",
    )
    run.add_argument(
        "--events",
        metavar="FILE",
        help="JSON lines, one a tick; '-' is standard output; 'journal': for systemd's, statistics once a second",
    )
    run.add_argument("--metrics-file", type=Path, metavar="FILE", help="Prometheus metrics, renewed every 15 s; with --events journal")
    run.add_argument("--clock", choices=("realtime", "simulated"), default="realtime", help="simulated: as fast as it computes")
    run.add_argument(
        "--master", choices=MASTERS, help="whose clock the ticks follow (default: audio with a live microphone or speaker, otherwise soc)"
    )
    run.add_argument(
        "--text",
        action="extend",
        nargs="+",
        default=[],
        metavar="SECONDS:TOKENS",
        help="words to deliver as text at a time, such as '2.5:count three'",
    )
    run.add_argument("--seconds", type=float, metavar="N", help="end after so long")
    run.add_argument("--record-calibration", type=Path, metavar="DIR", help="add the inputs of every tick to a data set for quantization")
    run.add_argument(
        "--dumps",
        type=Path,
        metavar="DIR",
        help="where the flight recorder writes its last minute after a fault, on SIGUSR1 and on 'copresence dump' (default: in --state)",
    )
    run.add_argument(
        "--record-raw", action="store_true", help="dumps hold sound and pictures too, and can be replayed (default: neither, for privacy)"
    )
    run.add_argument(
        "--think",
        metavar="URL",
        help="ask the model behind this OpenAI-compatible address, such as http://127.0.0.1:8080/v1 (default: nobody)",
    )
    run.add_argument("--think-model", default="default", metavar="NAME", help="what that model is called there (default: default)")
    run.add_argument(
        "--think-key-file",
        type=Path,
        metavar="FILE",
        help=f"holds the key to it and is its owner's alone (default: ${KEY_VARIABLE}, or no key)",
    )
    run.add_argument("--think-sound", action="store_true", help="also send it what the microphone heard in the last seconds")
    run.add_argument(
        "--playout-offset-ms",
        type=_offset,
        metavar="MS",
        help=f"from a tick's edge to its speech; 'auto': from the engine's measured time, and raised when ticks come late"
        f" (default: auto on live devices, {playout_offset.ON_FILES_MS} on files)",
    )
    run.add_argument("--echo-canceller", choices=("webrtc",), help="in front of the model, for rooms that need one (extra 'echo')")
    run.set_defaults(command_function=_run)
    _add_serve(commands)
    for module in (settings, doctor, logs, top, pull):
        module.add_command(commands)
    after.add_commands(commands)
    return parser, run


def _add_shared(parser: argparse.ArgumentParser) -> None:
    """What every command takes that runs a bundle."""
    parser.add_argument(
        "--engine", type=Path, metavar="DIR", help="run this TensorRT engine, made by 'copresence-export compile' (default: ONNX Runtime)"
    )
    parser.add_argument("--no-priority", action="store_true", help="ask the kernel for no real-time priority, CPU or locked memory")
    parser.add_argument("--seed", type=_natural, default=0, metavar="N", help="of the noise that the voice is made from (default: 0)")
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


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="run a bundle for who connects: a page to talk to, and OpenAI's Realtime API",
        description="Runs a bundle for one peer at a time, over a WebSocket that speaks OpenAI's Realtime API, with a page to talk to. "
        f"The key that peers need is made anew at each start, or taken from ${TOKEN_VARIABLE}.",
    )
    serve.add_argument("--bundle", required=True, help=BUNDLE_HELP)
    serve.add_argument("--events", metavar="FILE", help="JSON lines, one a tick; '-' is standard output")
    _add_shared(serve)
    serve.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="listen here (default: 127.0.0.1, this machine alone)")
    serve.add_argument("--port", type=_natural, default=8765, metavar="N", help="default: 8765; 0: any that is free")
    serve.add_argument("--no-token", action="store_true", help="whoever can connect may talk")
    serve.add_argument(
        "--playout-offset-ms",
        type=_natural,
        default=playout_offset.ON_FILES_MS,
        metavar="MS",
        help=f"from a tick's edge to its speech (default: {playout_offset.ON_FILES_MS})",
    )
    serve.add_argument(
        "--jitter-buffer-ms",
        type=_natural,
        default=JITTER_BUFFER_MS,
        metavar="MS",
        help=f"packets that are late by so much are in time; it adds to every reaction (default: {JITTER_BUFFER_MS})",
    )
    network = dict.fromkeys(("mic", "camera", "speaker", "master"), "network")
    serve.set_defaults(
        command_function=_serve,
        clock="realtime",
        bridge=None,
        body=None,
        record_raw=False,
        think=None,
        echo_canceller=None,
        text=[],
        **network,
    )


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _offset(text: str) -> int | str:
    return text if text == AUTO else _natural(text)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.bundle is None:
        raise UsageError("there is no bundle to run; give --bundle, or --config")
    trust = Trust.of_machine(arguments.keys, arguments.state, arguments.allow_downgrade)
    bundle = Bundle.open(arguments.bundle, trust, arguments.unproven)
    config, realtime = bundle.config, arguments.clock == "realtime"
    rate_hz, tick_ns = config.audio.sample_rate_hz, config.tick_ms * 1_000_000
    _check_arguments(arguments)
    _choose_audio(arguments)
    _choose_master(arguments)
    body = {} if arguments.body is None else read_body(arguments.body)
    endpoint = _endpoint(arguments)
    text = TextQueue([parse_text(entry, config.text) for entry in arguments.text], config.text.text_in)
    with ExitStack() as stack:
        stop = _stop_on_signals(stack)
        ticker: Ticker = RealtimeTicker(tick_ns) if realtime else SimulatedTicker(tick_ns)
        stack.callback(ticker.close)
        engine = open_engine(arguments.engine, bundle, trust, stack)
        if trust:
            trust.memory.remember(bundle.version, bundle.path)
        calibration = None
        if arguments.record_calibration is not None:
            calibration = CalibrationRecorder(arguments.record_calibration, config, bundle.digest, arguments.seed, patient=not realtime)
        guard = _choose_offset(arguments, config, engine)
        recorder = _open_recorder(arguments, config)
        session = Session(config, engine, arguments.seed, _all([recorder.launch, *([] if calibration is None else [calibration.record])]))
        source, playout = _open_audio(arguments, config, ticker, stack)
        camera = open_camera(arguments.camera, config, patient=not realtime, origin_ns=lambda: ticker.origin_ns)
        stack.callback(camera.close)
        recording = Recording(arguments.speaker, rate_hz, patient=not realtime) if _is_file(arguments.speaker) else None
        canceller: Canceller | None = None if arguments.echo_canceller is None else WebRtcCanceller(rate_hz)
        line = Line(config, source, playout, arguments.playout_offset_ms * rate_hz // 1000, canceller)
        actuator = _open_bridge(arguments.bridge, body, stack)
        steering = _steer(arguments.master, tick_ns, ticker, source, playout, actuator)
        header, senses = _header(bundle, arguments), Senses(config, line)
        thermometer = _measure_heat(stack) if realtime else None
        events: EventLog | Journal
        if arguments.events == "journal":
            events = _open_journal(senses, header, bundle, source, playout, steering, actuator, thermometer, arguments.metrics_file)
        else:
            events = EventLog(arguments.events, patient=not realtime)
        notifier = Notifier()
        stack.callback(notifier.close)
        rolled_back = board.read_json(board.ROLLED_BACK)
        loop = Loop(
            config=config,
            session=session,
            ticker=ticker,
            steering=steering,
            line=line,
            camera=camera,
            text=text,
            actuator=actuator,
            events=events,
            recording=recording,
            seconds=arguments.seconds,
            stop=stop,
            recorder=recorder,
            thermometer=thermometer,
            watcher=Watch(notifier, senses, actuator if rolled_back else None),
            thinker=_open_reach(arguments, endpoint, config, stack),
            offset=guard,
        )
        try:
            notices = _notices(bundle)
            if rolled_back:
                notices.append({"event": "runs_after_rollback", **rolled_back})
            _listen(recorder, realtime, notices, stack)
            if realtime and not arguments.no_priority:
                privileges = stack.enter_context(RealTime())
                notices.append(privileges.event)
                if advice := privileges.advice():
                    print(f"copresence: {advice}", file=sys.stderr)
            summary = loop.run(header, *notices)
        finally:
            _close_recorder(recorder, events)
            events.close()
            if calibration is not None:
                calibration.close()
    faults = [("--events", events.fault), ("--speaker", recording.fault if recording else None)]
    if calibration is not None:
        lost = f"{calibration.dropped} ticks came faster than they could be written" if calibration.dropped else None
        faults.append(("--record-calibration", calibration.fault or lost))
    return _report(arguments, summary, faults)


def _serve(arguments: argparse.Namespace) -> int:
    try:
        from device.serve.companion import Companion
        from device.serve.server import LOOPBACK, Server
    except ImportError as error:
        raise UsageError(
            f"serving needs a library that is not here ({error}); install the extra: pip install 'copresence[serve]'"
        ) from error
    if max(arguments.playout_offset_ms, arguments.jitter_buffer_ms) > playout_offset.LONGEST_MS:
        raise UsageError(f"--playout-offset-ms or --jitter-buffer-ms is beyond {playout_offset.LONGEST_MS}; give less")
    token = None if arguments.no_token else os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(16)
    if token is not None and not re.fullmatch(r"[\w.~-]{8,}", token, re.ASCII):  # a browser hands it over as a WebSocket subprotocol
        raise UsageError(f"${TOKEN_VARIABLE} must be 8 letters, digits, or any of _ - . ~, at least")
    trust = Trust.of_machine(arguments.keys, arguments.state, arguments.allow_downgrade)
    bundle = Bundle.open(arguments.bundle, trust, arguments.unproven)
    said = sys.stderr if arguments.events == "-" else sys.stdout
    with ExitStack() as stack:
        stop = _stop_on_signals(stack)
        engine = open_engine(arguments.engine, bundle, trust, stack)
        if trust:
            trust.memory.remember(bundle.version, bundle.path)
        events = EventLog(arguments.events, patient=False)
        stack.callback(events.close)
        offset_ms, buffer_ms = arguments.playout_offset_ms, arguments.jitter_buffer_ms
        companion = Companion(bundle.config, bundle.name, engine, events, arguments.seed, offset_ms, buffer_ms)
        server = Server(companion, arguments.host, arguments.port, token)
        stack.callback(server.close)
        server.start()
        key = "none is needed" if token is None else token
        print(f"a page to talk to:  {server.address}/{'' if token is None else '#' + token}", file=said)
        print(f"for OpenAI clients: base URL {server.address}/v1, API key: {key}", file=said, flush=True)
        if arguments.host not in LOOPBACK:
            warning = (
                "sound, pictures and the key travel unencrypted; browsers lend microphone and camera to https and to this machine only"
            )
            print(f"copresence: --host {arguments.host}: {warning}. Put a proxy with TLS before it, or use ssh -L", file=sys.stderr)
        for notice in _notices(bundle):
            events.put(notice)
        if not arguments.no_priority:
            privileges = stack.enter_context(RealTime())
            events.put(privileges.event)
            if advice := privileges.advice():
                print(f"copresence: {advice}", file=sys.stderr)
        companion.keep_company(_header(bundle, arguments), stop)
    if events.fault:
        print(f"copresence: --events is incomplete: {events.fault}; free space or name another place", file=sys.stderr)
    return WRITE_ERROR if events.fault else 0


def _open_recorder(arguments: argparse.Namespace, config: ModelConfig) -> FlightRecorder:
    folder = arguments.dumps or (None if arguments.state is None else Path(arguments.state) / "dumps")
    return FlightRecorder(config, folder, arguments.record_raw, watch=arguments.clock == "realtime")


def _all(shown: Sequence[Callable[[int, Buffers], None]]) -> Callable[[int, Buffers], None]:
    """Each of them in turn."""

    def show(tick: int, inputs: Buffers) -> None:
        for one in shown:
            one(tick, inputs)

    return show


def _measure_heat(stack: ExitStack) -> Thermometer:
    thermometer = Thermometer()
    stack.callback(thermometer.close)
    return thermometer


def _listen(recorder: FlightRecorder, realtime: bool, notices: list[dict[str, Any]], stack: ExitStack) -> None:
    """A dump on SIGUSR1, and on 'copresence dump' where there is time to ask for it."""
    stack.callback(signal.signal, signal.SIGUSR1, signal.signal(signal.SIGUSR1, lambda *_: recorder.request("signal") and None))
    if not realtime:
        return
    try:
        control = Control(lambda asked: after.answer(recorder, asked))
    except OSError as error:
        notices.append({"event": "control", "fault": f"'copresence dump' cannot reach this run ({error}); set ${RUNTIME_VARIABLE}"})
    else:
        stack.callback(control.close)


def _close_recorder(recorder: FlightRecorder, events: EventLog | Journal) -> None:
    """Wait for the dumps under way, and tell of those that the log does not know yet."""
    recorder.close()
    for event in recorder.take_events():
        events.put(event)
        if event["reason"] == "fault":
            told = (
                f"the last minute is in {event['file']}" if "file" in event else f"no dump could be written: {event['fault']}; give --dumps"
            )
            print(f"copresence: {told}", file=sys.stderr)


def _open_journal(
    senses: Senses,
    header: dict[str, Any],
    bundle: Bundle,
    source: Source,
    playout: Playout,
    steering: Steering,
    actuator: Actuator,
    thermometer: Thermometer | None,
    metrics_file: Path | None,
) -> Journal:
    statistics = Statistics(
        bundle.config.tick_ms,
        senses,
        counts=lambda: {**source.counts, **playout.counts},
        clock=steering.summary,
        bridge=lambda: bridge_state(actuator),
        alive=lambda: {
            "microphone": calls_back(source),
            "speaker": calls_back(playout),
            "engine": board.verified(bundle.digest),
        },
        temperatures=lambda: {} if thermometer is None else thermometer.newest().get("zones_c", {}),
    )
    return Journal(statistics, header, lambda: _firmware(actuator), metrics_file)


def _is_file(choice: str | None) -> bool:
    return choice not in (None, "none") and not is_live(choice)


def _live(arguments: argparse.Namespace) -> bool:
    return is_live(arguments.mic) or is_live(arguments.speaker)


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
        arguments.playout_offset_ms = AUTO if _live(arguments) else playout_offset.ON_FILES_MS
    if arguments.playout_offset_ms != AUTO:
        return None
    arguments.playout_offset_ms = playout_offset.measure(config, engine)
    return playout_offset.OffsetGuard(arguments.playout_offset_ms, config.tick_ms)


def _open_audio(arguments: argparse.Namespace, config: ModelConfig, ticker: Ticker, stack: ExitStack) -> tuple[Source, Playout]:
    rate_hz = config.audio.sample_rate_hz
    microphone, speaker = open_sound(
        rate_hz, config.tick_samples, live_device(arguments.mic), live_device(arguments.speaker), arguments.master, stack
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
    follower = McuFollower(actuator, tick_ns) if isinstance(actuator, Bridge) else None
    if master == "audio":
        device = source if isinstance(source, LiveMicrophone) else playout
        assert isinstance(device, LiveMicrophone | LiveSpeaker)
        return Steering(tick_ns, device, master, follower)
    if master == "mcu":
        bridge = actuator
        assert isinstance(bridge, Bridge)
        bridge.trim(0)  # it may have followed the session before this one
        return Steering(tick_ns, McuMaster(lambda: bridge.tick, lambda ns: ns - ticker.origin_ns), master)
    return Steering(tick_ns, follower=follower)


def _open_bridge(port: str | None, body: dict[str, int], stack: ExitStack) -> Actuator:
    if port is None or port == "none":
        return NoActuator()
    bridge = Bridge(find_port() if port == "auto" else port, body)
    bridge.start()
    stack.callback(bridge.close)
    return bridge


def _endpoint(arguments: argparse.Namespace) -> Endpoint | None:
    if arguments.think is None:
        return None
    return Endpoint(arguments.think, arguments.think_model, read_key(arguments.think_key_file))


def _open_reach(arguments: argparse.Namespace, endpoint: Endpoint | None, config: ModelConfig, stack: ExitStack) -> Thinker:
    if endpoint is None:
        return NoThinker()
    from device.reach.reach import Reach

    reach = Reach(config, endpoint, arguments.think_sound, patient=arguments.clock == "simulated")
    stack.callback(reach.close)
    return reach


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UsageError for what would only show later, or never."""
    if isinstance(arguments.playout_offset_ms, int) and arguments.playout_offset_ms > playout_offset.LONGEST_MS:
        raise UsageError(f"--playout-offset-ms {arguments.playout_offset_ms} is beyond {playout_offset.LONGEST_MS}; give less")
    if arguments.seconds is not None and not 0 < arguments.seconds < math.inf:
        raise UsageError(f"--seconds {arguments.seconds} is not a length of time; give more than 0")
    if arguments.metrics_file is not None and arguments.events != "journal":
        raise UsageError("--metrics-file: metrics are made of the journal's statistics; give --events journal too")
    if arguments.clock == "simulated":
        if _live(arguments) or is_device(arguments.camera):
            raise UsageError("a simulated clock cannot pace a live device; give a file or 'none', or --clock realtime")
        if arguments.bridge not in (None, "none"):
            raise UsageError("a simulated clock cannot pace a body; leave --bridge out, or give --clock realtime")
        if arguments.seconds is None and not _is_file(arguments.mic) and not is_recording(arguments.camera):
            raise UsageError("nothing would end this simulated run; give --seconds, a microphone file or a camera file")
    if arguments.body is not None and arguments.bridge in (None, "none"):
        raise UsageError("--body: there is no body without --bridge; give its port, or leave --body out")
    if arguments.think is None and (arguments.think_key_file or arguments.think_sound):
        raise UsageError("--think-key-file and --think-sound say how to ask a model; give --think URL with them")
    if arguments.camera == "live":
        raise UsageError(f"--camera live: say which kind of camera it is: {', '.join(DEVICES)}")
    inputs, outputs = (arguments.mic, arguments.camera), (arguments.speaker, arguments.events)
    named = [Path(choice).resolve() for choice in outputs if _is_file(choice) and choice not in ("-", "journal")]
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
        "body": None if arguments.body is None else str(arguments.body),
        "text": arguments.text,
        "record_raw": arguments.record_raw,
        "think": "none" if arguments.think is None else f"{arguments.think_model} at {arguments.think}",
    }


def _firmware(actuator: Actuator) -> dict[str, str]:
    """Build and dictionary of the microcontroller that answers; empty where none does."""
    identity = actuator.identity if isinstance(actuator, Bridge) else None
    return {} if identity is None else {"firmware": f"{identity.build:08x}", "dictionary": f"{identity.dictionary:08x}"}


def _notices(bundle: Bundle) -> list[dict[str, Any]]:
    """What the log must say of a bundle beyond the header."""
    return [{"event": "unproven", "bundle_sha256": bundle.digest, "reason": bundle.unproven}] if bundle.unproven else []


def _report(arguments: argparse.Namespace, summary: dict[str, Any], faults: list[tuple[str, str | None]]) -> int:
    if arguments.events not in ("-", "journal"):
        engine = summary["engine_ms"]
        print(
            f"{summary['ticks']} ticks, {summary['gap_ticks']} lost; engine {engine['p50']} ms (p99 {engine['p99']}); "
            f"late speech in {summary['late_speech_ticks']} ticks; ended by {summary['ended_by']}"
        )
    if summary["camera_fault"]:
        remedy = "; check the file" if is_recording(arguments.camera) else ""  # a device's own fault names its own
        print(f"copresence: --camera {arguments.camera} broke off: {summary['camera_fault']}{remedy}", file=sys.stderr)
    status = 0
    for option, fault in faults:
        if fault:
            print(f"copresence: {option} is incomplete: {fault}; free space or name another place", file=sys.stderr)
            status = WRITE_ERROR
    return status


if __name__ == "__main__":
    sys.exit(main())
