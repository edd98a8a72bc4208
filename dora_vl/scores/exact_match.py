"""Exact match of short answers: accuracy, by kind of question, with a bootstrap interval. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dora_vl.data.examples import Example
from dora_vl.scores.benchmark import Benchmark, only
from dora_vl.scores.known_truth import right_answer
from dora_vl.scores.scored import ACCURACY, Scored, Tally, by_kind, kind_columns, unit_of


def normalised(answer: str) -> str:
    """Lower case, one space between words, no full stop at the end (GQA's rule in LLaVA: `rstrip('.').lower()`)."""
    return " ".join(answer.lower().split()).rstrip(".").rstrip()


def final_answer(text: str | None, after: str | None) -> str | None:
    """What follows the last `after` in an answer that reasons first ("blue circle, so no"); all of it without one."""
    return text if text is None or not after else text.rpartition(after)[2]


def is_match(truth: str, prediction: str | None) -> bool:
    """Whether the model's answer is the true one, after normalisation of both."""
    return prediction is not None and normalised(prediction) == normalised(truth)


def score(examples: Sequence[Example], answers: Mapping[str, str], *, answer_after: str | None = None) -> Scored:
    """Accuracy in percent: all, and by `extra["kind"]`. A question without an answer counts as wrong.

    Args:
        answer_after: as `final_answer` takes it, for answers that reason first.

    Raises:
        ValueError: there is nothing to score.
    """
    tally, kinds = Tally(), []
    for example in examples:
        prediction = final_answer(answers.get(example.id), answer_after)
        truth = final_answer(right_answer(example), answer_after) or ""
        right = float(is_match(truth, prediction))
        kind = [str(example.extra["kind"])] if "kind" in example.extra else []
        kinds += kind
        tally.add(example.id, right, kind_columns(right, *kind), unit=unit_of(example), failed=prediction is None)
    settings = {"answer_after": answer_after} if answer_after else {}
    return tally.scored({"accuracy": ACCURACY, **by_kind("kind", kinds)}, settings=settings)


BENCHMARK = Benchmark(modes=only(score))
