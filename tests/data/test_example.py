"""Examples come back from disk as they were written; what is broken is named by file and line, never half there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

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
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError

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
