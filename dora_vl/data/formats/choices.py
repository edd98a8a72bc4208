"""Choices of a question: how columns list them, which one is right, and how they are asked."""

from __future__ import annotations

import ast
import contextlib
import re
import warnings
from collections.abc import Mapping, Sequence
from string import ascii_lowercase, ascii_uppercase

from dora_vl.data.column_names import is_empty, parsed
from dora_vl.data.conversation import as_text
from dora_vl.data.example import LETTER, with_letters
from dora_vl.data.turns import Unusable
from dora_vl.errors import UserError, short_repr

LONGEST_LIST = 100_000
"""A list as Python writes it is read up to this many characters: the reader takes a hundred times as much memory."""
_LETTERED = re.compile(r"\(?([A-Za-z])[.):]\)?\s+(.*)", re.DOTALL)  # such as `A. cat`
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")


def choices_in(value: object) -> tuple[list[str], list[str]]:
    """Returns the choices' own labels, if any, and their texts; empty choices are none."""
    labels: object = []
    if isinstance(value, str):
        value = _listed(value)
    if isinstance(value, Mapping) and "text" in value:
        labels, value = value.get("label") or [], value["text"]
    elif isinstance(value, Mapping):
        texts_by_label = {name: text for name, text in value.items() if not is_empty(text)}
        labels, value = [*texts_by_label], [*texts_by_label.values()]
    if not isinstance(value, list | tuple) or not isinstance(labels, list) or len(labels) not in (0, len(value)):
        raise Unusable(f"its choices must be a list of text, got {short_repr(value)}")
    texts = [as_text(text, "choices") for text in value]
    lettered = [_LETTERED.fullmatch(text.strip()) for text in texts]
    letters = [match[1].casefold() for match in lettered if match]
    if not labels and len(texts) > 1 and letters == list(ascii_lowercase[: len(texts)]):
        labels, texts = letters, [match[2] for match in lettered if match]
    return [as_text(label, "choices") for label in labels], texts


def _listed(text: str) -> list[str]:
    """Returns the choices of a column that holds a list as text, in JSON or as Python writes it."""
    value = parsed(text)
    value = value if isinstance(value, list) else written_in_python(text)
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value) or len(value) == 1:
        raise Unusable(f"its choices must be a list of text, got the text {short_repr(text)}")
    return value


def written_in_python(text: str) -> object:
    """Returns the list or object that a text writes as Python does; None where it writes none."""
    if text.lstrip()[:1] in ("[", "{") and len(text) <= LONGEST_LIST:
        with (
            warnings.catch_warnings(),
            contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError),
        ):
            warnings.simplefilter("ignore")  # of backslashes that Python keeps as they are
            return ast.literal_eval(text.strip())
    return None


def written_choices(
    question: str, choices: Sequence[str], answer: str | int, labels: Sequence[str] = ()
) -> tuple[str, str]:
    """Returns a question with its choices as LLaVA writes MMBench's, a line each, and the right one's letter.

    A question that says its choices itself stays as it is: with letters, or where the answer is the text of one.

    Args:
        answer: the right choice's index, or its label or text; without labels but letters, its letter or number from 0.
        labels: what the file calls the choices, where it calls them something.
    """
    texts = [choice.strip() for choice in choices]
    if not all(texts) or len(choices) > len(ascii_uppercase):
        raise Unusable(f"its {len(choices)} choices must be text, at most {len(ascii_uppercase)} of them")
    if isinstance(answer, str) and (match := _LETTERED.fullmatch(answer.strip())) and match[2].strip() in texts:
        answer = match[2]
    index = answer if isinstance(answer, int) else _index_of(answer, texts, [label.casefold() for label in labels])
    letter = "" if index is None else ascii_uppercase[index]
    lines = with_letters(choices)
    if says(question, choices):
        if isinstance(answer, str) and answer.strip() in texts:
            return question, answer
        if all(re.search(rf"\b{line[0]}\W", question) for line in lines):
            return question, letter
    return "\n".join([question, *lines, LETTER]), letter


def says(question: str, texts: Sequence[str]) -> bool:
    """Tells whether the question holds all of these texts, as whole words; every question holds an empty text."""
    return all(not text or re.search(rf"(?<!\w){re.escape(text.strip())}(?!\w)", question) for text in texts)


def _index_of(answer: str, choices: Sequence[str], labels: Sequence[str]) -> int | None:
    """Returns the index of the right choice; None where the publisher keeps it back.

    A column says it by its label or text, or where the labels are letters or none by its number from 0 (AI2D) or its
    letter (MMMU, "B", also "(B)" or "B."). What is the text of one choice and the letter or number of another, such as
    "2" among "1", "2" and "3", is refused.

    Raises:
        CountedFromOne: its number is that of the choices.
    """
    word, label = answer.strip(), answer.strip(" ().:").casefold()
    by_place = [*labels] == [*ascii_lowercase[: len(labels)]]
    if not word or (label in labels and not by_place):
        return labels.index(label) if word else None
    by_text = [index for index, choice in enumerate(choices) if choice == word]
    if len(by_text) > 1:
        raise Unusable(f"its answer {short_repr(answer)} is the text of {len(by_text)} of its choices")
    letter = _LETTER.fullmatch(word)
    number = int(word) if re.fullmatch("[0-9]{1,4}", word) else None
    place = ascii_uppercase.index(letter[1].upper()) if letter else number
    indices = {*by_text, *([place] if by_place and place is not None and place < len(choices) else [])}
    if not indices and by_place and number == len(choices):
        raise CountedFromOne(len(choices))
    if not indices:
        ways = "letter, number from 0 or text" if by_place else "text"
        raise Unusable(f"its answer {short_repr(answer)} is no {ways} of its {len(choices)} choices")
    if len(indices) > 1:
        reason = "is the text of one choice and the letter or number of another; write a letter before each choice"
        raise Unusable(f"its answer {short_repr(answer)} {reason}")
    return indices.pop()


class CountedFromOne(UserError):
    """An answer is the number of its choices, so that its file counts from 1 and other rows mean another choice too.

    Attributes:
        count: how many choices there are.
    """

    def __init__(self, count: int) -> None:
        reason = f"its answer is {count} of {count} choices, and numbers count from 0; if the file counts from 1,"
        super().__init__(f"{reason} write letters or the choices' texts instead of numbers")
        self.count = count

    def __reduce__(self) -> tuple[type[CountedFromOne], tuple[int]]:
        return type(self), (self.count,)
