"""POPE: how answers are read, hand-worked numbers, the published label files."""

from __future__ import annotations

import json

import pytest

from dora_vl.data.example import Answer, Example
from dora_vl.errors import UserError
from dora_vl.evaluation.scores import llava
from tests.shared_data import shared


@pytest.mark.parametrize(
    "answer", ["no", "No", "no, it is not.", "There is no dog.", "it is not there", "No. Yes", "no ,"]
)
def test_read_as_no(answer: str) -> None:
    assert llava.says_no(answer)


@pytest.mark.parametrize(
    "answer", ["yes", "", "NO", "Not", "nope", "isn't", "No\n", "no!", "Yes. There is no doubt.", "nothing", ".no"]
)
def test_read_as_yes(answer: str) -> None:
    assert not llava.says_no(answer)


ROWS = [  # category, label, answer
    ("random", "yes", "Yes"),
    ("random", "yes", "No"),
    ("random", "no", "yes"),
    ("random", "no", "no"),
    ("popular", "yes", "yes"),
    ("popular", "no", "no."),
    ("popular", "yes", "nope"),
    ("adversarial", "no", "yes"),
    ("adversarial", "no", "yes"),
    ("adversarial", "yes", "not"),
]


def ten() -> tuple[list[Example], dict[str, str]]:
    examples = [
        Example(id=str(n), images=(f"{n % 4}.jpg",), answers=(Answer(text=label),), extra={"category": category})
        for n, (category, label, _) in enumerate(ROWS)
    ]
    return examples, {str(n): answer for n, (_, _, answer) in enumerate(ROWS)}


def test_ten_rows() -> None:
    scored = llava.pope_score(*ten())
    metrics = scored.metrics
    assert next(iter(metrics)) == "f1"
    assert metrics["random/f1"] == pytest.approx(50.0)  # tp fn fp tn, one each
    assert metrics["random/accuracy"] == pytest.approx(50.0)
    assert metrics["popular/f1"] == pytest.approx(100.0)
    assert metrics["adversarial/f1"] == 0.0  # the script divides by zero here
    assert metrics["adversarial/precision"] == 0.0
    assert metrics["adversarial/yes share"] == pytest.approx(200 / 3)
    assert metrics["f1"] == pytest.approx((50 + 100 + 0) / 3)
    assert metrics["accuracy"] == pytest.approx((50 + 100 + 0) / 3)
    assert metrics["recall"] == pytest.approx((50 + 100 + 0) / 3)
    assert scored.settings["labels"] == "3 adversarial, 3 popular, 4 random"


def test_precision_recall_and_f1_hang_together() -> None:
    examples, answers = ten()
    answers = {**answers, "3": "yes"}  # random: 1 tp, 1 fn, 2 fp
    metrics = llava.pope_score(examples, answers).metrics
    precision, recall = 1 / 3, 1 / 2
    assert metrics["random/precision"] == pytest.approx(100 * precision)
    assert metrics["random/recall"] == pytest.approx(100 * recall)
    assert metrics["random/f1"] == pytest.approx(100 * 2 * precision * recall / (precision + recall))


def test_answers_to_other_questions_are_refused_and_missing_ones_are_wrong() -> None:
    examples, answers = ten()
    with pytest.raises(UserError, match="1 POPE answers belong to no question here, first 'stranger'"):
        llava.pope_score(examples, {**answers, "stranger": "yes"})
    del answers["0"]
    scored = llava.pope_score(examples, answers)
    assert scored.failed == ("0",)
    assert scored.metrics["random/recall"] == 0.0


def test_the_published_files_by_hand_written_rules() -> None:
    examples, answers = [], {}
    for category in ("random", "popular", "adversarial"):
        with shared(f"pope/coco_pope_{category}.json").open() as file:
            for row in map(json.loads, file):
                name = f"{category}-{row['question_id']}"
                answer = Answer(text=row["label"])
                examples.append(
                    Example(id=name, images=(row["image"],), answers=(answer,), extra={"category": category})
                )
                # says yes unless the object's name is short: some of both, wrong and right
                answers[name] = "No, there is not." if len(row["text"]) % 3 == 0 else "Yes, there is."
    scored = llava.pope_score(examples, answers)
    assert scored.n == 9000
    assert scored.settings["labels"] == "current"
    for category in ("random", "popular", "adversarial"):
        mine = [(one.answers[0].text, answers[one.id][:2] == "No") for one in examples if one.id.startswith(category)]
        tp = sum(label == "yes" and not no for label, no in mine)
        said = sum(not no for _, no in mine)
        assert scored.metrics[f"{category}/yes share"] == pytest.approx(100 * said / 3000)
        assert scored.metrics[f"{category}/precision"] == pytest.approx(100 * tp / said)
        assert scored.metrics[f"{category}/f1"] == pytest.approx(200 * tp / (said + 1500))  # 1,500 are yes in each
    all_yes = llava.pope_score(examples, dict.fromkeys(answers, "Yes"))
    assert all_yes.metrics["random/accuracy"] == 50.0
