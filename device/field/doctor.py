"""`copresence doctor`: one line for each thing that a companion needs: well, or what is wrong and what to do.

A companion that runs is asked by its status, for its devices are its own; one that does not is helped by trying them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from device import playout_offset, thermal
from device.bundle import Bundle, BundleError
from device.camera import is_device, is_recording
from device.commands.shared import natural
from device.config import AudioConfig, ConfigError, ModelConfig
from device.engine.opening import open_engine
from device.engine.record import RECORD_NAME
from device.field import board
from device.field.settings import SETTINGS_FILE, Settings, SettingsError, mistakes
from device.live_audio import LIVE, live_device
from device.loopback import Loopback, LoopbackError, measure_loopback, render
from device.portaudio import available
from device.realtime import PRIORITY
from device.signature import KeyFileError, Trust, VersionMemoryError
from device.tensors import TensorMismatch
from firmware_bridge.bridge import Bridge
from firmware_bridge.errors import BridgeError
from firmware_bridge.port import find_port

OK, WARNING, BAD = "ok", "warning", "bad"
STATUS_OF = {OK: 0, WARNING: 1, BAD: 2}  # what the program exits with: that of the worst
STALE_S = 5.0
FREE_WARNING_MB, FREE_BAD_MB = 500, 50  # a release takes 300
HOT_C, TOO_HOT_C = 85.0, 95.0  # Jetson's GPU is slowed at 99 °C
OLD_FRAME_S = 1.0  # from there on the model is shown black
FULL_CLOCK = 0.95
SILENT_DBFS = -90.0  # a microphone that is there has noise
EARLIEST_YEAR = 2026  # a clock before that was never set


class Finding(NamedTuple):
    """One line. `remedy` is empty where nothing is to be done."""

    check: str
    level: str
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Place:
    """The machine that is examined: its configuration file, and where its file system begins."""

    config: Path = SETTINGS_FILE
    root: Path = Path("/")

    @property
    def settings(self) -> Settings:
        """Those of the file, or the defaults where it is no use."""
        try:
            return Settings.read(self.config)
        except SettingsError:
            return Settings({})

    @property
    def status(self) -> dict[str, Any]:
        """What the running companion says of itself; empty if none runs."""
        status = self.json("run/copresence/status.json")
        return status if status and (time.monotonic_ns() - status["at_ns"]) / 1e9 < STALE_S else {}

    def json(self, name: str) -> dict[str, Any]:
        return board.read_json(self.root / name)

    def text(self, name: str) -> str:
        """First line of a file; empty where there is none."""
        with contextlib.suppress(OSError):
            return (self.root / name).read_text(errors="replace").strip("\0\n ").split("\n")[0]
        return ""

    def ask(self, *command: str) -> str:
        """What a program of the system prints; empty where there is none, or it fails."""
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""


def add_command(commands: Any) -> None:
    """`copresence doctor`."""
    command = commands.add_parser("doctor", help="what is wrong with this board, and what to do about it")
    command.add_argument("--json", action="store_true", help="the findings as JSON")
    command.add_argument(
        "--loopback", action="store_true", help="instead: latency and level from speaker to microphone, by chirps, and the reaction floor"
    )
    command.add_argument("--bundle", help="of --loopback: whose tick and engine it is for (default: the configuration's, if it is there)")
    command.add_argument("--mic", metavar="SRC", default=LIVE, help="of --loopback: 'live' (default) or 'live:DEVICE'")
    command.add_argument("--speaker", metavar="DST", default=LIVE, help="of --loopback: 'live' (default) or 'live:DEVICE'")
    command.add_argument("--playout-offset-ms", type=natural, metavar="MS", help="of --loopback (default: measured)")
    command.add_argument("--config", type=Path, default=SETTINGS_FILE, metavar="FILE", help=f"default: {SETTINGS_FILE}")
    command.set_defaults(command_function=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0 if all is well, 1 with warnings, 2 if something is bad."""
    if arguments.loopback:
        print(render(_loopback(arguments)))
        return 0
    findings = examine(Place(arguments.config))
    if arguments.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1, ensure_ascii=False))
    else:
        for finding in findings:
            print(sentence(finding, sys.stdout.isatty()))
    return max(STATUS_OF[finding.level] for finding in findings)


