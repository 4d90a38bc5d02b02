"""Drives headless Chromium over its debugging pipe (the DevTools protocol)."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = [
    *("--headless", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"),
    *("--force-device-scale-factor=1", "--hide-scrollbars"),
]
# Chromium reads commands on descriptor 3 and answers on 4.
_LAUNCH = "import os,sys; r,w=map(int,sys.argv[1:3]); a,b=os.dup(r),os.dup(w)\n"
_LAUNCH += "os.dup2(a,3); os.dup2(b,4); os.set_inheritable(3,True); os.set_inheritable(4,True)\n"
_LAUNCH += "os.execv(sys.argv[3], sys.argv[3:])"


def find_chromium() -> str | None:
    return next((path for path in map(shutil.which, _NAMES) if path), None)


class Page:
    """One page. `errors` collects console errors and uncaught exceptions."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._buffer, self._last, self._session = b"", 0, None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _read(self, seconds: float = 60) -> dict:
        while b"\0" not in self._buffer:
            if not select.select([self._answers], [], [], seconds)[0]:
                raise TimeoutError("Chromium did not answer")
            data = os.read(self._answers, 1 << 20)
            if not data:
                raise RuntimeError("Chromium ended")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)

    def _note(self, event: dict) -> None:
        params = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif event["method"] == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.errors.append(json.dumps(params["args"]))
        elif event["method"] == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, path: Path, width: int, height: int = 900, *, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait(f"document.readyState === 'complete' && location.href.endsWith({path.name!r})")

    def run(self, expression: str):
        """The value of a JavaScript expression, by JSON."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not self.run(expression):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {expression}")
            time.sleep(0.05)

    def box(self, selector: str) -> dict:
        """x, y, width and height of an element in the window, scrolled into view."""
        return self.run(
            f"(() => {{ const e = document.querySelector({selector!r});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const {x, y, width, height} = e.getBoundingClientRect();"
            "return {x, y, width, height}; })()"
        )

    def mouse(self, kind: str, x: float, y: float, **more) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def drag(self, x: float, y: float, dx: float, dy: float, button: str = "left") -> None:
        held = {"left": 1, "right": 2}[button]
        self.mouse("mousePressed", x, y, button=button, buttons=held, clickCount=1)
        self.mouse("mouseMoved", x + dx / 2, y + dy / 2, button=button, buttons=held)
        self.mouse("mouseMoved", x + dx, y + dy, button=button, buttons=held)
        self.mouse("mouseReleased", x + dx, y + dy, button=button, clickCount=1)

    def key(self, name: str) -> None:
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36}
        for kind in ("keyDown", "keyUp"):
            more = {"windowsVirtualKeyCode": codes[name]}
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, **more)

    def picture(self) -> np.ndarray:
        """The window as uint8 [H, W, 3]."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


@contextlib.contextmanager
def browse(chromium: str, profile: Path) -> Iterator[Page]:
    """A page of a browser of its own, ended with the block."""
    theirs_in, commands = os.pipe()
    answers, theirs_out = os.pipe()
    launch = [sys.executable, "-c", _LAUNCH, str(theirs_in), str(theirs_out)]
    process = subprocess.Popen(
        [*launch, chromium, *_FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(commands, answers)
    finally:
        os.close(commands)  # Chromium ends when its pipe closes
        os.close(answers)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
