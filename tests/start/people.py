"""A person's folder as people have it: photographs below it, a table of questions, and mistakes in it."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (20, 40, 220), "white": (250, 250, 250)}


def picture(number: int, kind: str = "PNG") -> bytes:
    colour = np.array(list(COLOURS.values())[number % 4])
    noise = np.random.default_rng(number).integers(-20, 5, (12 + number % 3, 16, 3))
    stream = io.BytesIO()
    Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(stream, kind)
    return stream.getvalue()


def write_table(path: Path, rows: list[list[str]], columns: str = "image,question,answer") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns.split(","), *rows])
    return path


def write_folder(folder: Path, *, count: int = 24, below: str = "photos") -> list[list[str]]:
    """Pictures below `folder/below` and `answers.csv` beside it, a row each; returns the rows."""
    (folder / below).mkdir(parents=True)
    names = list(COLOURS)
    rows = [[f"{number:03}.png", "Say the colour.", names[number % 4]] for number in range(count)]
    for number, row in enumerate(rows):
        (folder / below / row[0]).write_bytes(picture(number))
    write_table(folder / "answers.csv", rows)
    return rows
