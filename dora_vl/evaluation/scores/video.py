"""TVQA and How2QA: the generated label ("a2") by exact match, and what VALUE's server would make of it.

The model is trained to say "a" and the index. VL-Adapter counts exact matches of that string (`accuracy`). For a
submission it takes the second character, or 0 where that is no digit, and the server compares whole numbers and rounds
to two decimals (`value_accuracy`): an empty answer is then a guess of the first choice, and a missing one, -1 in the
file, is wrong. An answer chosen by likelihood is written "a2" as well. A LLaVA is asked for a letter, so "C" or "C." is
read as "a2" where the question has such a choice; VALUE's tools never see one.

The server ignores extra ids for TVQA and rejects them for How2QA; so do these. A missing answer is wrong (the
server stops). Source: github.com/VALUE-Leaderboard/EvaluationTools. Reads `choices` and `extra["correct"]`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from dora_vl.data.example import Example
from dora_vl.errors import UserError, shown
from dora_vl.evaluation.scores.benchmark import Benchmark, correct_index, letters
from dora_vl.evaluation.scores.prompts import about_video
from dora_vl.evaluation.scores.scored import ACCURACY, Answers, Ratio, Scored, score_points


def label_of(example: Example, answer: str) -> str:
    """The label that an answer gives: the answer itself, or that of the choice whose letter it is."""
    letter, known = answer.strip().removesuffix("."), letters(example)
    return f"a{known.index(letter)}" if len(letter) == 1 and letter in known else answer


def submitted_index(answer: str) -> int:
    """The choice that a submission holds for a generated answer."""
    digit = answer[1:2]
    return int(digit) if digit.isascii() and digit.isdigit() else 0


def score(examples: Sequence[Example], answers: Answers) -> Scored:
    """Both accuracies in percent, extra answers ignored (TVQA)."""

    def points(example: Example, answer: str) -> float:
        return float(label_of(example, answer) == f"a{correct_index(example)}")

    def parsed(example: Example) -> dict[str, float]:
        return {"parsed right": float(_submitted(example, answers) == correct_index(example))}

    metrics = {"accuracy": ACCURACY, "value_accuracy": Ratio("parsed right", "asked", decimals=2)}
    return score_points(examples, answers, points, metrics=metrics, more=parsed)


def score_how2qa(examples: Sequence[Example], answers: Answers) -> Scored:
    """The same, extra answers refused."""
    strangers = sorted(answers.keys() - {example.id for example in examples})
    if strangers:
        raise UserError(f"How2QA's server rejects extra answers: {len(strangers)} here, first {shown(strangers[0])}")
    return score(examples, answers)


def _submitted(example: Example, answers: Answers) -> int:
    """What the server's file holds; for a missing answer -1, as it stops where a question lacks."""
    answer = answers.get(example.id)
    return -1 if answer is None else submitted_index(label_of(example, answer))


def submission(examples: Sequence[Example], answers: Answers, *, file: str) -> tuple[str, str]:
    """VALUE: choice indices by question id."""
    return file, json.dumps({example.id: _submitted(example, answers) for example in examples})


TVQA = Benchmark(
    modes={"": score},
    prompt=about_video,
    splits=("validation", "test"),
    submission=partial(submission, file="tvqa_test_predictions.json"),
    chooses=True,
    labels_choices=True,
)
HOW2QA = replace(
    TVQA,
    modes={"": score_how2qa},
    submission=partial(submission, file="how2qa_test_public_predictions.json"),
)
