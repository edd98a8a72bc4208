"""Other tools' files of predictions: which answers they hold, and which questions those belong to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_vl.data.example import Example
from dora_vl.errors import UserError
from dora_vl.evaluation.benchmarks import BENCHMARKS
from dora_vl.evaluation.predictions import ANSWERS, MODEL_ANSWERS, Predictions, read_rows
from dora_vl.evaluation.scores.benchmark import SHORT, UNANSWERABLE, join


def answers_in(path: Path, content: object) -> dict[str, str]:
    """By the rows' own ids, of a file that holds this."""
    if isinstance(content, list) and path.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return {row.id: row.prediction for row in read_rows(path)}


def joined(
    name: str, examples: Sequence[Example], content: object, tmp_path: Path, file: str = "p.jsonl"
) -> Predictions:
    path = tmp_path / file
    answers_in(path, content)
    return join(BENCHMARKS[name], examples, read_rows(path), path=path, questions=Path("records.jsonl"))


def llava(question_id: object, prompt: str, text: str) -> dict[str, object]:
    about: dict[str, object] = {"answer_id": "x", "model_id": "m", "metadata": {}}
    return {"question_id": question_id, "prompt": prompt, "text": text, **about}


def test_the_forms_of_rows_and_the_later_of_two_stands(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "answer": "one"},
        {"id": "b", "images": [], "question": "?", "truth": "2", "prediction": "two", "kind": None},
        llava(7, "?", "three"),
        {"id": "a", "answer": "four"},
    ]
    answers = {"a": "four", "b": "two", "7": "three"}
    assert answers_in(tmp_path / "p.jsonl", rows) == answers_in(tmp_path / "p.json", rows) == answers


@pytest.mark.parametrize("key", MODEL_ANSWERS)
@pytest.mark.parametrize("true", ANSWERS)
def test_what_the_model_said_goes_before_the_true_answer(tmp_path: Path, key: str, true: str) -> None:
    rows = [{"id": "a", "question": "?", true: "cat", key: "dog"}, {"id": "b", key: "owl", true: "owl"}]
    for name, content in (
        ("p.jsonl", rows),
        ("p.csv", f"id,{true},{key}\na,cat,dog\nb,owl,owl\n"),
        ("only.csv", f"id,{key}\na,dog\nb,owl\n"),
    ):
        assert answers_in(tmp_path / name, content) == {"a": "dog", "b": "owl"}


@pytest.mark.parametrize("keys", [("prediction", "response"), ("pred", "output"), ("answer", "text")])
def test_two_keys_that_may_be_the_answer(tmp_path: Path, keys: tuple[str, str]) -> None:
    one, other = keys
    with pytest.raises(UserError):
        answers_in(tmp_path / "p.jsonl", [{"id": "a", other: "dog", one: "cat"}])
    assert answers_in(tmp_path / "p.jsonl", [{"id": "a", other: "cat", one: "cat"}]) == {"a": "cat"}


@pytest.mark.parametrize(
    "line",
    [
        *('{"id": 1,, }', "[1]", '{"id": "b"}', '{"answer": "b"}', '{"id": "b", "answer": 3}', "[" * 100_000),
        *('{"id": true, "answer": "b"}', '{"id": ["b"], "answer": "b"}', '{"id": 1' + "0" * 5000 + ', "answer": "b"}'),
        '{"id": "b", "answer": "cat", "pred": null}',
    ],
)
def test_a_broken_line_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError):
        answers_in(tmp_path / "p.jsonl", f'{{"id": "a", "answer": "one"}}\n{line}\n')


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("r.csv", "dev-1-0-0\n"), ("r.tsv", 'index\tprediction\n1\t"x\n'), ("r.xlsx", "PK\x03\x04rest")),
        *(("r.json", content) for content in ('{"1": [2]}', '{"1": true}', '{"answer": "x"}', "[]", "[1, 2]")),
        *(("r.csv", "\n"), ("r.jsonl", "\n")),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, file: str, content: str) -> None:
    with pytest.raises(UserError):
        answers_in(tmp_path / file, content)
    with pytest.raises(UserError):
        read_rows(tmp_path / "gone.jsonl")


