"""The page, in a real browser whose microphone and camera are files of ours: it hears, sees, shows and ends well."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from browser import Browser, browser
from chat_server import ChatServer, calls, says
from test_loop import write_bundle
from test_serve import THINKING

from export.demo import NOISE_RMS, RATE_HZ, SPEECH_RMS, trimmed, write_hands
from export.espeak import speak

TOKEN = "open-sesame"
LOOP_S, UP_S, HAND_S = 8.0, 2.0, (3.5, 6.5)  # the browser plays its files again and again
DIGIT, WORD = 3, "three"
PATIENCE_S = 240  # thirty rounds: on a machine that is slow, ticks get lost

SAID = "[...document.querySelectorAll('#log .says')].map((line) => line.textContent)"
STATE = "document.body.dataset.state"
TILT = "document.querySelector('#face').style.getPropertyValue('--tilt')"
TROUBLE = "document.querySelector('#trouble').textContent"
STATUS = "document.querySelector('#status').textContent"
NOTE_MOUTH = """
window.spoke = false;
new MutationObserver(() => { window.spoke ||= Number(document.querySelector('#mouth').getAttribute('ry')) > 0; })
  .observe(document.querySelector('#mouth'), { attributes: true });
"""
COLOURS = """
(() => {
  const canvas = document.querySelector('#timeline'), { width, height } = canvas;
  const data = canvas.getContext('2d').getImageData(0, 0, width, height).data, seen = new Set();
  for (let i = 0; i < data.length; i += 4 * 37) seen.add(data.slice(i, i + 4).join());
  return seen.size;
})()
"""


class Server:
    """`copresence serve` as its own process, which can be killed and begun again at the same address."""

    def __init__(self, bundle: Path, *options: str) -> None:
        self._bundle, self._options, self._port = bundle, options, "0"
        self.begin()

    def begin(self) -> None:
        command = [sys.executable, "-m", "device.cli", "serve", "--bundle", str(self._bundle), "--port", self._port, "--no-priority"]
        command += self._options
        environment = {**os.environ, "COPRESENCE_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().split()[-1]
        found = re.search(r":(\d+)/", self.url)
        assert found is not None
        self._port = found[1]

    def end(self, how: int = signal.SIGINT) -> None:
        self._process.send_signal(how)
        self._process.communicate()


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """What the browser's fake devices play: somebody says *up*, and a hand that shows three is held up."""
    folder = tmp_path_factory.mktemp("room")
    sound = NOISE_RMS * np.random.default_rng(0).standard_normal(int(LOOP_S * RATE_HZ))
    word = trimmed(speak("up", "en-us+m3", 150, 45))
    start = int(UP_S * RATE_HZ)
    sound[start : start + len(word)] += word * (SPEECH_RMS / np.sqrt(np.mean(word**2)))
    soundfile.write(folder / "room.wav", np.clip(sound, -1, 1), RATE_HZ, subtype="PCM_16")
    write_hands(folder / "room.mkv", [(*HAND_S, DIGIT)], LOOP_S)
    with av.open(str(folder / "room.mkv")) as video, (folder / "room.mjpeg").open("wb") as pictures:
        for packet in video.demux(video=0):
            pictures.write(bytes(packet))
    return (
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={folder / 'room.wav'}",
        f"--use-file-for-fake-video-capture={folder / 'room.mjpeg'}",
    )


@pytest.fixture(scope="module")
def server(companion_bundle: Path) -> Iterator[Server]:
    server = Server(companion_bundle)
    yield server
    server.end()


@pytest.fixture(scope="module")
def visitor(room: tuple[str, ...]) -> Iterator[Browser]:
    """Somebody whose browser lends microphone and camera."""
    with browser(*room, "--use-fake-ui-for-media-stream") as tab:
        yield tab


def screenshot(tab: Browser, repository: Path, name: str) -> None:
    """Kept in build/, to be looked at."""
    (repository / "build").mkdir(exist_ok=True)
    tab.picture(repository / "build" / f"page-{name}.png")


def exceptions(tab: Browser) -> list[str]:
    return [complaint for complaint in tab.complaints if complaint.startswith("Runtime.")]


