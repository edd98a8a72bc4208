"""The letters of multiple-choice questions, and where an example says which one is right."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from string import ascii_uppercase

from dora_vl.data.examples import Example
from dora_vl.data.right_choice import right_choice
from dora_vl.errors import UserError, shown


def letters(example: Example) -> str:
    """The letters of the example's choices: "ABCD" for four."""
    return ascii_uppercase[: len(example.choices)]


def correct_index(example: Example) -> int:
    """Which choice is right.

    Raises:
        UserError: the example does not say, or says one that is not there.
    """
    if "correct" not in example.extra:
        raise UserError(
            f"example {shown(example.id)} does not say which of its {len(example.choices)} choices is right "
            "(extra.correct); a split whose answers the publisher keeps cannot be scored here"
        )
    return right_choice(example.extra["correct"], example.choices, example.id)


def check_choices(
    examples: Iterable[Example], file: Path, *, most: int | None = len(ascii_uppercase), all_known: bool = True
) -> None:
    """Sees, before a model is asked, that every question of a file can be answered and scored.

    A file that gives no right answer at all is one whose answers the publisher keeps.

    Args:
        most: choices that a question may have; the letters end with Z.
        all_known: where some questions say which choice is right, all must.

    Raises:
        UserError: a question has no choices or too many, or some questions say which is right and others do not.
    """
    count, known = 0, False
    bare, crowded, unsaid = [], [], []
    for example in examples:
        count += 1
        known = known or bool(example.answers) or "correct" in example.extra
        bare += [] if example.choices else [example.id]
        crowded += [] if most is None or len(example.choices) <= most else [example.id]
        unsaid += [] if "correct" in example.extra else [example.id]
    wrong = {"no choices": bare, f"more than {most} choices": crowded}
    if known and all_known:
        wrong["no extra.correct, the right choice's index"] = unsaid
    for what, ids in wrong.items():
        if ids:
            raise UserError(
                f"{file}: {len(ids)} of {count} questions have {what}, first {shown(ids[0])}; repair the file"
            )
