"""Each format by its own keys, all to the same turns; whatever else a row holds is a bad sample."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_vl.data.columns import FORMATS, USUAL, ColumnsError
from dora_vl.data.example import Example
from dora_vl.data.readers import RowReader, read_row
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.questions import read_questions

ROOT = Path(__file__).parents[3]
ASKED = Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A cat.")


def conversation(row: Mapping[str, object]) -> Example:
    return read_row(row)


def documented_rows(kind: str = "rows") -> list[str]:
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    return text.partition(f"<!-- {kind} -->\n```json\n")[2].partition("```")[0].splitlines()


@pytest.mark.parametrize("line", [*documented_rows(), *documented_rows("video rows")])
def test_each_row_of_the_documentation_is_the_same_sample(line: str) -> None:
    sample, videos = conversation(json.loads(line)), line in documented_rows("video rows")
    *system, question, answer = sample.turns
    assert system == ([Turn("system", "Be brief.")] if "system" in line else [])
    assert answer == ASKED[1]
    words = "" if '"caption"' in line else "What is it?"
    assert question.text.replace("\n", "") == ("<video>" if videos else "<image>") + words
    if videos:
        assert [clip.path for clip in sample.videos] == ["cat.mp4"]
        assert read_row(json.loads(line)).video is not None  # what a test about one video reads
    else:
        assert sample.images == ("cat.jpg",)
        assert not words or question == ASKED[0]


def test_the_documentation_has_a_row_of_every_format() -> None:
    formats = [USUAL.resolve(json.loads(line)).format for line in documented_rows()]
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
    sample = read_row({"messages": messages, "images": ["first.png", {"bytes": b"third", "path": None}]})
    assert sample.turns[0].text == "<image>and<image>and <image>?"
    assert sample.images[0] == "first.png"
    assert [sample.image_bytes[name] for name in sample.images[1:]] == [b"pixels", b"third"]


SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
LLAVA = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


ASKING = {"question": "Which is red?", "answer": "two"}


def test_an_instruction_keeps_its_input_and_the_answer_that_is_scored(tmp_path: Path) -> None:
    scored = {"instruction": "Is it so?", "input": "", "output": "the correct answer is true", "answer": "true"}
    unscored = {"instruction": "Say it.", "input": " it\n\u00e9 ", "output": "it"}
    first, second = conversation(scored).turns[0], conversation(unscored).turns[0]
    assert (first.text, first.input) == ("Is it so?", "")
    assert (second.instruction, second.input) == ("Say it.", " it\n\u00e9 ")
    assert second.text == "Say it.\n it\n\u00e9 "  # what every other prompt takes
    (tmp_path / "a.json").write_text(json.dumps([scored, {**unscored, "id": "b"}, {"instruction": "q", "output": ""}]))
    questions, skipped = read_questions(tmp_path / "a.json")
    assert [(question.id, question.extra.get("answer", ""), question.answers[0].text) for question in questions] == [
        ("row 1", "true", "the correct answer is true"),
        ("b", "", "it"),
    ]
    assert [*skipped] == ["row 3"]
    assert [question.id for question in read_questions(tmp_path / "a.json", limit=1)[0]] == ["row 1"]
    (tmp_path / "twice.json").write_text(json.dumps([{**scored, "id": "a"}] * 2))
    with pytest.raises(UserError):
        read_questions(tmp_path / "twice.json")


def test_pictures_in_base64_and_paths_of_windows() -> None:
    png = b"\x89PNG\r\n\x1a\n and more"
    sample = read_row({**ASKING, "images": [base64.b64encode(png).decode(), "a\\b.png", "/9j/a.png"]})
    assert (sample.image_bytes[sample.images[0]], sample.images[1:]) == (png, ("a/b.png", "/9j/a.png"))


@pytest.mark.parametrize(
    "value",
    [b"x", {"bytes": b"x", "path": None}, {"bytes": None, "path": "a"}, [None, b"x"], [{"bytes": b"x"}], "a.PNG"],
)
@pytest.mark.parametrize("row", [ASKING, {"messages": SAID}, {"conversations": LLAVA}, {"image": "a", "caption": "c"}])
def test_bytes_in_a_column_that_nothing_reads_are_named(row: dict[str, object], value: object) -> None:
    with pytest.raises(UserError):
        RowReader("a").read({**row, "thumb": value}, 0)
    for nothing in (None, b"", [], {"bytes": None, "path": None}, [None, {}]):
        assert read_row({**row, "thumb": nothing, "id": b"1"}).turns == read_row(row).turns


KEYS = [
    *("id", "messages", "conversations", "texts", "prompt", "completion", "instruction", "output", "question"),
    *("answer", "answers", "image", "images", "caption", "video", "system", "turns", "role", "content", "type"),
    *("text", "from", "value", "user", "assistant", "bytes", "path", "url", "image_url", "weight", "extra", "choices"),
    *("context", "history", "image_1", "gif", "loss", "system_prompt"),
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


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), VALUES, max_size=6), FORMED)
def test_any_row_is_a_sample_or_a_bad_one(values: dict[str, object], formed: dict[str, object]) -> None:
    longest = 0
    for row in (values, {**formed, **values}, {**values, **formed}):
        try:
            sample = conversation(row)
        except (BadSample, ColumnsError) as error:
            longest = len(str(error))
            continue
        assert sample.turns[-1].text.strip()
        assert sum(turn.text.count("<image>") for turn in sample.turns) == len(sample.images)
    assert longest < 500


FREE_TEXT = st.text().filter(lambda text: "<image" not in text)
ANSWER = FREE_TEXT.filter(lambda text: text.strip() != "")


def texts_of(*texts: str, **more: object) -> list[str]:
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return [turn.text for turn in conversation({"conversations": turns, **more}).turns]


def published_normalisation(value: str) -> str:
    """`preprocess_multimodal` of LLaVA c121f04, written out for one turn."""
    if "<image>" in value:
        value = value.replace("<image>", "").strip()
        value = "<image>\n" + value
        value = value.strip()
    return value


@given(st.lists(st.tuples(FREE_TEXT, ANSWER), min_size=1, max_size=4), FREE_TEXT, st.data())
def test_one_picture_is_normalised_as_published(rounds: list[tuple[str, str]], tail: str, data: st.DataObject) -> None:
    texts = [text for pair in rounds for text in pair]
    assert texts_of(*texts) == texts  # free text is kept to the letter
    at = data.draw(st.integers(0, len(texts) - 1))
    texts[at] = f"{texts[at]}<image>{tail}"
    assert texts_of(*texts, image="a.png") == [published_normalisation(text) for text in texts]
