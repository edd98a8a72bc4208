"""A VL-BART whose scores are NaN for one example, however the task answers: the example is named, the others stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dora_vl.errors import UserError
from dora_vl.evaluation import vlbart_assistant
from dora_vl.run.reading import read_settings
from dora_vl.run.settings import VlBartRunConfig
from dora_vl.training.run import run
from dora_vl.training.vlbart_pipeline import VlBartPipeline
from tests.training.tiny_vlbart_run import all_subtasks, write_vlbart_data, write_vlbart_run

TASKS = {"gqa": "text", "nlvr2": "pair", "tvqa": "choice"}


def pipeline(folder: Path, task: str) -> VlBartPipeline:
    data = write_vlbart_data(folder / "data")
    path = write_vlbart_run(
        folder / "run.yaml",
        data,
        (task,),
        training={"use_cpu": True},
        evaluation={"files": {task: str(data / "records" / f"{task}.jsonl")}},
    )
    return VlBartPipeline(read_settings([f"--config={path}"], VlBartRunConfig), all_subtasks(), name="vlbart_image")


def break_row(number: int, patched: pytest.MonkeyPatch) -> None:
    """So many rows down, a batch has features of NaN, once they have been read."""
    collate = vlbart_assistant.Seq2SeqCollator.__call__

    def broken(self: Any, parts: Any) -> dict[str, Any]:
        batch = collate(self, parts)
        features: Tensor = batch["features"]
        features[number] = float("nan")
        return batch

    patched.setattr(vlbart_assistant.Seq2SeqCollator, "__call__", broken)


@pytest.mark.parametrize("task", list(TASKS))
def test_the_others_of_a_batch_have_their_answers(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pipeline(tmp_path, task)
    run(made)
    whole = answers_in(tmp_path, task)
    subtask = all_subtasks()[task]
    assert subtask.answer_by == TASKS[task]
    with monkeypatch.context() as patched:
        break_row(2, patched)
        with pytest.raises(UserError):
            made.test({})
    found = answers_in(tmp_path, task)
    (broken,) = whole.keys() - found.keys()
    assert "-2" in broken
    assert found == {name: text for name, text in whole.items() if name != broken}


def answers_in(folder: Path, task: str) -> dict[str, str]:
    lines = (folder / "run" / "predictions" / f"{task}.jsonl").read_text().splitlines()
    return {one["id"]: one["prediction"] for one in map(json.loads, lines)}
