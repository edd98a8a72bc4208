"""The pictures of docs/serving.md: python -m tests.serving.page_screenshots --to docs/images, after `make demo`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from dora_vl.serving.model import open_served
from dora_vl.serving.options import Settings
from dora_vl.serving.page_parts import example_questions
from tests.serving.browser import Visitor, browser, page_of

SIZE = {"width": 1240, "height": 800}
COLOURS = 192
"""Of a palette: enough for a page, and a small file."""


def shoot(visitor: Visitor, path: Path) -> None:
    """The page as it is, as a small PNG."""
    visitor.page.mouse.move(0, 0)
    visitor.page.evaluate("window.scrollTo(0, 0)")
    visitor.page.wait_for_timeout(600)
    visitor.page.screenshot(path=str(path))
    picture = Image.open(path).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Takes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path, default=Path("runs/demo/adapter"))
    parser.add_argument("--to", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    model = open_served(None, {"demo": options.adapter}, base_name="the base")
    examples = example_questions(options.adapter)
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        broken = Path(folder) / "holiday.jpg"
        broken.write_bytes(b"\xff\xd8\xff\xe0" + bytes(900))
        with page_of(model, Path(folder) / "uploads", Settings(max_new_tokens=24), examples) as (address, _):
            visitor = Visitor(chromium.new_context(viewport=SIZE, color_scheme="light"), address)
            visitor.page.set_default_timeout(60_000)
            visitor.page.locator("#dv-examples tbody tr").nth(0).click()
            visitor.see(1)
            visitor.page.click("#dv-ask")
            visitor.both(1)
            visitor.ask("what color is the shape?")
            shoot(visitor, options.to / "page_side_by_side.png")
            visitor.page.locator("#dv-examples tbody tr").nth(3).click()
            visitor.page.locator("#dv-conversation-left", has_text="will answer here").wait_for()
            visitor.choose("right", "demo")
            visitor.turn_dial("left", 0.25)
            visitor.page.click("#dv-ask")
            visitor.both(1)
            visitor.ask("describe the picture")
            shoot(visitor, options.to / "page_dial.png")
            visitor.show(broken)
            visitor.page.locator("#dv-notice .dv-notice").wait_for()
            shoot(visitor, options.to / "page_broken_file.png")


if __name__ == "__main__":
    main()
