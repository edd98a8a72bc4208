"""Exact match of short answers: accuracy, by kind of question, with a bootstrap interval. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase

from dora_vl.data.example import Example
from dora_vl.evaluation.scores import caption, llava
from dora_vl.evaluation.scores.benchmark import Benchmark, Scorer, correct_index, right_answer
from dora_vl.evaluation.scores.scored import ACCURACY, Answers, Scored, score_points


def normalised(answer: str) -> str:
    """Lower case, one space between words, no full stop at the end (GQA's rule in LLaVA: `rstrip('.').lower()`)."""
    return " ".join(answer.lower().split()).rstrip(".").rstrip()


def final_answer(text: str | None, after: str | None) -> str | None:
    """What follows the last `after` in an answer that reasons first ("blue circle, so no"); all of it without one."""
    return text if text is None or not after else text.rpartition(after)[2]


def score(examples: Sequence[Example], answers: Answers, *, answer_after: str | None = None) -> Scored:
    """Accuracy in percent: all, and by `extra["kind"]`. A question without an answer counts as wrong.

    Args:
        answer_after: as `final_answer` takes it, for answers that reason first.
    """

    def points(example: Example, answer: str) -> float:
        truth = final_answer(right_answer(example), answer_after) or ""
        return float(normalised(final_answer(answer, answer_after) or "") == normalised(truth))

    settings = {"answer_after": answer_after} if answer_after else {}
    return score_points(examples, answers, points, kinds=_kind, settings=settings)


def _kind(example: Example) -> list[str]:
    return [f"kind/{example.extra['kind']}"] if "kind" in example.extra else []


BENCHMARK = Benchmark(modes={"": score})


# Scores for a benchmark of one's own: each is the best over an example's right answers; everything in percent.
#
# - `exact`: the answer, letter case, spaces between words and final periods aside.
# - `choice`: the letter of the right choice, or its text: equal to it, as `exact` compares, or else as MMBench's
#   current rules find it in a longer answer.
# - `anls`: average normalised Levenshtein similarity (Biten et al., 2019; DocVQA): one minus the edit distance over the
#   longer one's length, letter case and spaces aside, and nothing where that is not above one half.
# - `relaxed`: ChartQA's (Masry et al., 2022): numbers, "%" read as hundredths, may be off by 5 % of the true one,
#   others must be equal but for letter case; so must a number whose true value is zero.
# - `caption`: CIDEr, BLEU, ROUGE-L and METEOR, in `caption`.


def best_of(points: Callable[[str, str], float], headline: str) -> Scorer:
    """A score that is the best of an answer's points, from 0 to 1, against each right answer."""

    def scorer(examples: Sequence[Example], answers: Answers) -> Scored:
        """Over all, and by `extra["kind"]`."""

        def best(example: Example, answer: str) -> float:
            return max((float(points(answer, right.text)) for right in example.answers), default=0.0)

        return score_points(examples, answers, best, metrics={headline: ACCURACY}, kinds=_kind)

    return scorer


def choice(examples: Sequence[Example], answers: Answers) -> Scored:
    """Accuracy over all, and by `extra["kind"]`."""

    def right(example: Example, answer: str) -> float:
        choices = dict(zip(ascii_uppercase, example.choices, strict=False))
        return float(_chosen(answer, choices) == ascii_uppercase[correct_index(example)])

    return score_points(examples, answers, right, kinds=_kind)


def _chosen(said: str, choices: Mapping[str, str]) -> str | None:
    """The letter an answer gives, or None.

    MMBench's rules look for a choice's text anywhere, so where one choice is in another ("1" in "10") they find two in
    the right answer and take neither. A letter as it was asked for goes before all texts, a small one after them.
    """
    bare = said.strip().removesuffix(".")
    if bare in choices:
        return bare
    for same in (str.strip, normalised):  # "Co" and "CO" may both be choices
        equal = [letter for letter, text in choices.items() if same(text) == same(said)]
        if len(equal) == 1:
            return equal[0]
    return bare.upper() if bare.upper() in choices else llava.chosen(said, choices, "2025")


def similarity(said: str, true: str) -> float:
    """One answer's ANLS against one right one, from 0 to 1."""
    said, true = (" ".join(text.lower().split()) for text in (said, true))
    longer = max(len(said), len(true))
    if abs(len(said) - len(true)) * 2 > longer:  # at least so many insertions
        return 0.0
    share = 1.0 - _edits(said, true) / longer if longer else 1.0
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


def is_close(said: str, true: str) -> bool:
    """ChartQA's relaxed equality."""
    found, wanted = _number(said), _number(true)
    if found is None or not wanted:
        return said.strip().lower() == true.strip().lower()
    return abs(found - wanted) <= (0.05 + 1e-9) * abs(wanted)  # 105 is within, whatever float division makes of it


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
