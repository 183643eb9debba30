"""Headless Chromium, driven over its DevTools pipe without any package: for the tests that look at a report."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]
PATIENCE = 120.0  # seconds until a browser that says nothing counts as broken


class Chromium:
    """One headless browser with one page. Messages on descriptors 3 and 4 are JSON; a zero byte ends each."""

    def __init__(self, program: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        # Numbers of 10 and above, so that putting them at 3 and 4 overwrites neither.
        read_command, self._write = self._high_pipe()
        self._read, write_answer = self._high_pipe()
        launcher = f'exec "$@" 3<&{read_command} 4>&{write_answer}'
        self._process = subprocess.Popen(
            ["bash", "-c", launcher, "bash", program, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            pass_fds=(read_command, write_answer),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # it complains about the desktop that is not there; pages are heard by events
            start_new_session=True,
        )
        os.close(read_command)
        os.close(write_answer)
        self._buffer = b""
        self._last_id = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        try:
            target = self.command("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.command(f"{domain}.enable")
        except BaseException:
            self._clean_up()
            raise

    @staticmethod
    def _high_pipe() -> tuple[int, int]:
        ends = os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
        for end in ends:
            os.close(end)
        return high[0], high[1]

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result; events that arrive before the result are kept."""
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"Chromium said nothing for {PATIENCE} seconds"
            part = os.read(self._read, 1 << 16)
            assert part, f"Chromium ended with status {self._process.wait()}"
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        parsed: dict[str, Any] = json.loads(message)
        return parsed

    def look(self, *, width: int, height: int, dark: bool) -> None:
        """Set the window's size and the colour scheme that pages see."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path: Path) -> None:
        """Open a file and wait until the page and its pictures are loaded; `events` then holds the events."""
        self.events.clear()
        answer = self.command("Page.navigate", url=path.resolve().as_uri())
        assert "errorText" not in answer, f"{path}: {answer['errorText']}"
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page; a promise is awaited."""
        answer = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        picture = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))

    def complaints(self) -> list[str]:
        """Return the warnings and errors that the page wrote to the console, and the exceptions that it threw."""
        found = []
        for event in self.events:
            told = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(f"exception: {told['exceptionDetails']['text']}")
            if event["method"] == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
                found.append(f"console: {told['args']}")
            if event["method"] == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                found.append(f"log: {told['entry']['text']}")
        return found

    def requests(self) -> list[str]:
        """Return the addresses that the page requested; data: addresses hold their content and request nothing."""
        addresses = [
            event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        ]
        return [address for address in addresses if not address.startswith("data:")]

    def close(self) -> None:
        """End the browser and remove its profile."""
        try:
            self._session = None
            self.command("Browser.close")
            self._process.wait(timeout=PATIENCE)
        finally:
            self._clean_up()

    def _clean_up(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()


# This script asks the page for everything that a reader would see.
PROBE = """
(async () => {
  await Promise.all([...document.images].map(image => image.decode().catch(() => null)));
  const box = element => { const b = element.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
  return {
    background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    width: document.documentElement.scrollWidth,
    window: document.documentElement.clientWidth,
    sections: [...document.querySelectorAll('section')].map(section => section.id),
    images: [...document.images].map(image => ({
      alt: image.alt, complete: image.complete, pixels: image.naturalWidth * image.naturalHeight, box: box(image),
      rendering: getComputedStyle(image).imageRendering, side: Math.max(image.naturalWidth, image.naturalHeight),
    })),
    charts: [...document.querySelectorAll('svg')].map(chart => ({
      name: chart.querySelector('title').textContent, box: box(chart),
      texts: [...chart.querySelectorAll('text')].map(text => [text.textContent, box(text)]),
      marks: [...chart.querySelectorAll('.bar, .line, .first, .second')].map(mark => ({
        length: mark.getTotalLength(), fill: getComputedStyle(mark).fill, stroke: getComputedStyle(mark).stroke,
        box: box(mark),
      })),
    })),
  };
})()
"""


def _inside(inner: list[float], outer: list[float]) -> bool:
    slack = 1.0
    return (
        inner[0] >= outer[0] - slack
        and inner[1] >= outer[1] - slack
        and inner[2] <= outer[2] + slack
        and inner[3] <= outer[3] + slack
    )


def _meet(one: list[float], other: list[float]) -> bool:
    """Return whether two words overlap by more than the empty space around their letters."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return wide > 1 and high > 0.3 * min(one[3] - one[1], other[3] - other[1])


def problems(browser: Chromium, path: Path, *, charts: bool = True) -> list[str]:
    """Open a page in a light desktop window and in a dark phone window, and return a list of all faults.

    A page without a chart is at fault, unless `charts` is False.
    """
    found = []
    colours = {}
    for name, width, height, dark in (("desktop", 1280, 900, False), ("phone", 390, 844, True)):
        browser.look(width=width, height=height, dark=dark)
        browser.open(path)
        page = browser.evaluate(PROBE)
        found += browser.complaints()
        found += [f"asked for {address}" for address in browser.requests() if address != path.resolve().as_uri()]
        colours[name] = (page["background"], page["ink"])
        if page["width"] > page["window"]:
            found.append(f"{name}: the page is {page['width']} wide in a window of {page['window']}")
        if not page["sections"] or (charts and not page["charts"]):
            found.append(f"{name}: no section or no chart")
        for image in page["images"]:
            left, top, right, bottom = image["box"]
            if not image["complete"] or not image["pixels"] or right - left < 8 or bottom - top < 8:
                found.append(f"{name}: image not drawn: {image}")
            # Small pictures are drawn without smoothing; photos are smoothed.
            if not image["alt"] or (image["side"] <= 64 and image["rendering"] != "pixelated"):
                found.append(f"{name}: image without words or smoothed: {image}")
        for chart in page["charts"]:
            title, texts = chart["name"], chart["texts"]
            if chart["box"][2] - chart["box"][0] < 200 or chart["box"][3] - chart["box"][1] < 50:
                found.append(f"{name}: {title}: too small, {chart['box']}")
            if not chart["marks"]:
                found.append(f"{name}: {title}: nothing drawn")
            for mark in chart["marks"]:
                # A colour that is not defined turns into black.
                if mark["length"] <= 0 or {"rgb(0, 0, 0)"} & {mark["fill"], mark["stroke"]}:
                    found.append(f"{name}: {title}: mark not drawn or without a colour: {mark}")
                if not _inside(mark["box"], chart["box"]):
                    found.append(f"{name}: {title}: mark outside: {mark}")
            for i, (text, place) in enumerate(texts):
                if not _inside(place, chart["box"]):
                    found.append(f"{name}: {title}: “{text}” is cut off")
                found += [f"{name}: {title}: “{text}” meets “{more}”" for more, at in texts[:i] if _meet(place, at)]
    if colours["desktop"] == colours["phone"]:
        found.append(f"light and dark look the same: {colours['desktop']}")
    return found
