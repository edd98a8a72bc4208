"""What a row says must not be split: a group is on one side, and intervals draw its unit as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dora_vl.data.columns import USUAL, TrainFile
from dora_vl.data.table import load_training_rows
from dora_vl.evaluation.questions import read_questions
from dora_vl.evaluation.scores.exact import score


@pytest.mark.parametrize("form", ["record", "columns"])
def test_a_group_is_held_out_whole(tmp_path: Path, form: str) -> None:
    path = tmp_path / "train.jsonl"
    lines = []
    for number in range(60):
        row: dict[str, Any] = {"id": f"{number}", "question": f"is it {number}?"}
        about = {"group": f"scene {number % 6}", "unit": f"sentence {number % 10}"}
        if form == "record":
            row |= {"answers": [{"text": "yes"}], "images": [f"{number}.png"], "extra": about}
        else:
            row |= {"answer": "yes", "image": f"{number}.png", **about}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    train, held_out = load_training_rows([TrainFile(path=str(path))], share=0.3, cache_folder=tmp_path / "cache")
    assert held_out is not None
    scenes = [{int(name) % 6 for name in part.rows["id"]} for part in (train, held_out)]
    assert scenes[0] & scenes[1] == set()
    assert scenes[0] | scenes[1] == set(range(6))
    examples, unreadable = read_questions(path, columns=USUAL)
    assert not unreadable
    scored = score(examples, dict.fromkeys((example.id for example in examples), "yes"))
    assert len(scored.units) == 10
    assert {example.extra["group"] for example in examples} == {f"scene {number}" for number in range(6)}
