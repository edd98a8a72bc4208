"""VizWiz accuracy: VQA's soft accuracy over EvalAI's normaliser, as LLaVA's upload is scored.

The prompt adds "When the provided information is insufficient, respond with 'Unanswerable'.". The test answers are the
server's; this is for the validation split, and for a look before an upload (`submission` writes that file).
Questions that the publisher marks as unanswerable (`extra["answerable"]` false) are also counted on their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from dora_vl.data.examples import Example
from dora_vl.scores.answer_rows import AnswerRow
from dora_vl.scores.benchmark import Benchmark, only
from dora_vl.scores.evalai_normaliser import normalise
from dora_vl.scores.human_answers import human_answers
from dora_vl.scores.joins import ByKey, Key, picture_stem, plain, question_in
from dora_vl.scores.prompts import SHORT, UNANSWERABLE
from dora_vl.scores.scored import ACCURACY, Scored, Tally, by_kind, kind_columns, unit_of
from dora_vl.scores.textvqa import soft_accuracy
from dora_vl.whole_numbers import number_of


def score(examples: Sequence[Example], answers: Mapping[str, str]) -> Scored:
    """Mean soft accuracy in percent, a missing answer scored as the empty one that the file holds."""
    tally, kinds = Tally(), []
    for example in examples:
        answer = answers.get(example.id)
        points = soft_accuracy(answer or "", human_answers(example))
        kind = _kind(example)
        kinds += kind
        tally.add(example.id, points, kind_columns(points, *kind), unit=unit_of(example), failed=answer is None)
    return tally.scored({"accuracy": ACCURACY, **by_kind("accuracy", kinds)}, settings={"normaliser": "evalai (m4c)"})


def _kind(example: Example) -> list[str]:
    if "answerable" not in example.extra:
        return []
    return ["answerable" if example.extra["answerable"] else "unanswerable"]


def prompt(example: Example) -> str:
    """LLaVA's wording."""
    return f"{example.question}\n{UNANSWERABLE}\n{SHORT}"


def submission(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """EvalAI's file: normalised answers by picture."""
    rows = [
        {
            "image": (example.images or (example.id,))[0].rsplit("/", 1)[-1],
            "answer": normalise(answers.get(example.id, "")),
        }
        for example in examples
    ]
    return "vizwiz.json", json.dumps(rows, ensure_ascii=False)


def _picture_name(row: AnswerRow) -> Key:
    return PurePosixPath(row.ids.get("image", row.id)).name


def _picture_of(example: Example) -> Key:
    return PurePosixPath(example.images[0]).name if example.images else None


def _number_row(row: AnswerRow) -> Key:
    number = number_of(row.id)
    return None if number is None else (number, question_in(row.prompt))


def _number_example(example: Example) -> Key:
    found = re.search(r"_(\d+)$", picture_stem(example.images[0])) if example.images else None
    number = number_of(found.group(1)) if found else None
    return None if number is None else (number, plain(example.question))


BENCHMARK = Benchmark(
    modes=only(score),
    prompt=prompt,
    submission=submission,
    joins=(
        ByKey("picture", _picture_name, _picture_of),
        ByKey("number in the picture's name, and question", _number_row, _number_example),
    ),
)
