"""TextVQA accuracy as m4c's evaluator gives it (used by LLaVA's eval_textvqa.py).

Both sides go through `evalai_normaliser`; the points are those of VQA, leaving each of exactly ten people out in turn.
LLaVA finds the question again by (image id, lower-cased question) parsed out of the prompt; here the id does that.
A question without an answer counts as wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dora_vl.data.examples import Example
from dora_vl.scores.evalai_normaliser import normalise
from dora_vl.scores.human_answers import human_answers, leave_one_out
from dora_vl.scores.scored import ACCURACY, Scored, Tally, kind_columns, unit_of


def score(examples: Sequence[Example], answers: Mapping[str, str]) -> Scored:
    """Mean soft accuracy in percent."""
    tally = Tally()
    for example in examples:
        answer = answers.get(example.id)
        points = 0.0 if answer is None else soft_accuracy(answer, human_answers(example))
        tally.add(example.id, points, kind_columns(points), unit=unit_of(example), failed=answer is None)
    return tally.scored({"accuracy": ACCURACY}, settings={"normaliser": "evalai (m4c)"})


def soft_accuracy(prediction: str, people: Sequence[str]) -> float:
    """One question's points, from 0 to 1."""
    return leave_one_out(normalise(prediction), [normalise(one) for one in people])