def _loopback(arguments: argparse.Namespace) -> Loopback:
    """Raises LoopbackError, AudioDeviceError, and what opening a bundle and its engine raises."""
    settings = Place(arguments.config).settings
    rate_hz, tick_ms = AudioConfig().sample_rate_hz, ModelConfig.tick_ms
    offset_ms = settings["audio.playout_offset_ms"] if arguments.playout_offset_ms is None else arguments.playout_offset_ms
    mic, speaker = live_device(arguments.mic), live_device(arguments.speaker)
    if mic is None or speaker is None:
        raise LoopbackError("--loopback: --mic and --speaker are 'live' or 'live:DEVICE'; a file returns no sound")
    if arguments.bundle is not None or Path(settings["bundle.path"]).is_dir():
        bundle = Bundle.open(arguments.bundle or settings["bundle.path"], unproven=True)
        rate_hz, tick_ms = bundle.config.audio.sample_rate_hz, bundle.config.tick_ms
        if not offset_ms:
            with contextlib.ExitStack() as stack:
                engine = open_engine(None if arguments.bundle else settings.engine_folder(), bundle, None, stack)
                offset_ms = playout_offset.measure(bundle.config, engine)
    return measure_loopback(rate_hz, tick_ms, offset_ms or playout_offset.ON_FILES_MS, mic, speaker)


def sentence(finding: Finding, colours: bool = False) -> str:
    """One line for people."""
    shown = f"{finding.level:8}{finding.check:14}{finding.what}{' → ' if finding.remedy else ''}{finding.remedy}"
    colour = {OK: "32", WARNING: "33", BAD: "31"}[finding.level]
    return f"\033[{colour}m{shown[:8]}\033[0m{shown[8:]}" if colours else shown


def examine(place: Place) -> list[Finding]:
    """All checks, in the order of CHECKS; one that breaks is a finding itself."""
    return [_safely(name, check, place) for name, check in CHECKS.items()]


def _safely(name: str, check: Callable[[Place], Finding], place: Place) -> Finding:
    try:
        return check(place)._replace(check=name)
    except Exception as error:  # noqa: BLE001 - the other checks are wanted all the same
        return Finding(name, BAD, f"cannot be examined ({type(error).__name__}: {error})", "report this with 'copresence pull'")


def _finding(level: str, what: str, remedy: str = "") -> Finding:
    return Finding("", level, what, remedy)


def _ok(what: str) -> Finding:
    return _finding(OK, what)


# --- the checks ---------------------------------------------------------------------------------------------------


def _configuration(place: Place) -> Finding:
    found = mistakes(place.config)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return _finding(BAD, f"{found[0]}{more}", "copresence config --check") if found else _ok(str(place.config))


def _companion(place: Place) -> Finding:
    status = place.status
    if not status:
        return _finding(BAD, "it does not run", "systemctl status copresence; copresence logs")
    sick = [name for name, well in status["health"].items() if not well]
    stats = status["stats"]
    what = f"{stats['ticks']} ticks, {stats['missed']} missed, {stats['late']} late; engine {stats['engine_ms'][1]} ms (p99)"
    return _finding(WARNING, f"not well: {', '.join(sick)}; {what}", "copresence logs --level warning") if sick else _ok(what)


def _release(place: Place) -> Finding:
    current, good = ((place.root / "opt/copresence" / link) for link in ("current", "good"))
    names = [os.readlink(link).rpartition("/")[2] if link.is_symlink() else "" for link in (current, good)]
    back = place.json("opt/copresence/rolled-back.json")
    if not names[0]:
        return _finding(WARNING, "none is installed under /opt/copresence", "make flash HOST=user@board")
    if back:
        return _finding(WARNING, f"{names[0]}, after {back.get('from')} was given up: {back.get('reason')}", "flash a mended release")
    if names[0] != names[1]:
        return _finding(WARNING, f"{names[0]} is not confirmed yet", "wait: five healthy minutes confirm it")
    return _ok(f"{names[0]}, confirmed")


def _bundle(place: Place) -> Finding:
    settings = place.settings
    try:
        trust = Trust.of_machine(settings["bundle.keys"] or None, settings["bundle.state"])
        bundle = Bundle.open(settings["bundle.path"], trust, settings["bundle.unproven"])
    except (BundleError, KeyFileError, VersionMemoryError, ConfigError, TensorMismatch) as error:
        what, _, remedy = str(error).rpartition("; ")
        return _finding(BAD, what or remedy, remedy if what else "")
    what = f"{bundle.name} {bundle.digest[:12]}, signature {bundle.signature}"
    if bundle.signed_by is None:
        return _finding(WARNING, f"{what}: this board runs whatever it is given", "put a public key into /etc/copresence/keys")
    return _ok(what)


def _engine(place: Place) -> Finding:
    verified = place.json("run/copresence-engine/verified.json")
    running = place.status.get("versions", {})
    if not verified:
        return _finding(BAD, "not verified since the boot", "systemctl start copresence-engine; journalctl -u copresence-engine")
    if running and running["bundle_sha256"] != verified["bundle_sha256"]:
        return _finding(BAD, "another bundle runs than the one that was verified", "systemctl restart copresence")
    return _ok(f"{verified['engine']}, {verified['p50_ms']} ms a tick, p99 {verified['p99_ms']}")


