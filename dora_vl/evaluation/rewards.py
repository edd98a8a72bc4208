"""Rewards of drawn answers: the scorers of the tests by name, a format, and functions of one's own."""

from __future__ import annotations

import importlib
import re
import runpy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from math import isfinite

from dora_vl.data.example import Clip, Example
from dora_vl.errors import SettingError, UserError, short_repr
from dora_vl.evaluation.benchmarks import with_choices
from dora_vl.evaluation.scores.benchmark import LETTER
from dora_vl.evaluation.scores.caption import CiderOfAnswers
from dora_vl.evaluation.scores.exact import final_answer, is_close, normalised, right_choice_points, similarity
from dora_vl.evaluation.scores.vqa import normalise

Reward = Callable[[Example, str], float]
"""Gives an answer to an example its points, 1 for a right one; the example's first answer is the data's own."""
Media = tuple[str | Clip, ...]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def overlap(answer: str, right: str) -> float:
    """Computes the intersection of two boxes over their union; a box is the last four numbers of a text."""
    boxes = [[float(number) for number in NUMBER.findall(text)[-4:]] for text in (answer, right)]
    if any(len(box) < 4 or box[0] >= box[2] or box[1] >= box[3] for box in boxes):
        return 0.0
    (left, top, end, bottom), (other_left, other_top, other_end, other_bottom) = boxes
    width, height = min(end, other_end) - max(left, other_left), min(bottom, other_bottom) - max(top, other_top)
    shared = max(0.0, width) * max(0.0, height)
    areas = (end - left) * (bottom - top) + (other_end - other_left) * (other_bottom - other_top)
    return shared / (areas - shared)


SCORES: Mapping[str, Callable[[str, str], float | bool]] = {
    "exact": lambda answer, right: normalised(answer) == normalised(right),
    "anls": similarity,
    "relaxed": is_close,
    "vqa": lambda answer, right: normalise(answer) == normalise(right),
    "box": overlap,
}
"""Maps a reward's name to what compares an answer with the right one, as the tests' scorers do."""
CHOICE, FORMAT, CIDER = "choice", "format", "cider"


def rewards_of(
    names: Iterable[str],
    *,
    answer_format: str | None,
    answer_after: str | None,
    examples: Callable[[], Iterable[Example]] = tuple,
) -> dict[str, Reward]:
    """Finds the rewards of `objective.rewards` by name.

    Args:
        examples: all of the training file; read by the reward `cider` alone, at its first answer.
        answer_format: the pattern of the reward `format`.
        answer_after: what stands before it in answers and right answers is not compared.
    """

    def compared(score: Callable[[str, str], float | bool]) -> Reward:
        def reward(example: Example, answer: str) -> float:
            text = final_answer(answer, answer_after)
            return max(float(score(text, final_answer(right.text, answer_after))) for right in example.answers)

        return reward

    def choice(example: Example, answer: str) -> float:
        return right_choice_points(with_right_choice(example), final_answer(answer, answer_after))

    def reward_of(name: str) -> Reward:
        if name in SCORES:
            return compared(SCORES[name])
        own = {CHOICE: lambda: choice, FORMAT: lambda: _format(answer_format), CIDER: lambda: _cider(examples)}
        return own.get(name, lambda: _own(name))()

    return {name: reward_of(name) for name in names}


def with_right_choice(example: Example) -> Example:
    """Returns an example with its choices and the right one, which the reward `choice` needs of every sample."""
    chosen = example if example.choices else with_choices(example, LETTER)
    if "correct" not in chosen.extra:
        raise UserError(f"the reward {CHOICE}: sample {short_repr(example.id)} has no choices, or names none as right")
    return chosen


def _format(pattern: str | None) -> Reward:
    """Makes the reward 1 of answers that a pattern fits from end to end."""
    if pattern is None:
        raise SettingError("objective.format", " is missing: the reward `format` compares answers with its pattern")
    try:
        fits = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise SettingError(
            "objective.format", f": {short_repr(pattern)} is not a regular expression: {error}"
        ) from error
    return lambda example, answer: float(fits.fullmatch(answer) is not None)


def _cider(examples: Callable[[], Iterable[Example]]) -> Reward:
    """Compares a caption with all captions of its picture in the training file."""

    @cache
    def read() -> tuple[CiderOfAnswers, Mapping[Media, list[str]]]:
        captions: defaultdict[Media, list[str]] = defaultdict(list)
        for example in examples():
            texts = [turn.text for turn in example.turns[-1:]] + [right.text for right in example.answers]
            captions[media_of(example)] += dict.fromkeys(texts)
        return CiderOfAnswers(list(captions.values())), captions

    def media_of(example: Example) -> Media:
        return (*example.images, *example.videos) or (example.id,)

    def reward(example: Example, answer: str) -> float:
        score, captions = read()
        return score(answer, captions[media_of(example)])

    return reward


def _own(name: str) -> Reward:
    """Finds a function by `FILE.py:FUNCTION`, or `MODULE:FUNCTION` of an installed package."""
    setting = "objective.rewards"
    source, colon, function = name.rpartition(":")
    if not colon:
        there = ", ".join([*SCORES, CHOICE, FORMAT, CIDER])
        raise SettingError(
            setting, f": there is no reward {short_repr(name)}; there are {there}, and FILE.py:FUNCTION of your own"
        )
    try:
        names = runpy.run_path(source) if source.endswith(".py") else vars(importlib.import_module(source))
        own: Reward = names[function]
    except Exception as error:
        raise SettingError(
            setting, f": {short_repr(name)} cannot be loaded: {type(error).__name__}: {error}"
        ) from error

    def points(example: Example, answer: str) -> float:
        try:
            value = float(own(example, answer))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"the reward {short_repr(name)} fails for sample {short_repr(example.id)}: {reason}"
            ) from error
        if not isfinite(value):
            raise UserError(
                f"the reward {short_repr(name)} of sample {short_repr(example.id)} is {value}, for {short_repr(answer)}"
            )
        return value

    return points
