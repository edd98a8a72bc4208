"""Each format by its own keys, all to the same turns; whatever else a row holds is a bad sample."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_vl.data.examples import Example, to_record
from dora_vl.data.sample_rows import FORMATS, format_of, read_row, turns_of
from dora_vl.data.turns import Conversation, Turn, as_conversation
from dora_vl.errors import BadSample, UserError

ROOT = Path(__file__).parents[3]
ASKED = Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A cat.")


def talk(row: dict[str, object]) -> Conversation:
    example = read_row(row)
    return as_conversation(example.id, example.images, turns_of(example), example.clips)


def documented_rows(kind: str = "rows") -> list[str]:
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    return text.partition(f"<!-- {kind} -->\n```json\n")[2].partition("```")[0].splitlines()


@pytest.mark.parametrize("line", documented_rows())
def test_each_row_of_the_documentation_is_the_same_sample(line: str) -> None:
    found = talk(json.loads(line))
    *system, asked, answer = found.turns
    assert system == ([Turn("system", "Be brief.")] if "system" in line else [])
    expected = Turn("user", "<image>") if '"caption"' in line else ASKED[0]
    assert (asked, answer, found.images) == (expected, ASKED[1], ("cat.jpg",))


@pytest.mark.parametrize("line", documented_rows("video rows"))
def test_each_row_with_a_video_of_the_documentation_is_the_same_sample(line: str) -> None:
    found = talk(json.loads(line))
    assert found.turns[0].text.replace("\n", "") == "<video>" + ("" if '"caption"' in line else "What is it?")
    assert found.turns[1:] == ASKED[1:]
    assert [clip.path for clip in found.videos] == ["cat.mp4"]
    assert read_row(json.loads(line)).video is not None  # what a test about one video reads


def test_the_documentation_has_a_row_of_every_format() -> None:
    formats = [format_of(json.loads(line)) for line in documented_rows()]
    assert {form.name for form in formats if form} == {form.name for form in FORMATS}


def test_pictures_in_parts_and_beside_them_keep_their_order() -> None:
    url = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
    parts = [
        {"type": "image"},
        {"type": "text", "text": "and"},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "and <image>?"},
    ]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "so"}]
    found = read_row({"messages": messages, "images": ["first.png", {"bytes": b"third", "path": None}]})
    assert found.turns[0].text == "<image>and<image>and <image>?"
    assert found.images[0] == "first.png"
    assert [found.image_bytes[name] for name in found.images[1:]] == [b"pixels", b"third"]


def test_videos_in_parts_and_beside_them_keep_their_order() -> None:
    parts = [
        {"type": "video"},
        {"type": "text", "text": "and"},
        {"type": "video", "video": "second.mp4", "video_start": 1, "video_end": 2.5},
        {"type": "text", "text": "and <video> or "},
        {"type": "image", "image": "a.png"},
    ]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "so"}]
    found = read_row({"messages": messages, "videos": ["first.mp4", "third.mp4"]})
    assert found.turns[0].text == "<video>and<video>and <video> or <image>"
    assert [clip.path for clip in found.clips] == ["first.mp4", "second.mp4", "third.mp4"]
    assert (found.clips[1].start_seconds, found.clips[1].end_seconds) == (1.0, 2.5)
    assert (found.video, found.images) == (None, ("a.png",))
    placed = as_conversation(found.id, found.images, turns_of(found), found.clips)
    assert (len(placed.videos), placed.turns[0].text) == (3, found.turns[0].text)


def test_a_caption_may_be_a_video_s() -> None:
    assert talk({"video": "a.mp4", "caption": "A cat."}).turns == (
        Turn("user", "<video>\n"),
        Turn("assistant", "A cat."),
    )


def test_tables_fill_parts_with_null() -> None:
    """One column of structs: a part has every field, null where it is another part's."""
    parts = [{"type": "image", "text": None, "image": "a.png"}, {"type": "text", "text": "q", "image": None}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}], "images": None}
    assert talk(row).turns[0].text == "<image>\nq"
    record = {"id": "a", "images": None, "question": "q", "answers": [{"text": "x", "weight": None}], "video": None}
    assert talk(record).turns == (Turn("user", "q"), Turn("assistant", "x"))


