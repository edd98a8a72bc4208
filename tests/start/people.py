"""A person's folder as people have it, with mistakes in it; signs of a colour, a shape and dots, with questions."""

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

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


SIGN_COLOURS = {"red": (205, 40, 40), "blue": (40, 80, 200), "yellow": (240, 200, 40), "green": (40, 150, 70)}
CORNERS = {"triangle": 3, "square": 4, "round": 40}
ANSWERS = {
    "what colour is the sign?": tuple(SIGN_COLOURS),
    "what shape is the sign?": tuple(CORNERS),
    "how many dots are on the sign?": ("one", "two", "three", "four"),
}


def draw_sign(rng: random.Random) -> tuple[Image.Image, list[str]]:
    """A sign, and the answers in the questions' order."""
    colour, shape, dots = (rng.choice(answers) for answers in ANSWERS.values())
    picture = Image.new("RGB", (200, 200), tuple(rng.randrange(130, 220) for _ in range(3)))
    draw, x, y = ImageDraw.Draw(picture), rng.randrange(80, 120), rng.randrange(80, 120)
    draw.regular_polygon((x, y, rng.randrange(60, 78)), CORNERS[shape], fill=SIGN_COLOURS[colour])
    for number in range(1 + ANSWERS["how many dots are on the sign?"].index(dots)):
        draw.circle((x - 20 + 40 * (number % 2), y - 14 + 34 * (number // 2)), 9, fill="white")
    return picture, [colour, shape, dots]


def write_signs(folder: Path, *, as_pairs: bool, count: int = 225) -> None:
    """Writes the pictures and `rows.jsonl`; of flagged answers half are wrong."""
    rng, rows = random.Random(0), list[dict[str, Any]]()
    folder.mkdir(parents=True)
    for number in range(count):
        picture, answers = draw_sign(rng)
        picture.save(folder / f"{number:03}.png")
        for question, answer in zip(ANSWERS, answers, strict=True):
            wrong = rng.choice([other for other in ANSWERS[question] if other != answer])
            is_good = rng.random() < 0.5
            flagged = {"completion": answer if is_good else wrong, "label": is_good}
            answered = {"chosen": answer, "rejected": wrong} if as_pairs else flagged
            rows.append({"image": f"{number:03}.png", "prompt": question, **answered})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
