"""Asking question by question: each gets its own answer, failures are named, a stopped run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dora_vl.data.turns import Turn
from dora_vl.errors import UserError
from dora_vl.evaluation.ask import Assistant, Decoding, ask, media_reader, prediction
from dora_vl.evaluation.open_model import ModelRequest, open_model
from dora_vl.evaluation.predictions import Prediction, Predictions
from dora_vl.evaluation.questions import Question
from tests.backbones.tiny_language import write_tiny_language

BROKEN, WITHOUT_NUMBERS = "broken", "no numbers"


class Echo:
    """Answers each question with its own words; `batches` are the ids that it was asked."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.batches: list[list[str]] = []
        self.stop_after = stop_after

    def predict(self, questions: Sequence[Question], media: Any, decoding: Decoding) -> Iterator[list[Prediction]]:
        for start in range(0, len(questions), decoding.batch_size):
            if len(self.batches) == self.stop_after:
                raise KeyboardInterrupt
            batch = questions[start : start + decoding.batch_size]
            self.batches.append([question.id for question in batch])
            yield [
                prediction(
                    question,
                    None if question.text in (BROKEN, WITHOUT_NUMBERS) else question.text,
                    "a broken picture" if question.text == BROKEN else "",
                )
                for question in batch
            ]


def question(number: int, text: str = "") -> Question:
    return Question(id=f"q{number}", turns=(Turn("user", text or f"words {number}"),))


def asked(folder: Path, questions: list[Question], model: Any) -> Predictions:
    media, file = media_reader(folder, frames=1), folder / "predictions.jsonl"
    return ask(model, questions, media, Decoding(batch_size=4, max_new_tokens=3), path=file, settings={})


def test_what_cannot_be_asked_is_named_and_never_an_empty_answer(tmp_path: Path) -> None:
    questions = [question(0), question(1, BROKEN), question(2)]
    predictions = asked(tmp_path, questions, Echo())
    assert predictions.answers == {"q0": "words 0", "q2": "words 2"}
    assert predictions.failed == {"q1": "a broken picture"}
    again = asked(tmp_path, questions, later := Echo())  # it is asked again
    assert (again.answered_before, later.batches) == (2, [["q1"]])


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    questions = [question(number) for number in range(11)]
    with pytest.raises(KeyboardInterrupt):
        asked(tmp_path, questions, Echo(stop_after=1))
    predictions = asked(tmp_path, questions, again := Echo())
    assert sum(map(len, again.batches)) == 7
    assert predictions.answers == {f"q{n}": f"words {n}" for n in range(11)}
    asked(tmp_path, questions, third := Echo())
    assert third.batches == []


def test_scores_that_are_no_numbers_are_named_at_the_end_and_cost_no_other_its_answer(tmp_path: Path) -> None:
    questions = [question(number, WITHOUT_NUMBERS if number == 2 else "") for number in range(9)]
    with pytest.raises(UserError):
        asked(tmp_path, questions, model := Echo())
    assert list(map(len, model.batches)) == [4, 4, 1]
    predictions = asked(tmp_path, [one for one in questions if one.id != "q2"], again := Echo())
    assert again.batches == []
    assert len(predictions.answers) == 8
    with pytest.raises(UserError):  # without any numbers it ends at the first batch
        asked(tmp_path, [question(number, WITHOUT_NUMBERS) for number in range(20, 29)], none := Echo())
    assert len(none.batches) == 1


def test_the_longest_prompts_come_first(tmp_path: Path) -> None:
    model = open_model(ModelRequest(model=str(write_tiny_language(tmp_path / "model")), template="vicuna_v1")).adapted
    assert isinstance(model, Assistant)
    questions = [question(number, "word " * (number * 7 % 11)) for number in range(1, 11)]
    batches = model.predict(questions, media_reader(tmp_path, frames=1), Decoding(batch_size=4, max_new_tokens=2))
    rows = [row for batch in batches for row in batch]
    lengths = [len(row.question) for row in rows]
    assert lengths == sorted(lengths, reverse=True)
    assert {row.id for row in rows} == {one.id for one in questions}
