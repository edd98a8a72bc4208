"""Text files of a person: any bytes give rows or a `UserError` that names file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dora_vl.data import text_file
from dora_vl.data.records import stream_values
from dora_vl.data.text_file import json_lines, table_rows, text_lines
from dora_vl.errors import LONGEST_MESSAGE, UserError

BOM = b"\xef\xbb\xbf"
DEEP = b"[" * 100_000


@given(content=st.binary(max_size=60))
@example(content=BOM + b'{"a": 1}\r\n\r\n{"b": "\xc3\xa9"}')
@example(content=b'{"a": ' + DEEP)
@example(content=b'{"a": 1' + b"0" * 5000 + b"}")
@example(content=b'{"a": "\\ud83d"}')
@example(content=b'a,b\n"1\n')
@example(content=b"\xff\xfe{\x00}\x00")
def test_any_bytes_give_rows_or_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any"
    path.write_bytes(content)
    readers = (
        lambda: list(text_lines(path, "text")),
        lambda: list(json_lines(path, "rows")),
        lambda: list(table_rows(path, "rows", delimiter=",")),
        lambda: list(stream_values(path, "values")),
    )
    for read in readers:
        said = ""
        try:
            read()
        except UserError as error:
            said = str(error)
        assert not said or str(path) in said
        assert len(said) <= LONGEST_MESSAGE


def test_a_byte_order_mark_and_blank_lines_are_no_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(BOM + b'{"a": 1}\r\n \r\n{"b": 2}')
    assert list(json_lines(path, "rows")) == [(1, {"a": 1}), (3, {"b": 2})]
    path.write_bytes(BOM + b'id,answer\n1,"a, b"\n\n2\n3,c,d\n')
    rows = [(2, {"id": "1", "answer": "a, b"}), (4, {"id": "2"}), (5, {"id": "3", "answer": "c"})]
    assert list(table_rows(path, "rows", delimiter=",")) == rows


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{}\n{"a": "\xe9"}', "line 2: not UTF-8"),
        (b"{}\n" + DEEP, "line 2: not whole JSON .its values are nested too deeply"),
        (b'{}\n{"a": "\\uDE00"}', "line 2: its text holds half of a surrogate pair"),
        (b"{}\n[1]", "line 2: a line must hold an object, found list"),
        (b"{}\n" + b"x" * 2000, "line 2: longer than 1,000 bytes"),
    ],
)
def test_what_is_wrong_has_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, said: str) -> None:
    if b"x" in content:
        monkeypatch.setattr(text_file, "LONGEST_LINE_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.jsonl, {said}"):
        list(json_lines(tmp_path / "a.jsonl", "rows"))


def test_a_folder_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError, match="no such file of answers"):
            list(text_lines(path, "answers"))


def test_values_of_a_list_and_of_lines_have_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"a": 1},\n\n {"b": [2,\n 3]}, 4\n]\n')
    assert list(stream_values(path, "values")) == [(2, {"a": 1}), (4, {"b": [2, 3]}), (5, 4)]
    path.write_text('{"a": 1}\n\n{"b":\n 2}\n"c"\n')
    assert list(stream_values(path, "values")) == [(1, {"a": 1}), (3, {"b": 2}), (5, "c")]


def test_lines_are_right_beyond_the_first_piece_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(f'{{"number": {number}, "text": "{"x" * 1000}"}}\n' for number in range(1, 3000)))
    found = [(line, value["number"]) for line, value in stream_values(path, "values") if isinstance(value, dict)]
    assert found == [(number, number) for number in range(1, 3000)]
