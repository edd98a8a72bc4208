"""The fast reader gives the very columns of the careful one, or says that the file is not plain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_vl.data import table as plain_lines
from dora_vl.data import table as record_table
from dora_vl.data.columns import USUAL, Columns, roles_of_columns
from dora_vl.data.containers import find_files
from dora_vl.data.table import NotPlainError, load_table, plain_batches, word_counts

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TURN = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "cat"]), "value": TEXT})
RECORD = st.fixed_dictionaries(
    {"id": TEXT, "conversations": st.lists(TURN, min_size=1, max_size=4)},
    optional={"image": st.none() | TEXT, "model": st.none() | TEXT, "video": st.none()},
)


def rows_of(path: Path, read: Callable[[Path, BinaryIO], int]) -> list[dict[str, object]]:
    table = path.with_suffix(".arrow")
    with table.open("wb") as file:
        assert read(path, file) > 0
    return pa.ipc.open_stream(table.read_bytes()).read_all().to_pylist()


@settings(max_examples=80)
@given(st.lists(RECORD, min_size=1, max_size=6), st.booleans())
def test_columns_are_those_of_the_careful_reader(
    tmp_path: Path, records: list[dict[str, object]], escaped: bool
) -> None:
    path = tmp_path / "any.jsonl"
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in records), encoding="utf-8", newline="\n"
    )
    fast = rows_of(path, lambda path, file: record_table._write_plain(path, file, USUAL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_table, "plain_batches", not_plain)
        careful = rows_of(path, record_table._Writer(find_files(path), USUAL).write)
    uses = [[json.loads(str(use)) for row in rows if (use := row.pop("columns"))] for rows in (fast, careful)]
    assert fast == careful
    assert roles_of_columns(uses[0]) == roles_of_columns(uses[1])


def not_plain(path: Path, schema: pa.Schema, columns: Columns) -> object:
    raise NotPlainError


@given(st.lists(TEXT | st.text(" \t\n\x0b\x1c\x85\u3000\xa0ab", max_size=30), max_size=8))
def test_words_are_those_of_split(texts: list[str]) -> None:
    array = pa.array([*texts, "x y"], pa.string())
    assert word_counts(array[:-1]).tolist() == [len(text.split()) for text in texts]
    assert word_counts(array[1:]).tolist() == [len(text.split()) for text in [*texts, "x y"][1:]]


PLAIN = {"id": "a", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]}


@pytest.mark.parametrize(
    "other",
    [
        {"id": 7},
        {"id": None},
        {"image": ["a.png"]},
        {"image": 3},
        {"images": ["a.png"]},
        {"video": "a.mp4"},
        {"videos": ["a.mp4"]},
        {"videos": "a.mp4"},
        {"video": {"path": "a.mp4", "start_seconds": 1.5}},
        {"system": "Be brief."},
        {"img": "a.png"},
        {"bmp": "a.bmp"},
        {"image_1": "a.png"},
        {"Image": "a.png"},
        {"file_name": "a.png"},
        {"image": "a\\b.png"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "<img>a.png</img>"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x", "note": "y"}]},
        {"more": [1]},
        {"system_prompt": "Be brief."},
        {"image": "file:///there/a.png"},
        {"image": "https://a.b/c.png"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x", "weight": 0}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x", "loss": False}]},
        {"conversations": []},
        {"conversations": None},
        {"conversations": [{"from": "human"}]},
        {"conversations": [{"from": "human", "value": None}]},
        {"conversations": [None]},
        {"conversations": "text"},
        {"id": "half \ud83d"},
    ],
)
def test_a_row_with_a_surprise_sends_the_whole_file_to_the_careful_reader(
    tmp_path: Path, other: dict[str, object]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [PLAIN] * 3 + [{**PLAIN, **other}, PLAIN]))
    with pytest.raises(NotPlainError):
        list(plain_batches(path, record_table._SCHEMA))
    assert len(load_table(path, cache_folder=tmp_path / "cache")) == 5


@pytest.mark.parametrize(
    ("image", "names", "problem"),
    [
        ("file:///there/a.png", ["/there/a.png"], ""),
        ("http://a.b/c.png", [], "is on the web"),
        ("https://a.b/c.png", [], "is on the web"),
        ("data:image/png;base64,aGk=", ["bytes:8f434346648f6b96df89dda901c5176b"], ""),
        ("data/a.png", ["data/a.png"], ""),
    ],
)
def test_pictures_of_lines_are_named_as_those_of_a_list(
    tmp_path: Path, image: str, names: list[str], problem: str
) -> None:
    rows = [PLAIN, {**PLAIN, "image": image}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.json", "a.jsonl"):
        found = load_table(tmp_path / name, cache_folder=tmp_path / "cache")[1]
        assert (found["images"], problem in (found["problem"] or "")) == (names, True)


def test_a_surprise_in_a_later_block_leaves_no_row_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_lines, "BLOCK_BYTES", 512)
    path = tmp_path / "rows.jsonl"
    rows = [{**PLAIN, "id": f"r{number}"} for number in range(200)] + [{**PLAIN, "image": ["a.png", "b.png"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = load_table(path, cache_folder=tmp_path / "cache")
    assert table["id"][:3] == ["r0", "r1", "r2"]
    assert len(table) == 201
    assert table[200]["images"] == ["a.png", "b.png"]
