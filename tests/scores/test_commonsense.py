"""Commonsense: both extraction rules, the tasks' patterns, the published test sets."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_vl.data.example import Answer, Example
from dora_vl.errors import UserError
from dora_vl.evaluation.scores import commonsense
from dora_vl.evaluation.scores.commonsense import PATTERNS, RESPONSE, extracted, response
from tests.shared_data import shared

GOES_ON = f"the correct answer is answer1\n\n### Instruction:\nagain\n\n{RESPONSE} the correct answer is answer2"


def test_the_two_rules_take_different_parts() -> None:
    assert extracted(GOES_ON, "openbookqa", "llm_adapters") == "answer1"
    assert extracted(GOES_ON, "openbookqa", "nvlabs") == "answer2"
    whole = f"Below is an instruction\n\n{RESPONSE}\n{GOES_ON}"
    for rule in ("llm_adapters", "nvlabs"):
        assert response(whole, rule, with_prompt=True) == response(GOES_ON, rule)
    with pytest.raises(UserError, match="must hold '### Response:'"):
        response("no marker", "nvlabs", with_prompt=True)


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "it is untrue", "true"),
        ("boolq", "True", ""),
        ("boolq", "false, not true", "false"),
        ("piqa", "solution2", "solution2"),
        ("openbookqa", "answer10", "answer1"),
        ("ARC-Easy", "answer5", "answer5"),
        ("hellaswag", "ending4 or ending1", "ending4"),
        ("winogrande", "Option1", ""),
        ("social_i_qa", "", ""),
    ],
)
def test_ten_rows_of_extraction(task: str, text: str, expected: str) -> None:
    assert extracted(text, task, "nvlabs") == expected


def test_the_headline_is_the_mean_over_tasks() -> None:
    rows = [("boolq", "true", "true")] * 4 + [("piqa", "solution1", "solution2")] * 3 + [("piqa", "solution1", "x")] * 2
    rows.append(("boolq", "true", "TRUE"))
    examples = [
        Example(id=str(n), answers=(Answer(text=truth),), extra={"task": task})
        for n, (task, truth, _) in enumerate(rows)
    ]
    scored = commonsense.score(examples, {str(n): said for n, (*_, said) in enumerate(rows)}, rule="llm_adapters")
    assert scored.metrics == pytest.approx({"average": 40.0, "boolq": 80.0, "piqa": 0.0})
    assert scored.settings == {"extraction": "llm_adapters"}


@given(st.text(), st.sampled_from(sorted(PATTERNS)), st.sampled_from(["nvlabs", "llm_adapters"]))
def test_what_is_extracted_is_in_the_text(text: str, task: str, rule) -> None:
    found = extracted(text, task, rule)
    assert found in text
    assert not found or PATTERNS[task].fullmatch(found)


@pytest.mark.parametrize(
    ("file", "task", "rows"),
    [
        ("openbookqa/test.json", "openbookqa", 500),
        ("ARC-Easy/test.json", "ARC-Easy", 2376),
        ("ARC-Challenge/test.json", "ARC-Challenge", 1172),
        ("boolq/test_sample.json", "boolq", 40),
        ("piqa/test_sample.json", "piqa", 40),
        ("social_i_qa/test_sample.json", "social_i_qa", 40),
        ("winogrande/test_sample.json", "winogrande", 40),
    ],
)
def test_the_published_targets_score_full_marks(file: str, task: str, rows: int) -> None:
    records = json.loads(shared(f"commonsense/{file}").read_text())
    assert len(records) == rows
    examples = [
        Example(id=str(n), answers=(Answer(text=record["answer"]),), extra={"task": task})
        for n, record in enumerate(records)
    ]
    scored = commonsense.score(examples, {str(n): record["output"] for n, record in enumerate(records)})
    assert scored.metrics["average"] == 100.0
    first = commonsense.score(examples, dict.fromkeys((one.id for one in examples), records[0]["answer"]))
    same = sum(record["answer"] == records[0]["answer"] for record in records)
    assert first.metrics[task] == pytest.approx(100 * same / rows)
