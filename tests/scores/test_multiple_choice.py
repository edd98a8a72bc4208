"""ScienceQA, SEED, MMBench, TVQA and How2QA: ten hand-worked rows each, and the quirks of reading an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dora_vl.data.example import Example
from dora_vl.errors import UserError
from dora_vl.evaluation.scores import llava, video
from dora_vl.evaluation.scores.llava import Matcher, chosen
from tests.shared_data import shared

FOUR = ("red", "green", "blue", "white")


def asked(name: str, correct: int, choices: tuple[str, ...] = FOUR, images: tuple[str, ...] = (), **extra: Any):
    return Example(id=name, images=images, choices=choices, extra={"correct": correct, **extra})


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("F", None),
        ("B.", None),
        ("B. green", "B"),
        ("B.green", None),
        ("The answer is C.", "C"),
        ("The answer is C", None),  # the last "." of the pattern needs a character
        ("The answer is Because", "B"),
        ("The answer is A. The answer is B.", None),  # twice
        ("I think The answer is D!", "D"),
        ("b", None),
        ("", None),
    ],
)
def test_scienceqa_reading(answer: str, letter: str | None) -> None:
    assert llava.parsed(answer) == letter


def test_scienceqa_ten_rows() -> None:
    two = ("yes", "no")
    rows = [
        (asked("0", 0), "A", 1),
        (asked("1", 1, images=("1.png",)), "B. green", 1),
        (asked("2", 2, images=("2.png",)), "The answer is C.", 1),
        (asked("3", 2, images=("3.png",)), "The answer is C", 0),
        (asked("4", 1), "The answer is Because", 1),
        (asked("5", 1, two), "C", 0),  # beyond the choices
        (asked("6", 0, two, images=("6.png",)), "a", 0),
        (asked("7", 3), "white", 0),
        (asked("8", 3), "D", 1),
        (asked("9", 0), "E", 0),
    ]
    scored = llava.scienceqa_score([row[0] for row in rows], {row[0].id: row[1] for row in rows})
    assert list(scored.per_item.values()) == [row[2] for row in rows]
    assert scored.metrics == pytest.approx({"image accuracy": 50.0, "accuracy": 50.0})
    assert next(iter(scored.metrics)) == "image accuracy"


def test_seed_ten_rows() -> None:
    answers = ["A", "B", "C", "A.", "a", "", "B", "A", "C", "D"]
    examples = [
        asked(str(n), n % 3, data_type="image" if n < 6 else "video", question_type=("count", "text")[n > 7])
        for n in range(10)
    ]
    scored = llava.seed_score(examples, {str(n): answer for n, answer in enumerate(answers) if answer})
    right = [1, 1, 1, 0, 0, 0, 0, 0, 1, 0]
    assert list(scored.per_item.values()) == right
    assert scored.metrics["accuracy"] == pytest.approx(40.0)
    assert scored.metrics["accuracy/image"] == pytest.approx(50.0)
    assert scored.metrics["accuracy/video"] == pytest.approx(25.0)
    assert scored.metrics["type/text"] == pytest.approx(50.0)
    assert scored.failed == ("5",)


CHOICES = dict(zip("ABCD", FOUR, strict=True))


@pytest.mark.parametrize(
    ("answer", "in_2023", "in_2025"),
    [
        ("B", "B", "B"),
        ("B.", "B", "B"),
        ("(C)", "C", "C"),
        ("The answer is B", "B", "B"),
        ("it is green", "B", "B"),  # a choice's text
        ("red and green", None, None),
        ("A red ball, so it must be B", "A", "A"),  # two letters stand alone, so "red", a choice's text, decides
        ("A is what one sees in the picture here", None, None),
        ("E", "E", None),  # 2023 looks for A to E whatever the choices
        ("C is right, look at the middle part of it", "C", None),  # 2025: not one of the last four words
        ("Answer:D", None, "D"),
        ("**B**", None, "B"),
        ("Z", None, "Z"),
        ("Cannot determine the answer B", "B", "Z"),
        ("Failed to obtain answer via API B", None, None),
        ("GREEN", "B", "B"),
        ("green " * 10, "B", None),  # longer than twice all choices
    ],
)
def test_mmbench_reading(answer: str, in_2023: str | None, in_2025: str | None) -> None:
    assert (chosen(answer, CHOICES, "opencompass_2023"), chosen(answer, CHOICES, "2025")) == (in_2023, in_2025)


@pytest.mark.parametrize(("matcher", "right"), [("opencompass_2023", 1), ("2025", 2)])
def test_mmbench_ten_rows(matcher: Matcher, right: int) -> None:
    """Three questions in four, four and two rotations."""
    rows = []
    for question, rotations in ((7, 4), (8, 4), (9, 2)):
        for turn in range(rotations):
            correct = turn % rotations
            extra = {"index": question + turn * 1_000_000, "l2_category": "logic" if question > 7 else "seeing"}
            rows.append(asked(f"{question}-{turn}", correct, FOUR[:rotations], **extra))
    answers = {one.id: "ABCD"[one.extra["correct"]] for one in rows}
    answers["8-3"] = "A"  # one rotation wrong: the question is wrong
    answers["9-1"] = "Answer:B"  # read by one matcher alone
    scored = llava.mmbench_score(rows, answers, matcher=matcher)
    assert scored.metrics["accuracy"] == pytest.approx(100 * right / 3)
    assert scored.metrics["vanilla"] == pytest.approx(90.0 if right == 2 else 80.0)
    assert scored.metrics["l2/seeing"] == 100.0
    assert scored.metrics["l2/logic"] == pytest.approx(50.0 * (right - 1))
    assert scored.settings["matcher"] == matcher
    assert len(scored.table.units) == 3


def test_video_qa_ten_rows() -> None:
    answers = ["a0", "a1", "a2", "a3", "A0", "a1.", " a2", "", "x3", "a"]
    examples = [asked(str(n), n % 4) for n in range(10)]
    scored = video.score(examples, {str(n): answer for n, answer in enumerate(answers)})
    assert scored.metrics["accuracy"] == pytest.approx(40.0)
    # parsed by the second character, else 0: "A0" 0, "a1." 1, " a2" none -> 0, "" 0, "x3" 3, "a" 0
    parsed = [0, 1, 2, 3, 0, 1, 0, 0, 3, 0]
    right = sum(index == n % 4 for n, index in enumerate(parsed))
    assert scored.metrics["value_accuracy"] == pytest.approx(10.0 * right)
    third = video.score(examples[:3], {"0": "a0"})
    assert third.metrics["value_accuracy"] == 33.33  # two decimals, as the server
    assert third.metrics["accuracy"] == pytest.approx(100 / 3)
    assert third.failed == ("1", "2")


def test_extra_answers_are_ignored_by_tvqa_and_refused_by_how2qa() -> None:
    examples, answers = [asked("1", 0)], {"1": "a0", "2": "a1"}
    assert video.score(examples, answers).metrics["accuracy"] == 100.0
    with pytest.raises(UserError, match="How2QA's server rejects extra answers: 1 here, first '2'"):
        video.score_how2qa(examples, answers)


def test_where_the_answer_is_kept_by_the_publisher_it_says_so() -> None:
    with pytest.raises(UserError, match=r"example '1' does not say which of its 4 choices is right \(extra\.correct\)"):
        llava.seed_score([Example(id="1", choices=FOUR)], {"1": "A"})


def test_how2qa_as_published() -> None:
    with shared("value/how2qa_val_release.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    examples = [
        asked(str(row["qid"]), row["answer_idx"], tuple(row[f"a{n}"] for n in range(4)), vid_name=row["vid_name"])
        for row in rows
    ]
    always_second = video.score_how2qa(examples, {one.id: "a1" for one in examples})
    counts = [sum(row["answer_idx"] == index for row in rows) for index in range(4)]
    assert (len(rows), counts) == (3115, [778, 727, 781, 829])
    assert always_second.metrics["accuracy"] == pytest.approx(100 * 727 / 3115)
    assert always_second.metrics["value_accuracy"] == 23.34
    nonsense = video.score_how2qa(examples, {one.id: "" for one in examples})
    assert (nonsense.metrics["accuracy"], nonsense.metrics["value_accuracy"]) == (0.0, 24.98)  # 778 of 3,115


def test_tvqa_as_published() -> None:
    solution = json.loads(shared("value/tvqa_val_solution.json").read_text())["solution"]
    of_show = {show: dict(questions) for show, questions in solution.items()}
    examples = [
        asked(name, correct, tuple("abcde"), show=show)
        for show, questions in of_show.items()
        for name, correct in questions.items()
    ]
    scored = video.score(examples, {one.id: f"a{one.extra['correct']}" for one in examples})
    assert scored.n == 15253
    assert scored.metrics["accuracy"] == 100.0
