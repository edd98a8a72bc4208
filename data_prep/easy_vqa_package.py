"""easy-VQA's package as published: its questions, its answers, and what each question asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from dora_vl.errors import UserError, shown, shown_text

YES_NO = frozenset({"yes", "no"})
NEGATIONS = frozenset({"no", "not"})
_ROWS = TypeAdapter(list[tuple[str, str, int]])


@dataclass(frozen=True)
class Question:
    """One question of the package, at its place in the package's list."""

    index: int
    text: str
    answer: str
    picture: int


def read_answers(folder: Path) -> frozenset[str]:
    """The package's list of all possible answers (13 of them)."""
    path = folder / "answers.txt"
    if not path.is_file():
        raise UserError(f"{path} is missing; fetch the package: python -m data_prep.demo_assets --to {folder.parent}")
    return frozenset(path.read_text(encoding="utf-8-sig").split())


def read_questions(folder: Path, split: str, answers: frozenset[str]) -> list[Question]:
    """The questions of one of the package's splits, in its own order."""
    path = folder / split / "questions.json"
    try:
        rows = _ROWS.validate_json(path.read_text(encoding="utf-8-sig"), strict=True)
    except (OSError, ValueError) as error:
        reason = shown_text(str(error), 200)
        raise UserError(f"{path}: not easy-VQA's list of [question, answer, picture number] ({reason})") from error
    questions = [Question(index, *row) for index, row in enumerate(rows)]
    for question in questions:
        where = f"{split}: question {question.index}"
        if question.answer not in answers:
            raise UserError(f"{where}: answer {shown(question.answer)} is not in answers.txt")
        if kind_of(question).startswith("yes/no") != (question.answer in YES_NO):
            mismatch = f"{shown(question.text)} does not ask for {shown(question.answer)}"
            raise UserError(f"{where}: {mismatch}; the package's questions changed")
    pictures = sorted({question.picture for question in questions})
    missing = [name for name in (picture_path(split, number) for number in pictures) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: {len(missing)} of {len(pictures)} pictures are missing, first {missing[0]}")
    return questions


def picture_path(split: str, number: int) -> str:
    """A picture's path relative to the package's data folder."""
    return f"{split}/images/{number}.png"


def kind_of(question: Question) -> str:
    """What is asked for: "color", "shape", "yes/no", or "yes/no negated" ("is no blue shape present?").

    Read from the question, not from the answer, which may say more than the package's own.
    """
    words = question.text.rstrip("?").split()
    if words[:1] == ["what"]:
        return "color" if "color" in words else "shape"
    return "yes/no negated" if NEGATIONS & set(words) else "yes/no"


def shows(question: Question) -> bool:
    """Whether a yes/no question asks about something that the picture shows."""
    negated = kind_of(question) == "yes/no negated"
    return (question.answer == "yes") != negated
