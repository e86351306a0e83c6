"""A headless Chromium for tests, where one is installed: it opens pages from files and reaches no network."""

from __future__ import annotations

import base64
import importlib.util
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, final

import pytest

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER: Final = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None or importlib.util.find_spec("selenium") is None,
    reason="needs chromium, its driver (Debian: chromium-driver) and selenium (pip install '.[dev]')",
)
needs_charts = pytest.mark.skipif(
    importlib.util.find_spec("vl_convert") is None, reason="needs the charts' code: pip install '.[report]'"
)
FLAGS: Final = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
SECONDS: Final = 30.0
MIDDLE: Final = """
const mark = document.querySelector(`[data-chart='${arguments[0]}'] ${arguments[1]}`);
mark.scrollIntoView({block: "center"});
if (getComputedStyle(mark).fill === "none") {
  const half = mark.getPointAtLength(mark.getTotalLength() / 2).matrixTransform(mark.getScreenCTM());
  return [half.x, half.y];
}
const box = mark.getBoundingClientRect();
return [box.x + box.width / 2, box.y + box.height / 2];
"""
"""Brings a mark into view and returns where on the screen its middle is; of a line, a point on it."""


@final
class Browser:
    """A Chromium that was started.

    Args:
        driver: selenium's.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def open(self, page: Path, *, width: int = 1440, theme: Literal["light", "dark"] = "light") -> float:
        """Open a page and wait until its charts are drawn; return milliseconds from navigation to the last chart."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self._driver.get(page.resolve().as_uri())
        end = time.monotonic() + SECONDS
        while not self.run("return document.documentElement.dataset.ready"):
            assert time.monotonic() < end, f"{page} was not ready after {SECONDS} s: {self.messages()}"
            time.sleep(0.02)
        return float(self.run("return parseFloat(document.documentElement.dataset.ready)"))

    def run(self, script: str, *values: Any) -> Any:
        """Run a script in the page and return its value."""
        return self._driver.execute_script(script, *values)

    def messages(self) -> list[str]:
        """Return what the console has said since it was last asked."""
        return [f"{entry['level']}: {entry['message']}" for entry in self._driver.get_log("browser")]

    def hover(self, chart: str, marks: str) -> str:
        """Move the mouse over the first of a chart's marks and return what is shown beside it."""
        place = self.run(MIDDLE, chart, marks)
        end, shown = time.monotonic() + 5, ""
        while not shown and time.monotonic() < end:  # the page hides what is shown while it scrolls
            for x in (place[0] - 3, place[0]):
                event = {"type": "mouseMoved", "x": x, "y": place[1]}
                self._driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)
            shown = self.run(
                "const tip = document.getElementById('tip'); return tip.style.display === 'block' && tip.innerText;"
            )
            time.sleep(0.05)
        return shown or ""

    def picture(self, path: Path) -> bytes:
        """Write a PNG of the whole page and return its bytes."""
        width, height = self.run("const e = document.documentElement; return [e.clientWidth, e.scrollHeight];")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        taken = self._driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(taken["data"]))
        return path.read_bytes()


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start a Chromium with an empty profile, and end it."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
