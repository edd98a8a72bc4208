"""Text files of a person and of examples: any bytes give rows, or an error that names file and line."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dora_vl.data import text_file
from dora_vl.data.check import FileCheck
from dora_vl.data.example import (
    Answer,
    Clip,
    Example,
    ExampleFile,
    Subtitle,
    from_record,
    iterate_examples,
    to_record,
    write_examples,
)
from dora_vl.data.table import load_rows
from dora_vl.data.text_file import (
    DEEPEST,
    NotUtf8,
    json_lines,
    json_object,
    stream_members,
    stream_records,
    stream_values,
    table_rows,
    text_lines,
)
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from dora_vl.yaml_files import read_yaml

BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_and_blank_lines_are_no_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(BOM + b'{"a": 1}\r\n \r\n{"b": 2}')
    assert list(json_lines(path, "rows")) == [(1, {"a": 1}), (3, {"b": 2})]
    path.write_bytes(BOM + b'id,answer\r\n1,"a, b"\r\n\r\n2,"two\r\nlines"\r\n3,an "inch"\n')
    rows = [(2, "1", "a, b"), (5, "2", "two\nlines"), (6, "3", 'an "inch"')]
    expected = [(number, {"id": name, "answer": answer}) for number, name, answer in rows]
    assert list(table_rows(path, "rows", delimiter=",")) == expected


@pytest.mark.parametrize(
    ("content", "begins"),
    [
        ("sep=;\r\nid;answer\r\n1;a\r\n2;b\r\n", 3),
        ('"SEP=\t"\nid\tanswer\n1\ta\n2\tb\n', 3),
        ("id,answer,,\n1,a\n2,b, ,\n", 2),
        ("id,,answer\n1,,a\n2,,b\n", 2),
    ],
)
def test_what_excel_writes_around_a_table_is_no_content(tmp_path: Path, content: str, begins: int) -> None:
    (tmp_path / "a.csv").write_text(content, newline="")
    expected = [(begins, {"id": "1", "answer": "a"}), (begins + 1, {"id": "2", "answer": "b"})]
    assert list(table_rows(tmp_path / "a.csv", "rows", delimiter=",")) == expected


@pytest.mark.parametrize(
    "content",
    [
        "id,answer\n1,a\n2\n",
        "id,answer\n1,yes, it is\n",
        "id,answer,id\n1,2,3\n",
        "id,answer,\n1,2,\n3,4,5\n",
        "id,answer,\n1\n",
        'id,answer\n1,"a\n2,b\n',
        "id,answer\n1,a\rb\n",
        'id,answer\n1,"' + "a" * 120 + "\n" + "b" * 120 + '"\n',
        "a,b,c,d\n1,2,3,4\n",
    ],
)
def test_a_table_that_is_damaged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(text_file, "LONGEST_LINE_BYTES", 200)
    monkeypatch.setattr(text_file, "MOST_COLUMNS", 3)
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError):
        list(table_rows(tmp_path / "a.csv", "rows", delimiter=","))


def test_an_object_at_once_has_every_name_once(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(BOM + b'{"a": {"b": 1},\r\n "c": "\\ud83d"}')
    assert json_object(path, "answers") == {"a": {"b": 1}, "c": "\ud83d"}
    for content in ('{"a": {"b": 1, "b": 2}}', "[1]", '{"a": ' + "[" * 100_000, '{"a": ' + "1" * 5_000 + "}"):
        path.write_text(content)
        with pytest.raises(UserError):
            json_object(path, "answers")
    path.write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(NotUtf8):
        json_object(path, "answers")


def test_a_folder_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone", tmp_path / "NUL\0"):
        with pytest.raises(UserError):
            list(text_lines(path, "answers"))
    with pytest.raises(UserError):
        list(text_lines(tmp_path / ("y" * 60_000), "answers"))


def test_values_of_a_list_of_lines_and_of_texts_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"a": 1},\n\n {"b": [2,\n 3]}, 4\n]\n')
    numbered = [(1, {"a": 1}), (2, {"b": [2, 3]}), (3, 4)]
    assert list(stream_values(path, "values")) == numbered
    path.write_text('{"a": 1}\n\n{"b": [2, 3]}\n4\n')
    assert list(stream_values(path, "values")) == numbered
    path.write_text('{"a":\n 1}\n{"b":\n [2, 3]}\n4')
    assert list(stream_values(path, "values")) == numbered
    path.write_text('[{"a": "\\ud83d\\ude00"}]')
    assert list(stream_values(path, "values")) == [(1, {"a": "\U0001f600"})]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_of_objects_holds_rows_by_their_ids(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    rows = {"img.0": {"question": "?", "answer": "red"}, "img1": {"id": "own", "answer": {"text": "blue"}}}
    path.write_text(json.dumps(rows, indent=indent))
    named = [{"id": "img.0", **rows["img.0"]}, rows["img1"]]
    assert list(stream_records(path)) == named
    assert list(stream_values(path, "rows")) == [*enumerate(named, start=1)]
    for one in ({"meta": {"answer": "red"}}, {"image": {"path": "a.png"}, "caption": "red"}):  # a row itself
        path.write_text(json.dumps(one, indent=indent))
        assert list(stream_records(path)) == [one]
    path.write_text("\n".join([json.dumps({"a": {}, "b": {}}, indent=indent)] * 2))  # two rows
    assert list(stream_records(path)) == [{"a": {}, "b": {}}] * 2


LINE = json.dumps({"id": "a", "text": "x"})


HALF = '{"a": "\\uDE00"}'


@pytest.mark.parametrize(
    ("read", "content", "where"),
    [
        ("records", f"[{LINE},\n{LINE}", "value 2"),
        ("records", f"[{LINE}\n{LINE}]", "value 1"),
        ("records", f"{LINE}\n{LINE}\n{{'id': 1}}\n", "line 3"),
        ("records", f'[{LINE}, {{"id": NaN}}]', "value 1"),
        ("records", f'[\n{{"id": {"[" * 100_000}', "value 0"),
        ("records", f'{{"data": [{LINE}],\n"test": [{LINE}]}}', "'test'"),
        ("lines", b'{}\n{"a": "\xe9"}', "line 2"),
        ("lines", b"{}\n" + b"[" * 100_000, "line 2"),
        ("lines", f"{{}}\n{HALF}", "line 2"),
        ("lines", "{}\n" + "x" * 120_000, "line 2"),
        ("values", f'{{"a": 1}}\n{HALF}', "row 2"),
    ],
)
def test_what_is_wrong_has_its_place(tmp_path, monkeypatch, read, content, where) -> None:
    monkeypatch.setattr(text_file, "LONGEST_LINE_BYTES", 110_000)
    path = tmp_path / "broken.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    readers = {
        "records": stream_records,
        "lines": lambda path: json_lines(path, "rows"),
        "values": lambda path: stream_values(path, "values"),
    }
    with pytest.raises(UserError) as caught:
        list(readers[read](path))
    message = str(caught.value)
    assert message.startswith(str(path))
    assert where in message
    assert "\n" not in message


def test_what_an_object_holds_under_a_name_and_its_members(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"info": {"n": 1}, "rows": [{"a": 1}, {"a": 2}], "empty": []}')
    assert list(stream_records(path, key="rows")) == [{"a": 1}, {"a": 2}]
    assert list(stream_records(path, key="empty")) == []
    for key in ("info", "none"):
        with pytest.raises(UserError):
            list(stream_records(path, key=key))
    path.write_text('{"a": {"n": 1},\n "b": {}}')
    assert list(stream_members(path)) == [("a", {"n": 1}), ("b", {})]
    path.write_text('{"a": {"n": 1},\n "b": 3}')
    with pytest.raises(UserError):
        list(stream_members(path))


LAUGHS = "a0: &a0 [x, y]\n" + "".join(f"a{n}: &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]\n" for n in range(1, 30))


KEYS = "".join(f"key{number}: 1\n" for number in range(20_000))


@pytest.mark.parametrize("text", [LAUGHS, "a: &a [*a]", "a: &a {b: *a}", KEYS])
def test_yaml_of_too_many_values_is_refused_at_once(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        read_yaml(path)
    path.write_text("a: &a {x: [1, 2]}\nb: *a\nc: [*a, *a]\n")
    assert read_yaml(path) == {"a": (value := {"x": [1, 2]}), "b": value, "c": [value, value]}


def test_brackets_in_texts_open_nothing_and_open_ones_have_a_limit(tmp_path: Path) -> None:
    rows = [{"text": '[{"\\' * 5}] * 2_500  # more open brackets than may be nested
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert list(stream_records(tmp_path / "rows.json")) == rows
    (tmp_path / "deep.json").write_text('[{"a": ' + "[" * (DEEPEST + 1))
    with pytest.raises(UserError):
        list(stream_records(tmp_path / "deep.json"))


def test_a_carriage_return_inside_a_line_is_named_in_our_words(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"id,answer\n1,a\rb\n")
    with pytest.raises(UserError) as caught:
        list(table_rows(tmp_path / "a.csv", "rows", delimiter=","))
    assert "line 2" in str(caught.value)
    assert "universal" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "rows", "unfit", "broken", "line"),
    [
        ("a.csv", 'question,answer\n"two\nlines",a\n\nq,{}\nr,b\n', "", "a,b", 5),
        ("a.csv", 'question,images,answer\n"two\nlines",,a\nq,{}\nr,,b\n', ",", '"[x",a', 4),
        (
            "a.jsonl",
            '{{"question": "q", "answer": "a"}}\n\n{}\n',
            '{"question": "q", "answer": ""}',
            '{"question": q',
            3,
        ),
    ],
    ids=["another length", "a cell of JSON", "lines of JSON"],
)
def test_a_row_has_one_number_in_every_message(tmp_path, name, rows, unfit, broken, line) -> None:
    path = tmp_path / name
    path.write_text(rows.format(unfit), newline="")
    assert [row.sample_id for row in load_rows(str(path)) if isinstance(row, BadSample)] == ["row 2"]
    (finding,) = FileCheck(path).run().findings.values()
    assert [*finding.examples.values()] == [["row 2"]]
    path.write_text(rows.format(broken), newline="")
    with pytest.raises(UserError) as caught:
        load_rows(str(path))
    assert f"{name}, row 2 (line {line})" in str(caught.value)


FULL = Example(
    id="q1",
    images=("a/b.jpg",),
    videos=(Clip(path="v.mp4", start_seconds=1.5, end_seconds=3.0),),
    question='What\u2028 "é"?',
    turns=(Turn("user", "q\n"), Turn("assistant", "")),
    answers=(Answer(text="cat"), Answer(text="kitten", weight=0.3)),
    choices=("cat", "dog"),
    subtitles=(Subtitle("Meow.", 0.0, 1.0),),
    extra={"correct": 0, "of": [{"a": None}, 0.1, 1 << 40]},
)


def test_the_form_on_disk() -> None:
    assert to_record(Example(id="1", question="a cat")) == {"id": "1", "question": "a cat"}
    assert to_record(FULL) == {
        "id": "q1",
        "images": ["a/b.jpg"],
        "video": {"path": "v.mp4", "start_seconds": 1.5, "end_seconds": 3.0},
        "question": 'What\u2028 "é"?',
        "turns": [{"role": "user", "text": "q\n"}, {"role": "assistant", "text": ""}],
        "answers": [{"text": "cat"}, {"text": "kitten", "weight": 0.3}],
        "choices": ["cat", "dog"],
        "subtitles": [{"text": "Meow.", "start_seconds": 0.0, "end_seconds": 1.0}],
        "extra": {"correct": 0, "of": [{"a": None}, 0.1, 1 << 40]},
    }
    several = to_record(Example(id="1", videos=(Clip(path="a.mp4", start_seconds=1.5), Clip(path="b.mp4"))))
    assert several["videos"] == [{"path": "a.mp4", "start_seconds": 1.5}, {"path": "b.mp4"}]
    with pytest.raises(BadSample):
        from_record({**several, "video": {"path": "c.mp4"}})
    with pytest.raises(UserError):
        to_record(Example(id="a", images=("bytes:1",), image_bytes={"bytes:1": b"x"}))


def stopped() -> Iterator[Example]:
    yield Example(id="new")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "examples",
    [
        [Example(id="x"), Example(id="y"), Example(id="x")],
        [Example(id="a"), Example(id="b", extra={"value": float("nan")})],
        [Example(id="a"), Example(id="b", extra={"value": "\ud83d"})],
        [Example(id="a"), Example(id="b", extra={"value": {1, 2}})],
        stopped(),
    ],
)
def test_a_writing_that_fails_leaves_the_old_file(tmp_path: Path, examples: list[Example] | Iterator[Example]) -> None:
    path = tmp_path / "a.jsonl"
    assert write_examples(path, [FULL]) == path.read_bytes().count(b"\n") == 1
    with pytest.raises((UserError, KeyboardInterrupt)):
        write_examples(path, examples)
    assert list(iterate_examples(path)) == [FULL]
    assert list(tmp_path.iterdir()) == [path]


BROKEN: list[bytes] = [
    b"{'id': 1}",
    b'{"id":"b","ans',
    b'{"id":"caf\xe9"}',
    b"[" * 5000 + b"]" * 5000,
    b'{"id": 7}',
    b'{"id": "b", "answer": "x"}',
    b'{"id": "b", "images": [1]}',
    b'{"id": "b", "video": "v.mp4"}',
    b'{"id": "b", "video": {"path": "v", "start_seconds": ' + b"9" * 400 + b"}}",
    b'{"id": "b", "answers": ["x"]}',
    b'{"id": "b", "answers": [{"text": "x", "weight": NaN}]}',
    b'{"id": "b", "turns": [{"role": "human", "text": "x"}]}',
    b'{"id": "b", "turns": [{"role": "user", "text": "x", "more": "{tools"}]}',
    b'{"id": "b", "choices": ["x"], "extra": {"correct": 1}}',
]
GOOD = b'{"id":"a","answers":[{"text":"red"},{"text":"blue"}]}\n'


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_is_named_with_its_file(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(UserError) as caught:
        list(iterate_examples(path))
    errors = [str(caught.value)]
    for each_answer in (False, True):
        file = ExampleFile(path, each_answer=each_answer)
        broken = 2 if each_answer else 1
        if len(file) == (5 if each_answer else 3):
            with pytest.raises(BadSample) as bad:
                file[broken]
            errors.append(str(bad.value))
            assert file[broken + 1].id == "a"  # what follows is read as before
    assert len(errors) == 3
    assert all(f"{path}, line 3: " in error and "\n" not in error for error in errors)


def test_ids_and_limits_of_several_files(tmp_path: Path) -> None:
    first, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    first.write_bytes(GOOD + b'{"id":"b","ans\n' + GOOD.replace(b'"a"', b'"c"'))
    other.write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b'"a"', b'"d"') + b"\n" + GOOD)
    answers = ExampleFile([first, other], each_answer=True, limit=7)
    assert list(answers.ids()) == ["a", "a", "", "c", "c", "d", "d"]
    assert [answers.answer_of(index) for index in range(7)] == [0, 1, 0, 0, 1, 0, 1]
    assert list(ExampleFile([first, other], limit=4).ids()) == ["a", "", "c", "d"]
    for limit in (0, -2):
        with pytest.raises(UserError):
            ExampleFile(first, limit=limit)
    with pytest.raises(UserError):
        ExampleFile(tmp_path / "none.jsonl")
    other.write_text(json.dumps(to_record(FULL)) + "\n\n" + json.dumps(to_record(FULL)))
    with pytest.raises(UserError):
        list(iterate_examples(other))
