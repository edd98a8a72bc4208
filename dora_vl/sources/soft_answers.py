"""Ten people's answers to one question about a picture: distinct ones with the weight each gets in training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dora_vl.data.examples import Answer
from dora_vl.errors import BadSample
from dora_vl.sources.fields import rows, text
from dora_vl.sources.published import Raw

STEP = 0.3
"""LXMERT's ladder: one person 0.3, two 0.6, three 0.9, more 1; the metric itself gives 1 from three on."""


def people_answers(raw: Raw, column: str, sample_id: str) -> list[str]:
    """What each person answered, from a list of {"answer": text}; empty ones are kept, for the metrics count them.

    Raises:
        BadSample: nobody answered.
    """
    return somebody_answered([text(entry, "answer", sample_id) for entry in rows(raw, column, sample_id)], sample_id)


def somebody_answered(answers: Sequence[str], sample_id: str) -> list[str]:
    """The answers, of which one must not be empty.

    Raises:
        BadSample: nobody answered.
    """
    if not any(answer.strip() for answer in answers):
        raise BadSample(sample_id, f"none of its {len(answers)} answers holds text")
    return list(answers)


def soft_answers(answers: Sequence[str]) -> tuple[Answer, ...]:
    """The distinct answers, most frequent first, in the order in which they came; empty ones are left out."""
    counted = Counter(answer for answer in answers if answer.strip())
    return tuple(Answer(text=text, weight=min(1.0, round(STEP * count, 1))) for text, count in counted.most_common())
