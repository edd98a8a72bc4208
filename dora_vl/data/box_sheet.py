"""A sheet of pictures with their boxes drawn, to see at a glance whether the numbers mean what was thought."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from dora_vl.data.objects import Box
from dora_vl.data.pictures import load_picture

SIDE, ACROSS, MOST = 320, 4, 24
COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


def write_sheet(pictures: Sequence[tuple[Path, Sequence[Box]]], to: Path) -> None:
    """Draws the boxes of the first pictures, in fractions; each label has a colour."""
    shown = pictures[:MOST]
    down = -(-len(shown) // ACROSS)
    sheet = Image.new("RGB", (SIDE * min(ACROSS, len(shown)), SIDE * down), "white")
    labels = list(dict.fromkeys(box.label for _, boxes in shown for box in boxes))
    for number, (path, boxes) in enumerate(shown):
        picture = load_picture(path)
        picture.thumbnail((SIDE - 4, SIDE - 4))
        draw = ImageDraw.Draw(picture)
        for box in boxes:
            color, corners = COLORS[labels.index(box.label) % len(COLORS)], box.pixels(picture.size)
            if len(corners) == 2:
                draw.ellipse((corners[0] - 3, corners[1] - 3, corners[0] + 3, corners[1] + 3), fill=color)
            elif corners:
                draw.rectangle(corners, outline=color, width=2)
            if corners and box.label:
                words = box.label.encode("latin-1", "replace").decode("latin-1")  # all that Pillow's own font has
                draw.text((corners[0] + 3, corners[1] + 1), words, fill=color, stroke_width=2, stroke_fill="white")
        sheet.paste(picture, (SIDE * (number % ACROSS), SIDE * (number // ACROSS)))
    sheet.save(to)
