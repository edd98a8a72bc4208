"""Choices as a list or as text of one, and the right one by letter, number or text; what could be two is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dora_vl.data.benchmarks.hugging_face import convert
from dora_vl.data.example import Answer, Example, from_record, to_record
from dora_vl.errors import BadSample
from dora_vl.evaluation.scores.benchmark import correct_index

MMMU = {"id": "v1", "question": "Which?", "options": "['Yes', 'No']", "answer": "B"}
AI2D = {"question": "Which?", "options": ["Yes", "No"], "answer": "1"}


def made(raw: dict[str, Any], **columns: str) -> Example:
    return convert({"row number": 1, **raw}, columns=columns, task_folder=Path())


@pytest.mark.parametrize("raw", [MMMU, AI2D])
def test_rows_as_two_sets_write_them_can_be_scored(raw: dict[str, Any]) -> None:
    example = from_record(to_record(made(raw)))
    assert example.choices == ("Yes", "No")
    assert example.answers == (Answer(text="No"),)
    assert correct_index(example) == 1


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ('["Yes", "No"]', ("Yes", "No")),
        (r"""['It\'s', "isn't", '$\\frac{1}{2}$']""", ("It's", "isn't", r"$\frac{1}{2}$")),
        (r"['\d', 'b']", (r"\d", "b")),
        ([1, "two"], ("1", "two")),
    ],
)
def test_choices_in_every_form(choices: object, expected: tuple[str, ...]) -> None:
    assert made({"question": "Which?", "choices": choices, "answer": 1}).choices == expected


def test_an_empty_list_of_choices_is_an_open_question() -> None:
    example = made({"question": "How many?", "options": "[]", "answer": "5"})
    assert (example.choices, example.answers, dict(example.extra)) == ((), (Answer(text="5"),), {})


@pytest.mark.parametrize(
    "choices",
    [
        "Yes",
        "['Yes' 'No']",
        "['Yes', 2]",
        "['Yes', __import__('os')]",
        "['Yes'",
        "[" * 5_000,
        "{'A': 'Yes'}",
        "['a\0']",
    ],
)
def test_text_that_is_no_list_of_choices_is_refused(choices: str) -> None:
    with pytest.raises(BadSample, match="its choices must be a list of text, got the text"):
        made({"question": "Which?", "options": choices, "answer": "A"})


@pytest.mark.parametrize(
    ("answer", "correct"),
    [(0, 0), (2, 2), ("0", 0), ("C", 2), ("c", 2), ("(B)", 1), ("B.", 1), ("a dog", 1), (" a cat ", 0), (["A"], 0)],
)
def test_the_right_choice_in_every_form(answer: object, correct: int) -> None:
    example = made({"question": "Which?", "choices": ["a cat", "a dog", "a cow"], "answer": answer})
    assert example.extra == {"correct": correct}
    assert [one.text for one in example.answers] == [example.choices[correct]]


@pytest.mark.parametrize("answer", [None, "", " ", [], [None, ""]])
def test_an_answer_that_the_publisher_keeps(answer: object) -> None:
    example = made({"question": "Which?", "choices": ["a", "b"], "answer": answer})
    assert (example.answers, dict(example.extra)) == ((), {})


@pytest.mark.parametrize(
    ("choices", "answer", "said"),
    [
        (["Yes", "No"], "C", "its answer 'C' is no letter, number from 0 or text of its 2 choices"),
        (["Yes", "No"], "2", "its answer '2' is no letter, number from 0 or text"),
        (["Yes", "No"], "maybe", "its answer 'maybe' is no letter"),
        (["Yes", "Yes"], "Yes", "'Yes' is the text of 2 of its choices"),
        (["Yes", "No"], True, "its answer must be text or a whole number, got True"),
        (["Yes", "No"], ["Yes", "No"], "its 2 answers are 2 of its choices"),
        (["1", "2", "3"], "2", "is the text of one choice and the letter or number of another; with"),
    ],
)
def test_an_answer_that_is_no_choice_drops_the_row(choices: list[str], answer: object, said: str) -> None:
    with pytest.raises(BadSample, match=said):
        made({"question": "Which?", "choices": choices, "answer": answer})


def test_which_reading_of_a_choice_counts_can_be_said() -> None:
    raw = {"question": "How many?", "choices": ["1", "2", "B"], "answer": "1"}
    assert made(raw, answers="answer").extra == {"correct": 0}
    assert made(raw, correct="answer").extra == {"correct": 1}
    assert made({**raw, "answer": "B"}, answers="answer").extra == {"correct": 2}
    assert made({**raw, "answer": "B"}, correct="answer").extra == {"correct": 1}
    assert made({**raw, "choices": ["0", "1", "2"]}).extra == {"correct": 1}  # both readings are one choice
