"""The letters of multiple-choice questions, and where an example says which one is right."""

from __future__ import annotations

from string import ascii_uppercase

from dora_vl.data.examples import Example
from dora_vl.errors import UserError


def letters(example: Example) -> str:
    """The letters of the example's choices: "ABCD" for four."""
    return ascii_uppercase[: len(example.choices)]


def correct_index(example: Example) -> int:
    """Which choice is right.

    Raises:
        UserError: the example does not say, or says one that is not there.
    """
    index = example.extra.get("correct")
    if not isinstance(index, int) or not 0 <= index < len(example.choices):
        raise UserError(
            f"example {example.id} has {len(example.choices)} choices and extra.correct {index!r}; "
            "a split whose answers the publisher keeps cannot be scored here, write its submission instead"
        )
    return index
