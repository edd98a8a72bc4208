"""VizWiz accuracy: VQA's soft accuracy over EvalAI's normaliser, as LLaVA's upload is scored.

The prompt adds "When the provided information is insufficient, respond with 'Unanswerable'.". The test answers are the
server's; this is for the validation split, and for a look before an upload (`submission.py` writes that file).
Questions that the publisher marks as unanswerable (`extra["answerable"]` false) are also counted on their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dora_vl.data.examples import Example
from dora_vl.scores.human_answers import human_answers
from dora_vl.scores.scored import ACCURACY, Scored, Tally, by_kind, kind_columns, unit_of
from dora_vl.scores.textvqa import soft_accuracy


def score(examples: Sequence[Example], answers: Mapping[str, str]) -> Scored:
    """Mean soft accuracy in percent, a missing answer counting as wrong."""
    tally, kinds = Tally(), []
    for example in examples:
        answer = answers.get(example.id)
        points = 0.0 if answer is None else soft_accuracy(answer, human_answers(example))
        kind = _kind(example)
        kinds += kind
        tally.add(example.id, points, kind_columns(points, *kind), unit=unit_of(example), failed=answer is None)
    return tally.scored({"accuracy": ACCURACY, **by_kind("accuracy", kinds)}, settings={"normaliser": "evalai (m4c)"})


def _kind(example: Example) -> list[str]:
    if "answerable" not in example.extra:
        return []
    return ["answerable" if example.extra["answerable"] else "unanswerable"]
