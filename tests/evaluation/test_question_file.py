"""LLaVA's own question files as a benchmark's file: asked as they stand, scored where they hold the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dora_vl.cli import main
from dora_vl.data.turns import Turn
from dora_vl.errors import UserError
from dora_vl.evaluation.questions import EvaluationSet, read_question_file, read_set
from dora_vl.evaluation.scores import prompts

SHORT, LETTER = prompts.SHORT, prompts.LETTER


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(name: str, path: Path, tmp_path: Path, limit: int | None = None) -> EvaluationSet:
    return read_set(f"{name}={path}", tmp_path, mode=None, limit=limit)


@pytest.mark.parametrize("name", ["vqav2", "gqa", "textvqa", "pope", "mme", "vizwiz", "seed", "mmbench", "mmvet"])
def test_questions_are_asked_as_they_stand(name: str, tmp_path: Path) -> None:
    rows = [
        {"question_id": 5, "image": "a.jpg", "text": f"Is it <image> red?\n{SHORT}", "category": "random"},
        {"question_id": "x7", "text": f"Why?\nA. so\nB. no\n{LETTER}"},
    ]
    one = read(name, lines(tmp_path / "q.jsonl", rows), tmp_path)
    first, second = one.examples
    assert (first.id, first.images, first.extra) == ("5", ("a.jpg",), {"category": "random"})
    assert prompts.turns_of(first, one.benchmark.prompt) == (Turn("user", f"<image>\nIs it  red?\n{SHORT}"),)
    assert prompts.turns_of(second, one.benchmark.prompt) == (Turn("user", f"Why?\nA. so\nB. no\n{LETTER}"),)
    assert one.scorer is None
    assert read(name, tmp_path / "q.jsonl", tmp_path, limit=1).examples == [first]


def test_questions_of_one_id_are_numbered(tmp_path: Path) -> None:
    rows = [{"question_id": name, "text": f"{name}{n}?"} for name, n in (("a", 1), ("b", 1), ("a", 2), ("a", 3))]
    names = [one.id for one in read_question_file(lines(tmp_path / "q.jsonl", rows))]
    assert names == ["a#1", "b", "a#2", "a#3"]
    with pytest.raises(UserError, match=r"q\.jsonl: id 'a' in lines 1 and 3 with one text"):
        read_question_file(lines(tmp_path / "q.jsonl", [rows[0], rows[1], rows[0]]))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question_id": [1], "text": "?"}, "line 2: question_id must be text or a whole number, it is .1."),
        ({"question_id": 1, "text": 2}, "line 2: text and image must be text, they are 2 and None"),
        ({"question_id": 1, "text": "?", "image": ["a"]}, "line 2: text and image must be text"),
        ({"id": 1, "text": "?"}, "line 2: not a question with question_id and text"),
    ],
)
def test_what_is_no_question_is_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        read_question_file(lines(tmp_path / "q.jsonl", [{"question_id": 0, "text": "?"}, row]))


def science(name: str, value: str, answer: str, **more: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"id": name, **more, "conversations": turns}


def test_scienceqas_conversations_have_choices(tmp_path: Path) -> None:
    rows = [
        science("4", "Context: A. Look.\nWhich?\nA. map\nB. pen\n<image>", "The answer is B.", image="4/image.png"),
        science("5", "Which?\nContext: N/A\nOptions: (A) red (B) pale blue (C) green", "The answer is A.\nBECAUSE: so"),
        science("6", "Which?\nA. map\nB. pen", "pen"),
        science("7", "Which?\nA. map\nB. pen", "nothing of it"),
        science("8", "Which?\nA. map\nB. pen", ""),
    ]
    (tmp_path / "llava_test_CQM-A.json").write_text(json.dumps(rows))
    one = read("scienceqa", tmp_path / "llava_test_CQM-A.json", tmp_path)
    by_id = {example.id: example for example in one.examples}
    assert by_id["4"].choices == ("map", "pen")
    assert by_id["5"].choices == ("red", "pale blue", "green")
    assert [by_id[name].extra.get("correct") for name in "4567"] == [1, 0, 1, None]
    (asked,) = prompts.turns_of(by_id["4"], one.benchmark.prompt)
    assert asked.text == f"<image>\nContext: A. Look.\nWhich?\nA. map\nB. pen\n{LETTER}"
    assert one.not_scored.keys() == {"7"}
    assert one.unreadable.keys() == {"8"}
    answers = {"4": "B", "5": "B", "6": "The answer is B.", "7": "A"}
    lines(tmp_path / "p.jsonl", [{"question_id": name, "text": said} for name, said in answers.items()])
    options = ["--benchmarks", f"scienceqa={tmp_path / 'llava_test_CQM-A.json'}", "--to", str(tmp_path)]
    main(["evaluate", *options, "--predictions", str(tmp_path / "p.jsonl")])
    entry = json.loads((tmp_path / "metrics.json").read_text())["benchmarks"]["scienceqa"]
    assert (entry["n"], entry["metrics"]["accuracy"]["value"]) == (4, 50.0)  # two of 4, 5, 6 and the unreadable 8
    assert entry["metrics"]["image accuracy"]["value"] == 100.0


def test_answers_to_questions_give_the_servers_file(tmp_path: Path, capsys: Any) -> None:
    rows = [{"question_id": n, "image": f"{n}.jpg", "text": f"Is it red?\n{SHORT}"} for n in (7, 8)]
    questions = lines(tmp_path / "q.jsonl", rows)
    lines(tmp_path / "p.jsonl", [{"question_id": 8, "prompt": "?", "text": "The  dogs"}])
    options = ["--predictions", str(tmp_path / "p.jsonl"), "--to", str(tmp_path)]
    main(["evaluate", "--benchmarks", f"vqav2={questions}", *options])
    upload = json.loads((tmp_path / "vqav2" / "vqav2.json").read_text())
    assert upload == [{"question_id": 7, "answer": ""}, {"question_id": 8, "answer": "dogs"}]
    assert "no score here" in capsys.readouterr().out


def test_mmvets_grader_gets_its_own_ids(tmp_path: Path) -> None:
    questions = lines(tmp_path / "q.jsonl", [{"question_id": n, "image": f"v1_{n}.png", "text": "?"} for n in (0, 1)])
    lines(tmp_path / "p.jsonl", [{"question_id": 1, "prompt": "?", "text": "8"}])
    options = ["--predictions", str(tmp_path / "p.jsonl"), "--to", str(tmp_path)]
    main(["evaluate", "--benchmarks", f"mmvet={questions}", *options])
    assert json.loads((tmp_path / "mmvet" / "mmvet.json").read_text()) == {"v1_0": "", "v1_1": "8"}
