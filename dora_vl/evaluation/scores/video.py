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
from collections.abc import Mapping, Sequence

from dora_vl.data.example import Example
from dora_vl.errors import UserError, shown
from dora_vl.evaluation.scores.benchmark import Benchmark, Scorer, Submission, correct_index, letters, only
from dora_vl.evaluation.scores.prompts import about_video
from dora_vl.evaluation.scores.scored import ACCURACY, Ratio, Scored, Tally, unit_of

SERVER_DECIMALS = 2
NO_CHOICE = -1
"""What a file holds for a missing answer: the server stops where a question lacks, and no choice has this index."""


def label_of(example: Example, answer: str) -> str:
    """The label that an answer gives: the answer itself, or that of the choice whose letter it is."""
    letter, known = answer.strip().removesuffix("."), letters(example)
    return f"a{known.index(letter)}" if len(letter) == 1 and letter in known else answer


def submitted_index(answer: str) -> int:
    """The choice that a submission holds for a generated answer."""
    digit = answer[1:2]
    return int(digit) if digit.isascii() and digit.isdigit() else 0


def score(examples: Sequence[Example], answers: Mapping[str, str]) -> Scored:
    """Both accuracies in percent, extra answers ignored (TVQA)."""
    tally = Tally()
    for example in examples:
        answer, correct = answers.get(example.id), correct_index(example)
        answer = None if answer is None else label_of(example, answer)
        right = float(answer == f"a{correct}")
        parsed = float(answer is not None and submitted_index(answer) == correct)
        columns = {"right": right, "asked": 1.0, "parsed right": parsed}
        tally.add(example.id, right, columns, unit=unit_of(example), failed=answer is None)
    return tally.scored(
        {"accuracy": ACCURACY, "value_accuracy": Ratio("parsed right", "asked", decimals=SERVER_DECIMALS)}
    )


def score_how2qa(examples: Sequence[Example], answers: Mapping[str, str]) -> Scored:
    """The same, extra answers refused.

    Raises:
        UserError: an answer belongs to no question.
    """
    strangers = sorted(answers.keys() - {example.id for example in examples})
    if strangers:
        raise UserError(f"How2QA's server rejects extra answers: {len(strangers)} here, first {shown(strangers[0])}")
    return score(examples, answers)


def tvqa(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """VALUE: choice indices by question id."""
    return "tvqa_test_predictions.json", _indices(examples, answers)


def how2qa(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """VALUE: choice indices by question id."""
    return "how2qa_test_public_predictions.json", _indices(examples, answers)


def _indices(examples: Sequence[Example], answers: Mapping[str, str]) -> str:
    indices: dict[str, int] = {}
    for example in examples:
        answer = answers.get(example.id)
        indices[example.id] = NO_CHOICE if answer is None else submitted_index(label_of(example, answer))
    return json.dumps(indices)


def _benchmark(scorer: Scorer, submission: Submission) -> Benchmark:
    return Benchmark(
        modes=only(scorer),
        prompt=about_video,
        splits=("validation", "test"),
        submission=submission,
        chooses=True,
        labels_choices=True,
    )


TVQA = _benchmark(score, tvqa)
HOW2QA = _benchmark(score_how2qa, how2qa)
