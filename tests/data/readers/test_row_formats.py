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
from dora_vl.errors import EMPTY_ANSWER, NO_SAMPLE, ON_THE_WEB, BadSample, UserError
from dora_vl.evaluation.questions import read_questions

ROOT = Path(__file__).parents[3]
ASKED = Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A cat.")


def talk(row: Mapping[str, object]) -> Example:
    return read_row(row)


def documented_rows(kind: str = "rows") -> list[str]:
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    return text.partition(f"<!-- {kind} -->\n```json\n")[2].partition("```")[0].splitlines()


@pytest.mark.parametrize("line", [*documented_rows(), *documented_rows("video rows")])
def test_each_row_of_the_documentation_is_the_same_sample(line: str) -> None:
    found, videos = talk(json.loads(line)), line in documented_rows("video rows")
    *system, asked, answer = found.turns
    assert system == ([Turn("system", "Be brief.")] if "system" in line else [])
    assert answer == ASKED[1]
    words = "" if '"caption"' in line else "What is it?"
    assert asked.text.replace("\n", "") == ("<video>" if videos else "<image>") + words
    if videos:
        assert [clip.path for clip in found.videos] == ["cat.mp4"]
        assert read_row(json.loads(line)).video is not None  # what a test about one video reads
    else:
        assert found.images == ("cat.jpg",)
        assert not words or asked == ASKED[0]


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
    assert [clip.path for clip in found.videos] == ["first.mp4", "second.mp4", "third.mp4"]
    assert (found.videos[1].start_seconds, found.videos[1].end_seconds) == (1.0, 2.5)
    assert (found.video, found.images) == (None, ("a.png",))


def test_tables_fill_parts_with_null() -> None:
    """One column of structs: a part has every field, null where it is another part's."""
    parts = [{"type": "image", "text": None, "image": "a.png"}, {"type": "text", "text": "q", "image": None}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}], "images": None}
    assert talk(row).turns[0].text == "<image>\nq"
    record = {"id": "a", "images": None, "question": "q", "answers": [{"text": "x", "weight": None}], "video": None}
    assert talk(record).turns == (Turn("user", "q"), Turn("assistant", "x"))


def test_the_most_frequent_answer_counts_and_numbers_are_text() -> None:
    assert talk({"question": "q", "answers": ["b", "a", {"answer": "a"}, ""]}).turns[1].text == "a"
    assert talk({"question": 3, "label": 4.5}).turns == (Turn("user", "3"), Turn("assistant", "4.5"))


SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
LLAVA = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": SAID},
        {"conversations": SAID},
        {"conversations": LLAVA},
        {"prompt": "q", "completion": "a"},
        {"prompt": SAID[:1], "completion": SAID[1:]},
        {"texts": [{"user": "q", "assistant": "a"}]},
        {"instruction": "q", "output": "a"},
        {"query": "q", "response": "a"},
        {"image": "a.png", "caption": "a"},
    ],
)
def test_the_system_s_words_beside_any_format_are_its_first_turn(row: dict[str, object]) -> None:
    plain = talk(row).turns
    assert plain[-1] == Turn("assistant", "a")
    for name in ("system", "system_prompt"):
        assert talk({**row, name: "Be brief."}).turns == (Turn("system", "Be brief."), *plain)
        for nothing in (None, "", " ", [], float("nan")):
            assert talk({**row, name: nothing}).turns == plain


def test_a_system_turn_and_a_system_column_must_agree() -> None:
    own = [{"role": "system", "content": "Be brief."}, *SAID]
    assert talk({"messages": own, "system": "Be brief.\n"}).turns == talk({"messages": own}).turns
    with pytest.raises(BadSample):
        talk({"messages": own, "system": "Be long."})


@pytest.mark.parametrize("row", [{"query": "q", "response": "a"}, {"prompt": "q", "completion": "a"}])
def test_earlier_rounds_come_before_the_question(row: dict[str, object]) -> None:
    found = talk({**row, "history": [["one", "1"], ["two", "2"]], "system": "s", "images": ["a.png"]})
    said = [Turn("user", "<image>\none"), Turn("assistant", "1"), Turn("user", "two"), Turn("assistant", "2")]
    assert found.turns == (Turn("system", "s"), *said, Turn("user", "q"), Turn("assistant", "a"))
    assert talk({**row, "history": []}).turns == talk({**row, "history": None}).turns == talk(row).turns
    for wrong in ("[]", [["one"]], [["one", 1]], ["ab"], [{"user": "one"}]):
        with pytest.raises(BadSample):
            talk({**row, "history": wrong})


def test_pictures_of_earlier_rounds_come_before_those_of_the_prompt() -> None:
    parts = [{"type": "image", "image": "b.png"}, {"type": "text", "text": "q"}]
    row = {"prompt": [{"role": "user", "content": parts}], "completion": "a", "history": [["<image>one", "1"]]}
    assert talk({**row, "images": ["a.png"]}).images == ("a.png", "b.png")


