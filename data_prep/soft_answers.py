"""Ten people's answers to one question about a picture: distinct ones with the weight each gets in training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dora_vl.data.examples import Answer

STEP = 0.3
"""LXMERT's ladder: one person 0.3, two 0.6, three 0.9, more 1; the metric itself gives 1 from three on."""


def soft_answers(answers: Sequence[str]) -> tuple[Answer, ...]:
    """The distinct answers, most frequent first, in the order in which they came; empty ones are left out."""
    counted = Counter(answer for answer in answers if answer.strip())
    return tuple(Answer(text=text, weight=min(1.0, round(STEP * count, 1))) for text, count in counted.most_common())