def test_prompt_and_completion_may_be_messages() -> None:
    row = {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "image"}, "q"]}],
        "completion": [{"role": "assistant", "content": "a"}],
        "images": ["a.png"],
    }
    assert talk(row).turns == (Turn("system", "s"), Turn("user", "<image>\nq"), Turn("assistant", "a"))


def test_the_most_frequent_answer_counts_and_numbers_are_text() -> None:
    assert talk({"question": "q", "answers": ["b", "a", {"answer": "a"}, ""]}).turns[1].text == "a"
    assert talk({"question": 3, "label": 4.5}).turns == (Turn("user", "3"), Turn("assistant", "4.5"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "its keys [] fit no format"),
        ({"question": "q"}, "its keys ['question'] fit no format"),
        ({"messages": "q"}, "must be a list of turns, got 'q'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn 1 has the role 'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "the content of turn 1 is neither text nor parts"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "no text, picture or video"),
        ({"prompt": 3, "completion": "x"}, "must be a list of turns, got 3"),
        ({"texts": [{"user": "q"}]}, "entry 1 of 'texts' must hold user and assistant"),
        ({"instruction": "q", "output": ["x"]}, "'output' must hold text"),
        ({"instruction": "q", "output": "x", "history": [["a", "b"]]}, "it has a 'history'"),
        ({"question": True, "answer": "x"}, "'question' must hold text"),
        ({"question": "q", "answer": " "}, "answer 1 of 1 is empty"),
        ({"question": "q", "answer": "a", "image": "https://a.b/c.png"}, "is on the web"),
        ({"question": "q", "answer": "a", "image": "data:image/png,x"}, "cannot be read: it is not base64"),
        ({"question": "q", "answer": "a", "image": "data:;base64,?"}, "cannot be read: "),
        ({"question": "q", "answer": "a", "image": {"bytes": None, "path": None}}, "must be a path or a list of paths"),
        ({"question": "q", "answer": "a", "videos": ["a.mp4", 7]}, "'videos' must be a path or a list of paths, got 7"),
        ({"id": "r", "question": "q", "answers": [{"text": "a"}], "choices": ["a", "b"]}, "it has choices"),
    ],
)
def test_what_is_wrong_is_named(row: dict[str, object], reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        talk(row)
    assert reason in caught.value.reason


def test_an_example_with_bytes_is_no_record() -> None:
    with pytest.raises(UserError, match="holds its pictures as bytes"):
        to_record(Example(id="a", images=("bytes:1",), image_bytes={"bytes:1": b"x"}))


KEYS = [
    *("id", "messages", "conversations", "texts", "prompt", "completion", "instruction", "output", "question"),
    *("answer", "answers", "image", "images", "caption", "video", "system", "turns", "role", "content", "type"),
    *("text", "from", "value", "user", "assistant", "bytes", "path", "url", "image_url", "weight", "extra", "choices"),
]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.sampled_from(["user", "assistant", "human", "gpt", "text", "image", "<image>", "data:;base64,aGk=", "a.png"])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)
FORMED = st.sampled_from([json.loads(line) for line in documented_rows()])


@settings(max_examples=600)
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), VALUES, max_size=6), FORMED)
def test_any_row_is_a_sample_or_a_bad_one(values: dict[str, object], formed: dict[str, object]) -> None:
    longest = 0
    for row in (values, {**formed, **values}, {**values, **formed}):
        try:
            found = talk(row)
        except BadSample as error:
            longest = len(str(error))
            continue
        assert found.turns[-1].text.strip()
        assert sum(turn.text.count("<image>") for turn in found.turns) == len(found.images)
    assert longest < 500


@pytest.mark.parametrize("line", documented_rows())
def test_numbers_of_thousands_of_digits_are_bad_samples(line: str) -> None:
    for name in json.loads(line):
        for huge in (10**5000, [10**5000], {"text": 10**5000}):
            try:
                found = talk({**json.loads(line), name: huge})
            except BadSample:
                continue
            assert name in ("id", "system", "caption"), found
