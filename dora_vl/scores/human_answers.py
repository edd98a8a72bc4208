"""Soft accuracy against ten people's answers: VQAv2, VizWiz and TextVQA."""

from __future__ import annotations

from collections.abc import Sequence

from dora_vl.data.examples import Example
from dora_vl.errors import UserError, shown

PEOPLE = 10
AGREEING_FOR_ALL_POINTS = 3


def human_answers(example: Example) -> list[str]:
    """What the ten people said, raw: `extra["human_answers"]`, or else the example's answers.

    Raises:
        UserError: they are not ten.
    """
    given = example.extra.get("human_answers")
    if not isinstance(given, list | tuple | None):
        raise UserError(f"example {shown(example.id)}: extra.human_answers must be a list, it is {shown(given)}")
    answers = [str(one) for one in given] if given is not None else [answer.text for answer in example.answers]
    if len(answers) != PEOPLE:
        raise UserError(
            f"example {shown(example.id)} has {len(answers)} human answers, the metric needs {PEOPLE} "
            "(extra.human_answers); prepare the set again from the publisher's annotations"
        )
    return answers


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """The mean over the people of min(1, others who said the prediction / 3), by exact comparison."""
    said = sum(answer == prediction for answer in answers)
    without_one = [min(1.0, (said - (answer == prediction)) / AGREEING_FOR_ALL_POINTS) for answer in answers]
    return sum(without_one) / len(answers)
