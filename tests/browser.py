"""Chromium without a window, driven over a pipe by its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Message = dict[str, Any]


def chromium() -> str | None:
    """The program, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """One page. events: every event of the protocol so far, as (method, params)."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = send, receive
        self._waiting = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[tuple[str, Message]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: object) -> Message:
        """Send a command and wait for its result."""
        self._number += 1
        message: Message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            if "method" in answer:
                self.events.append((answer["method"], answer.get("params", {})))

    def _read(self) -> Message:
        while b"\0" not in self._waiting:
            data = os.read(self._receive, 1 << 16)
            if not data:
                raise RuntimeError("the browser has ended")
            self._waiting += data
        first, _, self._waiting = self._waiting.partition(b"\0")
        return dict(json.loads(first))

    def open(self, path: Path, seconds: float = 30.0) -> None:
        """Load a file, until it has loaded."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + seconds
        while self.evaluate("document.readyState + location.protocol") != "completefile:":
            if time.monotonic() > end:
                raise TimeoutError(f"{path} has not loaded in {seconds} s")
            time.sleep(0.05)

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key press by the user; code: its Windows virtual key code."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def resize(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def colours(self, scheme: str) -> None:
        """light or dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, target: Path) -> None:
        """The whole page as .png."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        target.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page of a fresh browser whose profile lies in `folder`."""
    program = chromium()
    assert program is not None
    to_child, send = os.pipe()
    receive, from_child = os.pipe()
    flags = ["--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run"]

    # The browser reads from descriptor 3 and writes to 4: a small program puts the pipes there and becomes the browser.
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_child, from_child)]
    become = "import os, sys; a, b, *c = sys.argv[1:]; os.dup2(int(a), 3); os.dup2(int(b), 4); os.execv(c[0], c)"
    command = [program, *flags, "--disable-dev-shm-usage", f"--user-data-dir={folder}"]
    child = subprocess.Popen(
        [sys.executable, "-c", become, *map(str, theirs), *command],
        pass_fds=theirs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for fd in (to_child, from_child, *theirs):
        os.close(fd)
    try:
        yield Page(send, receive)
    finally:
        os.close(send)
        os.close(receive)
        child.terminate()
        child.wait(20)