ASKING = {"question": "Which is red?", "answer": "two"}
LETTERED = (
    "Which is red?\nA. one\nB. two\nAnswer with the option's letter from the given choices directly.",
    "B",
)


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"choices": ["one", "two"]}, LETTERED),
        ({"options": "['one', 'two']", "answer": "B"}, LETTERED),
        ({"choices": {"text": ["one", "two"], "label": ["1", "2"]}, "answer": "2"}, LETTERED),
        ({"options": {"A": "one", "B": "two", "C": None}, "answer": "(b)"}, LETTERED),
        ({"option 1": "one", "option 2": "two", "answer": "2"}, LETTERED),
        ({"A": "one", "B": None, "C": "two", "answer": "C"}, LETTERED),
        ({"context": "One is blue."}, ("One is blue.\nWhich is red?", "two")),
        ({"question": "Which is red? It is one.", "input": "It is one."}, ("Which is red? It is one.", "two")),
        (
            {"question": "Which?\nA. one\nB. two", "answer": "A", "options": ["one", "two"]},
            ("Which?\nA. one\nB. two", "A"),
        ),
        ({"question": "Is one or two red?", "options": ["one", "two"]}, ("Is one or two red?", "two")),
        (
            {"question": "Is one or two?", "options": ["one", "two"], "answer": "B"},
            (f"Is one or two?{LETTERED[0][13:]}", "B"),
        ),
        ({"answer": {"text": ["two"], "start": [3]}}, ("Which is red?", "two")),
    ],
)
def test_what_belongs_to_a_question_is_asked_with_it(beside: dict[str, object], expected: tuple[str, str]) -> None:
    found = talk({**ASKING, **beside})
    assert tuple(turn.text for turn in found.turns) == expected
    record = {"id": "r", "question": ASKING["question"], "choices": ["one", "two"], "extra": {"correct": 1}}
    assert tuple(turn.text for turn in talk({**record, "answers": [{"text": "two"}]}).turns) == LETTERED
    notes = {"source": "a set", "split": "train", "category": 3, "answer_type": 7}
    for nothing in (None, "", [], [None], {}, float("nan")):
        assert talk({**ASKING, **notes, "choices": nothing}).turns == talk(ASKING).turns


def test_an_instruction_keeps_its_input_and_the_answer_that_is_scored(tmp_path: Path) -> None:
    scored = {"instruction": "Is it so?", "input": "", "output": "the correct answer is true", "answer": "true"}
    asked = {"instruction": "Say it.", "input": " it\n\u00e9 ", "output": "it"}
    first, second = talk(scored).turns[0], talk(asked).turns[0]
    assert (first.text, first.input) == ("Is it so?", "")
    assert (second.instruction, second.input) == ("Say it.", " it\n\u00e9 ")
    assert second.text == "Say it.\n it\n\u00e9 "  # what every other prompt takes
    (tmp_path / "a.json").write_text(json.dumps([scored, {**asked, "id": "b"}, {"instruction": "q", "output": ""}]))
    questions, skipped = read_questions(tmp_path / "a.json")
    assert [(one.id, one.answer, one.truth) for one in questions] == [
        ("record 0", "true", "the correct answer is true"),
        ("b", "", "it"),
    ]
    assert [*skipped] == ["record 2"]
    assert [one.id for one in read_questions(tmp_path / "a.json", limit=1)[0]] == ["record 0"]
    (tmp_path / "twice.json").write_text(json.dumps([{**scored, "id": "a"}] * 2))
    with pytest.raises(UserError):
        read_questions(tmp_path / "twice.json")


@pytest.mark.parametrize("place", ["<image{}>", "<image {}>", "<image_{}>", "<|image_{}|>"])
def test_numbered_places_keep_the_order_of_their_pictures(place: str) -> None:
    first, second = place.format(1), place.format(2)
    row = {"question": f"Is {second} or {first}?", "answer": "a", "images": ["a.png", "b.png"]}
    found = talk(row)
    assert (found.images, found.turns[0].text) == (("b.png", "a.png"), "Is <image> or <image>?")
    assert talk({**row, "question": f"{first} {second} {first}"}).images == ("a.png", "b.png", "a.png")
    lettered = talk({**row, "question": "Which?", "options": [first, second], "answer": "B"}).turns
    assert lettered[0].text.startswith("Which?\nA. <image>\nB. <image>\n")
    for wrong in (first, f"{first} {second} <image>", place.format(3)):
        with pytest.raises(BadSample):
            talk({**row, "question": wrong})


def test_pictures_in_tags_and_by_index() -> None:
    llava = [LLAVA[0] | {"value": "<img>a.png</img>\nor <img> b.png</img>"}, LLAVA[1]]
    tagged = talk({"conversations": llava})
    assert (tagged.images, tagged.turns[0]) == (("a.png", "b.png"), Turn("user", "<image>\nor <image>"))
    with pytest.raises(BadSample):
        talk({"conversations": llava, "image": "c.png"})
    parts = [{"type": "image", "index": 1}, {"type": "text", "text": "or"}, {"type": "image", "index": 0}]
    messages = [{"role": "user", "content": parts}, SAID[1]]
    assert talk({"messages": messages, "images": ["a.png", "b.png"]}).images == ("b.png", "a.png")
    with pytest.raises(BadSample):
        talk({"messages": messages, "images": ["a.png"]})


