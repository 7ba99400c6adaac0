"""A real browser without a window, and the page of a server of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MISSING = (
    "these tests drive Chromium: apt-get install -y --no-install-recommends chromium, "
    "or name one with MIRASOL_BROWSER=/path/to/chrome"
)
SWITCHES = (
    "--no-sandbox",  # which Chromium does not have for root
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
)
QUESTION = "What is seen and heard?"
ANSWER = "A green square goes to the right below eight blocks that count the pictures. " * 3 + "Four tones sound."
MEMORY = 32
"""Chunks that the server's streams keep."""
SECONDS = 8.0
"""Of the clip."""
VISITORS = 2

SIZE = {"width": 1280, "height": 930}
PATIENCE = 60_000
"""Milliseconds that anything may take on a busy machine."""


def find_browser() -> str:
    """Path of the browser to drive.

    Raises:
        RuntimeError: there is none.
    """
    named = os.environ.get("MIRASOL_BROWSER")
    for name in [named] if named else BROWSERS:
        if found := shutil.which(name):
            return found
    raise RuntimeError(MISSING)


@contextmanager
def open_browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=SWITCHES)
        yield browser
        browser.close()


@contextmanager
def serve(run: Path, *options: str) -> Iterator[str]:
    """`python -m mirasol demo` in a process of its own; gives its address."""
    command = [sys.executable, "-m", "mirasol", "demo", "--run", str(run), "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT / "tests", env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            address = server.stdout.readline().strip()
            if not address.startswith("http://"):
                raise RuntimeError(f"the server must print its address, printed {address!r}")
            yield address
        finally:
            server.terminate()


class Visit:
    """A page that was opened in a browser of its own, and what went wrong on it.

    Attributes:
        mistakes: errors on the console, exceptions, and whatever was asked of another machine.
    """

    def __init__(self, browser: Browser, address: str) -> None:
        self.mistakes: list[str] = []
        self.context: BrowserContext = browser.new_context(viewport=SIZE)
        self.context.set_default_timeout(PATIENCE)
        self.page: Page = self.context.new_page()
        host = urlsplit(address).netloc
        self.page.on("console", lambda told: told.type == "error" and self.mistakes.append(f"console: {told.text}"))
        self.page.on("pageerror", lambda error: self.mistakes.append(f"exception: {error}"))
        self.context.on("request", lambda asked: self._note(host, asked.url))
        self.page.goto(address)
        self.page.wait_for_selector("#play")

    def _note(self, host: str, url: str) -> None:
        if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).netloc != host:
            self.mistakes.append(f"asked elsewhere: {url}")

    def take(self, clip: Path) -> None:
        """Upload a clip."""
        self.page.set_input_files("#clip input[type=file]", clip)
        self.wait_for_player()

    def wait_for_player(self) -> None:
        """Until a clip with a picture is ready to be played."""
        self.page.wait_for_function(
            "(v => v && v.videoWidth > 0 && v.readyState >= 3)(document.querySelector('#clip video'))"
        )

    def chunks(self) -> list[dict[str, str]]:
        """The `data-` attributes of the strip's cells."""
        return self.page.evaluate("[...document.querySelectorAll('#strip .chunk')].map((cell) => ({...cell.dataset}))")

    def wait_for_chunk(self, number: int) -> None:
        """Until a chunk of that number, or a later one, is in the strip."""
        last = "[...document.querySelectorAll('#strip .chunk')].at(-1)?.dataset.chunk"
        self.page.wait_for_function(f"Number({last} ?? -1) >= {number}")

    def wait_for_status(self, state: str) -> str:
        self.page.wait_for_selector(f"#status [data-state={state}]")
        return self.page.inner_text("#status .status")

    def figure(self, name: str) -> str:
        return self.page.inner_text(f"#figures [data-figure={name}]")

    def ask(self, question: str) -> None:
        self.page.fill("#question textarea, #question input", question)
        self.page.click("#ask")

    def answers(self) -> list[str]:
        return self.page.locator("#chat .bot .message-content").all_inner_texts()


def main(run: str, clip: str, out: str, *asked: str) -> None:
    """Write a picture of the page while a clip is played.

    Args:
        asked: when, in seconds from the clip's start, and what, in turns.
    """
    with open_browser() as browser, serve(Path(run)) as address:
        visit = Visit(browser, address)
        visit.take(Path(clip))
        visit.page.click("#play")
        visit.page.wait_for_selector("#status [data-state=live]")
        begun = time.monotonic()
        for number, (seconds, question) in enumerate(zip(asked[::2], asked[1::2], strict=True), start=1):
            visit.page.wait_for_timeout(1000 * max(0.0, begun + float(seconds) - time.monotonic()))
            visit.ask(question)
            visit.page.wait_for_function(f"document.querySelectorAll('#chat .bot').length >= {number}")
        visit.page.wait_for_selector("#strip .looked-at")
        visit.page.screenshot(path=out)
        if visit.mistakes:
            raise RuntimeError("; ".join(visit.mistakes))


if __name__ == "__main__":
    main(*sys.argv[1:])
