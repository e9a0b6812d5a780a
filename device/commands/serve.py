"""`copresence serve`: the loop for who connects, by a page or by OpenAI's Realtime API."""

from __future__ import annotations

import argparse
import os
import re
import secrets
import sys
from contextlib import ExitStack
from typing import Any

from device import playout_offset
from device.bundle import Bundle
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
from device.engine.opening import open_engine
from device.events import EventLog
from device.realtime import RealTime
from device.signature import Trust

JITTER_BUFFER_MS = 120  # six packets of 20 ms: 50 ms of jitter lose nothing, and at 80 and 100 ms one tick in 55 and 110, measured
TOKEN_VARIABLE = "COPRESENCE_TOKEN"


def add_command(commands: Any) -> None:
    """`copresence serve`."""
    serve = commands.add_parser(
        "serve",
        help="run a bundle for who connects: a page to talk to, and OpenAI's Realtime API",
        description="Runs a bundle for one peer at a time, over a WebSocket that speaks OpenAI's Realtime API, with a page to talk to. "
        f"The key that peers need is made anew at each start, or taken from ${TOKEN_VARIABLE}.",
    )
    serve.add_argument("--bundle", required=True, help=BUNDLE_HELP)
    serve.add_argument("--events", metavar="FILE", help="JSON lines, one a tick; '-' is standard output")
    add_shared(serve)
    add_think(serve)
    serve.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="listen here (default: 127.0.0.1, this machine alone)")
    serve.add_argument("--port", type=natural, default=8765, metavar="N", help="default: 8765; 0: any that is free")
    serve.add_argument("--no-token", action="store_true", help="whoever can connect may talk")
    serve.add_argument(
        "--playout-offset-ms",
        type=natural,
        default=playout_offset.ON_FILES_MS,
        metavar="MS",
        help=f"from a tick's edge to its speech (default: {playout_offset.ON_FILES_MS})",
    )
    serve.add_argument(
        "--jitter-buffer-ms",
        type=natural,
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
        echo_canceller=None,
        text=[],
        **network,
    )


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
    endpoint = endpoint_of(arguments)
    trust = Trust.of_machine(arguments.keys, arguments.state, arguments.allow_downgrade)
    bundle = Bundle.open(arguments.bundle, trust, arguments.unproven)
    with ExitStack() as trial:  # what cannot be asked is said now, not to the first who comes
        open_thinker(arguments, endpoint, bundle.config, trial)
    said = sys.stderr if arguments.events == "-" else sys.stdout
    with ExitStack() as stack:
        stop = stop_on_signals(stack)
        engine = open_engine(arguments.engine, bundle, trust, stack)
        if trust:
            trust.memory.remember(bundle.version, bundle.path)
        events = EventLog(arguments.events, patient=False)
        stack.callback(events.close)
        offset_ms, buffer_ms = arguments.playout_offset_ms, arguments.jitter_buffer_ms
        companion = Companion(
            bundle.config,
            bundle.name,
            engine,
            events,
            arguments.seed,
            offset_ms,
            buffer_ms,
            open_thinker=lambda visit: open_thinker(arguments, endpoint, bundle.config, visit),
        )
        server = Server(companion, arguments.host, arguments.port, token)
        stack.callback(server.close)
        server.start()
        key = "none is needed" if token is None else token
        print(f"a page to talk to:  {server.address}/{'' if token is None else '#' + token}", file=said)
        print(f"for OpenAI clients: base URL {server.address}/v1, API key: {key}", file=said, flush=True)
        if arguments.think is not None:
            print(
                f"of what peers say and show, the last seconds go to {arguments.think} whenever the companion asks", file=said, flush=True
            )
        if arguments.host not in LOOPBACK:
            warning = (
                "sound, pictures and the key travel unencrypted; browsers lend microphone and camera to https and to this machine only"
            )
            print(f"copresence: --host {arguments.host}: {warning}. Put a proxy with TLS before it, or use ssh -L", file=sys.stderr)
        for notice in notices_of(bundle):
            events.put(notice)
        if not arguments.no_priority:
            privileges = stack.enter_context(RealTime())
            events.put(privileges.event)
            if advice := privileges.advice():
                print(f"copresence: {advice}", file=sys.stderr)
        companion.keep_company(header_of(bundle, arguments), stop)
    if events.fault:
        print(f"copresence: --events is incomplete: {events.fault}; free space or name another place", file=sys.stderr)
    return WRITE_ERROR if events.fault else 0
