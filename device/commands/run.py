"""`copresence run`: a run put together from its options, on devices or on files."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from device import playout_offset
from device.audio import Canceller, Line, Playout, Silence, SoundFile, Source, VirtualPlayout
from device.bundle import Bundle
from device.calibration import CalibrationRecorder
from device.camera import DEVICES, is_device, is_recording, open_camera
from device.commands import after
from device.commands.shared import (
    BUNDLE_HELP,
    WRITE_ERROR,
    UsageError,
    add_shared,
    add_think,
    endpoint_of,
    header_of,
    natural,
    notices_of,
    open_thinker,
    stop_on_signals,
)
from device.config import ModelConfig, TextConfig
from device.control import RUNTIME_VARIABLE, Control
from device.echo_canceller import WebRtcCanceller
from device.engine import Buffers, Engine
from device.engine.opening import open_engine
from device.events import EventLog, Recording
from device.field import board
from device.field.journal import Journal
from device.field.settings import SETTINGS_FILE
from device.field.statistics import Senses, Statistics, bridge_state, calls_back
from device.field.watch import Watch
from device.live_audio import LIVE, LiveMicrophone, LiveSpeaker, is_live, live_device, open_sound
from device.loop import Actuator, Loop, NoActuator, TextQueue
from device.mcu_clock import McuFollower, McuMaster
from device.notify import Notifier
from device.portaudio import available
from device.realtime import RealTime
from device.recorder import FlightRecorder
from device.session import Session
from device.signature import Trust
from device.steering import MASTERS, Steering
from device.thermal import Thermometer
from device.ticker import RealtimeTicker, SimulatedTicker, Ticker
from firmware_bridge.body import read_body
from firmware_bridge.bridge import Bridge
from firmware_bridge.port import find_port

AUTO = "auto"


def add_command(commands: Any) -> argparse.ArgumentParser:
    """`copresence run`; a board's configuration stands for its options."""
    run = commands.add_parser(
        "run",
        help="run a bundle on microphone and camera",
        description="Runs a bundle until the microphone file (or, without one, the camera file) ends, or Ctrl-C.",
    )
    run.add_argument(
        "--config", type=Path, metavar="FILE", help=f"take the options from it, as on a board ({SETTINGS_FILE}); those given here win"
    )
    run.add_argument("--bundle", help=BUNDLE_HELP)
    add_shared(run)
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
    add_think(run)
    run.add_argument(
        "--playout-offset-ms",
        type=_offset,
        metavar="MS",
        help=f"from a tick's edge to its speech; 'auto': from the engine's measured time, and raised when ticks come late"
        f" (default: auto on live devices, {playout_offset.ON_FILES_MS} on files)",
    )
    run.add_argument("--echo-canceller", choices=("webrtc",), help="in front of the model, for rooms that need one (extra 'echo')")
    run.set_defaults(command_function=_run)
    return run


def _offset(text: str) -> int | str:
    return text if text == AUTO else natural(text)


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
    endpoint = endpoint_of(arguments)
    text = TextQueue([parse_text(entry, config.text) for entry in arguments.text], config.text.text_in)
    with ExitStack() as stack:
        stop = stop_on_signals(stack)
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
        header, senses = header_of(bundle, arguments), Senses(config, line)
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
            thinker=open_thinker(arguments, endpoint, config, stack),
            offset=guard,
        )
        try:
            notices = notices_of(bundle)
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
        heat=dict if thermometer is None else thermometer.newest,
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


def _firmware(actuator: Actuator) -> dict[str, str]:
    """Build and dictionary of the microcontroller that answers; empty where none does."""
    identity = actuator.identity if isinstance(actuator, Bridge) else None
    return {} if identity is None else {"firmware": f"{identity.build:08x}", "dictionary": f"{identity.dictionary:08x}"}


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
