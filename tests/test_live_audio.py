"""Live sound on a real PulseAudio server: a room whose sound is the microphone, and a speaker that is recorded."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from test_loop import RATE, TICK, noise, write_bundle

from device import loopback

NEEDED = ("pulseaudio", "pactl", "paplay", "parec")

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("pyaudio") is None, reason="PyAudio is not installed (extra 'board')"),
    pytest.mark.skipif(
        any(shutil.which(program) is None for program in NEEDED), reason="pulseaudio and pulseaudio-utils are not installed"
    ),
]

Environment = dict[str, str]


@contextlib.contextmanager
def pulseaudio(folder: Path, *modules: str) -> Iterator[Environment]:
    """A PulseAudio server of our own with these modules; programs get at it by the environment."""
    socket = folder / "socket"
    (folder / ".asoundrc").write_text("pcm.!default { type pulse }\nctl.!default { type pulse }\n")
    environment = {
        **os.environ,
        "HOME": str(folder),
        "XDG_RUNTIME_DIR": str(folder),
        "PULSE_SERVER": f"unix:{socket}",
        "PULSE_LATENCY_MSEC": "20",  # without it the plugin moves two seconds at a time
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    loads = [f"--load={module}" for module in (f"module-native-protocol-unix socket={socket} auth-anonymous=1", *modules)]
    command = ["pulseaudio", "-n", "--daemonize=no", "--exit-idle-time=-1", "--disable-shm=yes", *loads]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while subprocess.run(["pactl", "info"], env=environment, capture_output=True).returncode:
            if time.monotonic() > deadline or server.poll() is not None:
                pytest.skip("PulseAudio does not start here")
            time.sleep(0.1)
        yield environment
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture(scope="module")
def sound_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """Null sinks `room`, whose monitor is the default microphone, and `speaker`, the default output."""
    sinks = [f"module-null-sink sink_name={name} rate=16000 channels=1" for name in ("room", "speaker")]
    with pulseaudio(tmp_path_factory.mktemp("pulse"), *sinks) as environment:
        for default in (["set-default-source", "room.monitor"], ["set-default-sink", "speaker"]):
            subprocess.run(["pactl", *default], env=environment, check=True)
        yield environment


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "echo")


def run(environment: Environment, bundle: Path, tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    events = tmp_path / "events.jsonl"
    command = [sys.executable, "-m", "device.cli", "run", "--bundle", str(bundle), "--events", str(events), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=40)
    assert done.returncode == 0, done.stderr
    assert "jack" not in done.stderr, "what PortAudio's search prints is kept off the terminal"
    return [json.loads(line) for line in events.read_text().splitlines()]


def lags(reference: np.ndarray, recorded: np.ndarray, piece: int) -> list[int]:
    """By how much each piece of `recorded` comes after the same sound in `reference`; pieces that are nowhere in it are left out."""
    found = []
    for start in range(0, len(recorded) - piece, piece):
        part = recorded[start : start + piece]
        size = len(reference) + piece
        correlation = np.fft.irfft(np.fft.rfft(reference, size) * np.conj(np.fft.rfft(part, size)), size)[: len(reference)]
        best = int(np.argmax(correlation))
        energy = np.linalg.norm(reference[best : best + piece]) * np.linalg.norm(part)
        if correlation[best] > 0.9 * energy > 0:
            found.append(start - best)
    return found


def test_nothing_is_lost_silently(sound_server: Environment, bundle: Path, tmp_path: Path) -> None:
    sound, piece = noise(14 * RATE), RATE // 4
    soundfile.write(tmp_path / "room.wav", sound, RATE)
    record = ["parec", "--device=speaker.monitor", "--format=float32le", "--rate=16000", "--channels=1", "--latency-msec=20"]
    with (tmp_path / "speaker.raw").open("wb") as raw:
        recorder = subprocess.Popen(record, env=sound_server, stdout=raw)
        player = subprocess.Popen(["paplay", "--device=room", str(tmp_path / "room.wav")], env=sound_server)
        try:
            events = run(sound_server, bundle, tmp_path, "--seconds", "4")
        finally:
            for child in (player, recorder):
                child.terminate()
                child.wait(10)
    header, summary = events[0], events[-1]
    assert (header["mic"], header["speaker"]) == ("live", "live"), "the default where there are devices"
    assert summary["input_callback_errors"] == summary["output_callback_errors"] == 0
    losses = [event for event in events if event["event"] in ("loss", "recovery")]
    found = lags(sound, np.fromfile(tmp_path / "speaker.raw", np.float32), piece)
    assert len(found) >= 12 - 2 * len(losses), "the engine repeats what it hears, so the speaker plays what the room did"
    assert np.count_nonzero(np.diff(found)) <= len(losses), "and every slip is in the events"


LISTEN_TO_ONESELF = """
import sys
import numpy as np
from contextlib import ExitStack
from device.live_audio import open_sound
from device.steering import Steering
from device.ticker import RealtimeTicker