@given(answers=st.dictionaries(st.text(min_size=1), st.text(), min_size=1, max_size=5))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, answers: dict[str, str]) -> None:
    rows = [{"id": name, "answer": answer} for name, answer in answers.items()]
    assert answers_in(tmp_path_factory.getbasetemp() / "any.jsonl", rows) == answers


@pytest.mark.parametrize(
    ("name", "file", "content", "answers"),
    [
        ("vqav2", "r.json", [{"question_id": 262148000, "answer": "2"}], {"262148000": "2"}),
        ("vqav2", "r.json", {"7": 3}, {"7": "3"}),
        ("vqav2", "r.csv", 'question_id,answer\n7,"a, b"\n', {"7": "a, b"}),
        ("vqav2", "r.json", '\ufeff[{"question_id": 7, "answer": "x"}]', {"7": "x"}),
        ("gqa", "r.json", [{"questionId": "20150", "prediction": "yes"}], {"20150": "yes"}),
        ("coco_caption", "r.json", [{"image_id": 391895, "caption": "A man."}], {"391895": "A man."}),
        ("tvqa", "r.json", {"122": 3, "123": 0}, {"122": "a3", "123": "a0"}),
        ("how2qa", "r.json", {"122": 3}, {"122": "a3"}),
        ("mmvet", "r.json", {"v1_0": "It is\n7", "v1_1": "8"}, {"v1_0": "It is\n7", "v1_1": "8"}),
        ("mmvet", "r.jsonl", [llava(1, "What?", "8")], {"v1_1": "8"}),
        ("seed", "r.jsonl", [{"question_id": "v7", "prediction": "B"}], {"v7": "B"}),
        ("scienceqa", "r.jsonl", [llava("4", "Which?", "A")], {"4": "A"}),
        (
            "yc2c",
            "r.jsonl",
            [{"video_id": "x", "clip_id": 10337, "descs": [{"desc": "stir it"}]}],
            {"10337": "stir it"},
        ),
        ("nlvr2", "r.csv", "dev-1-0-0,True \ndev-1-1-0, False,0.3\n\n", {"dev-1-0-0": "True", "dev-1-1-0": " False"}),
        ("nlvr2", "r.csv", "dev-1-0-0.png,True\n", {"dev-1-0-0": "True"}),
        ("mmbench", "r.tsv", 'index\tquestion\tA\tprediction\n241\t"Which\tone?"\tx\tB\n', {"241": "B"}),
    ],
)
def test_official_formats(tmp_path: Path, name: str, file: str, content: object, answers: dict[str, str]) -> None:
    examples = [Example(id=one) for one in (*answers, "another")]
    assert joined(name, examples, content, tmp_path, file).answers == answers


def test_textvqa_by_picture_and_question(tmp_path: Path) -> None:
    examples = [
        Example(id="34602", question="What is the brand?", extra={"image_id": "003a8ae2ef43b901"}),
        Example(id="34603", question="What  year IS it?", extra={"image_id": "003a8ae2ef43b901"}),
        Example(id="34604", question="What is the brand?", extra={"image_id": "4be7ddd4b4b39dd3"}),
    ]
    rows = [
        llava("4be7ddd4b4b39dd3", f"what is the brand?\nReference OCR token: A, what?\n{SHORT}", "dakota"),
        llava("003a8ae2ef43b901", f"What year is it?\n{SHORT}", "1999"),
        llava("003a8ae2ef43b901", f"What is the brand?\nReference OCR token: \n{SHORT}", "nous"),
        llava("ffff", f"What is the brand?\n{SHORT}", "none"),
    ]
    found = joined("textvqa", examples, rows, tmp_path)
    assert found.answers == {"ffff": "none", "34604": "dakota", "34603": "1999", "34602": "nous"}
    assert (found.joined_by, found.strangers) == ("picture and question", ("ffff",))
    asked = [{"id": "003a8ae2ef43b901#2", "question": f"What year is it?\n{SHORT}", "prediction": "2000"}]
    assert joined("textvqa", examples, asked, tmp_path).answers == {"34603": "2000"}  # of `questions`


def test_equal_keys_are_told_apart_by_their_order_if_all_are_there(tmp_path: Path) -> None:
    examples = [Example(id=name, question="What?", extra={"image_id": "a"}) for name in ("1", "2")]
    rows = [llava("a", f"What?\n{SHORT}", "first"), llava("a", f"What?\n{SHORT}", "second")]
    assert joined("textvqa", examples, rows, tmp_path).answers == {"1": "first", "2": "second"}
    with pytest.raises(UserError):
        joined("textvqa", examples, rows[:1], tmp_path)


