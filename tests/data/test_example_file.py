"""A records file read by place: a broken line is one bad sample that names file and line, never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_vl.data.example import Example, ExampleFile
from dora_vl.errors import BadSample, UserError

GOOD = b'{"id":"a","answers":[{"text":"red"},{"text":"blue"}]}\n'


@pytest.mark.parametrize("each_answer", [False, True])
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"id":"b","ans', "not whole JSON"),
        (b"[1, 2]", "must hold an object, found list"),
        (b"7", "must hold an object, found int"),
        (b'{"id":"\xff"}', "not UTF-8"),
        (b"[" * 5000 + b"]" * 5000, "not whole JSON"),
        (b'{"id":"b","answers":3}', "'answers' must be a list, got 3"),
        (b'{"id":"b","answers":null}', "'answers' must be a list, got None"),
        (b'{"id":"b","answers":"red"}', "'answers' must be a list"),
        (b'{"id":"b","answers":{"text":"red"}}', "'answers' must be a list"),
    ],
)
def test_a_broken_line_is_one_bad_sample_that_names_file_and_line(
    tmp_path: Path, line: bytes, said: str, each_answer: bool
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    file = ExampleFile(path, each_answer=each_answer)
    assert len(file) == (5 if each_answer else 3)
    broken = 2 if each_answer else 1
    with pytest.raises(BadSample) as caught:
        file[broken]
    assert f"{path}, line 3: " in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert file[broken + 1].id == "a"  # what follows is read as before


def read(file: ExampleFile, index: int) -> Example | BadSample:
    try:
        return file[index]
    except BadSample as error:
        return error


@settings(max_examples=80)
@given(st.binary(max_size=60), st.integers(0, len(GOOD)), st.booleans())
def test_any_bytes_are_examples_or_bad_samples(tmp_path: Path, inserted: bytes, at: int, each_answer: bool) -> None:
    path = tmp_path / "any.jsonl"
    path.write_bytes(GOOD[:at] + inserted + GOOD[at:])
    file = ExampleFile(path, each_answer=each_answer)
    for index in range(len(file)):
        if isinstance(found := read(file, index), BadSample):
            assert f"{path}, line " in found.reason


@pytest.mark.parametrize("limit", [0, -2])
def test_a_limit_that_leaves_nothing_is_refused(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 3)
    with pytest.raises(UserError, match=rf"a\.jsonl: a limit of {limit} leaves no example; at least 1"):
        ExampleFile(path, limit=limit)
    assert len(ExampleFile(path, limit=1)) == 1


@pytest.mark.parametrize("each_answer", [False, True])
def test_ids_are_those_of_the_items_in_order(tmp_path: Path, each_answer: bool) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_bytes(GOOD + b'{"id":"b","ans\n' + GOOD.replace(b'"a"', b'"c"'))
    other.write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b'"a"', b'"d"') + b"\n" + GOOD)
    file = ExampleFile([one, other], each_answer=each_answer, limit=7 if each_answer else 4)
    assert list(file.ids()) == (["a", "a", "", "c", "c", "d", "d"] if each_answer else ["a", "", "c", "d"])
