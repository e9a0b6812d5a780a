"""The program `copresence`: its commands, and what becomes of their errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from device.audio import SourceError
from device.bundle import BundleError, copresence_version
from device.calibration import CalibrationError
from device.commands import after, run, serve
from device.commands.shared import UsageError
from device.config import ConfigError
from device.echo_canceller import CancellerMissing
from device.engine import EngineError
from device.errors import complain
from device.field import doctor, logs, pull, settings, top
from device.field.settings import Settings, SettingsError
from device.loopback import LoopbackError
from device.portaudio import AudioDeviceError
from device.reach.limits import ReachError
from device.signature import KeyFileError, VersionMemoryError
from device.tensors import TensorMismatch
from firmware_bridge.body import BodyError
from firmware_bridge.errors import BridgeError

USAGE_ERROR = 2

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
    parser, runs = _parser()
    try:
        arguments = parser.parse_args(argv)
        if arguments.command == "run" and arguments.config is not None:
            runs.set_defaults(**Settings.read(arguments.config).arguments())
            arguments = parser.parse_args(argv)  # what stands on the command line wins
        return int(arguments.command_function(arguments))
    except USER_ERRORS as error:
        complain(f"copresence: {error}")
        return USAGE_ERROR


def _parser() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The whole, and the part that is `run`, whose options a configuration file stands for."""
    parser = argparse.ArgumentParser(prog="copresence", description="Runs an interaction model: one engine launch per tick.")
    parser.add_argument("--version", action="version", version=f"copresence {copresence_version()}")
    commands = parser.add_subparsers(dest="command", required=True)
    runs = run.add_command(commands)
    for module in (serve, settings, doctor, logs, top, pull):
        module.add_command(commands)
    after.add_commands(commands)
    return parser, runs


if __name__ == "__main__":
    sys.exit(main())