def test_mme_by_subtask_picture_and_question(tmp_path: Path) -> None:
    asked = [
        ("posters", "posters/images/tt01.jpg", "Is it a film?", 1),
        ("posters", "posters/images/tt01.jpg", "Is it a play?", 2),
        ("count", "count/0007.jpg", "Is it a film?", 1),
    ]
    examples = [
        Example(
            id=f"{image}#{number}",
            images=(image,),
            question=f"{question} Please answer yes or no.",
            extra={"category": category},
        )
        for category, image, question, number in asked
    ]
    rows = [
        llava("posters/tt01.png", f"Is it a play?\n{SHORT}", "No"),
        llava("posters/tt01.png", f"Is it a film?\n{SHORT}", "Yes"),
        llava("count/0007.jpg", f"Is it a film? Please answer yes or no.\n{SHORT}", "Yes."),
    ]
    assert joined("mme", examples, rows, tmp_path).answers == {
        "posters/images/tt01.jpg#2": "No",
        "posters/images/tt01.jpg#1": "Yes",
        "count/0007.jpg#1": "Yes.",
    }


def test_vizwiz_by_number_or_picture(tmp_path: Path) -> None:
    names = [f"VizWiz_val_0000000{n}.jpg" for n in range(3)]
    examples = [Example(id=name, images=(f"val/{name}",), question=f"What {n}?") for n, name in enumerate(names)]
    rows = [llava(n, f"What {n}?\n{UNANSWERABLE}\n{SHORT}", f"answer {n}") for n in (2, 0)]
    assert joined("vizwiz", examples, rows, tmp_path).answers == {names[2]: "answer 2", names[0]: "answer 0"}
    with pytest.raises(UserError):
        joined("vizwiz", examples, [llava(0, f"What 1?\n{SHORT}", "x")], tmp_path)  # another question's number
    for name in ("9" * 5_000, "²", "٣"):  # no numbers, or beyond what Python reads
        odd = [*examples, Example(id="odd", images=(f"val/a_{name}.jpg",), question="What 2?")]
        asked_odd = llava(name, f"What 2?\n{SHORT}", "x")
        assert joined("vizwiz", odd, [asked_odd, rows[0]], tmp_path).answers[names[2]] == "answer 2"
    official = [{"image": names[1], "answer": "dog"}]
    assert joined("vizwiz", examples, official, tmp_path, "p.json").answers == {names[1]: "dog"}


def test_pope_by_order_where_every_prompt_fits(tmp_path: Path) -> None:
    asked = [
        ("random-1", "Is there a dog in the image?"),
        ("random-2", "Is there a cat in the image?"),
        ("popular-1", "Is there a dog in the imange?"),
        ("popular-2", "Is there a car in the image?"),
    ]
    examples = [Example(id=name, question=text, extra={"category": name.split("-")[0]}) for name, text in asked]
    rows = [
        llava(n, f"{text}\n{SHORT}".replace("imange", "image"), f"said {name}")
        for n, (name, text) in enumerate([*asked[2:], *asked[:2]])
    ]
    found = joined("pope", examples, rows, tmp_path)
    assert found.answers == {name: f"said {name}" for name, _ in asked}
    assert found.joined_by == "order, each prompt being the question's"
    twice = [*examples, *(Example(id=f"{one.id}x", question=one.question, extra={}) for one in examples[:2])]
    for questions, wrong in (
        (examples, rows[:3]),
        (examples, [*rows[:3], rows[0]]),
        (examples, [rows[1], rows[0], *rows[2:]]),
        (twice, [*rows, *rows[2:]]),  # fits in two orders of the categories
    ):
        with pytest.raises(UserError):
            joined("pope", questions, wrong, tmp_path)


def test_two_ways_that_disagree_are_refused(tmp_path: Path) -> None:
    examples = [Example(id=name) for name in ("0", "v1_0", "v1_1", "1")]
    with pytest.raises(UserError):
        joined("mmvet", examples, [llava(0, "?", "x"), llava(1, "?", "y")], tmp_path)
