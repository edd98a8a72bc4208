"""MME: how answers are read, and ten hand-worked rows."""

from __future__ import annotations

import pytest

from dora_vl.data.example import Answer, Example
from dora_vl.errors import UserError
from dora_vl.evaluation.scores import llava


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("YES.", "yes"),
        ("eyes", "yes"),
        (" yes", "yes"),
        ("  yes", "other"),  # not stripped: the first four characters are "  ye"
        ("know", "no"),
        ("unknown", "other"),
        ("No", "no"),
        ("nyes", "yes"),
        ("noyes", "no"),
        ("", "other"),
        ("the answer is yes", "other"),
    ],
)
def test_reading(answer: str, expected: str) -> None:
    assert llava.said(answer) == expected


ROWS = [  # subtask, picture, label, answer
    ("existence", "1.jpg", "Yes", "yes"),
    ("existence", "1.jpg", "No", "No."),
    ("existence", "2.jpg", "Yes", "yes"),
    ("existence", "2.jpg", "No", "yes"),
    ("OCR", "1.jpg", "Yes", "Yes"),
    ("OCR", "1.jpg", "No", "no"),
    ("code_reasoning", "9.jpg", "Yes", "maybe"),
    ("code_reasoning", "9.jpg", "No", "no"),
    ("code_reasoning", "8.jpg", "Yes", "no"),
    ("code_reasoning", "8.jpg", "No", "yes"),
]


def ten() -> tuple[list[Example], dict[str, str]]:
    examples = [
        Example(id=str(n), images=(picture,), answers=(Answer(text=label),), extra={"category": task})
        for n, (task, picture, label, _) in enumerate(ROWS)
    ]
    return examples, {str(n): row[-1] for n, row in enumerate(ROWS)}


def test_ten_rows() -> None:
    metrics = llava.mme_score(*ten()).metrics
    assert metrics["existence"] == pytest.approx(75 + 50)
    assert metrics["OCR"] == pytest.approx(200)
    assert metrics["code_reasoning"] == pytest.approx(25 + 0)
    assert metrics["perception"] == pytest.approx(325)
    assert metrics["cognition"] == pytest.approx(25)
    assert list(metrics)[:2] == ["perception", "cognition"]


def test_a_picture_with_one_question_is_refused() -> None:
    examples, answers = ten()
    with pytest.raises(UserError, match=r"MME picture 1\.jpg of existence has 1 questions"):
        llava.mme_score(examples[1:], answers)


def test_a_missing_answer_costs_the_picture_its_plus() -> None:
    examples, answers = ten()
    del answers["0"]
    scored = llava.mme_score(examples, answers)
    assert scored.metrics["existence"] == pytest.approx(50 + 0)
    assert scored.failed == ("0",)
