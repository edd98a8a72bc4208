"""Asking question by question: each gets its own answer, failures are named, a stopped run goes on in its file."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dora_vl.data.example import Answer, Example
from dora_vl.data.turns import Turn
from dora_vl.errors import UserError
from dora_vl.evaluation import predict
from dora_vl.evaluation.predict import PredictionsFile, ask, evaluate
from dora_vl.evaluation.predictions import Prediction, Predictions, read_predictions
from dora_vl.evaluation.predictor import Decoding, media_reader, prediction
from dora_vl.evaluation.scores import exact
from dora_vl.evaluation.test_sets import ResultFolder, TestSet, read_results, refuse_unscored

BROKEN, WITHOUT_NUMBERS = "broken", "no numbers"


class Echo:
    """Answers each question with its own words; `batches` are the ids that it was asked."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.batches: list[list[str]] = []
        self.stop_after = stop_after

    def predict(self, examples: Sequence[Example], media: Any, decoding: Decoding) -> Iterator[list[Prediction]]:
        for start in range(0, len(examples), decoding.batch_size):
            if len(self.batches) == self.stop_after:
                raise KeyboardInterrupt
            batch = examples[start : start + decoding.batch_size]
            self.batches.append([example.id for example in batch])
            errors = ["a broken picture" if example.question == BROKEN else "" for example in batch]
            texts = [None if example.question in (BROKEN, WITHOUT_NUMBERS) else example.question for example in batch]
            yield list(map(prediction, batch, texts, errors))


def question(number: int, text: str = "", *, answer: str = "") -> Example:
    text = text or f"words {number}"
    answers = (Answer(text=answer),) if answer else ()
    return Example(id=f"q{number}", question=text, turns=(Turn("user", text),), answers=answers)


def set_of(folder: Path, examples: Sequence[Example], name: str = "set", **more: Any) -> TestSet:
    decoding, media = Decoding(batch_size=4, max_new_tokens=3), media_reader(folder, frames=1)
    return TestSet(name=name, examples=examples, decoding=decoding, media=media, **{"score": None, **more})


def asked(folder: Path, examples: list[Example], model: Any) -> Predictions:
    return ask(model, "set", examples, set_of(folder, examples), folder=folder, settings={})


def test_scores_that_are_no_numbers_are_named_at_the_end_and_cost_no_other_its_answer(tmp_path: Path) -> None:
    examples = [question(number, WITHOUT_NUMBERS if number == 2 else "") for number in range(9)]
    with pytest.raises(UserError):
        asked(tmp_path, examples, model := Echo())
    assert list(map(len, model.batches)) == [4, 4, 1]
    predictions = asked(tmp_path, [item for item in examples if item.id != "q2"], again := Echo())
    assert again.batches == []
    assert len(predictions.answers) == 8
    with pytest.raises(UserError):  # without any numbers it ends at the first batch
        asked(tmp_path, [question(number, WITHOUT_NUMBERS) for number in range(20, 29)], none := Echo())
    assert len(none.batches) == 1


def sets_in(folder: Path) -> list[TestSet]:
    """Two sets whose ids are the same; of the second a question cannot be asked. Half of the answers are right."""
    first = [question(number, answer=f"words {number % 6}") for number in range(11)]
    second = [question(number, BROKEN if number == 3 else f"w{number}", answer=f"w{number}") for number in range(6)]
    scored: dict[str, Any] = {"score": exact.score, "settings": {"adapter": "a"}}
    return [set_of(folder, rows, name, **scored) for name, rows in (("one", first), ("two", second))]


def results_of(folder: Path, model: Any) -> dict[str, str]:
    """What the three files hold after a test, less what it took."""
    evaluate(sets_in(folder), model, ResultFolder(folder=folder, header={"train_steps": 7}), exchange=False)
    metrics = json.loads((folder / "metrics.json").read_text())
    for entry in metrics["sets"].values():
        assert entry.pop("seconds") >= 0
        entry.pop("answers_from_earlier_run")
    files = {name: (folder / name).read_text() for name in ("predictions.jsonl", "scores.jsonl")}
    return {**files, "metrics": json.dumps(metrics)}


@pytest.mark.parametrize("stop_after", range(5))
def test_a_test_that_is_killed_loses_and_doubles_nothing(tmp_path: Path, stop_after: int) -> None:
    whole = results_of(tmp_path / "whole", Echo())
    with pytest.raises(KeyboardInterrupt):
        results_of(tmp_path / "killed", killed := Echo(stop_after=stop_after))
    if stop_after >= 3:  # the first set's score was written at once
        assert read_results(tmp_path / "killed")["one"].entry["metrics"]["accuracy"]["n"] == 11
    later = Echo()
    assert results_of(tmp_path / "killed", later) == whole
    answered = [name for model in (killed, later) for batch in model.batches for name in batch if name != "q3"]
    assert len(answered) == 10 + 5
    results_of(tmp_path / "killed", third := Echo())
    assert third.batches == [["q3"]]  # nothing but what could not be asked
    assert read_results(tmp_path / "killed")["two"].entry["failed"] == {"q3": "a broken picture"}


def test_a_set_that_cannot_be_scored_costs_no_other_its_score(tmp_path: Path) -> None:
    def trips(*_: object) -> Any:
        raise KeyError("extra")

    one, two = sets_in(tmp_path)
    done = evaluate([replace(one, score=trips), two], Echo(), ResultFolder(folder=tmp_path), exchange=False)
    with pytest.raises(UserError, match="one"):
        refuse_unscored(done)
    assert read_results(tmp_path).keys() == {"two"}


def test_several_processes_leave_what_one_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each appends to its own part; a start on fewer processes takes over the parts of those that were killed."""
    whole = results_of(tmp_path / "whole", Echo())
    monkeypatch.setattr(predict, "rank_and_ranks", lambda: (1, 2))
    one, _ = sets_in(folder := tmp_path / "parts")
    with PredictionsFile(folder) as file:
        file.begin("one", one.settings)
        for rows in Echo().predict(one.asked[1::2], None, Decoding(batch_size=4)):
            file.add("one", rows)
    part = folder / "predictions.part-1.jsonl"
    part.write_text(part.read_text() + '{"set": "one", "id": "q')  # a line that was being written
    assert not (folder / "predictions.jsonl").read_text()
    monkeypatch.undo()
    assert results_of(folder, model := Echo()) == whole
    assert model.batches[:2] == [["q0", "q2", "q4", "q6"], ["q8", "q10"]]
    assert not part.exists()


SETTINGS = {"adapter": "a1", "limit": None, "sizes": (1, 2)}


def finished(name: str, of_set: str = "set") -> Prediction:
    about = {"images": ["a.png"], "question": "what?", "truth": "red", "kind": "color"}
    return Prediction(id=name, set=of_set, prediction="rot, grün", **about)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with PredictionsFile(tmp_path) as file:
        file.begin("set", SETTINGS)
        file.add("set", map(finished, "12"))
    return tmp_path


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_line_cut_by_a_crash_is_removed_and_asked_again(folder: Path, cut: int) -> None:
    path = folder / "predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    with PredictionsFile(folder) as file:
        assert list(file.begin("set", SETTINGS)) == ["1"]


@pytest.mark.parametrize("line", [b'{"id": 7}', b'{"id":', b"[" * 100_000])
def test_any_broken_line_but_the_last_is_refused(folder: Path, line: bytes) -> None:
    path = folder / "predictions.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    for read in (read_predictions, lambda path: PredictionsFile(path.parent).begin("set", SETTINGS)):
        with pytest.raises(UserError):
            read(path)