tick, ticks = 3200, 15
stack = ExitStack()
mic, speaker = open_sound(16000, tick, "", "", "audio", stack)
ticker, steering = RealtimeTicker(200_000_000), Steering(200_000_000, mic, "audio")
captured, voice = np.zeros((ticks, tick), np.float32), np.zeros((ticks, tick), np.float32)
random = np.random.default_rng(0)
for device in (mic, speaker, ticker):
    device.start()
for k in range(ticks):
    edge = ticker.wait(k)
    end = edge.tick * tick + tick
    mic.sync(end)
    speaker.sync(end, ticker.origin_ns + edge.edge_ns)
    ticker.steer(steering.shift_ns(ticker.origin_ns, edge.edge_ns))
    mic.read(end - tick, captured[k])
    speaker.heard(end - tick, voice[k])
    speaker.put(end + 1600, random.uniform(-0.5, 0.5, tick).astype(np.float32))
stack.close()
np.save(sys.argv[1], np.stack([captured.ravel(), voice.ravel()]))
"""


def test_voice_is_what_the_microphone_hears_of_it(sound_server: Environment, tmp_path: Path) -> None:
    environment = {**sound_server, "PULSE_SOURCE": "speaker.monitor"}
    subprocess.run([sys.executable, "-c", LISTEN_TO_ONESELF, str(tmp_path / "heard.npy")], env=environment, check=True, timeout=30)
    mic, voice = np.load(tmp_path / "heard.npy")
    found = lags(mic, voice[RATE:], RATE // 8)
    assert len(found) >= 4
    assert abs(np.median(np.array(found) + RATE)) <= 80, "within 5 ms"


LISTEN_TO_CHIRPS = """
import sys
from contextlib import ExitStack
import numpy as np
from device import loopback
from device.live_audio import open_sound

loopback.CHIRPS = 16
with ExitStack() as stack:
    mic, speaker = open_sound(16000, 3200, "", "", "audio", stack)
    heard, voice, due = loopback._play(16000, 200, 150, mic, speaker, stack)
np.savez(sys.argv[1], heard=heard, voice=voice, due=due)
"""


def test_a_chirp_is_in_voice_within_a_millisecond_of_where_the_microphone_hears_it(sound_server: Environment, tmp_path: Path) -> None:
    environment = {**sound_server, "PULSE_SOURCE": "speaker.monitor"}  # the echo path: a wire
    for _ in range(3):  # on a machine at its limit the server itself stutters
        command = [sys.executable, "-c", LISTEN_TO_CHIRPS, str(tmp_path / "heard.npz")]
        subprocess.run(command, env=environment, check=True, timeout=90)
        kept = np.load(tmp_path / "heard.npz")
        apart = []
        for start in kept["due"]:
            found = [loopback._find(kept[name][start : start + 3 * TICK], loopback.chirp(RATE)) for name in ("heard", "voice")]
            if all(found):
                apart.append((found[0][0] - found[1][0]) * 1000 / RATE)
        print(np.round(apart, 2))
        if len(apart) >= 8 and np.percentile(np.abs(apart), 75) <= 1:
            return
    pytest.fail(f"chirps are apart by {apart} ms")


def test_a_loopback_is_measured_and_the_floor_is_printed(sound_server: Environment) -> None:
    environment = {**sound_server, "PULSE_SOURCE": "speaker.monitor"}
    command = [sys.executable, "-m", "device.cli", "doctor", "--loopback", "--playout-offset-ms", "150"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("reaction floor") and "= tick 200 + offset 150 + hardware" in last
    level = next(line for line in done.stdout.splitlines() if line.startswith("level"))
    assert abs(float(level.split()[1])) < 1.5, "a wire"


LONG_TICK = 3200  # of the program below

# One card with microphone and speaker: a null sink, whose monitor hears what it plays. It is taken away, and comes back.
UNPLUG = """
import json, subprocess, sys, time
from contextlib import ExitStack
import numpy as np
from scipy.signal import chirp
from device.live_audio import open_sound
from device.steering import Steering
from device.ticker import RealtimeTicker

TICK, LIMIT = 3200, 400
SINK = ["module-null-sink", "sink_name=card", "rate=16000", "channels=1", "norewinds=1"]
stack, steps = ExitStack(), []
mic, speaker = open_sound(16000, TICK, "", "", "audio", stack)
ticker, steering = RealtimeTicker(200_000_000), Steering(200_000_000, mic, "audio")
captured, voice = np.zeros((LIMIT, TICK), np.float32), np.zeros((LIMIT, TICK), np.float32)
sound = np.zeros(TICK, np.float32)
sound[:1600] = 0.5 * chirp(np.arange(1600) / 16000, 300, 0.1, 5000) * np.hanning(1600)
for device in (mic, speaker, ticker):
    device.start()

