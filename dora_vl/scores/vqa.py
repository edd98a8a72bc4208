"""VQAv2 accuracy as the official script gives it, before and after its change of 2021.

Source: github.com/GT-Vision-Lab/VQA, PythonEvaluationTools. The two versions disagree on about a fifth of tricky
questions, so a number needs its version beside it:

- `before_2021` (also VL-T5's and VL-Adapter's `evaluate_raw`, so the paper's VL-BART numbers): the prediction is always
  normalised. The people's answers get punctuation handling only, and that only if they differ: an answer such as
  "Two" or "the dog" can never be matched.
- `after_2021`: both sides get the whole treatment, but only if the ten answers differ. If all ten agree, nothing is
  normalised: "No" against ten "no" scores 0.

`upload accuracy` is that of the server's file, whose answers EvalAI's normaliser has been over, as in LLaVA's upload.

The script rounds to two decimals; here nothing is rounded. A question without an answer counts as wrong (the script
stops there).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from dora_vl.data.examples import Example
from dora_vl.scores import evalai_normaliser
from dora_vl.scores.benchmark import Benchmark, published_id
from dora_vl.scores.human_answers import human_answers, leave_one_out
from dora_vl.scores.prompts import short
from dora_vl.scores.scored import ACCURACY, Ratio, Scored, Tally, by_kind, kind_columns, unit_of
from dora_vl.scores.vqa_normaliser import normalise, one_line, strip_punctuation

Version = Literal["after_2021", "before_2021"]


UPLOAD = {"upload accuracy": Ratio("uploaded right", "asked")}


def score(examples: Sequence[Example], answers: Mapping[str, str], *, version: Version = "after_2021") -> Scored:
    """Accuracy over all questions, and by `extra["answer_type"]` (yes/no, number, other) where there is one."""
    tally, kinds = Tally(), []
    for example in examples:
        answer = answers.get(example.id)
        points = 0.0 if answer is None else accuracy(answer, human_answers(example), version)
        kind = str(example.extra.get("answer_type", ""))
        kinds += [kind] if kind else []
        columns = kind_columns(points, *([kind] if kind else []))
        uploaded = evalai_normaliser.normalise(answer or "")
        columns["uploaded right"] = accuracy(uploaded, human_answers(example), version)
        tally.add(example.id, points, columns, unit=unit_of(example), failed=answer is None)
    formulas = {"accuracy": ACCURACY, **UPLOAD, **by_kind("answer type", kinds)}
    return tally.scored(formulas, settings={"vqa_version": version})


def accuracy(prediction: str, people: Sequence[str], version: Version) -> float:
    """One question's points, from 0 to 1."""
    if version == "before_2021":
        references = [strip_punctuation(one) for one in people] if len(set(people)) > 1 else people
        return leave_one_out(normalise(prediction), references)
    stripped = [one_line(one) for one in people]
    if len(set(stripped)) > 1:
        return leave_one_out(normalise(prediction), [normalise(one) for one in stripped])
    return leave_one_out(one_line(prediction), stripped)


def submission(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """EvalAI's file: normalised answers for *all* questions of the split, "" where there is none."""
    rows = [
        {"question_id": published_id(example.id), "answer": evalai_normaliser.normalise(answers.get(example.id, ""))}
        for example in examples
    ]
    return "vqav2.json", json.dumps(rows, ensure_ascii=False)


_AFTER, _BEFORE = partial(score, version="after_2021"), partial(score, version="before_2021")

BENCHMARK = Benchmark(
    modes={"after_2021": _AFTER, "before_2021": _BEFORE},
    prompt=short,
    splits=("test_dev", "test", "validation"),
    submission=submission,
)
KARPATHY = Benchmark(modes={"before_2021": _BEFORE, "after_2021": _AFTER}, prompt=short)
