"""Instruction files: what is read, what is named as unusable, and what ends a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dora_vl.data.instructions import InstructionDataset, iterate_instructions, load_instructions, read_instruction
from dora_vl.errors import BadSample, UserError
from tests.shared_data import shared

ROW = {"instruction": "Is it so?", "input": "", "output": "the correct answer is true", "answer": "true"}


def write(path: Path, rows: list[Any], *, lines: bool = False) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows, indent=4))
    return path


@pytest.mark.parametrize("lines", [False, True])
def test_rows_as_published_and_as_lines(tmp_path: Path, lines: bool) -> None:
    path = write(
        tmp_path / "train.json", [ROW, {**ROW, "id": "own"}, {"instruction": "Say it.", "output": "it"}], lines=lines
    )
    rows = load_instructions(path, cache_folder=tmp_path)
    read = [read_instruction(rows[number]) for number in range(3)]
    assert [one.id for one in read] == ["0", "own", "2"]
    assert read[0].output == "the correct answer is true"
    assert read[2].answer == ""
    assert iterate_instructions(path) == read
    assert iterate_instructions(path, limit=1) == read[:1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output": ""}, "'output' is empty"),
        ({"output": None}, "'output' is empty"),
        ({"instruction": "  "}, "'instruction' is empty"),
        ({"output": 3}, "'output' must be text, got int"),
        ({"instruction": "half \ud83d"}, "half of a surrogate pair"),
    ],
)
def test_an_unusable_row_is_named_and_the_others_stay(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = write(tmp_path / "train.json", [ROW, {**ROW, **change}])
    rows = load_instructions(path, cache_folder=tmp_path)
    with pytest.raises(BadSample, match=reason):
        read_instruction(rows[1])
    skipped = InstructionDataset(rows, encode=lambda _: pytest.fail("an unusable row is not encoded"))[1]
    assert reason in str(skipped)
    failed = iterate_instructions(path)[1]
    assert isinstance(failed, BadSample)
    assert failed.sample_id == "1"


def test_what_ends_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; give a JSON or JSONL file of instruction"):
        load_instructions(tmp_path / "nope.json")
    with pytest.raises(UserError, match=r"none of its 1 records is an instruction.*'instruction' is missing; it has"):
        load_instructions(write(tmp_path / "llava.json", [{"id": "1", "conversations": []}]), cache_folder=tmp_path)
    with pytest.raises(UserError, match=r"holds no records"):
        load_instructions(write(tmp_path / "none.json", []), cache_folder=tmp_path)
    with pytest.raises(UserError, match=r"two records have the id a"):
        iterate_instructions(write(tmp_path / "twice.json", [{**ROW, "id": "a"}, {**ROW, "id": "a"}]))
    (tmp_path / "broken.json").write_text('[{"instruction": "x", ')
    with pytest.raises(UserError, match=r"broken\.json, line 1: .* ends too early"):
        load_instructions(tmp_path / "broken.json", cache_folder=tmp_path)


def test_the_published_files_convert_whole(tmp_path: Path) -> None:
    folder = shared("commonsense")
    counts = {"openbookqa": 4957, "ARC-Easy": 2251, "ARC-Challenge": 1119}
    for name, count in counts.items():
        rows = load_instructions(folder / name / "train.json", cache_folder=tmp_path)
        assert len(rows) == count
        assert set(rows["problem"]) == {None}
