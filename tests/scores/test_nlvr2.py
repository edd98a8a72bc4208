"""NLVR2 and NLVR: exact labels, consistency by sentence, the published annotations."""

from __future__ import annotations

import json

import pytest

from dora_vl.data.example import Answer, Example
from dora_vl.errors import UserError
from dora_vl.evaluation.scores import vqa
from tests.shared_data import shared

ROWS = [  # identifier, label, answer, right
    ("dev-1-0-0", "True", "true", 1),
    ("dev-1-1-0", "False", "False", 1),
    ("dev-1-0-1", "True", "True", 1),
    ("dev-1-1-1", "False", "true", 0),
    ("dev-2-0-0", "True", " True", 0),
    ("dev-2-1-0", "True", "TRUE", 1),
    ("dev-3-0-0", "False", "false.", 0),
    ("dev-3-0-1", "False", "false", 1),
    ("dev-4-0-0", "True", "", 0),
    ("dev-4-0-1", "True", "yes", 0),
]


def test_ten_rows() -> None:
    examples = [Example(id=name, answers=(Answer(text=label),)) for name, label, *_ in ROWS]
    scored = vqa.nlvr2_score(examples, {name: answer for name, _, answer, _ in ROWS})
    assert list(scored.per_item.values()) == [row[-1] for row in ROWS]
    # sentences: 1-0 both right, 1-1 one wrong, 2-0 one wrong, 3-0 wrong, 3-1 right, 4-0 and 4-1 wrong
    assert scored.metrics == pytest.approx({"accuracy": 50.0, "consistency": 100 * 2 / 7})
    assert len(scored.table.units) == 7


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("True ", 1.0),
        ("true\t\n", 1.0),
        ("True,0.9", 1.0),
        ("True ,0.9", 0.0),
        (" True", 0.0),
        ("True.", 0.0),
        ("", 0.0),
        (",True", 0.0),
    ],
)
def test_an_answer_is_read_as_the_line_of_a_csv(answer: str, right: float) -> None:
    """Each against the published script's `line.strip().split(",")[1]`, in a file that ends a line with the answer."""
    line = f"dev-1-0-0,{answer}".strip()
    assert float(line.split(",")[1].lower() == "true") == right
    scored = vqa.nlvr2_score([Example(id="dev-1-0-0", answers=(Answer(text="True"),))], {"dev-1-0-0": answer})
    assert scored.per_item == {"dev-1-0-0": right}


def test_an_identifier_of_another_form_is_refused() -> None:
    with pytest.raises(UserError, match="NLVR2 identifier '12-3' has 2 fields"):
        vqa.nlvr2_score([Example(id="12-3", answers=(Answer(text="true"),))], {})


def test_nlvr2_as_published() -> None:
    with shared("nlvr2/dev.json").open() as file:
        rows = [json.loads(line) for line in file]
    examples = [Example(id=row["identifier"], answers=(Answer(text=row["label"]),)) for row in rows]
    scored = vqa.nlvr2_score(examples, dict.fromkeys((one.id for one in examples), "true"))
    true = sum(row["label"] == "True" for row in rows)
    assert scored.n == 6982
    assert scored.metrics["accuracy"] == pytest.approx(100 * true / 6982)
    of_sentence: dict[str, set[str]] = {}
    for row in rows:
        split, number, _, sentence = row["identifier"].split("-")
        of_sentence.setdefault(f"{split} {number} {sentence}", set()).add(row["label"])
    consistent = sum(labels == {"True"} for labels in of_sentence.values())
    assert scored.metrics["consistency"] == pytest.approx(100 * consistent / len(of_sentence))


def test_nlvr_as_published() -> None:
    with shared("nlvr/dev/dev.json").open() as file:
        rows = [json.loads(line) for line in file]
    examples = [Example(id=row["identifier"], answers=(Answer(text=row["label"]),)) for row in rows]
    scored = vqa.score_nlvr(examples, {row["identifier"]: row["label"] for row in rows})
    assert scored.n == 989
    assert scored.metrics == {"accuracy": 100.0, "consistency": 100.0}
    assert len(scored.table.units) == len({row["identifier"].split("-")[0] for row in rows})
