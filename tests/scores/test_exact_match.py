"""Exact match: what counts as right, by kind, what failed counts as wrong, and the interval is a bootstrap's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dora_vl.data.example import Answer, Example
from dora_vl.evaluation.scores.exact import final_answer, is_match, score
from dora_vl.evaluation.scores.scored import Scored, intervals


def scored(*rows: tuple[str, str | None, str | None], picture_of: int = 1, after: str | None = None) -> Scored:
    """The score of truth, prediction and kind; so many neighbours are about one picture."""
    examples = [
        Example(
            id=str(number),
            images=(f"{number // picture_of}.png",),
            answers=(Answer(text=truth),),
            extra={} if kind is None else {"kind": kind},
        )
        for number, (truth, _, kind) in enumerate(rows)
    ]
    answers = {str(number): said for number, (_, said, _) in enumerate(rows) if said is not None}
    return score(examples, answers, answer_after=after)


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
    assert is_match(truth, prediction) is right


def test_by_kind_with_failed_counted_as_wrong() -> None:
    found = scored(
        ("red", "red", "color"),
        ("red", "blue", "color"),
        ("red", None, "color"),
        ("yes", "yes", "yes/no"),
        ("yes", " ", None),
    )
    assert (found.n, found.failed) == (5, ("2",))
    assert found.metrics == pytest.approx({"accuracy": 40.0, "kind/color": 100 / 3, "kind/yes/no": 100.0})
    assert {name: found.items_of(name) for name in found.metrics} == {"accuracy": 5, "kind/color": 3, "kind/yes/no": 1}


@pytest.mark.parametrize("together", [1, 10])  # 1000 questions, or 100 pictures, each wholly right or wholly wrong
def test_the_interval_is_the_binomial_one_over_pictures(together: int) -> None:
    found = scored(*[("yes", "yes" if number < 900 else "no", None) for number in range(1000)], picture_of=together)
    low, high = intervals(found)["accuracy"]
    spread = 196 * (0.9 * 0.1 / (1000 / together)) ** 0.5
    assert low == pytest.approx(90 - spread, abs=1.0)
    assert high == pytest.approx(90 + spread, abs=1.0)
    assert intervals(found)["accuracy"] == (low, high)  # the seed fixes it


def test_a_truth_that_reasons_first_is_cut_as_the_answer_is() -> None:
    found = scored(("blue circle, so no", "red square, so no", None), ("no", "it is blue, so yes", None), after=", so ")
    assert found.metrics["accuracy"] == 50.0


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing"):
        scored()


def test_scoring_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import dora_vl.evaluation.scores.exact"
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