def _libraries(place: Place) -> Finding:
    folder = place.settings.engine_folder()
    if folder is None:
        return _ok(f"ONNX Runtime {importlib.metadata.version('onnxruntime')}; no TensorRT is used")
    missing = [name for name in ("tensorrt", "pycuda") if importlib.util.find_spec(name) is None]
    if missing:
        return _finding(BAD, f"{' and '.join(missing)} cannot be imported", "flash again; TensorRT comes with JetPack")
    version = importlib.metadata.version("tensorrt")
    built = board.read_json(folder / RECORD_NAME).get("tensorrt")
    cuda = place.json("usr/local/cuda/version.json").get("cuda", {}).get("version", "of unknown version")
    if built and built != version:
        return _finding(BAD, f"TensorRT {version}, and the engine is of {built}", "systemctl restart copresence, which builds it anew")
    return _ok(f"TensorRT {version}, CUDA {cuda}")


def _power(place: Place) -> Finding:
    said = place.ask("nvpmodel", "-q")
    if said:
        mode = re.search(r"NV Power Mode: *(\S+)\s+(\d+)", said)
        if mode is None:
            return _finding(WARNING, f"nvpmodel says {said!r}", "nvpmodel -q")
        name, number = mode.groups()
        return _ok(f"{name} (mode 0)") if number == "0" else _finding(WARNING, f"{name} (mode {number})", "nvpmodel -m 0")
    governor = place.text("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor and governor not in ("performance", "schedutil"):
        return _finding(WARNING, f"CPU governor '{governor}'", "cpupower frequency-set -g performance")
    return _ok(f"CPU governor '{governor}'" if governor else "the board reports no power modes")


def _clocks(place: Place) -> Finding:
    slow, seen = [], 0
    for now, most in _frequencies(place.root):
        seen += 1
        with contextlib.suppress(OSError, ValueError):
            share = int(now.read_text()) / int(most.read_text())
            if share < FULL_CLOCK:
                slow.append(f"{now.parent.parent.name if now.parent.name == 'cpufreq' else now.parent.name} at {share:.0%}")
    if slow:
        return _finding(WARNING, f"held down: {', '.join(slow[:4])}", "jetson_clocks, or performance as the CPU's governor")
    return _ok(f"{seen} clocks at their highest" if seen else "the board reports no clocks")


def _frequencies(root: Path) -> list[tuple[Path, Path]]:
    """(least that is allowed, most that is possible): what runs below its most is let run below it."""
    cpus = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_min_freq")
    gpus = [path for path in (root / "sys/class/devfreq").glob("*/min_freq") if re.search(r"gpu|gv11b|ga10b|gb10b", path.parent.name)]
    return [(path, path.with_name("cpuinfo_max_freq")) for path in sorted(cpus)] + [
        (path, path.with_name("max_freq")) for path in sorted(gpus)
    ]


def _microphone(place: Place) -> Finding:
    status, choice = place.status, place.settings["audio.microphone"]
    if status:
        level = status["senses"]["mic_dbfs"]
        if not status["health"].get("microphone", True):
            return _finding(BAD, "it has stopped", "reseat its cable, then: arecord -l; copresence logs --level warning")
        if choice != "none" and level < SILENT_DBFS:
            return _finding(WARNING, f"it delivers silence ({level} dBFS)", "switch it on: the mute switch, then alsamixer")
        return _ok(f"{status['versions']['mic']}, {level} dBFS, {status['stats']['overruns']} overruns")
    return _sound(choice, 0, "microphone", "arecord -l")


def _speaker(place: Place) -> Finding:
    status, choice = place.status, place.settings["audio.speaker"]
    if status:
        if not status["health"].get("speaker", True):
            return _finding(BAD, "it has stopped", "reseat its cable, then: aplay -l; copresence logs --level warning")
        return _ok(f"{status['versions']['speaker']}, {status['stats']['underruns']} underruns")
    return _sound(choice, 1, "speaker", "aplay -l")


def _sound(choice: str, which: int, name: str, lists: str) -> Finding:
    if choice != "live":
        return _ok(choice)
    if available()[which]:
        return _ok("the default device is there")
    return _finding(BAD, f"there is no default {name}", f"connect one, and see that the user is in the group audio: {lists}")


def _camera(place: Place) -> Finding:
    status, choice = place.status, place.settings["camera.source"]
    if choice == "none":
        return _ok("none is configured")
    if status:
        age_s = status["stats"]["camera_s"]
        if age_s > OLD_FRAME_S:
            return _finding(BAD, f"the newest frame is {age_s} s old", "reseat its cable, then: copresence logs --level warning")
        return _ok(f"{status['versions']['camera']}, newest frame {age_s} s old, brightness {status['senses']['brightness']:.0%}")
    kind, _, which = str(choice).partition(":")
    path = which or "/dev/video0" if kind == "v4l2" else choice
    if (kind == "v4l2" or is_recording(choice)) and not Path(path).exists():
        return _finding(BAD, f"{path} does not exist", "connect the camera, or correct 'camera.source' in the configuration")
    return _ok(f"{choice}; whether frames come is known once the companion runs" if is_device(choice) else choice)


def _bridge(place: Place) -> Finding:
    status, port = place.status, place.settings["bridge.port"]
    if port == "none":
        return _ok("none is configured")
    if status:
        state = status["bridge"].get("state", "gone")
        what = f"{state}, {status['bridge'].get('round_trip_ms')} ms, {status['bridge'].get('faults')} faults"
        if state == "gone":
            return _finding(BAD, "no link to the microcontroller", "check power and cable, then: copresence logs --grep bridge")
        return _ok(what) if state == "ARMED" else _finding(WARNING, what, "copresence logs --grep bridge; a restart arms it")
    try:
        bridge = Bridge(find_port() if port == "auto" else port)
        bridge.start()
    except (BridgeError, OSError) as error:
        return _finding(BAD, str(error).partition(";")[0], str(error).partition("; ")[2])
    build = f"{bridge.identity.build:08x}" if bridge.identity else "?"
    bridge.close()
    return _ok(f"firmware {build} answers")


def _realtime(place: Place) -> Finding:
    unit = "flash again: the unit has LimitRTPRIO and LimitMEMLOCK"
    pid = place.status.get("pid")
    if not place.settings["realtime.priority"]:
        return _finding(WARNING, "switched off", "set 'realtime.priority' to true")
    if pid:
        policy = os.sched_getscheduler(pid) & ~os.SCHED_RESET_ON_FORK
        if policy != os.SCHED_FIFO:
            return _finding(WARNING, "the loop runs without priority", unit)
        locked = re.search(r"VmLck:\s+(\d+)", (place.root / f"proc/{pid}/status").read_text())
        if locked is None or int(locked[1]) == 0:
            return _finding(WARNING, "its memory is not locked", unit)
        return _ok(f"SCHED_FIFO {os.sched_getparam(pid).sched_priority}, {int(locked[1]) // 1024} MB locked")
    allowed = resource.getrlimit(resource.RLIMIT_RTPRIO)[1]
    if os.geteuid() != 0 and allowed < PRIORITY:
        return _finding(WARNING, f"this user may not have priority {PRIORITY}; the service may", "ask again while the companion runs")
    return _ok("permitted; what the companion got shows while it runs")


def _disk(place: Place) -> Finding:
    folders = [Path(place.settings["bundle.state"]), place.root / "opt/copresence"]
    free = {str(path): shutil.disk_usage(path).free >> 20 for path in folders if path.exists()}
    if not free:
        return _finding(BAD, f"{folders[0]} does not exist", "flash again: the unit makes it")
    worst = min(free, key=lambda path: free[path])
    what = f"{free[worst]} MB free in {worst}"
    if free[worst] < FREE_BAD_MB:
        return _finding(BAD, what, "delete old dumps and releases: make flash prunes releases")
    if free[worst] < FREE_WARNING_MB:
        return _finding(WARNING, what, "the next flash needs more: delete old dumps")
    return _ok(what)


def _time(place: Place) -> Finding:
    if time.gmtime().tm_year < EARLIEST_YEAR:
        return _finding(WARNING, f"the clock says {time.strftime('%Y-%m-%d')}; only the logs show it", "set it, or connect a time server")
    if place.ask("timedatectl", "show", "--property=NTPSynchronized", "--value") == "yes":
        return _ok("follows a time server")
    return _ok("is plausible; no time server, and nothing but the logs depends on one")


def _heat(place: Place) -> Finding:
    zones = thermal.read(place.root / "sys").get("zones_c")
    if not zones:
        return _ok("the board reports no temperature")
    zone = max(zones, key=lambda name: zones[name])
    what = f"{zone} {zones[zone]:.0f} °C"
    if zones[zone] >= TOO_HOT_C:
        return _finding(BAD, what, "switch it off and see to its fan and vents")
    return _finding(WARNING, what, "see to its fan and vents") if zones[zone] >= HOT_C else _ok(what)


# A further check is a further row.
CHECKS: dict[str, Callable[[Place], Finding]] = {
    "configuration": _configuration,
    "companion": _companion,
    "release": _release,
    "bundle": _bundle,
    "engine": _engine,
    "libraries": _libraries,
    "power": _power,
    "clocks": _clocks,
    "microphone": _microphone,
    "speaker": _speaker,
    "camera": _camera,
    "bridge": _bridge,
    "real time": _realtime,
    "disk": _disk,
    "time": _time,
    "heat": _heat,
}
