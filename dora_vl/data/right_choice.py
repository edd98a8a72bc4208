"""Multiple choice: which one is right, as records say it and as columns do, and how choices stand in a question.

The right choice of a column is said by its number from 0 (AI2D also as text, "1"), by its letter (MMMU, "B", also "(B)"
or "B."), or by its text. A row where the text of one choice reads as the letter or number of another, such as "2" among
"1", "2" and "3", could mean either: it is taken only where the columns that were named say which way to read it.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable, Sequence
from string import ascii_uppercase
from typing import Literal

from dora_vl.data.text_file import json_of
from dora_vl.errors import BadSample, UserError, shown

LETTER = "Answer with the option's letter from the given choices directly."
"""What LLaVA says behind the choices of MMBench and SEED."""


def with_letters(choices: Iterable[str]) -> list[str]:
    """The line of each choice, from A."""
    return [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices, strict=False)]


def right_choice(correct: object, choices: Sequence[str], sample_id: str) -> int:
    """The index, from 0, that `extra["correct"]` holds.

    Raises:
        BadSample: it is no whole number, or no choice has it.
    """
    if isinstance(correct, bool) or not isinstance(correct, int):
        raise BadSample(sample_id, f"extra.correct must be the right choice's index, from 0, got {shown(correct)}")
    if not choices:
        raise BadSample(sample_id, f"extra.correct is {shown(correct)}, but it has no choices")
    if not 0 <= correct < len(choices):
        last = len(choices) - 1
        raise BadSample(sample_id, f"extra.correct is {shown(correct)}; its {len(choices)} choices are 0 to {last}")
    return correct


Reading = Literal["place", "text", "either", "only text"]
"""What text that says the right choice is first: its letter or number, or its words; `either` refuses what is both."""

LONGEST_LIST = 100_000
"""Characters of a list written as text; Python's reader takes a hundred times that as memory."""
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_NUMBER = re.compile(r"[0-9]{1,4}")


def listed_choices(text: str, sample_id: str) -> tuple[str, ...]:
    """The choices of a column that holds a list as text, in JSON or as Python writes it.

    Raises:
        BadSample: it is anything else than a list of text, or one choice, which numpy's lists without commas look like.
    """
    value = _literal(text) if text.lstrip().startswith("[") and len(text) <= LONGEST_LIST else None
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value) or len(value) == 1:
        raise BadSample(sample_id, f"its choices must be a list of text, got the text {shown(text)}")
    return tuple(value)


def _literal(text: str) -> object:
    try:
        return json_of(text, "choices")
    except UserError:
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes that Python keeps as they are
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def correct_choice(said: object, choices: Sequence[str], sample_id: str, reading: Reading) -> int | None:
    """The index of the right choice; None where nothing is said, as in splits whose answers the publisher keeps.

    Raises:
        BadSample: it is no choice's letter, number or text, or those of several.
    """
    if said is None or (isinstance(said, str) and not said.strip()):
        return None
    if isinstance(said, int) and not isinstance(said, bool):
        if not 0 <= said < len(choices):
            raise BadSample(sample_id, f"its answer is {said}, but there are {len(choices)} choices")
        return said
    if not isinstance(said, str):
        raise BadSample(sample_id, f"its answer must be text or a whole number, got {shown(said)}")
    by_text, by_place = _of_text(said, choices, sample_id), _of_place(said.strip(), len(choices))
    found = {
        "only text": (by_text,),
        "text": (by_text, by_place),
        "place": (by_place, by_text),
        "either": (by_text, by_place),
    }[reading]
    known = [index for index in found if index is not None]
    if not known:
        ways = "text" if reading == "only text" else "letter, number from 0 or text"
        raise BadSample(sample_id, f"its answer {shown(said)} is no {ways} of its {len(choices)} choices")
    if reading == "either" and len(set(known)) > 1:
        raise BadSample(
            sample_id,
            f"its answer {shown(said)} is the text of one choice and the letter or number of another; with "
            "columns=correct:COLUMN it is the latter, with columns=answers:COLUMN the text",
        )
    return known[0]


def _of_text(said: str, choices: Sequence[str], sample_id: str) -> int | None:
    same = [index for index, choice in enumerate(choices) if choice.strip() == said.strip()]
    if len(same) > 1:
        raise BadSample(sample_id, f"its answer {shown(said)} is the text of {len(same)} of its choices")
    return same[0] if same else None


def _of_place(said: str, count: int) -> int | None:
    letter = _LETTER.fullmatch(said)
    place = ascii_uppercase.index(letter[1].upper()) if letter else int(said) if _NUMBER.fullmatch(said) else count
    return place if place < count else None
