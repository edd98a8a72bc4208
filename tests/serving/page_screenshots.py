"""The pictures of docs/serving.md: python -m tests.serving.page_screenshots --to docs/images, after `make demo`."""

import argparse
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw

from dora_vl.serving.model import open_served
from dora_vl.serving.options import ServerSettings
from tests.serving.browser import Trainer, Visitor, browser, demo, page_of

DEMO = Path("runs/demo")
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


SIGNS = {"stop": (200, 30, 30), "go": (40, 160, 60), "wait": (235, 190, 20)}


def draw_signs(folder: Path, count: int = 100) -> list[Path]:
    """Draws signs, each with its row of a table; all files."""
    folder.mkdir()
    draw, rows = Random(3), ["image,question,answer"]
    for number in range(count):
        name = draw.choice(list(SIGNS))
        picture = Image.new("RGB", (96, 96), tuple(draw.randint(180, 255) for _ in range(3)))
        left, top, size = draw.randint(10, 40), draw.randint(10, 40), draw.randint(25, 45)
        shape = (left, top, left + size, top + size)
        pen = ImageDraw.Draw(picture)
        (pen.ellipse if number % 2 else pen.rectangle)(shape, fill=SIGNS[name], outline=(30, 30, 30), width=3)
        picture.save(folder / f"sign_{number:03}.png")
        rows.append(f"sign_{number:03}.png,what does the sign say?,{name}")
    (folder / "signs.csv").write_text("\n".join(rows))
    return sorted(folder.iterdir())


def shoot_training(chromium: Any, base: Path, to: Path) -> None:
    """Trains on drawn signs by the page, from the drop to the test."""
    with tempfile.TemporaryDirectory() as folder, demo(Path(folder)) as (address, _):
        visitor = Trainer(chromium.new_context(viewport=SIZE, color_scheme="light"), address)
        visitor.page.set_default_timeout(1_800_000)
        visitor.drop(draw_signs(Path(folder) / "signs"))
        (own := Path(folder) / "runs" / "demo").mkdir(parents=True)
        (own / base.name).symlink_to(base.resolve())
        visitor.look(f"runs/demo/{base.name}")
        visitor.page.click("#dv-start")
        visitor.state("Trained and tested.")
        shoot(visitor, to / "page_train.png")


def main() -> None:
    """Takes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=Path("docs/images"))
    to = parser.parse_args().to
    with browser() as chromium:
        shoot_training(chromium, DEMO / "tuned", to)
    model = open_served(None, {"demo": DEMO / "adapter"}, base_name="the base")
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        first, second, *_ = sorted((DEMO / "assets/easy_vqa/test/images").glob("*.png"))
        with page_of(model, Path(folder) / "uploads", ServerSettings(max_new_tokens=24)) as (address, _):
            visitor = Visitor(chromium.new_context(viewport=SIZE, color_scheme="light"), address)
            visitor.page.set_default_timeout(60_000)
            visitor.show(first)
            visitor.see(1)
            visitor.ask("what shape is in the picture?")
            visitor.ask("what color is the shape?")
            shoot(visitor, to / "page_side_by_side.png")
            visitor.show(second)
            visitor.page.locator("#dv-conversation-left", has_text="will answer here").wait_for()
            visitor.choose("right", "demo")
            visitor.turn_dial("left", 0.25)
            visitor.ask("what color is the shape?")
            visitor.ask("describe the picture")
            shoot(visitor, to / "page_dial.png")


if __name__ == "__main__":
    main()
