"""Scores for a benchmark of one's own: the best over an example's right answers, in percent. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase

from dora_vl.data.example import Example
from dora_vl.evaluation.scores import caption, llava
from dora_vl.evaluation.scores.benchmark import Scorer, correct_index
from dora_vl.evaluation.scores.exact import by_kind, normalised
from dora_vl.evaluation.scores.scored import ACCURACY, Answers, Scored, score_points


def best_of(points: Callable[[str, str], float], headline: str) -> Scorer:
    """A score that is the best of an answer's points, from 0 to 1, against each right answer."""

    def scorer(examples: Sequence[Example], answers: Answers) -> Scored:
        """Over all, and by `extra["kind"]`."""

        def best(example: Example, answer: str) -> float:
            return max((float(points(answer, right.text)) for right in example.answers), default=0.0)

        return score_points(examples, answers, best, metrics={headline: ACCURACY}, kinds=by_kind)

    return scorer


def choice(examples: Sequence[Example], answers: Answers) -> Scored:
    """Accuracy over all, and by `extra["kind"]`: the right choice's letter or text, or as MMBench's rules find it."""

    def right(example: Example, answer: str) -> float:
        choices = dict(zip(ascii_uppercase, example.choices, strict=False))
        return float(_chosen(answer, choices) == ascii_uppercase[correct_index(example)])

    return score_points(examples, answers, right, kinds=by_kind)


def _chosen(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter an answer gives, or None.

    MMBench's rules look for a choice's text anywhere, so where one choice is in another ("1" in "10") they find two in
    the right answer and take neither. A letter as it was asked for goes before all texts, a small one after them.
    """
    bare = answer.strip().removesuffix(".")
    if bare in choices:
        return bare
    for same in (str.strip, normalised):  # "Co" and "CO" may both be choices
        equal = [letter for letter, text in choices.items() if same(text) == same(answer)]
        if len(equal) == 1:
            return equal[0]
    return bare.upper() if bare.upper() in choices else llava.chosen(answer, choices, "2025")


def similarity(answer: str, true: str) -> float:
    """One answer's ANLS against one right one, from 0 to 1 (Biten et al., 2019; DocVQA).

    One minus the edit distance over the longer one's length, letter case and spaces aside; nothing up to one half.
    """
    answer, true = (" ".join(text.lower().split()) for text in (answer, true))
    longer = max(len(answer), len(true))
    if abs(len(answer) - len(true)) * 2 > longer:  # at least so many insertions
        return 0.0
    share = 1.0 - _edits(answer, true) / longer if longer else 1.0
    return share if share > 0.5 else 0.0


def _edits(first: str, second: str) -> int:
    """Levenshtein's distance, a row of its table at a time."""
    row = list(range(len(second) + 1))
    for number, letter in enumerate(first, start=1):
        corner, row[0] = row[0], number
        for column, other in enumerate(second, start=1):
            changed = corner + (letter != other)
            corner = row[column]
            row[column] = min(changed, corner + 1, row[column - 1] + 1)
    return row[-1]


def is_close(answer: str, true: str) -> bool:
    """ChartQA's relaxed equality (Masry et al., 2022): numbers, "%" read as hundredths, may be off by 5 % of the true.

    Others must be equal but for letter case; so must a number whose true value is zero.
    """
    number, true_number = _number(answer), _number(true)
    if number is None or not true_number:
        return answer.strip().lower() == true.strip().lower()
    # 105 is within, whatever float division makes of it
    return abs(number - true_number) <= (0.05 + 1e-9) * abs(true_number)


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


SCORINGS: Mapping[str, Scorer] = {
    "exact": best_of(lambda answer, true: normalised(answer) == normalised(true), "accuracy"),
    "choice": choice,
    "anls": best_of(similarity, "anls"),
    "relaxed": best_of(is_close, "relaxed accuracy"),
    "caption": caption.score,
}
"""What `scoring:` may say in a benchmark's YAML."""
