"""Exact match of short answers: accuracy, by kind of question, with a bootstrap interval. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dora_vl.data.examples import Example
from dora_vl.scores.benchmark import Benchmark, only
from dora_vl.scores.bootstrap import RESAMPLES, intervals
from dora_vl.scores.known_truth import right_answer
from dora_vl.scores.scored import ACCURACY, Ratio, Scored, Tally, by_kind, kind_columns, unit_of

WHOLE = ""  # the metric over all kinds


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One question with its true answer and the model's; `prediction` is None when the model could not be asked.

    Attributes:
        group: what the question shares with others, such as its picture; the bootstrap draws whole groups.
    """

    id: str
    truth: str
    prediction: str | None
    kind: str | None = None
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class KindScore:
    """Accuracy of one kind of question."""

    accuracy: float
    n: int


@dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """The score of a question set.

    Attributes:
        accuracy: correct answers / `n`. A question that could not be asked counts as wrong.
        interval_95: from the 2.5th to the 97.5th percentile of the accuracy over bootstrap samples; Wilson's where all
            answers, or none, are right.
        unanswered: questions with no prediction at all.
        empty: predictions without a single visible character.
    """

    accuracy: float
    n: int
    interval_95: tuple[float, float]
    by_kind: dict[str, KindScore]
    unanswered: int
    empty: int


def normalised(answer: str) -> str:
    """Lower case, one space between words, no full stop at the end (GQA's rule in LLaVA: `rstrip('.').lower()`)."""
    return " ".join(answer.lower().split()).rstrip(".").rstrip()


def final_answer(text: str | None, after: str | None) -> str | None:
    """What follows the last `after` in an answer that reasons first ("blue circle, so no"); all of it without one."""
    return text if text is None or not after else text.rpartition(after)[2]


def is_match(answer: Answered) -> bool:
    """Whether the model's answer is the true one, after normalisation of both."""
    return answer.prediction is not None and normalised(answer.prediction) == normalised(answer.truth)


def exact_match(answers: Sequence[Answered], *, seed: int = 0, resamples: int = RESAMPLES) -> ExactMatch:
    """Scores a question set.

    Raises:
        ValueError: there is nothing to score.
    """
    if not answers:
        raise ValueError("no answers to score")
    tally, asked = Tally(), Counter(answer.kind for answer in answers if answer.kind is not None)
    for number, answer in enumerate(answers):
        right, kinds = float(is_match(answer)), [answer.kind] if answer.kind is not None else []
        tally.add(str(number), right, kind_columns(right, *kinds), unit=answer.group, failed=answer.prediction is None)
    kinds = {kind: Ratio(f"right {kind}", f"asked {kind}", scale=1.0) for kind in sorted(asked)}
    scored = tally.scored({WHOLE: Ratio("right", "asked", scale=1.0), **kinds})
    return ExactMatch(
        accuracy=scored.metrics[WHOLE],
        n=scored.n,
        interval_95=intervals(scored, seed=seed, resamples=resamples)[WHOLE],
        by_kind={kind: KindScore(accuracy=scored.metrics[kind], n=asked[kind]) for kind in kinds},
        unanswered=len(scored.failed),
        empty=sum(answer.prediction is not None and not answer.prediction.strip() for answer in answers),
    )


def score(examples: Sequence[Example], answers: Mapping[str, str], *, answer_after: str | None = None) -> Scored:
    """The same rule over examples, in percent: all, and by `extra["kind"]`; an interval draws whole pictures.

    Args:
        answer_after: as `final_answer` takes it, for answers that reason first.
    """
    tally, kinds = Tally(), []
    for example in examples:
        prediction = final_answer(answers.get(example.id), answer_after)
        truth = final_answer(right_answer(example), answer_after) or ""
        right = float(is_match(Answered(id=example.id, truth=truth, prediction=prediction)))
        kind = [str(example.extra["kind"])] if "kind" in example.extra else []
        kinds += kind
        tally.add(example.id, right, kind_columns(right, *kind), unit=unit_of(example), failed=prediction is None)
    settings = {"answer_after": answer_after} if answer_after else {}
    return tally.scored({"accuracy": ACCURACY, **by_kind("kind", kinds)}, settings=settings)


BENCHMARK = Benchmark(modes=only(score))
