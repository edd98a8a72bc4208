"""LLaVA's answer files and the official scripts' formats find their questions, and what is unclear is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dora_vl.data.example import Example
from dora_vl.errors import UserError
from dora_vl.evaluation.benchmarks import BENCHMARKS
from dora_vl.evaluation.predictions import Predictions, join
from dora_vl.evaluation.scores import prompts
from dora_vl.evaluation.scores.benchmark import read_answers, read_rows

SHORT = prompts.SHORT


def joined(
    name: str, examples: Sequence[Example], content: object, tmp_path: Path, file: str = "p.jsonl"
) -> Predictions:
    path = tmp_path / file
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, list) and file.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content))
    return join(BENCHMARKS[name], examples, read_rows(path), path=path, questions=Path("records.jsonl"))


def llava(question_id: object, prompt: str, text: str) -> dict[str, object]:
    about: dict[str, object] = {"answer_id": "x", "model_id": "m", "metadata": {}}
    return {"question_id": question_id, "prompt": prompt, "text": text, **about}


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
    with pytest.raises(UserError, match=r"p\.jsonl: 1 keys \(picture and question\) fit .*: 1 answers for 2 questions"):
        joined("textvqa", examples, rows[:1], tmp_path)


def test_mme_by_subtask_picture_and_question(tmp_path: Path) -> None:
    def example(category: str, image: str, question: str, number: int) -> Example:
        text = f"{question} Please answer yes or no."
        return Example(id=f"{image}#{number}", images=(image,), question=text, extra={"category": category})

    examples = [
        example("posters", "posters/images/tt01.jpg", "Is it a film?", 1),
        example("posters", "posters/images/tt01.jpg", "Is it a play?", 2),
        example("count", "count/0007.jpg", "Is it a film?", 1),
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
    examples = [
        Example(id=f"VizWiz_val_0000000{n}.jpg", images=(f"val/VizWiz_val_0000000{n}.jpg",), question=f"What {n}?")
        for n in range(3)
    ]
    asked = "When the provided information is insufficient, respond with 'Unanswerable'."
    rows = [llava(n, f"What {n}?\n{asked}\n{SHORT}", f"answer {n}") for n in (2, 0)]
    assert joined("vizwiz", examples, rows, tmp_path).answers == {
        "VizWiz_val_00000002.jpg": "answer 2",
        "VizWiz_val_00000000.jpg": "answer 0",
    }
    with pytest.raises(UserError, match="no id in common, looked for by id; picture; number"):
        joined("vizwiz", examples, [llava(0, f"What 1?\n{asked}\n{SHORT}", "x")], tmp_path)  # another question's number
    for name in ("9" * 5_000, "²", "٣"):  # no numbers, or beyond what Python reads
        odd = [*examples, Example(id="odd", images=(f"val/a_{name}.jpg",), question="What 2?")]
        asked_odd = llava(name, f"What 2?\n{SHORT}", "x")
        assert joined("vizwiz", odd, [asked_odd, rows[0]], tmp_path).answers["VizWiz_val_00000002.jpg"] == "answer 2"
    official = [{"image": "VizWiz_val_00000001.jpg", "answer": "dog"}]
    assert joined("vizwiz", examples, official, tmp_path, "p.json").answers == {"VizWiz_val_00000001.jpg": "dog"}


POPE = [
    ("random-1", "Is there a dog in the image?"),
    ("random-2", "Is there a cat in the image?"),
    ("popular-1", "Is there a dog in the imange?"),
    ("popular-2", "Is there a car in the image?"),
]


def test_pope_by_order_where_every_prompt_fits(tmp_path: Path) -> None:
    examples = [Example(id=name, question=text, extra={"category": name.split("-")[0]}) for name, text in POPE]
    rows = [
        llava(n, f"{text}\n{SHORT}".replace("imange", "image"), f"said {name}")
        for n, (name, text) in enumerate([*POPE[2:], *POPE[:2]])
    ]
    found = joined("pope", examples, rows, tmp_path)
    assert found.answers == {name: f"said {name}" for name, _ in POPE}
    assert found.joined_by == "order, each prompt being the question's"
    for wrong in (rows[:3], [*rows[:3], rows[0]], [rows[1], rows[0], *rows[2:]]):
        with pytest.raises(UserError, match=rf"\({len(wrong)} answers\) and records.jsonl \(4 questions\) have no id"):
            joined("pope", examples, wrong, tmp_path)
    twice = [
        *examples,
        *(Example(id=f"{one.id}x", question=one.question, extra={"category": "x"}) for one in examples[:2]),
    ]
    with pytest.raises(UserError, match=r"p\.jsonl: the answers fit the questions in 2 orders"):
        joined("pope", twice, [*rows, *rows[2:]], tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "content", "ids", "answers"),
    [
        ("vqav2", "r.json", [{"question_id": 262148000, "answer": "2"}], ["262148000"], ["2"]),
        ("gqa", "r.json", [{"questionId": "20150", "prediction": "yes"}], ["20150"], ["yes"]),
        ("coco_caption", "r.json", [{"image_id": 391895, "caption": "A man."}], ["391895"], ["A man."]),
        ("tvqa", "r.json", {"122": 3, "123": 0}, ["122", "123"], ["a3", "a0"]),
        ("how2qa", "r.json", {"122": 3}, ["122"], ["a3"]),
        ("mmvet", "r.json", {"v1_0": "It is\n7", "v1_1": "8"}, ["v1_0", "v1_1"], ["It is\n7", "8"]),
        ("mmvet", "r.jsonl", [llava(1, "What?", "8")], ["v1_0", "v1_1"], [None, "8"]),
        ("seed", "r.jsonl", [{"question_id": "v7", "prediction": "B"}], ["v7"], ["B"]),
        ("scienceqa", "r.jsonl", [llava("4", "Which?", "A")], ["4"], ["A"]),
        (
            "yc2c",
            "r.jsonl",
            [{"video_id": "x", "clip_id": 10337, "ts": [1, 2], "descs": [{"desc": "stir it"}]}],
            ["10337"],
            ["stir it"],
        ),
        ("nlvr2", "r.csv", "dev-1-0-0,True \ndev-1-1-0, False,0.3\n\n", ["dev-1-0-0", "dev-1-1-0"], ["True", " False"]),
        ("nlvr2", "r.csv", "dev-1-0-0.png,True\n", ["dev-1-0-0"], ["True"]),
        (
            "mmbench",
            "r.tsv",
            'index\tquestion\tA\tB\tprediction\n241\t"Which\tone?"\tx\ty\tB\n',
            ["241"],
            ["B"],
        ),
        ("vqav2", "r.csv", 'question_id,answer\n7,"a, b"\n', ["7"], ["a, b"]),
        ("vqav2", "r.json", '\ufeff[{"question_id": 7, "answer": "x"}]', ["7"], ["x"]),
    ],
)
def test_official_formats(
    tmp_path: Path, name: str, file: str, content: object, ids: list[str], answers: list[str | None]
) -> None:
    found = joined(name, [Example(id=one) for one in ids], content, tmp_path, file)
    assert found.answers == {one: said for one, said in zip(ids, answers, strict=True) if said is not None}
    assert not found.strangers


def test_value_indices_stay_numbers_for_other_benchmarks(tmp_path: Path) -> None:
    assert joined("vqav2", [Example(id="7")], {"7": 3}, tmp_path, "r.json").answers == {"7": "3"}


def test_two_ways_that_disagree_are_refused_with_the_numbers(tmp_path: Path) -> None:
    examples = [Example(id="0"), Example(id="v1_0"), Example(id="v1_1"), Example(id="1")]
    rows = [llava(0, "?", "x"), llava(1, "?", "y")]
    with pytest.raises(UserError, match=r"2 of 2 answers fit a question of records\.jsonl by id, and as many .* v1_N"):
        joined("mmvet", examples, rows, tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("r.csv", "dev-1-0-0\n", "line 1: 'dev-1-0-0' is no identifier"),
        ("r.tsv", 'index\tprediction\n1\t"x\n', "line 2: a quotation mark in it is never closed"),
        ("r.json", '{"1": [2]}', "'1' has .2."),
        ("r.json", '{"1": true}', "'1' has True"),
        ("r.json", '{"answer": "x"}', "line 1: needs an id"),
        ("r.xlsx", "PK\x03\x04rest", "an .xlsx or another packed file; save the table as tab-separated text"),
        ("r.json", "[]", "holds no predictions"),
        ("r.csv", "\n", "holds no predictions"),
        ("r.json", "[1, 2]", "line 1: a int, not an object"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, file: str, content: str, said: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=said):
        read_answers(tmp_path / file)


def test_a_whole_json_list_is_read_as_lines_are(tmp_path: Path) -> None:
    rows: list[Mapping[str, Any]] = [{"id": "a", "answer": "1"}, {"id": "b", "answer": "2"}, {"id": "a", "answer": "3"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    assert read_answers(tmp_path / "list.json") == {"a": "3", "b": "2"}
