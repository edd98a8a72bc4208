"""Rewards of drawn answers: the scorers of the tests by name, a format, and functions of one's own."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import re
import runpy
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import chain
from math import isfinite, nan
from pathlib import PurePath
from typing import Any

from dora_vl.data.example import Clip, Example
from dora_vl.errors import SettingError, UserError, short_repr
from dora_vl.evaluation.scores.benchmark import LETTER
from dora_vl.evaluation.scores.caption import CiderOfAnswers
from dora_vl.evaluation.scores.exact import COMPARISONS, best_points, final_answer, right_choice_points
from dora_vl.evaluation.scores.llava import with_choices

logger = logging.getLogger(__name__)

Points = Callable[[Example, str], float]
"""Gives an answer to an example its points, 1 for a right one; the example's first answer is the data's own."""
Reward = Callable[[Sequence[Example], Sequence[str]], list[float]]
"""Gives the answers of a step, each to its example, their points; NaN where it does not apply."""
Media = tuple[str | Clip, ...]
CHOICE, FORMAT, CIDER = "choice", "format", "cider"


def rewards_of(
    names: Iterable[str],
    *,
    answer_format: str | None,
    answer_after: str | None,
    examples: Callable[[], Iterable[Example]] = tuple,
    threads: int = 1,
    skips_errors: bool = False,
) -> dict[str, Reward]:
    """Finds the rewards of `objective.rewards` by name.

    Args:
        examples: all of the training file; read by the reward `cider` alone, at its first answer.
        answer_format: the pattern of the reward `format`.
        answer_after: what stands before it in answers and right answers is not compared.
        threads: how many answers a plain function of one's own rewards at once.
        skips_errors: such a function does not apply where it fails; else that raises UserError.
    """

    def choice(example: Example, answer: str) -> float:
        return right_choice_points(with_right_choice(example), final_answer(answer, answer_after))

    def each(points: Points) -> Reward:
        return lambda examples, answers: [float(points(*pair)) for pair in zip(examples, answers, strict=True)]

    def reward_of(name: str) -> Reward:
        if name in COMPARISONS:
            return each(partial(best_points, COMPARISONS[name], answer_after=answer_after))
        given = {CHOICE: lambda: choice, FORMAT: lambda: _format(answer_format), CIDER: lambda: _cider(examples)}
        if name in given:
            return each(given[name]())
        return OwnReward(name=name, function=_loaded(name), threads=threads, skips_errors=skips_errors)

    return {name: reward_of(name) for name in names}


def check_truths(names: Iterable[str], examples: Iterable[Example], file: str, *, answer_after: str | None) -> None:
    """Refuses samples whose own right answer earns nothing, such as a box of three numbers."""
    compared = {name: COMPARISONS[name] for name in names if name in COMPARISONS}
    unearned: defaultdict[str, list[Example]] = defaultdict(list)
    for example in examples:
        if CHOICE in names:
            with_right_choice(example)
        for name, points in compared.items():
            rights = [right.text for right in example.answers]
            if not any(best_points(points, example, right, answer_after=answer_after) for right in rights):
                unearned[name].append(example)
    for name, samples in unearned.items():
        first = samples[0]
        truth = short_repr(first.answers[0].text) if first.answers else "missing"
        raise UserError(
            f"{file}: no answer earns the reward {name} for {len(samples):,} samples, first {short_repr(first.id)}, "
            f"whose right answer is {truth}; repair or leave out these rows, or take another reward, such as exact"
        )


def with_right_choice(example: Example) -> Example:
    """Returns an example with its choices and the right one, which the reward `choice` needs of every sample."""
    chosen = example if example.choices else with_choices(example, LETTER)
    if "correct" not in chosen.extra:
        raise UserError(f"the reward {CHOICE}: sample {short_repr(example.id)} has no choices, or names none as right")
    return chosen


def _format(pattern: str | None) -> Points:
    """Makes the reward 1 of answers that a pattern fits from end to end."""
    if pattern is None:
        raise SettingError("objective.format", " is missing: the reward `format` compares answers with its pattern")
    try:
        fits = re.compile(pattern, re.DOTALL)
    except re.error as error:
        reason = f": {short_repr(pattern)} is not a regular expression: {error}"
        raise SettingError("objective.format", reason) from error
    return lambda example, answer: float(fits.fullmatch(answer) is not None)


def _cider(examples: Callable[[], Iterable[Example]]) -> Points:
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


@dataclass(frozen=True, kw_only=True)
class OwnReward:
    """A function of one's own, called once a step with two lists if its first parameter is `examples`, else for each.

    Coroutines are awaited together. None is "does not apply".
    """

    name: str
    function: Callable[..., Any]
    threads: int
    skips_errors: bool

    @cached_property
    def _takes_lists(self) -> bool:
        return next(iter(inspect.signature(self.function).parameters), "") == "examples"

    def __call__(self, examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
        """See `Reward`."""
        calls = [([example], [answer]) for example, answer in zip(examples, answers, strict=True)]
        if self._takes_lists:
            calls = [(list(examples), list(answers))] if answers else []
        if inspect.iscoroutinefunction(self.function):
            return [*chain.from_iterable(asyncio.run(self._gathered(calls)))]
        if self.threads == 1:
            return [points for call in calls for points in self._called(*call)]
        with ThreadPoolExecutor(self.threads) as pool:
            return [*chain.from_iterable(pool.map(lambda call: self._called(*call), calls))]

    def _called(self, examples: list[Example], answers: list[str]) -> list[float]:
        points = [nan] * len(answers)
        with self._errors_named(examples):
            result = self.function(examples, answers) if self._takes_lists else self.function(examples[0], answers[0])
            points = self._read(result, answers)
        return points

    async def _gathered(self, calls: Iterable[tuple[list[Example], list[str]]]) -> list[list[float]]:
        return await asyncio.gather(*(self._awaited(*call) for call in calls))

    async def _awaited(self, examples: list[Example], answers: list[str]) -> list[float]:
        points = [nan] * len(answers)
        with self._errors_named(examples):
            given = (examples, answers) if self._takes_lists else (examples[0], answers[0])
            points = self._read(await self.function(*given), answers)
        return points

    def _read(self, result: Any, answers: Sequence[str]) -> list[float]:
        values = list(result) if self._takes_lists else [result]
        if len(values) != len(answers):
            raise ValueError(f"{len(values)} rewards for {len(answers)} answers")
        points = [nan if value is None else float(value) for value in values]
        for value, number, answer in zip(values, points, answers, strict=True):
            if value is not None and not isfinite(number):
                raise ValueError(f"{number} is no reward, for {short_repr(answer)}")
        return points

    @contextmanager
    def _errors_named(self, examples: Sequence[Example]) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            others = f" or {len(examples) - 1} others" if len(examples) > 1 else ""
            reason = f"for sample {short_repr(examples[0].id)}{others}: {_told(error)}"
            if not self.skips_errors:
                raise UserError(f"the reward {PurePath(self.name).name} fails {reason}") from error
            logger.warning("the reward %s does not apply %s", PurePath(self.name).name, reason)


def _loaded(name: str) -> Callable[..., Any]:
    """Finds a function by `FILE.py:FUNCTION`, or `MODULE:FUNCTION` of an installed package."""
    setting = "objective.rewards"
    source, colon, function = name.rpartition(":")
    if not colon:
        there = ", ".join([*COMPARISONS, CHOICE, FORMAT, CIDER])
        reason = f": there is no reward {short_repr(name)}; there are {there}, and FILE.py:FUNCTION of your own"
        raise SettingError(setting, reason)
    try:
        names = runpy.run_path(source) if source.endswith(".py") else vars(importlib.import_module(source))
        return names[function]
    except (Exception, SystemExit) as error:
        raise SettingError(setting, f": {short_repr(name)} cannot be loaded: {_told(error)}") from error


def _told(error: BaseException) -> str:
    """Returns an error of a person's code with the last line of that code."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "<" not in frame.filename]
    theirs = [frame for frame in frames if frame.filename not in (__file__, runpy.__file__, importlib.__file__)]
    where = f"{theirs[-1].filename}:{theirs[-1].lineno}: " if theirs else ""
    return f"{where}{type(error).__name__}: {error}"