def test_the_spoken_up_tilts_the_face_and_the_shown_hand_is_read_aloud(server: Server, visitor: Browser, repository: Path) -> None:
    visitor.open(server.url, 1200)
    visitor.value(f"(() => {{ {NOTE_MOUTH} }})()")
    assert (visitor.value(STATE), visitor.value(TILT)) == ("off", "0")
    screenshot(visitor, repository, "before")
    visitor.press("#talk")
    visitor.until(f"{STATE} === 'on'")
    visitor.until(f"{TILT} === '1' && {SAID}.includes('{WORD}') && window.spoke", PATIENCE_S)
    screenshot(visitor, repository, "light")
    assert "look" in visitor.value("document.querySelector('#face').getAttribute('aria-label')"), "who cannot see it is told"
    assert visitor.value("document.querySelector('#log .does').textContent") == "look up"
    assert visitor.value(COLOURS) > 20, "the timeline is drawn"
    assert re.fullmatch(r"\d+ of 200 ms", visitor.value("document.querySelector('#engine').textContent"))
    assert re.fullmatch(r"\d\.\d s old", visitor.value("document.querySelector('#age').textContent"))
    assert visitor.complaints == []
    assert {request.split("/")[2] for request in visitor.requests if "//" in request} == {server.url.split("/")[2]}, "and nothing else"


def test_it_fits_a_phone_by_day_and_by_night(server: Server, visitor: Browser, repository: Path) -> None:
    shades = []
    for dark in (False, True):
        visitor.open(server.url, 360, dark=dark)
        visitor.press("#talk")
        visitor.until(f"{STATE} === 'on'")
        visitor.until(f"{SAID}.length > 0", PATIENCE_S)
        assert visitor.value("document.documentElement.scrollWidth") <= 360
        beside = "[...document.querySelectorAll('button, input, canvas, dl, ol, p')].filter((e) => e.getBoundingClientRect().right > 344)"
        assert visitor.value(f"{beside}.map((e) => e.id)") == [], "nothing sticks out of its card"
        small = "[...document.querySelectorAll('button, input')].filter((e) => e.getBoundingClientRect().height < 44).map((e) => e.id)"
        assert visitor.value(small) == [], "a thumb hits every control"
        shades.append(visitor.value("getComputedStyle(document.documentElement).backgroundColor"))
        screenshot(visitor, repository, "phone-dark" if dark else "phone")
    assert shades[0] != shades[1]
    assert visitor.complaints == []


def test_who_wants_little_motion_gets_poses_without_it(server: Server, visitor: Browser) -> None:
    visitor.open(server.url, 1200, calm=True)
    visitor.press("#talk")
    visitor.until(f"{STATE} === 'on'")
    visitor.until(f"{TILT} === '1'", PATIENCE_S)
    assert visitor.value("document.getAnimations().length") == 0
    assert visitor.value("getComputedStyle(document.querySelector('#head')).transitionDuration") == "0s"
    assert visitor.value(COLOURS) > 20, "the timeline goes on from tick to tick"


def key(tab: Browser, name: str, code: int, text: str = "") -> None:
    for kind in ("keyDown", "keyUp"):
        tab.send(
            "Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, text=text if kind == "keyDown" else ""
        )


