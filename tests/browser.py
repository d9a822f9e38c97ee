"""A real browser without a network: Debian's chromium, headless, with its requests and console lines."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright

WAIT_SECONDS = 300.0  # far more than anything takes
WIDE, NARROW = (1280, 900), (390, 844)


@dataclass
class Opened:
    """A page that has drawn itself. `requests` are the requested addresses, `complaints` all console lines."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def plots(self) -> dict[str, list[dict[str, Any]]]:
        """Each plot's traces: what was drawn, by the plot's id."""
        found: dict[str, list[dict[str, Any]]] = self.page.evaluate(
            """() => Object.fromEntries([...document.querySelectorAll('.plot')].map((node) => [
                node.id.replace('plot-', ''),
                node.data.map((t) => ({x: [...t.x], y: [...t.y], yaxis: t.yaxis ?? 'y', meta: t.meta, type: t.type})),
            ]))"""
        )
        return found

    def painted_ms(self) -> float:
        """Milliseconds from the beginning of the page's loading to two frames after its last plot."""
        frames = (
            "() => new Promise((y) => requestAnimationFrame(() => requestAnimationFrame(() => y(performance.now()))))"
        )
        return float(self.page.evaluate(frames))

    def wait(self, truth: str) -> None:
        """Until the expression `truth` holds in the page, which may load itself again meanwhile.

        playwright's own waiting evaluates strings inside the page, and the page's policy forbids that.
        """
        until = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < until:
            try:
                if self.page.evaluate(truth):
                    return
            except Error:  # between two loads nothing is defined
                pass
            self.page.wait_for_timeout(20)
        raise AssertionError(f"not within {WAIT_SECONDS} s: {truth}; {self.complaints}")

    def overflow(self) -> float:
        """Pixels by which the page is wider than its window (innerWidth would not do: a phone zooms out)."""
        assert self.page.viewport_size
        return float(self.page.evaluate("document.documentElement.scrollWidth")) - self.page.viewport_size["width"]


@contextmanager
def browser() -> Iterator[Browser]:
    """Chromium. Without one the test is skipped, or fails where MINKA_BROWSER=required."""
    program = shutil.which("chromium")
    if program is None:
        reason = "chromium is not installed: apt-get install --no-install-recommends chromium"
        if os.environ.get("MINKA_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])  # tests may run as root
        yield running
        running.close()


@contextmanager
def opened(running: Browser, file: Path, size: tuple[int, int] = WIDE, **options: Any) -> Iterator[Opened]:
    """`file` in a context of its own, offline, once every plot is drawn."""
    narrow = size == NARROW
    context = running.new_context(
        viewport={"width": size[0], "height": size[1]}, is_mobile=narrow, has_touch=narrow, **options
    )
    try:
        context.set_offline(True)
        seen = Opened(context.new_page())
        seen.page.on("console", lambda line: seen.complaints.append(f"{line.type}: {line.text}"))
        seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        watch = context.new_cdp_session(seen.page)
        watch.on("Network.requestWillBeSent", lambda sent: seen.requests.append(sent["request"]["url"]))
        watch.send("Network.enable")
        seen.page.goto(file.resolve().as_uri())
        seen.wait("document.documentElement.dataset.drawn || !document.getElementById('failed').hidden")
        yield seen
    finally:
        context.close()
