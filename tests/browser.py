"""A headless Chromium through its own debugging pipe: opens a page as a phone would, and tells what it complained about."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

PATIENCE_S = 120  # the machine is shared, and Chromium's first start reads 300 MB


class Browser:
    """One tab. `complaints` are console messages, exceptions and failed loads; `requests` every address that was asked for."""

    def __init__(self, *options: str) -> None:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        if program is None:
            pytest.skip("no Chromium; run: make setup")
        self._profile = tempfile.TemporaryDirectory(prefix="copresence-browser-", ignore_cleanup_errors=True)
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        # It reads commands from descriptor 3 and writes answers to 4, each a JSON text that ends with a zero byte.
        wiring = f'exec 3<&{to_read} 4>&{to_write}; exec "$@"'
        begin = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "--no-sandbox", "--disable-gpu"]
        begin += ["--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking", *options, "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", wiring, "bash", program, *begin], pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._answers = os.fdopen(self._from, "rb", buffering=0)
        self._buffer, self._last, self._session = b"", 0, ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def open(self, page: Path | str, width: int, dark: bool = False, script: bool = True, calm: bool = False) -> None:
        """Show a file, or an address, on a screen so many CSS pixels wide, and wait until it has loaded; `calm`: with little motion."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=2, mobile=width < 600)
        wishes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce" if calm else "no-preference"}
        self.send("Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in wishes.items()])
        self.send("Emulation.setScriptExecutionDisabled", value=not script)
        for address in ("about:blank", page if isinstance(page, str) else page.resolve().as_uri()):  # going to where one is loads nothing
            self.complaints, self.requests, self._loaded = [], [], False
            self.send("Page.navigate", url=address)
            while not self._loaded:
                self._listen()

    def reload(self) -> None:
        """As a person does, and wait until it has loaded."""
        self._loaded = False
        self.send("Page.reload")
        while not self._loaded:
            self._listen()

    def press(self, selector: str) -> None:
        """Click, as somebody's own gesture."""
        self.send("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)}).click()", userGesture=True)

    def until(self, expression: str, patience_s: float = PATIENCE_S) -> Any:
        """Wait until a JavaScript expression is true, and return what it is."""
        deadline = time.monotonic() + patience_s
        while not (found := self.value(expression)):
            assert time.monotonic() < deadline, f"{expression} did not become true; the page shows: {self.value('document.body.innerText')}"
            time.sleep(0.2)
        return found

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page; None if it is undefined."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def picture(self, file: Path) -> None:
        """The whole page as PNG."""
        shown = self.send("Page.captureScreenshot", captureBeyondViewport=True, fromSurface=True)
        file.write_bytes(base64.b64decode(shown["data"]))

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters} | ({"sessionId": self._session} if self._session else {})
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._listen()).get("id") != self._last:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    def _listen(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._answers], [], [], PATIENCE_S)[0], "Chromium does not answer"
            block = self._answers.read(1 << 16)
            assert block, "Chromium went away"
            self._buffer += block
        text, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed"):
            self.complaints.append(f"{method}: {json.dumps(params)}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded = True

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._answers.close()
        with contextlib.suppress(OSError):
            os.close(self._to)
        self._profile.cleanup()


@contextlib.contextmanager
def browser(*options: str) -> Iterator[Browser]:
    with Browser(*options) as found:
        yield found
