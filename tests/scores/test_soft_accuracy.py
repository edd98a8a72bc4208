"""VQAv2 in both versions, TextVQA and VizWiz on hand-worked rows."""

from __future__ import annotations

import pytest

from dora_vl.data.example import Answer, Example
from dora_vl.errors import UserError
from dora_vl.evaluation.scores import vqa
from dora_vl.evaluation.scores import vqa as textvqa
from dora_vl.evaluation.scores import vqa as vizwiz
from dora_vl.evaluation.scores.vqa import leave_one_out

ROWS = [  # the ten people, the prediction, points before 2021, points after, points of TextVQA
    (["yes"] * 10, "Yes.", 1.0, 0.0, 1.0),  # after 2021 nothing is normalised where all agree
    (["yes"] * 10, "yes", 1.0, 1.0, 1.0),
    (["No"] * 10, "No", 0.0, 1.0, 1.0),  # before 2021 the people's capital stays
    (["2"] * 9 + ["3"], "two", 1.0, 1.0, 1.0),
    (["two"] * 9 + ["3"], "two", 0.0, 1.0, 1.0),  # before 2021 the people's number words stay
    (["the dog"] * 5 + ["cat"] * 5, "dog", 0.0, 1.0, 1.0),
    (["red"] * 1 + ["blue"] * 9, "red", 0.3, 0.3, 0.3),  # 9 of the 10 see one match of three
    (["red"] * 2 + ["blue"] * 8, "red", 0.6, 0.6, 0.6),
    (["red"] * 3 + ["blue"] * 7, "red", 0.9, 0.9, 0.9),
    (["a,b"] * 4 + ["c"] * 6, "a b", 0.0, 1.0, 0.0),  # "b" against "a b", "b" and EvalAI's "ab"
]


def examples() -> list[Example]:
    kinds = ["yes/no"] * 3 + ["number"] * 2 + ["other"] * 5
    return [
        Example(
            id=str(number),
            images=(f"{number // 2}.jpg",),
            question="?",
            extra={"human_answers": people, "answer_type": kind, "answerable": number != 9},
        )
        for number, ((people, *_), kind) in enumerate(zip(ROWS, kinds, strict=True))
    ]


ANSWERS = {str(number): row[1] for number, row in enumerate(ROWS)}


@pytest.mark.parametrize(("version", "column"), [("before_2021", 2), ("after_2021", 3)])
def test_vqa_in_both_versions(version, column: int) -> None:
    expected = [row[column] for row in ROWS]
    scored = vqa.vqa_score(examples(), ANSWERS, version=version)
    assert list(scored.per_item.values()) == pytest.approx(expected)
    assert scored.metrics["accuracy"] == pytest.approx(10 * sum(expected))
    assert scored.metrics["answer type/number"] == pytest.approx(50 * sum(expected[3:5]))
    assert scored.settings == {"vqa_version": version}


def test_textvqa_and_vizwiz() -> None:
    expected = [row[4] for row in ROWS]
    for scorer in (textvqa, vizwiz):
        scored = scorer.score(examples(), ANSWERS)
        assert list(scored.per_item.values()) == pytest.approx(expected)
        assert scored.metrics["accuracy"] == pytest.approx(10 * sum(expected))
    assert vizwiz.vizwiz_score(examples(), ANSWERS).metrics["accuracy/unanswerable"] == 0.0


@pytest.mark.parametrize(("said", "points"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_leave_one_out(said: int, points: float) -> None:
    assert leave_one_out("x", ["x"] * said + ["y"] * (10 - said)) == pytest.approx(points)


def test_a_missing_answer_is_wrong_and_named() -> None:
    scored = vqa.vqa_score(examples(), {name: text for name, text in ANSWERS.items() if name != "1"})
    assert scored.failed == ("1",)
    assert scored.n == 10
    assert scored.per_item["1"] == 0.0


def test_ten_people_are_needed() -> None:
    short = Example(id="q", answers=(Answer(text="yes"),))
    with pytest.raises(UserError, match="example 'q' has 1 human answers"):
        vqa.vqa_score([short], {"q": "yes"})
