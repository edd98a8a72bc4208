"""Rows, shapes and files of rows as people write them, each beside what it is.

A row of `rows.jsonl` is what is written there for all readers alike: pictures, videos and turns, or refused, with the
kind of its `BadSample`, or "columns" where one would be left out that means something.

A shape of `shapes.jsonl` is read right, or stops with its `remedy`, the settings that the error names, and is what is
written with them; `bad` is the kind of its `BadSample`. A preference has its `rejected` answers or whether its answer
`is_good`, and `alone`, settings that leave these out. `of` says where it is from: LLaMA-Factory (data/README.md and its
demos), ms-swift (Custom-dataset.md), TRL (dataset_formats.md); published sets have their columns.

Each file of `files.jsonl`, written without looking at the reader, opens, stops, or has a bad first row, and says why.
"""

import base64
import contextlib
import csv
import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dora_vl.data.check import DOUBTS, GREETING, FileCheck
from dora_vl.data.columns import USUAL, Columns, ColumnsError, TrainFile
from dora_vl.data.containers import hub_rows
from dora_vl.data.data_files import find_files
from dora_vl.data.example import Example
from dora_vl.data.formats.choices import CountedFromOne
from dora_vl.data.formats.grounded import GROUNDED
from dora_vl.data.formats.table import FORMATS
from dora_vl.data.readers import RowReader, read_row
from dora_vl.data.stream import StreamSource
from dora_vl.data.table import VALIDATED, described, doubtful_samples, load_rows
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError, log_once
from dora_vl.evaluation.questions import read_questions

