"""Text files of a person: any bytes give rows or a `UserError` that names file and line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dora_vl.data import text_file
from dora_vl.data.readers import stream_values
from dora_vl.data.text_file import NotUtf8, json_lines, json_object, table_rows, text_lines
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
    path.write_bytes(BOM + b'id,answer\r\n1,"a, b"\r\n\r\n2,"two\r\nlines"\r\n3,an "inch"\n')
    rows = [(2, "1", "a, b"), (5, "2", "two\nlines"), (6, "3", 'an "inch"')]
    expected = [(number, {"id": name, "answer": answer}) for number, name, answer in rows]
    assert list(table_rows(path, "rows", delimiter=",")) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("id,answer\n1,a\n2\n", "a.csv, line 3: 1 values for 2 columns; the file is cut or damaged"),
        ("id,answer\n1,yes, it is\n", "a.csv, line 2: 3 values for 2 columns"),
        ("id,id\n1,2\n", "a.csv: two columns are called 'id'"),
        ("id,text\n1,2\n", "a.csv: no column 'answer'; it has id, text"),
        ('id,answer\n1,"a\n2,b\n', "a.csv, line 2: a quotation mark in it is never closed"),
        (
            'id,answer\n1,"' + "a" * 120 + "\n" + "b" * 120 + '"\n',
            "a.csv, line 3: not the table expected: field larger",
        ),
    ],
)
def test_a_table_that_is_damaged_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, said: str
) -> None:
    monkeypatch.setattr(text_file, "LONGEST_LINE_BYTES", 200)
    required = ["answer"] if "answer" in said else []
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=re.escape(said)):
        list(table_rows(tmp_path / "a.csv", "rows", delimiter=",", required=required))


def test_progress_is_told_every_byte_of_a_table(tmp_path: Path) -> None:
    told: list[int] = []
    (tmp_path / "a.tsv").write_bytes(BOM + "a\tb\né\t2\n".encode())
    assert list(table_rows(tmp_path / "a.tsv", "rows", delimiter="\t", progress=told.append)) == [
        (2, {"a": "é", "b": "2"})
    ]
    assert sum(told) == (tmp_path / "a.tsv").stat().st_size


def test_an_object_at_once_has_every_name_once(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(BOM + b'{"a": {"b": 1},\r\n "c": "\\ud83d"}')
    assert json_object(path, "answers") == {"a": {"b": 1}, "c": "\ud83d"}
    for content, said in (
        ('{"a": {"b": 1, "b": 2}}', "the name 'b' stands twice in one object"),
        ("[1]", "must hold one JSON object, found list"),
        ('{"a": ' + "[" * 100_000, "its values are nested too deeply"),
        ('{"a": ' + "1" * 5_000 + "}", "not whole JSON"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            json_object(path, "answers")
    path.write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(NotUtf8, match=r"a\.json: not UTF-8"):
        json_object(path, "answers")


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
    for path in (tmp_path, tmp_path / "gone", tmp_path / "NUL\0"):
        with pytest.raises(UserError, match="no such file of answers"):
            list(text_lines(path, "answers"))
    with pytest.raises(UserError, match=r"y: cannot be read \(File name too long\)"):
        list(text_lines(tmp_path / ("y" * 60_000), "answers"))


def test_values_of_a_list_and_of_lines_have_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"a": 1},\n\n {"b": [2,\n 3]}, 4\n]\n')
    assert list(stream_values(path, "values")) == [(2, {"a": 1}), (4, {"b": [2, 3]}), (5, 4)]
    path.write_text('{"a": 1}\n\n{"b":\n 2}\n"c"\n')
    assert list(stream_values(path, "values")) == [(1, {"a": 1}), (3, {"b": 2}), (5, "c")]


@pytest.mark.parametrize("form", ["[{}]", "{}", '{{"a": 1}}\n{}'])
def test_a_value_with_half_of_a_surrogate_pair_is_refused(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(form.format('{"whole": "\\ud83d\\ude00"}'))
    assert list(stream_values(path, "values"))[-1][1] == {"whole": "\U0001f600"}
    path.write_text(form.format('{"whole": ["\\uDE00"]}'))
    with pytest.raises(UserError, match=r"a\.json, line [12]: its text holds half of a surrogate pair"):
        list(stream_values(path, "values"))


def test_lines_are_right_beyond_the_first_piece_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(f'{{"number": {number}, "text": "{"x" * 1000}"}}\n' for number in range(1, 3000)))
    found = [(line, value["number"]) for line, value in stream_values(path, "values") if isinstance(value, dict)]
    assert found == [(number, number) for number in range(1, 3000)]