def test_keys_alone_reach_every_control_and_each_has_a_name(server: Server, visitor: Browser) -> None:
    visitor.open(server.url, 1200)
    reached = []
    for _ in range(7):
        key(visitor, "Tab", 9)
        reached.append(visitor.value("document.activeElement.id || document.activeElement.type"))
    assert reached == ["talk", "microphone", "camera", "voice", "text", "submit", "log"]
    tree = visitor.send("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "combobox", "image", "log", "status", "heading")
    named = [(node["role"]["value"], node["name"]["value"]) for node in tree if not node["ignored"] and node["role"]["value"] in roles]
    assert {("button", name) for name in ("Start talking", "Microphone", "Camera", "Voice", "Send")} <= {*named}
    assert [role for role, name in named if not name and role not in ("status",)] == []
    visitor.value("document.querySelector('#talk').focus()")
    key(visitor, "Enter", 13, "\r")
    visitor.until(f"{STATE} === 'on'")
    visitor.value("(document.querySelector('#text').focus(), document.querySelector('#text').value = 'tell eleventy')")
    key(visitor, "Enter", 13, "\r")
    visitor.until(f"{TROUBLE}.includes('eleventy')")
    visitor.value("document.querySelector('#text').value = 'tell five'")
    key(visitor, "Enter", 13, "\r")
    visitor.until("document.querySelector('#text').value === ''")
    assert visitor.complaints == []


def test_what_a_background_model_does_is_shown(tmp_path: Path, visitor: Browser) -> None:
    with ChatServer(calls(("look", '{"direction": "right"}')), says("tell five"), says("")) as thinker:
        server = Server(write_bundle(tmp_path / "asks", THINKING), "--think", thinker.url)
        visitor.open(server.url, 1200)
        visitor.press("#talk")
        visitor.until(f"{STATE} === 'on'")
        visitor.value("(document.querySelector('#text').focus(), document.querySelector('#text').value = 'three')")
        key(visitor, "Enter", 13, "\r")
        visitor.until(f"{SAID}.includes('tell five') && document.querySelector('#face').style.getPropertyValue('--pan') === '-1'")
        shown = visitor.value("[...document.querySelectorAll('#log .thinks')].map((line) => line.textContent).reverse()")
        server.end()
    assert shown[0] == "asked" and {"call look", "act look right", "told five"} <= {*shown}
    assert exceptions(visitor) == []


def test_a_reload_and_a_lost_connection_end_well(companion_bundle: Path, visitor: Browser) -> None:
    server = Server(companion_bundle)
    visitor.open(server.url, 1200)
    visitor.press("#talk")
    visitor.until(f"{STATE} === 'on'")
    visitor.reload()
    assert visitor.value(STATE) == "off"
    visitor.press("#talk")
    visitor.until(f"{STATE} === 'on'")  # the place was free again
    assert visitor.complaints == []
    server.end(signal.SIGKILL)
    visitor.until(f"{STATE} === 'waiting' && {STATUS}.includes('Trying again')")
    server.begin()
    visitor.until(f"{STATE} === 'on'")
    visitor.until(f"{SAID}.length > 0", PATIENCE_S)
    server.end()
    visitor.until(f"{STATE} === 'waiting'")
    visitor.press("#talk")
    visitor.until(f"{STATE} === 'off'")
    assert exceptions(visitor) == []


def test_a_wrong_key_is_said_and_not_tried_again(server: Server, visitor: Browser) -> None:
    visitor.open(server.url.replace(TOKEN, "guessed"), 1200)
    visitor.press("#talk")
    visitor.until(f"{TROUBLE}.includes('key in this address')")
    assert visitor.value(STATE) == "off" and exceptions(visitor) == []


def permit(tab: Browser, url: str, **settings: str) -> None:
    origin = "/".join(url.split("/")[:3])
    for name, setting in settings.items():
        tab.send("Browser.setPermission", permission={"name": name}, setting=setting, origin=origin)


def test_a_denied_microphone_is_said_and_it_still_sees(server: Server, room: tuple[str, ...], repository: Path) -> None:
    with browser(*room) as shy:
        permit(shy, server.url, microphone="denied", camera="granted")
        shy.open(server.url, 1200)
        shy.press("#talk")
        shy.until(f"{TROUBLE}.includes('microphone is blocked') && {TROUBLE}.includes('cannot hear you')")
        shy.until(f"{SAID}.includes('{WORD}')", PATIENCE_S)
        assert shy.value(STATUS) == "It sees you, but cannot hear you."
        screenshot(shy, repository, "denied")
        assert shy.complaints == []


def test_a_machine_without_devices_is_said(server: Server) -> None:
    with browser("--use-fake-ui-for-media-stream") as bare:
        bare.open(server.url, 1200)
        bare.press("#talk")
        bare.until(f"{STATE} === 'on'")
        found: Any = bare.value(TROUBLE)
        assert "No microphone was found" in found and "No camera was found" in found
        assert "cannot hear or see" in bare.value(STATUS) and bare.complaints == []