ROWS, SHAPES, FILES = (
    [json.loads(line) for line in Path(__file__).with_name(f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in ("rows", "shapes", "files")
)
ASKED = {"question": "Which?", "answer": "two"}
SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
LLAVA = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def as_csv(path: Path, rows: list[Mapping[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*dict.fromkeys(name for row in rows for name in row)])
        table.writeheader()
        for row in rows:
            table.writerow({name: json.dumps(v) if isinstance(v, list | dict) else v for name, v in row.items()})


OF_TABLES = (" image ", "image1, image2", "VSR", "A, B", "MATH-V", "header")
"""Cases that a table's cells or types could change."""
WRITERS: Mapping[str, Callable[[Path, list[Mapping[str, object]]], object]] = {
    "csv": as_csv,
    "json": lambda path, rows: path.write_text(json.dumps(rows), encoding="utf-8"),
    "jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"),
    "parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path),
}


def turn_parts(turn: Turn) -> list[Any]:
    """A turn as `rows.jsonl` has it: role, text, what else it holds, and false where it is not trained."""
    return [turn.role, turn.text, *([turn.fields] if turn.more else []), *([] if turn.is_trained else [False])]


def parts(example: object) -> dict[str, Any]:
    assert isinstance(example, Example)
    videos = [[clip.path, clip.start_seconds, clip.end_seconds] for clip in example.videos]
    turns = [turn_parts(turn) for turn in example.turns]
    return {"images": list(example.images), **({"videos": videos} if videos else {}), "turns": turns}


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case["name"])
def test_a_row_is_what_is_written_for_every_reader(tmp_path: Path, case: dict[str, Any]) -> None:
    columns = Columns(case.get("columns", {}), tuple(case.get("ignored", ())), case.get("ask", ""))
    refused = case.get("refused")
    expected = {name: case[name] for name in ("images", "videos", "turns") if name in case}
    if refused is None:
        assert parts(read_row(case["row"], columns=columns)) == expected
    else:
        with pytest.raises(ColumnsError if refused == "columns" else BadSample) as caught:
            read_row(case["row"], columns=columns)
        if isinstance(caught.value, BadSample):
            assert caught.value.kind == refused
            assert isinstance(FileCheck(tmp_path).read(case["row"]), BadSample)
            return
    for kind in WRITERS if case["name"] in OF_TABLES else ("jsonl",):
        path = tmp_path / f"rows.{kind}"
        WRITERS[kind](path, [case["row"]])
        check = FileCheck(path, columns=columns).run()
        assert bool(check.findings.keys() - {*DOUBTS}) == (refused is not None), check.findings
        stream = StreamSource(TrainFile(path=str(path)), limit=None, seed=0, columns=columns)
        if refused is None:
            table = load_rows(str(path), columns=columns)
            (question,), _ = read_questions(path, columns=columns)
            assert parts(table[0]) == parts(stream.first_rows[0]) == expected
            *turns, answer = expected["turns"]
            assert ([turn_parts(turn) for turn in question.turns], question.answers[0].text) == (turns, answer[1])
            continue
        with pytest.raises(UserError):
            load_rows(str(path), columns=columns)
        with pytest.raises(UserError):
            _ = stream.first_rows


def test_the_columns_are_told_before_the_first_step(tmp_path: Path) -> None:
    rows = [{"photo": "a.png", **ASKED, "source": "web"}, {"photo": None, **ASKED, "source": "web"}]
    rows.append({"image_1": "a.png", "image_2": "b.png", **ASKED, "source": "web"})
    path = tmp_path / "rows.jsonl"
    WRITERS["jsonl"](path, [*rows])
    lines = ["  photo: used as images", "  question: used as question", "  answer: used as answer"]
    lines += ["  source: left out", "  image_1: used as images", "  image_2: used as images"]
    summary = described(TrainFile(path=str(path)), load_rows(str(path)).rows)
    assert summary[1:-1] == lines
    assert [*map(int, re.findall(r"\d+", summary[-1]))] == [1, 1, 1, 2, 1]  # none in one, one in one, two in one
    assert StreamSource(TrainFile(path=str(path)), limit=None, seed=0).described()[1:] == lines
    plain = {"id": "a", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    WRITERS["jsonl"](path, [plain, {**plain, "label": False}])
    with pytest.raises(UserError):
        load_rows(str(path))


KINDS = datasets.ClassLabel(names=["cat", "dog"])


@pytest.mark.parametrize(
    ("feature", "values", "expected"),
    [
        (KINDS, [1, 0, -1], ["dog", "cat", None]),
        (datasets.List(KINDS), [[1], [0, 1]], [["dog"], ["cat", "dog"]]),
        (datasets.List({"a": KINDS}), [[{"a": 1}], [{"a": 0}]], [[{"a": "dog"}], [{"a": "cat"}]]),
        ({"a": {"b": KINDS, "c": datasets.Value("int64")}}, [{"a": {"b": 1, "c": 1}}], [{"a": {"b": "dog", "c": 1}}]),
    ],
    ids=["number", "list", "list of objects", "object"],
)
def test_numbers_of_a_class_are_its_names(tmp_path: Path, feature: Any, values: list[Any], expected: list[Any]) -> None:
    features = datasets.Features({"question": datasets.Value("string"), "label": feature})
    columns = {"question": ["q"] * len(values), "label": values}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(str(tmp_path / "saved"))
    of_files = [find_files(tmp_path / name).rows() for name in ("a.parquet", "saved")]
    for rows in (*of_files, hub_rows("a", dataset.to_iterable_dataset())):
        assert [row["label"] for row in rows] == expected
    if feature is KINDS:
        turns = load_rows(str(tmp_path / "a.parquet")).rows["turns"]
        assert [conversation[-1]["text"] for conversation in turns[:2]] == ["dog", "cat"]


def test_a_role_that_there_is_not_is_named() -> None:
    with pytest.raises(UserError):
        Columns({"a": "pictur"})


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.json"])
def test_a_folder_of_pictures_with_their_captions(tmp_path: Path, name: str) -> None:
    """As `datasets`' imagefolder has it: one file of JSON in a folder, which two could be but one could not."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(b"")
    WRITERS["csv" if name.endswith("csv") else "jsonl"](
        tmp_path / "set" / name, [{"file_name": "a.png", "text": "cat"}]
    )
    rows = load_rows(str(tmp_path / "set")).rows
    assert (rows["images"][:], rows["format"][:]) == ([["a.png"]], ["captions"])
    assert read_questions(tmp_path / "set")[0][0].answers[0].text == "cat"


def test_a_value_nested_too_deeply_is_a_bad_sample(tmp_path: Path) -> None:
    choices = "[" * 4_000 + "]" * 4_000
    (tmp_path / "a.json").write_text(f'[{{"question": "q", "choices": {choices}, "answers": [{{"text": "a"}}]}}]')
    (row,) = find_files(tmp_path / "a.json").rows()
    with pytest.raises(BadSample):
        read_row(row)
    assert isinstance(FileCheck(tmp_path / "a.json").read(row), BadSample)


def outcome(row: dict[str, Any], columns: Columns = USUAL) -> dict[str, Any]:
    try:
        example = read_row(row, columns=columns)
    except ColumnsError:
        return {"bad": "columns"}
    except BadSample as error:
        return {"bad": error.kind}
    parts = [
        [*vars(clip).values()] if {clip.start_seconds, clip.end_seconds} != {None} else clip.path
        for clip in example.videos
    ]
    videos = {"videos": parts} if parts else {}
    about = {name: [*vars(example)[name]] for name in ("rejected", "rejected_images")}
    rejected = {name: values for name, values in about.items() if values}
    judged = {} if example.is_good is None else {"is_good": example.is_good}
    turns = [turn_parts(turn) for turn in example.turns]
    return {"images": [*example.images], **videos, "turns": turns, **rejected, **judged}


def settings_of(remedy: Columns) -> dict[str, Any]:
    values = {"columns": dict(remedy.roles), "ignore": [*remedy.ignored], "ask": remedy.ask}
    return {name: value for name, value in values.items() if value}


@pytest.mark.parametrize("of", dict.fromkeys(shape["of"] for shape in SHAPES))
def test_a_shape_is_read_or_stops_with_what_settles_it(of: str) -> None:
    for shape in SHAPES:
        if shape["of"] != of:
            continue
        names = ("images", "videos", "turns", "bad", "rejected", "rejected_images", "is_good")
        expected = {name: shape[name] for name in names if name in shape}
        if "remedy" not in shape:
            assert outcome(shape["row"]) == expected, shape["row"]
            if alone := shape.get("alone"):
                settled = Columns(alone.get("columns", {}), tuple(alone.get("ignore", ())))
                plain = {name: expected[name] for name in ("images", "turns")}
                assert outcome(shape["row"], settled) == plain, shape["row"]
            continue
        with pytest.raises(ColumnsError) as caught:
            read_row(shape["row"])
        assert settings_of(caught.value.remedy) == shape["remedy"], shape["row"]
        assert caught.value.remedy.as_settings() in str(caught.value), shape["row"]
        assert outcome(shape["row"], caught.value.remedy) == expected, shape["row"]


def test_files_written_without_looking_at_the_reader(tmp_path: Path) -> None:
    for file in FILES:
        path = tmp_path / f"{file['name']}.{file['suffix']}"
        WRITERS[file["suffix"]](path, file["rows"])
        reader, found = RowReader(path.name), {"is": "stop"}
        with contextlib.suppress(UserError):
            first, *_ = [reader.read(row, number) for number, row in enumerate(find_files(path).rows())]
            opened = {} if isinstance(first, BadSample) else parts(first)
            found = {"is": "open", "turns": opened["turns"], "images": opened["images"]} if opened else {"is": "bad"}
        assert found == {name: file[name] for name in ("is", "turns", "images") if name in file}, file["name"]


@pytest.mark.parametrize(
    ("cells", "reply", "rejected"),
    [
        ({"question": "q", "answer": '["red", "crimson", "crimson"]'}, "crimson", ()),
        ({"image": "a.png", "caption": '["one dog", "two dogs"]'}, "one dog", ()),
        ({"question": "q", "answer": "[1, 2]"}, "[1, 2]", ()),
        ({"question": "q", "answer": '{"total": 5}'}, '{"total": 5}', ()),
        ({"question": "q", "answer": "['red', 'crimson']"}, None, ()),
        ({"prompt": "q", "chosen": "good", "rejected": '["bad", "worse"]'}, "good", ("bad", "worse")),
        ({"conversations": [LLAVA[0]], "chosen": json.dumps(LLAVA[1]), "rejected": "bad"}, "a", ("bad",)),
        ({"prompt": "q", "chosen": "[{'role': 'assistant', 'content': 'good'}]", "rejected": "bad"}, None, ()),
    ],
)
def test_a_cell_lists_replies_as_json(tmp_path, cells, reply, rejected) -> None:
    as_csv(tmp_path / "a.csv", [cells])
    (row,) = find_files(tmp_path / "a.csv").rows()
    sample = RowReader("a.csv").read(row, 0)
    assert isinstance(sample, Example) == (reply is not None)
    assert not isinstance(sample, Example) or (sample.turns[-1].text, sample.rejected) == (reply, rejected)


@pytest.mark.parametrize("choices", [{"options": ["w", "x"]}, {"A": "w", "B": "x"}])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_answers_that_count_from_one_end_the_run(tmp_path: Path, choices: dict[str, object], kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path, [{"question": "q", **choices, "answer": number} for number in (1, 2)])
    with pytest.raises(CountedFromOne) as caught:
        read_row({"question": "q", **choices, "answer": 2})
    assert caught.value.count == 2
    stream = StreamSource(TrainFile(path=str(path)), limit=None, seed=0)
    for read in (
        load_rows,
        lambda _: stream.first_rows,
        lambda _: FileCheck(path).run(),
        lambda _: read_questions(path),
    ):
        with pytest.raises(UserError) as refused:
            read(str(path))
        assert not isinstance(refused.value, BadSample)
        assert all(word in str(refused.value) for word in (str(path), "row 2"))


MESSAGES = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": 0.5}]}


QUESTIONS = {"Bilddatei": "a.png", "Frage": "which?", "Antwort": "red", "zweite": "how many?"}


def test_what_is_said_of_columns_must_fit_the_rows() -> None:
    with pytest.raises(UserError):
        Columns({"Frage": "question"}, ("Frage",))
    with pytest.raises(ColumnsError) as both:
        read_row(QUESTIONS, columns=Columns({"Frage": "question", "zweite": "question", "Antwort": "answer"}))
    assert both.value.remedy.ignored == ("zweite",)
    with pytest.raises(ColumnsError) as unnamed:
        read_row(QUESTIONS)
    remedy = {"Frage": "question", "Antwort": "answer", "Bilddatei": "image"}
    assert (unnamed.value.remedy.roles, unnamed.value.remedy.ignored) == (remedy, ("zweite",))
    assert "--columns Frage=question,Antwort=answer,Bilddatei=image --ignore zweite" in unnamed.value.options
    columns = Columns({"Bild": "image", **remedy}, ("zweite",))
    assert "'Bild'" in columns.missing_column([columns.resolve(QUESTIONS).uses])
    assert not Columns(remedy, ("zweite",)).missing_column([columns.resolve(QUESTIONS).uses])


@pytest.mark.parametrize("rest", [{"question": "which?", "answer": "red"}, {"Frage": "which?", "Antwort": "red"}])
@pytest.mark.parametrize(("name", "role"), [("a.png", "image"), ("a.MP4", "video")])
def test_a_column_of_media_is_proposed_as_what_its_files_are(rest: dict[str, str], name: str, role: str) -> None:
    with pytest.raises(ColumnsError) as caught:
        read_row({"xyz": name, **rest})
    assert caught.value.remedy.roles["xyz"] == role


def test_a_part_of_an_object_is_named_whatever_its_key_ends_in() -> None:
    row = {"image": "a.png", "receipt": {"total": "5", "paid_by": "card"}, "till": {"checked_by": "Ann"}}
    with pytest.raises(ColumnsError) as caught:
        read_row(row, columns=Columns({"receipt.total": "answer"}, ask="what is the total?"))
    assert caught.value.remedy.ignored == ("receipt.paid_by",)


def test_a_key_of_a_message_ends_the_run_by_file_row_and_setting() -> None:
    with pytest.raises(UserError) as caught:
        RowReader("conversations.jsonl").read(MESSAGES, 6)
    assert not isinstance(caught.value, BadSample)
    assert all(word in str(caught.value) for word in ("conversations.jsonl", "row 7", "data.ignore: [messages.train]"))
    columns = Columns({"conversation": "messages"})
    with pytest.raises(ColumnsError) as named:
        read_row({"conversation": MESSAGES["messages"]}, columns=columns)
    assert named.value.remedy.ignored == ("conversation.train",)  # by the file's own name
    with pytest.raises(ColumnsError) as nested:
        read_row({"prompt": "q", "completion": [MESSAGES["messages"][1]]})
    assert nested.value.remedy.ignored == ("completion.train",)


ROOT = Path(__file__).parents[3]
DOCUMENTED = Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A cat.")


def documented_rows(kind: str = "rows") -> list[str]:
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    return text.partition(f"<!-- {kind} -->\n```json\n")[2].partition("```")[0].splitlines()


@pytest.mark.parametrize("line", [*documented_rows(), *documented_rows("video rows")])
def test_each_row_of_the_documentation_is_the_same_sample(line: str) -> None:
    sample, videos = read_row(json.loads(line)), line in documented_rows("video rows")
    *system, question, answer = sample.turns
    assert system == ([Turn("system", "Be brief.")] if "system" in line else [])
    assert answer == DOCUMENTED[1]
    words = "" if '"caption"' in line else "What is it?"
    assert question.text.replace("\n", "") == ("<video>" if videos else "<image>") + words
    if videos:
        assert [clip.path for clip in sample.videos] == ["cat.mp4"]
        assert read_row(json.loads(line)).video is not None  # what a test about one video reads
    else:
        assert sample.images == ("cat.jpg",)
        assert not words or question == DOCUMENTED[0]


def test_the_documentation_has_a_row_of_every_format() -> None:
    formats = [USUAL.resolve(json.loads(line)).format for line in documented_rows()]
    assert {form.name for form in formats if form} == {form.name for form in FORMATS if form not in GROUNDED}


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


def test_an_instruction_keeps_its_input_and_the_answer_that_is_scored(tmp_path: Path) -> None:
    scored = {"instruction": "Is it so?", "input": "", "output": "the correct answer is true", "answer": "true"}
    unscored = {"instruction": "Say it.", "input": " it\n\u00e9 ", "output": "it"}
    first, second = read_row(scored).turns[0], read_row(unscored).turns[0]
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
    sample = read_row({**ASKED, "images": [base64.b64encode(png).decode(), "a\\b.png", "/9j/a.png"]})
    assert (sample.image_bytes[sample.images[0]], sample.images[1:]) == (png, ("a/b.png", "/9j/a.png"))


@pytest.mark.parametrize(
    "value",
    [b"x", {"bytes": b"x", "path": None}, {"bytes": None, "path": "a"}, [None, b"x"], [{"bytes": b"x"}], "a.PNG"],
)
@pytest.mark.parametrize("row", [ASKED, {"messages": SAID}, {"conversations": LLAVA}, {"image": "a", "caption": "c"}])
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
@example(values={"instruction": {}}, formed={"instruction": "What is it?", "output": "A cat.", "image": "a.png"})
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), VALUES, max_size=6), FORMED)
def test_any_row_is_a_sample_or_a_bad_one(values: dict[str, object], formed: dict[str, object]) -> None:
    longest = 0
    for row in (values, {**formed, **values}, {**values, **formed}):
        try:
            sample = read_row(row)
        except (BadSample, ColumnsError, CountedFromOne) as error:
            longest = len(str(error))
            continue
        assert sample.turns[-1].text.strip()
        assert sum(turn.text.count("<image>") for turn in sample.turns) == len(sample.images)
    assert longest < 500


FREE_TEXT = st.text().filter(lambda text: "<image" not in text)
ANSWER = FREE_TEXT.filter(lambda text: text.strip() != "")


def texts_of(*texts: str, **more: object) -> list[str]:
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return [turn.text for turn in read_row({"conversations": turns, **more}).turns]


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
    at = 2 * data.draw(st.integers(0, len(rounds) - 1))  # answers hold no picture
    texts[at] = f"{texts[at]}<image>{tail}"
    assert texts_of(*texts, image="a.png") == [published_normalisation(text) for text in texts]


def test_a_decimal_is_its_text_and_a_time_of_an_object_a_part_of_its_video() -> None:
    assert read_row({"question": "q", "answer": Decimal("4.50")}).turns[-1].text == "4.50"
    (clip,) = read_row({**ASKED, "video": {"path": "a.mp4", "start_time": 1.5, "end_time": 4}}).videos
    assert (clip.start_seconds, clip.end_seconds) == (1.5, 4)


def test_nulls_of_arguments_are_kept_and_those_that_fill_arrows_objects_are_not(tmp_path: Path) -> None:
    calls = [[{"function": {"name": "f", "arguments": arguments}}] for arguments in ({"a": 1, "b": None}, {"c": 2})]
    rows = [{"messages": [SAID[0], {"role": "assistant", "content": "", "tool_calls": call}]} for call in calls]
    for kind, expected in (("jsonl", [{"a": 1, "b": None}, {"c": 2}]), ("parquet", [{"a": 1}, {"c": 2}])):
        path = tmp_path / f"rows.{kind}"
        WRITERS[kind](path, [*rows])
        samples = [read_row(row) for row in find_files(path).rows()]
        assert [s.turns[-1].fields["tool_calls"][0]["function"]["arguments"] for s in samples] == expected


def test_an_opening_of_the_assistant_is_named(tmp_path: Path) -> None:
    greeted = {"messages": [{"role": "assistant", "content": "Hello!"}, *SAID]}
    WRITERS["jsonl"](tmp_path / "a.jsonl", [greeted, {"messages": SAID}])
    assert FileCheck(tmp_path / "a.jsonl").run().findings[GREETING].count == 1
    (finding,) = doubtful_samples(load_rows(str(tmp_path / "a.jsonl")).rows)
    assert (finding.problem, finding.count) == (GREETING, 1)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_of_several_splits_are_used_as_their_column_says(tmp_path: Path, caplog: Any, kind: str) -> None:
    caplog.set_level("INFO", "dora_vl")
    log_once.cache_clear()
    path = tmp_path / f"rows.{kind}"
    splits = {"e": "other", "a": "train", "b": "Val", "c": "test", "d": "train"}
    rows: list[Mapping[str, object]]
    rows = [{"id": name, "question": f"q {name}", "answer": "x", "data_split": split} for name, split in splits.items()]
    WRITERS[kind](path, [*rows])
    used = {wanted: [*load_rows(str(path), splits=wanted).ids()] for wanted in (("train",), VALIDATED, ("test",))}
    assert used == {("train",): ["e", "a", "d"], VALIDATED: ["b"], ("test",): ["c"]}
    log_once.cache_clear()
    caplog.clear()
    assert [question.id for question in read_questions(path)[0]] == ["c"]
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert all(words in line for words in (str(path), "train 2", "validation 1", "test 1", "without a word 1"))
    assert FileCheck(path).run().splits == {"train": 2, "validation": 1, "test": 1, None: 1}
    with pytest.raises(UserError):
        _ = StreamSource(TrainFile(path=str(path)), limit=None, seed=0).first_rows
    WRITERS[kind](path, rows[2:3])  # one split alone is all of it
    assert [*load_rows(str(path)).ids()] == [question.id for question in read_questions(path)[0]] == ["b"]
