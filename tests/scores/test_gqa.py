"""GQA: the conversion's quirks and ten hand-worked rows with entailed questions and global groups."""

from __future__ import annotations

import pytest

from dora_vl.data.example import Answer, Example
from dora_vl.errors import UserError
from dora_vl.evaluation.scores import vqa


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Yes.", "yes"), ("yes...", "yes"), ("yes. ", "yes. "), (" yes", " yes"), ("U.S.", "u.s"), ("", "")],
)
def test_conversion(answer: str, expected: str) -> None:
    assert vqa.converted(answer) == expected


ROWS = [  # truth, answer, structural, semantic, entailed, group
    ("yes", "Yes.", "verify", "obj", ["1", "2"], None),
    ("no", "no", "verify", "obj", [], None),
    ("yes", "no", "logical", "obj", [], None),
    ("red", "red", "query", "attr", ["3"], "color"),
    ("blue", "red", "query", "attr", [], "color"),
    ("red", "Red", "query", "attr", ["0", "1"], "color"),
    ("dog", "dog ", "query", "cat", [], "animal"),
    ("cat", "cat", "choose", "cat", ["6"], "animal"),
    ("left", "right", "choose", "rel", ["7"], None),
    ("table", "table", "query", "rel", [], None),
]


def ten() -> tuple[list[Example], dict[str, str]]:
    examples = []
    for n, (truth, _, structural, semantic, entailed, group) in enumerate(ROWS):
        extra: dict[str, object] = {"types": {"structural": structural, "semantic": semantic}, "entailed": entailed}
        if group:
            extra["global_group"] = group
        examples.append(Example(id=str(n), images=("1.jpg",), answers=(Answer(text=truth),), extra=extra))
    return examples, {str(n): row[1] for n, row in enumerate(ROWS)}


def test_ten_rows() -> None:
    scored = vqa.gqa_score(*ten())
    assert list(scored.per_item.values()) == [1, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    metrics = scored.metrics
    assert metrics["accuracy"] == pytest.approx(60.0)
    assert metrics["accuracy/open"] == pytest.approx(100 * 3 / 5)
    assert metrics["accuracy/binary"] == pytest.approx(100 * 3 / 5)
    assert metrics["structural/choose"] == pytest.approx(50.0)
    assert metrics["semantic/attr"] == pytest.approx(200 / 3)
    # right and entailing others: 0 (half of 1, 2), 5 (both of 0, 1), 7 (6 is wrong); 3 entails itself alone
    assert metrics["consistency"] == pytest.approx(100 * (0.5 + 1 + 0) / 3)
    # color: red 3 said of 2, blue 0 of 1; animal: "dog " is another word than dog: 0 of 1, cat 1 of 1
    color, animal = (3 - 2) ** 2 / 2 + (0 - 1) ** 2 / 1, (0 - 1) ** 2 / 1
    assert metrics["distribution"] == pytest.approx((color * 3 + animal * 2) / 5 / 100)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("types", [1], r"extra\.types must be an object, it is \[1\]"),
        ("types", 5, r"extra\.types must be an object, it is 5"),
        ("types", {"structural": ["query"]}, r"extra\.types\.structural must be text, it is \['query'\]"),
        ("types", {"semantic": {"a": 1}}, r"extra\.types\.semantic must be text, it is \{'a': 1\}"),
        ("entailed", "12", r"extra\.entailed must be a list of ids, it is '12'"),
        ("entailed", [["1"]], r"extra\.entailed must be a list of ids, it is \[\['1'\]\]"),
        ("global_group", ["color"], r"extra\.global_group must be text, it is \['color'\]"),
    ],
)
def test_what_a_record_should_hold_is_named(field: str, value: object, said: str) -> None:
    examples, answers = ten()
    extra = {**examples[4].extra, field: value}
    examples[4] = Example(id="4", answers=examples[4].answers, extra=extra)
    with pytest.raises(UserError, match=rf"^question '4': {said}$"):
        vqa.gqa_score(examples, answers)


def test_plain_questions_need_no_types_and_unbalanced_ones_are_left_out() -> None:
    examples = [
        Example(id="1", answers=(Answer(text="yes"),)),
        Example(id="2", answers=(Answer(text="yes"),), extra={"is_balanced": False}),
    ]
    scored = vqa.gqa_score(examples, {"1": "yes"})
    assert (scored.metrics, scored.n) == ({"accuracy": 100.0}, 1)


def test_vl_t5_compares_the_text_as_it_is_and_weighs_answers() -> None:
    several = Example(id="1", answers=(Answer(text="car", weight=0.6), Answer(text="taxi", weight=0.3)))
    for said, llava, vl_t5 in (("car", 60.0, 60.0), ("Taxi.", 30.0, 0.0), ("taxi", 30.0, 30.0), ("bus", 0.0, 0.0)):
        assert vqa.gqa_score([several], {"1": said}).metrics["accuracy"] == pytest.approx(llava)
        assert vqa.gqa_score([several], {"1": said}, conversion="vl_t5").metrics["accuracy"] == pytest.approx(vl_t5)
