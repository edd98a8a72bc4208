"""The page in a real browser: Debian's Chromium, driven by Playwright, and what a person does on it."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dora_vl.serving.access import AccessRules, Uploads, http_config
from dora_vl.serving.demo_command import keep_gradio_quiet
from dora_vl.serving.engine import Engine
from dora_vl.serving.model import ServedModel
from dora_vl.serving.options import ServerSettings
from dora_vl.serving.side_by_side import OpenModels

REPOSITORY = Path(__file__).parents[2]
MILLISECONDS = 60_000  # a busy machine has taken more than ten seconds for one answer
PICTURES = "#dv-seen figure"
QUESTION_BOX = "#dv-question textarea, #dv-question input"


def find_chromium() -> str:
    """The browser's program; the test is skipped where there is none, or nothing to drive it or to make the page."""
    for package in ("gradio", "playwright"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[web,dev]'")
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("there is no Chromium here: apt-get install chromium")


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    program = find_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


@contextlib.contextmanager
def page_of(
    model: ServedModel, uploads: Path, settings: ServerSettings | None = None, rules: AccessRules | None = None
) -> Iterator[tuple[str, Engine]]:
    """The page over a model, its door Ask alone; its address and its engine."""
    keep_gradio_quiet(uploads)
    from dora_vl.serving.page import Page, QuietServer, build_page_app

    settings = settings or ServerSettings()
    with (
        contextlib.closing(OpenModels(lambda base, adapters: model, settings)) as models,
        socket.create_server(("127.0.0.1", 0)) as listening,
    ):
        models.open({name: Path(name) for name in model.names[1:]})
        engine = models.side.engine
        page = Page(models, Uploads(uploads, 2**24))
        app = build_page_app(page, rules or AccessRules(), upload_bytes=4 * settings.media_bytes)
        server = QuietServer(http_config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", engine
        finally:
            server.should_exit = True
            thread.join(20)


class Visitor:
    """Somebody with the page open; every request that their browser makes is kept.

    Args:
        slower: so many times as long takes their machine for what the page does.
    """

    def __init__(self, context: Any, address: str, *, slower: float = 1, ready: str = "#dv-ask") -> None:
        self.page = context.new_page()
        if slower > 1:
            context.new_cdp_session(self.page).send("Emulation.setCPUThrottlingRate", {"rate": slower})
        self.page.set_default_timeout(MILLISECONDS)
        self.asked_for: list[str] = []
        self.page.on("request", lambda request: self.asked_for.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector(ready)

    def show(self, *files: Path | dict[str, Any]) -> None:
        uploads = [str(file) if isinstance(file, Path) else file for file in files]
        self.page.set_input_files("#dv-files input[type=file]", uploads)

    def see(self, count: int) -> None:
        self.page.wait_for_function(f"document.querySelectorAll('{PICTURES}').length == {count}")

    def captions(self) -> list[str]:
        return self.page.locator(f"{PICTURES} figcaption").all_inner_texts()

    def ask(self, question: str) -> tuple[str, str]:
        before = self.count("left")
        self.page.fill(QUESTION_BOX, question)
        self.page.keyboard.press("Enter")
        return self.both(before + 1)

    def both(self, count: int) -> tuple[str, str]:
        """The last answers, once each column has so many and all are over."""
        for side in ("left", "right"):
            self.page.wait_for_function(
                f"document.querySelectorAll('#dv-conversation-{side} .dv-asked').length == {count}"
                f" && document.querySelectorAll('#dv-conversation-{side} .dv-caret').length == 0"
            )
        self.page.wait_for_selector("#dv-ask:not([disabled])")
        return self.text_of("left"), self.text_of("right")

    def count(self, side: str) -> int:
        return self.page.locator(f"#dv-conversation-{side} .dv-asked").count()

    def text_of(self, side: str) -> str:
        return self.page.locator(f"#dv-conversation-{side} .dv-said").last.text_content()

    def tally(self, side: str) -> str:
        return self.page.locator(f"#dv-conversation-{side} .dv-tally").last.inner_text()

    def choose(self, side: str, model: str) -> None:
        self.page.evaluate("window.scrollTo(0, 0)")  # the list stays where it opens
        self.pick(f"#dv-model-{side}", model)

    def pick(self, dropdown: str, text: str) -> None:
        self.page.click(f"{dropdown} input")
        self.page.locator("ul[role=listbox] li, ul.options li").filter(has_text=text).first.click()

    def turn_dial(self, side: str, strength: float) -> None:
        number = self.page.locator(f"#dv-strength-{side} input[type=number]")
        number.fill(str(strength))
        number.blur()


class Trainer(Visitor):
    """Somebody at the tab Train, each of whose clicks may start programs."""

    def __init__(self, context: Any, address: str) -> None:
        super().__init__(context, address, ready="#dv-look")
        self.page.set_default_timeout(5 * MILLISECONDS)

    def state(self, text: str) -> None:
        self.page.locator("#dv-state, #dv-data-state").filter(has_text=text).wait_for()

    def look(self, base: str) -> None:
        self.page.fill("#dv-base input", base)
        self.page.keyboard.press("Enter")
        self.page.click("#dv-look")
        self.state("min on this machine")

    def drop(self, files: list[Path]) -> str:
        self.page.set_input_files("#dv-drop input[type=file]", [str(file) for file in files])
        self.state(f"{len(files)} files are in data/dropped")
        return self.page.input_value("#dv-folder textarea, #dv-folder input")


@contextlib.contextmanager
def demo(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "dora_vl.cli", "demo", "--port", "0", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        match = re.search(r"http://\S+", process.stdout.readline())
        yield match[0], process
    finally:
        process.terminate()
        process.wait(20)
