"""A run's folder `watched/`: the questions that are asked while it trains, their pictures and answers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageOps

from dora_vl.errors import BadSample
from dora_vl.files import write_json, write_json_lines
from dora_vl.run.folder import WATCHED, read_log

QUESTIONS, ANSWERS = "questions.json", "answers.jsonl"
SMALL_PX = 224
EXACT_PX = 128
"""Pictures up to this side are kept to the pixel, as PNG; larger ones are taken for photographs and become JPEG."""
JPEG_QUALITY = 82
SIDE, GAP_PX, PAPER = 2, 2, (255, 255, 255)
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class WatchedQuestion:
    """Holds one question; `picture` names its small picture in the folder, "" where there is none."""

    id: str
    question: str
    truth: str
    picture: str = ""
    why_no_picture: str = ""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Holds the questions that a pipeline answers while it trains.

    Attributes:
        questions: in the order in which they are shown.
        pictures: by question's id, what opens its picture; raises BadSample where it cannot be read.
        ask: answers by id with the current weights, without what cannot be asked; every rank must call it.
        source: where the questions are from, for messages.
    """

    questions: tuple[WatchedQuestion, ...]
    pictures: Mapping[str, Callable[[], Image.Image]]
    ask: Callable[[], Mapping[str, str]]
    source: str


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Holds the questions of a run's folder, and by step the answers by id."""

    folder: Path
    questions: tuple[WatchedQuestion, ...] = ()
    answers: Mapping[int, Mapping[str, str]] = field(default_factory=dict)


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Returns `count` evenly spaced items from the first on; all if there are fewer."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def begin(run_folder: Path, watch: Watch, *, step: int) -> None:
    """Writes the questions and their pictures; of a resumed run the answers up to `step` stay."""
    folder = run_folder / WATCHED
    folder.mkdir(parents=True, exist_ok=True)
    earlier = [line for line in read_log(folder / ANSWERS) if line["step"] <= step] if step else []
    questions = []
    for number, question in enumerate(watch.questions):
        if question.id in watch.pictures:
            try:
                picture = small_picture(watch.pictures[question.id]().convert("RGB"))
            except BadSample as error:
                question = replace(question, why_no_picture=error.reason)
            else:
                name = f"{number}.{'png' if max(picture.size) <= EXACT_PX else 'jpg'}"
                picture.save(folder / name, quality=JPEG_QUALITY)
                question = replace(question, picture=name)
        questions.append(asdict(question))
    write_json(folder / QUESTIONS, {"source": watch.source, "questions": questions})
    write_json_lines(folder / ANSWERS, earlier)


def read_watched(run_folder: Path) -> Watched | None:
    """Reads `watched/` of a run; None where nothing was asked, or its files cannot be read."""
    folder = run_folder / WATCHED
    try:
        content = json.loads((folder / QUESTIONS).read_text(encoding="utf-8"))
        questions = tuple(WatchedQuestion(**row) for row in content["questions"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    lines = read_log(folder / ANSWERS)
    answers = {
        line["step"]: line["answers"] for line in lines if isinstance(line.get("answers"), dict) and "step" in line
    }
    return Watched(folder=folder, questions=questions, answers=answers)


def small_picture(picture: Image.Image, max_size: int = SMALL_PX) -> Image.Image:
    """Shrinks a picture until its longer side has at most this many pixels."""
    return picture if max(picture.size) <= max_size else ImageOps.contain(picture, (max_size, max_size))


def data_url(picture: Image.Image, max_size: int = SMALL_PX) -> str:
    """Returns the picture, made small, as text inside a page: PNG to the pixel where it is tiny, else JPEG."""
    small = small_picture(picture.convert("RGB"), max_size)
    kind = "png" if max(small.size) <= EXACT_PX else "jpeg"
    file = io.BytesIO()
    small.save(file, format=kind, quality=JPEG_QUALITY, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def tiled(pictures: Sequence[Image.Image]) -> Image.Image:
    """Joins up to four pictures, two by two, each in the size of the first; a single one stays as it is."""
    first, *others = pictures[: SIDE**2]
    if not others:
        return first
    width, height = first.size
    rows = -(-(1 + len(others)) // SIDE)
    tile = Image.new("RGB", (SIDE * width + GAP_PX, rows * height + (rows - 1) * GAP_PX), PAPER)
    for number, picture in enumerate([first, *others]):
        row, column = divmod(number, SIDE)
        fitted = picture if picture.size == first.size else ImageOps.pad(picture, first.size, color=PAPER)
        tile.paste(fitted, (column * (width + GAP_PX), row * (height + GAP_PX)))
    return tile
