"""Exact match of short answers: accuracy, by kind of question, with a bootstrap interval. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from dora_vl.data.example import Example
from dora_vl.evaluation.scores.benchmark import Benchmark, right_answer
from dora_vl.evaluation.scores.scored import Answers, Scored, score_points


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
    return score_points(examples, answers, points, kinds=by_kind, settings=settings)


def by_kind(example: Example) -> list[str]:
    """The further groups that an example is counted in."""
    return [f"kind/{example.extra['kind']}"] if "kind" in example.extra else []


BENCHMARK = Benchmark(modes={"": score})
