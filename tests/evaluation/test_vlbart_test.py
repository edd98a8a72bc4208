"""A VL-BART's test: what it lacks is told before training, a score outlives a later error, NaN costs one answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dora_vl.errors import UserError
from dora_vl.evaluation import vlbart_assistant
from dora_vl.evaluation.predictions import read_predictions
from dora_vl.evaluation.vlbart_tasks import all_subtasks
from dora_vl.run.reading import read_run
from dora_vl.training.run import run
from dora_vl.training.vlbart_pipeline import VlBartPipeline
from tests.training.tiny_vlbart_run import write_vlbart_data, write_vlbart_run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_vlbart_data(tmp_path / "data")


def vlbart(data: Path, tested: tuple[str, ...], *overrides: str, trained: str = "vqav2") -> VlBartPipeline:
    files = {name: str(data / "records" / f"{name}.jsonl") for name in tested}
    features = dict.fromkeys((trained, *tested), str(data / "features"))
    path = write_vlbart_run(
        data.parent / "run.yaml",
        data,
        (trained,),
        data={"features": features},
        training={"use_cpu": True},
        evaluation={"files": files},
    )
    config = read_run([f"--config={path}", *overrides])
    return VlBartPipeline(config)


def spoil_records(data: Path, name: str, change: Callable[[list[str]], list[str]]) -> None:
    path = data / "records" / f"{name}.jsonl"
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))


def unlabelled(lines: list[str]) -> list[str]:
    return [*lines[:4], json.dumps({**json.loads(lines[4]), "answers": []}), *lines[5:]]


def other_features(data: Path) -> None:
    (data / "other").mkdir()
    (data / "other" / "x.npz").write_bytes((data / "features" / "p0.npz").read_bytes())


def features(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda data: change(data / "features" / "p5.npz")


def holding(tokens: int, width: int, value: float = 0.0) -> Callable[[Path], object]:
    return features(lambda path: np.savez(path, features=np.full((tokens, width), value, np.float16)))


@pytest.mark.parametrize(
    ("spoil", "tested"),
    [
        (lambda data: (data / "records" / "gqa.jsonl").unlink(), "gqa"),
        (lambda data: spoil_records(data, "gqa", lambda lines: [*lines, '{"id": "odd", "images": 3}']), "gqa"),
        (lambda data: spoil_records(data, "nlvr2", unlabelled), "nlvr2"),
        *((other_features, "gqa"), (features(Path.unlink), "gqa")),
        (features(lambda path: path.write_bytes(path.read_bytes()[:-40])), "tvqa"),
        *((holding(9, 8), "nlvr2"), (holding(4, 9), "gqa"), (holding(4, 8, np.nan), "gqa")),
    ],
)
def test_what_the_test_lacks_is_told_before_training(data: Path, spoil: Callable[[Path], object], tested: str) -> None:
    spoil(data)
    more = (f"--evaluation.features.{tested}={data}/other",) if spoil is other_features else ()
    with pytest.raises(UserError):
        run(vlbart(data, (tested,), *more))
    assert not (data.parent / "run" / "log.jsonl").exists()


def test_a_missing_caption_scorer_is_told_before_training(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pycocoevalcap", "pycocoevalcap.cider", "pycocoevalcap.cider.cider"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError):
        run(vlbart(data, ("tvc",)))
    assert not (data.parent / "run" / "log.jsonl").exists()


# Scores that are NaN for one example, however the task answers: it is named, and the others stand.


TASKS = {"gqa": "text", "tvqa": "choice"}


def break_row(number: int, patched: pytest.MonkeyPatch) -> None:
    """So many rows down, a batch has features of NaN, once they have been read."""
    collate = vlbart_assistant.Seq2SeqCollator.__call__

    def broken(self: Any, parts: Any) -> dict[str, Any]:
        batch = collate(self, parts)
        batch["features"][number] = float("nan")
        return batch

    patched.setattr(vlbart_assistant.Seq2SeqCollator, "__call__", broken)


@pytest.mark.parametrize("name", list(TASKS))
def test_the_others_of_a_batch_have_their_answers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = vlbart(write_vlbart_data(tmp_path / "data"), (name,), trained=name)
    run(pipeline)
    whole = answers_in(tmp_path, name)
    subtask = all_subtasks()[name]
    assert subtask.answer_by == TASKS[name]
    (tmp_path / "run" / "predictions.jsonl").unlink()
    with monkeypatch.context() as patched:
        break_row(2, patched)
        with pytest.raises(UserError):
            pipeline.test({})
    answers = answers_in(tmp_path, name)
    (broken,) = whole.keys() - answers.keys()
    assert "-2" in broken
    assert answers == {key: text for key, text in whole.items() if key != broken}


def answers_in(folder: Path, task: str) -> dict[str, str]:
    rows = read_predictions(folder / "run" / "predictions.jsonl")[task]
    return {name: row.prediction for name, row in rows.items()}
