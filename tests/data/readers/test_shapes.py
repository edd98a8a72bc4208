"""Every shape of `shapes.jsonl` is read right, or stops with the settings that settle it and is then read right.

A shape is a row with its pictures, videos and turns. One that is refused has its `remedy`, the settings that the error
names, and what it is with them; what no setting helps has the kind of its `BadSample`. `of` says where it is from:
published examples are those of LLaMA-Factory (data/README.md and its demos), ms-swift (Custom-dataset.md) and TRL
(dataset_formats.md), published sets have their columns; `bookkeeping` has nothing else beside known columns.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dora_vl.data.columns import USUAL, Columns, ColumnsError
from dora_vl.data.readers import read_row
from dora_vl.errors import BadSample

SHAPES = [
    json.loads(line) for line in Path(__file__).with_name("shapes.jsonl").read_text(encoding="utf-8").splitlines()
]


def outcome(row: dict[str, Any], columns: Columns = USUAL) -> dict[str, Any]:
    """What a row is by these settings."""
    try:
        example = read_row(row, columns=columns)
    except ColumnsError:
        return {"bad": "columns"}
    except BadSample as error:
        return {"bad": error.kind}
    videos = {"videos": [clip.path for clip in example.videos]} if example.videos else {}
    return {"images": [*example.images], **videos, "turns": [[turn.role, turn.text] for turn in example.turns]}


def settings(remedy: Columns) -> dict[str, Any]:
    values = {"columns": dict(remedy.roles), "ignore": [*remedy.ignored], "ask": remedy.ask}
    return {name: value for name, value in values.items() if value}


@pytest.mark.parametrize("of", dict.fromkeys(shape["of"] for shape in SHAPES))
def test_a_shape_is_read_or_stops_with_what_settles_it(of: str) -> None:
    for shape in SHAPES:
        if shape["of"] != of:
            continue
        expected = {name: shape[name] for name in ("images", "videos", "turns", "bad") if name in shape}
        if "remedy" not in shape:
            assert outcome(shape["row"]) == expected, shape["row"]
            continue
        with pytest.raises(ColumnsError) as caught:
            read_row(shape["row"])
        assert settings(caught.value.remedy) == shape["remedy"], shape["row"]
        assert caught.value.remedy.as_settings() in str(caught.value), shape["row"]
        assert outcome(shape["row"], caught.value.remedy) == expected, shape["row"]


def test_bookkeeping_opens_and_two_hundred_shapes_are_tried() -> None:
    count = Counter(shape["of"] for shape in SHAPES if shape["of"] != "bookkeeping")
    assert count.total() >= 200
    assert all(count[name] >= 10 for name in ("LLaMA-Factory", "ms-swift", "TRL", "published sets"))
    notes = [shape for shape in SHAPES if shape["of"] == "bookkeeping"]
    assert len(notes) >= 70
    assert all("turns" in shape and "remedy" not in shape for shape in notes)