def pactl(*words):
    return subprocess.run(["pactl", *words], check=True, capture_output=True, text=True).stdout

def run(until):
    edge = ticker.wait(run.tick)
    end = edge.tick * TICK + TICK
    mic.sync(end)
    speaker.sync(end, ticker.origin_ns + edge.edge_ns)
    ticker.steer(steering.shift_ns(ticker.origin_ns, edge.edge_ns))
    if edge.tick >= LIMIT:
        sys.exit("it did not come back")
    mic.read(end - TICK, captured[edge.tick])
    speaker.heard(end - TICK, voice[edge.tick])
    speaker.put(end + 1600, sound)
    run.tick = edge.tick + 1
    return until()

run.tick = 0
while not run(lambda: run.tick >= 12):
    pass
steps.append(run.tick)
pactl("unload-module", "module-null-sink")
gone = mic.counts["inserted_samples"], speaker.counts["unplayed_samples"]
while not run(lambda: min(mic.counts["inserted_samples"] - gone[0], speaker.counts["unplayed_samples"] - gone[1]) >= 8 * TICK):
    pass
pactl("load-module", *SINK)
steps.append(run.tick)
begin = time.monotonic()
back = []
while not run(lambda: len(back) == 2):
    for device in (mic, speaker):
        if device not in back and device.track.elapsed_ns() < 2e8 and device.track.settled.is_set():
            back.append(device)
took_s = time.monotonic() - begin
steps.append(run.tick)
while not run(lambda: run.tick >= steps[-1] + 12):
    pass
stack.close()
np.save(sys.argv[1], np.stack([captured[:run.tick].ravel(), voice[:run.tick].ravel(), np.resize(sound, run.tick * TICK)]))
print(json.dumps({"steps": steps, "took_s": took_s, **mic.counts, **speaker.counts}))
"""


def chirps(sound: np.ndarray, chirp: np.ndarray) -> list[int]:
    """Where in `sound` it is found, once in each two ticks."""
    found = []
    for start in range(0, len(sound) - 2 * LONG_TICK, 2 * LONG_TICK):
        part = sound[start : start + 2 * LONG_TICK]
        match = np.correlate(part, chirp, "valid")
        best = int(np.argmax(match))
        if match[best] > 0.7 * np.linalg.norm(chirp) * np.linalg.norm(part[best : best + len(chirp)]) > 0.1:
            found.append(start + best)
    return found


def test_a_card_that_is_pulled_out_is_silence_and_back_when_it_is_plugged_in(tmp_path: Path) -> None:
    with pulseaudio(tmp_path, "module-null-sink sink_name=card rate=16000 channels=1 norewinds=1") as environment:
        done = subprocess.run(
            [sys.executable, "-c", UNPLUG, str(tmp_path / "heard.npy")], env=environment, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print(f"back after {told['took_s']:.2f} s")
    mic, voice, sound = np.load(tmp_path / "heard.npy")
    away, plugged, back = (step * LONG_TICK for step in told["steps"])
    assert told["input_reopened"] >= 1 and told["output_reopened"] >= 1
    assert told["input_callback_errors"] == told["output_callback_errors"] == 0
    gone = slice(away + 2 * LONG_TICK, plugged)
    assert not mic[gone].any() and not voice[gone].any(), "silence, of the same length"
    for stream in (mic, voice):
        assert len(chirps(stream[back:], sound[:1600])) >= 3, "and everything is as before"
    assert told["inserted_samples"] >= plugged - away - 4 * LONG_TICK, "and counted"


def test_the_ticks_follow_the_sound_devices_clock(sound_server: Environment, bundle: Path, tmp_path: Path) -> None:
    events = run(sound_server, bundle, tmp_path, "--seconds", "14", "--no-priority")
    assert events[0]["master"] == "audio", "the default on live devices"
    clock = [event for event in events if event["event"] == "clock"]
    assert "locked" in [event["state"] for event in clock]
    assert abs(events[-1]["clock"]["ppm"]) <= 500
    shifted = events[-1]["inserted_samples"] + events[-1]["dropped_samples"]
    assert shifted < 14 * RATE // 10, (shifted, clock)


def test_a_run_outlives_its_sound_server(sound_server: Environment, bundle: Path, tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    command = [sys.executable, "-m", "device.cli", "run", "--bundle", str(bundle), "--events", str(events), "--seconds", "4"]
    child = subprocess.Popen(command, env=sound_server, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (events.exists() and events.read_text().count("\n") > 10):
        time.sleep(0.02)
    subprocess.run(["pactl", "exit"], env=sound_server, check=True)
    _, errors = child.communicate(timeout=20)
    assert child.returncode == 0, errors
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    summary = lines[-1]
    assert (summary["event"], summary["ended_by"]) == ("summary", "seconds")
    assert summary["ticks"] + summary["gap_ticks"] == 40, "silence at the right rate"
    assert summary["inserted_samples"] >= 15 * TICK, "and counted"
