"""Exact match: what counts as right, by kind, what failed counts as wrong, and the interval is a bootstrap's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dora_vl.scores.exact_match import (
    Answered,
    KindScore,
    exact_match,
    final_answer,
    is_match,
)


def answered(truth: str, prediction: str | None, kind: str | None = None, group: str = "") -> Answered:
    return Answered(id="x", truth=truth, prediction=prediction, kind=kind, group=group)


@pytest.mark.parametrize(
    ("truth", "prediction", "right"),
    [
        ("yes", "Yes.", True),
        ("light blue", " Light \n blue ", True),
        ("yes", "yes, it is", False),
        ("yes", "", False),
        ("yes", None, False),
        ("no", "not", False),
        ("3.5", "3.5", True),
    ],
)
def test_what_counts_as_right(truth: str, prediction: str | None, right: bool) -> None:
    assert is_match(answered(truth, prediction)) is right


def test_by_kind_with_failed_and_empty_counted_as_wrong() -> None:
    score = exact_match(
        [
            answered("red", "red", "color"),
            answered("red", "blue", "color"),
            answered("red", None, "color"),
            answered("yes", "yes", "yes/no"),
            answered("yes", " "),
        ]
    )
    assert (score.accuracy, score.n, score.unanswered, score.empty) == (2 / 5, 5, 1, 1)
    assert score.by_kind == {"color": KindScore(accuracy=1 / 3, n=3), "yes/no": KindScore(accuracy=1.0, n=1)}


def test_the_interval_of_single_questions_is_the_binomial_one() -> None:
    questions = [answered("yes", "yes" if number < 900 else "no") for number in range(1000)]
    low, high = exact_match(questions).interval_95
    spread = 1.96 * (0.9 * 0.1 / 1000) ** 0.5
    assert low == pytest.approx(0.9 - spread, abs=0.003)
    assert high == pytest.approx(0.9 + spread, abs=0.003)
    assert exact_match(questions).interval_95 == (low, high)  # the seed fixes it


def test_questions_of_one_picture_widen_the_interval() -> None:
    questions = [
        answered("yes", "yes" if number < 900 else "no", group=f"picture {number // 10}") for number in range(1000)
    ]
    low, high = exact_match(questions).interval_95
    spread = 1.96 * (0.9 * 0.1 / 100) ** 0.5  # 100 pictures, each wholly right or wholly wrong
    assert low == pytest.approx(0.9 - spread, abs=0.01)
    assert high == pytest.approx(0.9 + spread, abs=0.01)


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="no answers"):
        exact_match([])


def test_scoring_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import dora_vl.scores.exact_match"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("said", "after", "scored"),
    [
        ("blue circle, so no", ", so ", "no"),
        ("no", ", so ", "no"),
        ("a, so b, so c", ", so ", "c"),
        ("blue circle, so no", None, "blue circle, so no"),
        (None, ", so ", None),
    ],
)
def test_only_what_follows_the_last_marker_is_scored(said: str | None, after: str | None, scored: str | None) -> None:
    assert final_answer(said, after) == scored
