"""TextVQA accuracy as m4c's evaluator gives it (used by LLaVA's eval_textvqa.py).

Both sides go through `evalai_normaliser`; the points are those of VQA, leaving each of exactly ten people out in turn.
LLaVA finds the question again by (image id, lower-cased question) parsed out of the prompt; here the id does that.
A question without an answer counts as wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dora_vl.data.examples import Example
from dora_vl.scores.answer_rows import AnswerRow
from dora_vl.scores.benchmark import Benchmark, only
from dora_vl.scores.evalai_normaliser import normalise
from dora_vl.scores.human_answers import human_answers, leave_one_out
from dora_vl.scores.joins import REPEATED, ByKey, Key, plain, question_in
from dora_vl.scores.prompts import SHORT
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


def prompt(example: Example) -> str:
    """LLaVA's wording, with its line of OCR tokens where `extra["reference_ocr"]` holds them."""
    tokens = example.extra.get("reference_ocr")
    line = "" if tokens is None else f"Reference OCR token: {tokens}\n"
    return f"{example.question}\n{line}{SHORT}"


def _row_key(row: AnswerRow) -> Key:
    question = question_in(row.prompt)
    return (REPEATED.sub("", row.id), question) if question else None


def _example_key(example: Example) -> Key:
    return str(example.extra.get("image_id")), plain(example.question)


BENCHMARK = Benchmark(
    modes=only(score),
    prompt=prompt,
    splits=("validation",),
    joins=(ByKey("picture and question", _row_key, _example_key),),
)