def test_pictures_in_base64_and_paths_of_windows() -> None:
    png = b"\x89PNG\r\n\x1a\n and more"
    found = read_row({**ASKING, "images": [base64.b64encode(png).decode(), "a\\b.png", "/9j/a.png"]})
    assert (found.image_bytes[found.images[0]], found.images[1:]) == (png, ("a/b.png", "/9j/a.png"))


@pytest.mark.parametrize("mark", [{"loss": False}, {"weight": 0}, {"weight": 0.0}, {"weight": 0.5}, {"loss": 0}])
def test_an_answer_marked_as_not_to_be_trained_is_refused(mark: dict[str, object]) -> None:
    spared, asked = {"loss": None, "weight": None}, {"loss": False, "weight": 0}
    for question, answer, keys in ((SAID[0], SAID[1], ("messages", "conversations")), (*LLAVA, ("conversations",))):
        for key in keys:
            row = {key: [question | asked, answer | spared, question, answer | {"weight": 1.0, "loss": True}]}
            assert len(talk(row).turns) == 4
            row[key][1] = answer | mark
            with pytest.raises(BadSample):
                talk(row)
    with pytest.raises(BadSample):
        talk({"prompt": "q", "completion": [SAID[1] | mark]})


@pytest.mark.parametrize(
    "held",
    [b"x", {"bytes": b"x", "path": None}, {"bytes": None, "path": "a"}, [None, b"x"], [{"bytes": b"x"}], "a.PNG"],
)
@pytest.mark.parametrize("row", [ASKING, {"messages": SAID}, {"conversations": LLAVA}, {"image": "a", "caption": "c"}])
def test_bytes_in_a_column_that_nothing_reads_are_named(row: dict[str, object], held: object) -> None:
    with pytest.raises(UserError):
        RowReader("a").read({**row, "thumb": held}, 0)
    for nothing in (None, b"", [], {"bytes": None, "path": None}, {"path": "a.png"}, "a.", [1.5]):
        assert read_row({**row, "thumb": nothing, "id": b"1"}).turns == read_row(row).turns


NO_SAMPLES: list[dict[str, object]] = [
    {},
    {"question": "q"},
    {"messages": "q"},
    {"messages": [{"role": "tool", "content": "x"}]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
    {"prompt": 3, "completion": "x"},
    {"texts": [{"user": "q"}]},
    {"instruction": "q", "output": ["x"]},
    {"instruction": "q", "output": "x", "history": [["a", "b"]]},
    {"instruction": ["x"], "output": "a"},
    {"instruction": "half \ud83d", "output": "a"},
    {"instruction": "q", "input": "half \ud83d", "output": "a"},
    {"messages": SAID, "system": {"a": 1}},
    {"question": True, "answer": "x"},
    {"question": "q", "answer": float("nan")},
    {"question": "q", "answer": {"value": "x"}},
    {"question": "q", "answer": "c", "choices": ["a", "b"]},
    {"question": "q", "answer": "B", "A": "a", "B": None, "C": "c"},
    {"question": "is <bbox> red?", "answer": "a"},
    {"messages": [SAID[0], SAID[1] | {"tool_calls": [{}, "f"]}]},
    {"messages": [SAID[0], SAID[1] | {"reasoning_content": "so"}]},
    {"question": "q", "answer": "a", "image": "data:image/png,x"},
    {"question": "q", "answer": "a", "image": "data:;base64,?"},
    {"question": "q", "answer": "a", "image": {"bytes": None, "path": None}},
    {"question": "q", "answer": "a", "videos": ["a.mp4", 7]},
]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"question": "q", "answer": " "}, EMPTY_ANSWER),
        ({"instruction": "q", "output": None}, EMPTY_ANSWER),
        ({"instruction": "q", "output": "\n "}, EMPTY_ANSWER),
        ({"question": "q", "answer": "a", "image": "https://a.b/c.png"}, ON_THE_WEB),
        ({"question": "see <image 2>", "answer": "a", "image_1": "a.png"}, "placeholders differ from pictures"),
        *((row, NO_SAMPLE) for row in NO_SAMPLES),
    ],
)
def test_what_is_wrong_is_a_bad_sample(row: dict[str, object], kind: str) -> None:
    with pytest.raises(BadSample) as bad:
        talk(row)
    assert (bad.value.sample_id, bad.value.kind) == ("record 0", kind)


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
            found = talk(row)
        except (BadSample, ColumnsError) as error:
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
            except (BadSample, ColumnsError):
                continue
            assert name in ("id", "system", "caption"), found
