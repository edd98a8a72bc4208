"""Every shape of `shapes.jsonl` is read right, or stops with the settings that settle it and is then read right.

A shape is a row with its pictures, videos and turns (as `test_rows` writes them). One that is refused has its `remedy`,
the settings that the error names, and what it is with them; what no setting helps has the kind of its `BadSample`. A
preference has its `rejected` answers or whether its answer `is_good`, and `alone`, settings that leave these out. `of`
says where it is from: published examples are those of LLaMA-Factory (data/README.md and its demos), ms-swift (Custom-
dataset.md) and TRL (dataset_formats.md), published sets have their columns.

`files.jsonl` holds files that were written without looking at the reader: each opens, with the pictures and turns of
its first row, stops, or has a bad first row, and says why.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from dora_vl.data.columns import USUAL, Columns, ColumnsError
from dora_vl.data.containers import find_files
from dora_vl.data.readers import RowReader, read_row
from dora_vl.errors import BadSample, UserError
from tests.data.readers.test_rows import turn_parts

SHAPES = [
    json.loads(line) for line in Path(__file__).with_name("shapes.jsonl").read_text(encoding="utf-8").splitlines()
]

FILES = [json.loads(line) for line in Path(__file__).with_name("files.jsonl").read_text(encoding="utf-8").splitlines()]


def outcome(row: dict[str, Any], columns: Columns = USUAL) -> dict[str, Any]:
    try:
        example = read_row(row, columns=columns)
    except ColumnsError:
        return {"bad": "columns"}
    except BadSample as error:
        return {"bad": error.kind}
    videos = {"videos": [clip.path for clip in example.videos]} if example.videos else {}
    about = {name: [*vars(example)[name]] for name in ("rejected", "rejected_images")}
    rejected = {name: values for name, values in about.items() if values}
    judged = {} if example.is_good is None else {"is_good": example.is_good}
    turns = [turn_parts(turn) for turn in example.turns]
    return {"images": [*example.images], **videos, "turns": turns, **rejected, **judged}


def settings(remedy: Columns) -> dict[str, Any]:
    values = {"columns": dict(remedy.roles), "ignore": [*remedy.ignored], "ask": remedy.ask}
    return {name: value for name, value in values.items() if value}


@pytest.mark.parametrize("of", dict.fromkeys(shape["of"] for shape in SHAPES))
def test_a_shape_is_read_or_stops_with_what_settles_it(of: str) -> None:
    for shape in SHAPES:
        if shape["of"] != of:
            continue
        names = ("images", "videos", "turns", "bad", "rejected", "rejected_images", "is_good")
        expected = {name: shape[name] for name in names if name in shape}
        if "remedy" not in shape:
            assert outcome(shape["row"]) == expected, shape["row"]
            if alone := shape.get("alone"):
                settled = Columns(alone.get("columns", {}), tuple(alone.get("ignore", ())))
                plain = {name: expected[name] for name in ("images", "turns")}
                assert outcome(shape["row"], settled) == plain, shape["row"]
            continue
        with pytest.raises(ColumnsError) as caught:
            read_row(shape["row"])
        assert settings(caught.value.remedy) == shape["remedy"], shape["row"]
        assert caught.value.remedy.as_settings() in str(caught.value), shape["row"]
        assert outcome(shape["row"], caught.value.remedy) == expected, shape["row"]


def written(folder: Path, file: dict[str, Any]) -> Path:
    path, rows = folder / f"{file['name']}.{file['suffix']}", file["rows"]
    if file["suffix"] in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as stream:
            names = dict.fromkeys(name for row in rows for name in row)
            table = csv.DictWriter(stream, [*names], delimiter="," if file["suffix"] == "csv" else "\t")
            table.writeheader()
            table.writerows(rows)
    else:
        text = json.dumps(rows) if file["suffix"] == "json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
    return path


def first_row(path: Path) -> dict[str, Any]:
    """What a file is by its first row, all of them read."""
    reader = RowReader(path.name)
    try:
        first, *_ = [reader.read(row, number) for number, row in enumerate(find_files(path).rows())]
    except UserError:
        return {"is": "stop"}
    if isinstance(first, BadSample):
        return {"is": "bad"}
    return {"is": "open", "turns": [*map(turn_parts, first.turns)], "images": [*first.images]}


def test_files_written_without_looking_at_the_reader(tmp_path: Path) -> None:
    for file in FILES:
        expected = {name: file[name] for name in ("is", "turns", "images") if name in file}
        assert first_row(written(tmp_path, file)) == expected, file["name"]


MESSAGES = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": 0.5}]}


def test_a_key_of_a_message_ends_the_run_by_file_row_and_setting() -> None:
    with pytest.raises(UserError) as caught:
        RowReader("conversations.jsonl").read(MESSAGES, 6)
    assert not isinstance(caught.value, BadSample)
    assert all(word in str(caught.value) for word in ("conversations.jsonl", "row 7", "data.ignore: [messages.train]"))
    columns = Columns({"conversation": "messages"})
    with pytest.raises(ColumnsError) as named:
        read_row({"conversation": MESSAGES["messages"]}, columns=columns)
    assert named.value.remedy.ignored == ("conversation.train",)  # by the file's own name
    with pytest.raises(ColumnsError) as nested:
        read_row({"prompt": "q", "completion": [MESSAGES["messages"][1]]})
    assert nested.value.remedy.ignored == ("completion.train",)
