"""What comes after a run, or is asked while one goes on: `copresence dump`, `replay` and `trace`."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from device.bundle import Bundle
from device.control import ControlError, ask
from device.dump import Dump, DumpError
from device.engine.opening import open_engine
from device.recorder import FlightRecorder
from device.signature import Trust
from device.trace import TraceError, trace, write

ERRORS = (ControlError, DumpError, TraceError)
DIFFERS = 1  # exit status


def add_commands(commands: Any) -> None:
    """Their parsers; what each does is its default `command_function`."""
    dump = commands.add_parser(
        "dump", help="have the running companion write down its last minute", description="Prints the path of the dump (an MCAP file)."
    )
    dump.add_argument("--pid", type=int, metavar="N", help="of which companion, where several run")
    dump.set_defaults(command_function=_dump)
    replay = commands.add_parser(
        "replay",
        help="run the loop again on a dump and compare every output bit for bit",
        description=f"Exit status 0: everything was equal; {DIFFERS}: the first tick and tensor that differ are named.",
    )
    replay.add_argument("dump", type=Path, help="a dump of a run with --record-raw")
    replay.add_argument("--bundle", required=True, help="the bundle of that run")
    replay.add_argument("--engine", type=Path, metavar="DIR", help="the TensorRT engine of that run (default: ONNX Runtime)")
    replay.add_argument("--unproven", action="store_true", help="as for run")
    replay.set_defaults(command_function=_replay)
    tracing = commands.add_parser(
        "trace",
        help="make a trace for a browser's tracing page of an event log or a dump",
        description="Open the trace at https://ui.perfetto.dev or chrome://tracing; nothing is uploaded.",
    )
    tracing.add_argument("source", type=Path, metavar="EVENTS|DUMP", help="a file of 'copresence run --events', or a dump")
    tracing.add_argument("--out", type=Path, required=True, metavar="TRACE.json")
    tracing.set_defaults(command_function=_trace)


def answer(recorder: FlightRecorder, asked: str) -> dict[str, Any]:
    """What a running companion says on its control socket."""
    if asked != "dump":
        return {"fault": f"it does not know what {asked!r} is; update copresence on both sides"}
    wish = recorder.request("command")
    wish.done.wait()
    return wish.outcome()


def _dump(arguments: argparse.Namespace) -> int:
    told = ask("dump", arguments.pid)
    if "file" not in told:
        raise ControlError(f"the companion could not write a dump: {told.get('fault')}; name a folder with 'copresence run --dumps'")
    print(told["file"])
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    from device.replay import replay, require_bundle, require_replayable

    dump = Dump.read(arguments.dump)
    require_replayable(dump)
    # What this machine does not run it does not replay either; an older release than its last may be looked into.
    trust = Trust.of_machine(None, None, allow_downgrade=True)
    bundle = Bundle.open(arguments.bundle, trust, arguments.unproven)
    require_bundle(dump, bundle)
    with ExitStack() as stack:
        outcome = replay(dump, open_engine(arguments.engine, bundle, trust, stack))
    if outcome.difference is None:
        print(f"{outcome.ticks} ticks, {outcome.lost} lost: every output is bit for bit what was recorded")
        return 0
    print(f"{outcome.difference}; {outcome.ticks - 1} ticks before it were equal")
    return DIFFERS


def _trace(arguments: argparse.Namespace) -> int:
    events = trace(arguments.source)
    write(arguments.out, events)
    print(f"{arguments.out}: {sum(event['name'] == 'capture' for event in events)} ticks; open it at https://ui.perfetto.dev")
    return 0
