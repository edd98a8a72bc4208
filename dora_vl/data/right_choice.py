"""Which of an example's choices is the right one, as `extra["correct"]` says it."""

from __future__ import annotations

from collections.abc import Sequence

from dora_vl.errors import BadSample, shown


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
