"""Asking question by question: each gets its own answer, failures are named, a stopped run goes on in its file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dora_vl.data.turns import Turn
from dora_vl.errors import UserError
from dora_vl.evaluation.ask import Assistant, Decoding, ask, media_reader, prediction
from dora_vl.evaluation.open_model import ModelRequest, open_model
from dora_vl.evaluation.predictions import Prediction, Predictions, PredictionsFile, cut_broken_tail, read_predictions
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
    predictions = asked(tmp_path, [item for item in questions if item.id != "q2"], again := Echo())
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
    assert {row.id for row in rows} == {item.id for item in questions}


# predictions.jsonl goes on after a crash, and never mixes answers of two adapters.


SETTINGS = {"adapter": "a1", "limit": None, "sizes": (1, 2)}


def finished(name: str) -> Prediction:
    return Prediction(id=name, images=["a.png"], question="what?", truth="red", prediction="rot, grün", kind="color")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a run that finished two questions."""
    path = tmp_path / "run/predictions.jsonl"
    with PredictionsFile(path, SETTINGS) as file:
        for name in "12":
            file.add(finished(name))
    return path


def test_a_second_run_finds_what_the_first_one_finished(path: Path) -> None:
    with PredictionsFile(path, SETTINGS) as file:
        assert file.done == {"1": finished("1"), "2": finished("2")}
        file.add(finished("3"))
        file.flush()
        assert list(read_predictions(path)) == ["1", "2", "3"]


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_line_cut_by_a_crash_is_removed_and_asked_again(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut])
    with PredictionsFile(path, SETTINGS) as file:
        assert list(file.done) == ["1"]
        file.add(finished("2"))
    assert list(read_predictions(path)) == ["1", "2"]


@pytest.mark.parametrize(("whole", "tail"), [(b"whole\n", b"x" * 200_000), (b"", b"x" * 10), (b"whole\n", b"")])
def test_a_broken_tail_is_cut(tmp_path: Path, whole: bytes, tail: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(whole + tail)
    assert cut_broken_tail(path) == len(tail)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("stated", [None, "{"])
def test_other_settings_and_none_start_anew(path: Path, stated: str | None) -> None:
    if stated is not None:
        path.with_name("predictions.settings.json").write_text(stated)
    with PredictionsFile(path, SETTINGS if stated else {**SETTINGS, "adapter": "b2"}) as file:
        assert file.done == {}
    assert path.read_text() == ""


@pytest.mark.parametrize(
    "line",
    [
        *(b'{"id": 7}', b'{"id":', "\ud800".encode("utf-8", "surrogatepass"), b"[" * 100_000, b"[1]"),
        *(b'{"id": ["a"], "images": []}', b'{"id": "a", "prediction": "b", "ids": {}}'),
    ],
)
def test_any_broken_line_but_the_last_is_refused(path: Path, line: bytes) -> None:
    path.write_bytes(line + b"\n" + path.read_bytes())
    for read in (read_predictions, lambda path: PredictionsFile(path, SETTINGS)):
        with pytest.raises(UserError):
            read(path)
