"""A headless Chromium that tells what a page did: its console, its requests, its size."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
"""What the binary is called here or there."""

_DOMAINS = ("Page", "Network", "Log", "Runtime")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars")


def find_chromium() -> str | None:
    """Return the path of a Chromium, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One page, driven over the DevTools protocol through a pair of pipes."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._input, self._output = os.fdopen(read_fd, "rb"), os.fdopen(write_fd, "wb")
        self._buffer = b""
        self._number = 0
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in _DOMAINS:
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Return the answer to a command; events that come before it are kept."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params, **self._session}
        self._output.write(json.dumps(command).encode() + b"\0")
        self._output.flush()
        while (message := self._next()).get("id") != self._number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._input.fileno(), 2**20)
            assert data, "Chromium ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, *, width: int, scheme: str) -> None:
        """Load a file at a width in CSS pixels, in a colour scheme; return when it has loaded."""
        self.events.clear()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"]["value"]

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    @property
    def requests(self) -> list[str]:
        """URLs that the page asked for, itself included."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """What the console would show."""
        methods = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [event for event in self.events if event["method"] in methods]


@contextmanager
def open_tab(binary: str, profile: Path) -> Iterator[Tab]:
    """Start a Chromium with a profile of its own; end it afterwards."""
    commands_in, commands_out = os.pipe()
    answers_in, answers_out = os.pipe()

    def as_expected() -> None:  # Chromium reads from descriptor 3 and writes to 4
        low, high = os.dup2(commands_in, 103), os.dup2(answers_out, 104)
        os.dup2(low, 3)
        os.dup2(high, 4)

    process = subprocess.Popen(
        [binary, *_FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}"],
        preexec_fn=as_expected,  # noqa: PLW1509 - only numbers of descriptors change
        close_fds=False,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_in)
    os.close(answers_out)
    try:
        yield Tab(answers_in, commands_out)
    finally:
        process.kill()
        process.wait()
