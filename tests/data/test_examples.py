"""Examples come back from disk as they were written; what is broken is named by file and line, never half there."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_vl.data.example import (
    Answer,
    Clip,
    Example,
    Subtitle,
    from_record,
    iterate_examples,
    to_record,
    whole_file,
    write_examples,
)
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SECONDS = st.none() | st.floats(0, 1e6)
VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 40), 1 << 40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
EXAMPLE = st.builds(
    Example,
    id=TEXT.filter(bool),
    images=st.lists(TEXT, max_size=3).map(tuple),
    video=st.none() | st.builds(Clip, path=TEXT, start_seconds=SECONDS, end_seconds=SECONDS),
    question=TEXT,
    turns=st.lists(st.builds(Turn, st.sampled_from(["user", "assistant"]), TEXT), max_size=3).map(tuple),
    answers=st.lists(st.builds(Answer, text=TEXT, weight=st.floats(0, 1)), max_size=3).map(tuple),
    choices=st.lists(TEXT, max_size=3).map(tuple),
    subtitles=st.lists(st.builds(Subtitle, TEXT, SECONDS, SECONDS), max_size=3).map(tuple),
    extra=st.dictionaries(TEXT, VALUE, max_size=3),
)

FULL = Example(
    id="q1",
    images=("a/b.jpg",),
    video=Clip(path="v.mp4", start_seconds=1.5, end_seconds=3.0),
    question="What?",
    answers=(Answer(text="cat"), Answer(text="kitten", weight=0.3)),
    choices=("cat", "dog"),
    subtitles=(Subtitle("Meow.", 0.0, 1.0),),
    extra={"correct": 0},
)


@settings(max_examples=60)
@given(st.lists(EXAMPLE, max_size=5, unique_by=lambda example: example.id))
def test_what_is_written_is_read_again(tmp_path: Path, examples: list[Example]) -> None:
    path = tmp_path / "new" / "any.jsonl"
    assert write_examples(path, iter(examples)) == len(examples)
    assert list(iterate_examples(path)) == examples
    assert path.read_bytes().count(b"\n") == len(examples)


def test_the_form_on_disk() -> None:
    assert to_record(Example(id="1", question="a cat")) == {"id": "1", "question": "a cat"}
    assert to_record(FULL) == {
        "id": "q1",
        "images": ["a/b.jpg"],
        "video": {"path": "v.mp4", "start_seconds": 1.5, "end_seconds": 3.0},
        "question": "What?",
        "answers": [{"text": "cat"}, {"text": "kitten", "weight": 0.3}],
        "choices": ["cat", "dog"],
        "subtitles": [{"text": "Meow.", "start_seconds": 0.0, "end_seconds": 1.0}],
        "extra": {"correct": 0},
    }


def test_several_videos_are_written_and_read() -> None:
    clips = (Clip(path="a.mp4", start_seconds=1.5), Clip(path="b.mp4"))
    record = to_record(Example(id="1", videos=clips, question="q"))
    assert record["videos"] == [{"path": "a.mp4", "start_seconds": 1.5}, {"path": "b.mp4"}]
    assert from_record(record).clips == clips
    assert from_record({"id": "1", "video": record["videos"][1]}).clips == clips[1:]
    with pytest.raises(BadSample, match="it has 'video' and 'videos'"):
        from_record({**record, "video": {"path": "c.mp4"}})


def test_two_examples_of_one_id_name_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match=r"a\.jsonl: id 'x' in lines 1 and 3"):
        write_examples(path, [Example(id="x"), Example(id="y"), Example(id="x")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "said"),
    [(float("nan"), "not JSON compliant"), ("\ud83d", "surrogates not allowed"), ({1, 2}, "not JSON serializable")],
)
def test_what_json_cannot_hold_is_named(tmp_path: Path, value: object, said: str) -> None:
    with pytest.raises(UserError, match=f"line 2, id 'b': cannot be written as JSON in UTF-8: .*{said}"):
        write_examples(tmp_path / "a.jsonl", [Example(id="a"), Example(id="b", extra={"value": value})])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_or_stopped_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_examples(path, [FULL])

    def stopped() -> Iterator[Example]:
        yield Example(id="new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_examples(path, stopped())
    assert list(iterate_examples(path)) == [FULL]
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be written \(No space left on device\)") as caught:
        write_examples(tmp_path / "a.jsonl", [FULL])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="cannot be written"), whole_file(tmp_path / "taken" / "a.jsonl"):
        pass


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{'id': 1}", "Expecting property name"),
        ("[1]", "must hold an object, found list"),
        ("nul", "Expecting value"),
        ('{"id": 7}', "'id' must be text that is not empty, got 7"),
        ('{"question": "x"}', "'id' must be text that is not empty, got None"),
        ('{"id": "b", "answer": "x"}', "sample b: unknown field 'answer'"),
        ('{"id": "b", "images": "x.jpg"}', "'images' must be a list, got 'x.jpg'"),
        ('{"id": "b", "images": [1]}', "'images' must hold text, got 1"),
        ('{"id": "b", "question": null}', "'question' must hold text, got None"),
        ('{"id": "b", "video": "v.mp4"}', "'video' must hold an object, got 'v.mp4'"),
        (
            '{"id": "b", "video": {"path": "v", "start_seconds": "1"}}',
            "'video start_seconds' must hold a finite number",
        ),
        (
            f'{{"id": "b", "video": {{"path": "v", "start_seconds": {"9" * 400}}}}}',
            "'video start_seconds' must hold a finite number",
        ),
        ('{"id": "b", "answers": ["x"]}', "'answers' must hold an object, got 'x'"),
        (
            '{"id": "b", "answers": [{"text": "x", "weight": NaN}]}',
            "'answers weight' must hold a finite number, got nan",
        ),
        (
            '{"id": "b", "turns": [{"role": "human", "text": "x"}]}',
            "role must be 'system', 'user' or 'assistant', got 'human'",
        ),
        ('{"id": "b", "subtitles": [{"start_seconds": 1}]}', "'subtitles text' must hold text, got None"),
        ('{"id": "b", "extra": []}', "'extra' must hold an object"),
        (f'{{"id": "b", "extra": {"[" * 100_000}', "nested too deeply"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(to_record(FULL))}\n{line}\n")
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: .*{said}") as caught:
        list(iterate_examples(path))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": "caf\xe9"}\n')
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        list(iterate_examples(path))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        list(iterate_examples(tmp_path / "none.jsonl"))


@given(st.dictionaries(st.sampled_from(["id", "images", "video", "turns", "answers", "extra", "other"]), VALUE))
def test_any_object_is_an_example_or_a_bad_sample(record: dict[str, object]) -> None:
    named = {"id": "x", **record}
    try:
        example = from_record(named)
    except BadSample:
        return
    assert from_record(to_record(example)) == example


def test_it_needs_the_standard_library_only() -> None:
    code = """
        import sys
        for name in ("torch", "transformers", "datasets", "pyarrow", "numpy", "PIL"):
            sys.modules[name] = None
        import dora_vl.data.example
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    with whole_file(path) as first:
        first.write("one")
        with whole_file(path) as second:
            second.write("two")
        assert path.read_text() == "two"
    assert path.read_text() == "one"
    assert [one.name for one in tmp_path.iterdir()] == ["settings.json"]


def test_two_records_of_one_id_are_refused_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "a"}\n\n{"id": "b"}\n{"id": "a", "question": "?"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl: id 'a' in lines 1 and 4; ids must be unique"):
        list(iterate_examples(path))
