"""SEED-Bench as LLaVA's convert and SEED's own script give it: exact letter, over images, videos, all, and each type.

The published script stops when an answer is missing or a type has no right answer; here the former is wrong and the
latter 0. Nothing is parsed out of longer answers: "A." is wrong. (lmms-eval takes the first character instead.)

Reads `choices`, `extra["correct"]`, `extra["data_type"]` (image or video; absent means image) and
`extra["question_type"]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dora_vl.data.examples import Example
from dora_vl.scores.benchmark import Benchmark, only
from dora_vl.scores.choices import correct_index, letters
from dora_vl.scores.prompts import letter
from dora_vl.scores.scored import ACCURACY, Scored, Tally, by_kind, kind_columns, unit_of


def score(examples: Sequence[Example], answers: Mapping[str, str]) -> Scored:
    """Accuracies in percent."""
    tally, data, types = Tally(), [], []
    for example in examples:
        answer = answers.get(example.id)
        right = answer == letters(example)[correct_index(example)]
        medium = str(example.extra.get("data_type", "image"))
        kind = str(example.extra.get("question_type", ""))
        data.append(medium)
        types += [kind] if kind else []
        columns = kind_columns(float(right), medium, *([f"type {kind}"] if kind else []))
        tally.add(example.id, float(right), columns, unit=unit_of(example), failed=answer is None)
    by_type = by_kind("type", [f"type {kind}" for kind in types])
    named = {name.replace("type/type ", "type/"): formula for name, formula in by_type.items()}
    return tally.scored({"accuracy": ACCURACY, **by_kind("accuracy", data), **named})


BENCHMARK = Benchmark(modes=only(score), prompt=letter, chooses=True)
