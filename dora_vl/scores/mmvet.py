"""MM-Vet: the file its grader takes, and its score from the grades an external judge gave.

Judged by GPT-4 with a few-shot prompt, each answer from 0 to 1 in steps of 0.1; the online grader takes one JSON object
`{"v1_0": answer, ...}`. No judge is called here. `score_grades` averages the grades, times 100, over all and over
the questions of each capability (rec, ocr, know, gen, spat, math; `extra["capability"]`, a question may need several).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from dora_vl.data.examples import Example
from dora_vl.errors import UserError
from dora_vl.scores.benchmark import LONG_ANSWER_TOKENS, Benchmark
from dora_vl.scores.joins import ByKey
from dora_vl.scores.scored import ACCURACY, Formula, Scored, Tally, by_kind, kind_columns, unit_of
from dora_vl.whole_numbers import number_of


def judge_file(examples: Sequence[Example], answers: Mapping[str, str]) -> dict[str, str]:
    """What the grader takes: answers by the publisher's ids, "v1_7" for LLaVA's 7; a missing one is empty."""
    names = {
        example.id: f"v1_{example.id}" if number_of(example.id) is not None else example.id for example in examples
    }
    return {published: answers.get(name, "") for name, published in names.items()}


def score_grades(examples: Sequence[Example], grades: Mapping[str, float]) -> Scored:
    """The total and each capability, from 0 to 100; a missing grade counts as 0.

    Raises:
        UserError: a grade is not between 0 and 1.
    """
    tally, found = Tally(), []
    for example in examples:
        grade = grades.get(example.id)
        if grade is not None and not 0 <= grade <= 1:
            raise UserError(f"MM-Vet grade of {example.id} is {grade}; grades go from 0 to 1")
        capabilities = [str(one) for one in example.extra.get("capability", ())]
        found += capabilities
        columns = kind_columns(grade or 0.0, *capabilities)
        tally.add(example.id, grade or 0.0, columns, unit=unit_of(example), failed=grade is None)
    formulas: dict[str, Formula] = {"total": ACCURACY, **by_kind("capability", found)}
    return tally.scored(formulas, settings={"judge": "external"})


def submission(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """The grader's file."""
    return "mmvet.json", json.dumps(judge_file(examples, answers), ensure_ascii=False, indent=1)


BENCHMARK = Benchmark(
    modes={},
    max_new_tokens=LONG_ANSWER_TOKENS,
    submission=submission,
    joins=(ByKey("number, v1_N", lambda row: f"v1_{row.id}", lambda example: example.id),),
)
