"""How each official script reads or rewrites an answer, quirks included; `readings.jsonl` holds a reading a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_vl.evaluation.scores import exact, llava, vqa
from dora_vl.evaluation.scores.vqa import ARTICLES, CONTRACTIONS, DIGITS
from tests.shared_data import shared

ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in Path(__file__).with_name("readings.jsonl").read_text().splitlines()
]
MODULES = {"exact": exact, "llava": llava, "vqa": vqa}


@pytest.mark.parametrize("name", dict.fromkeys(row["read"] for row in ROWS))
def test_answers_are_read_as_the_script_does(name: str) -> None:
    module, _, function = name.partition(".")
    read = getattr(MODULES[module], function)
    for row in (row for row in ROWS if row["read"] == name):
        expected = row["expected"]
        expected = pytest.approx(expected) if isinstance(expected, float) else expected
        assert read(*row["given"], **row.get("options", {})) == expected, row


@pytest.mark.parametrize("answer", ["True ", "true\t\n", "True,0.9", "True ,0.9", " True", "True.", "", ",True"])
def test_nlvr2_reads_the_line_of_a_csv(answer: str) -> None:
    """Against the published script's `line.strip().split(",")[1]`, in a file that ends a line with the answer."""
    assert vqa.as_read(answer) == f"dev-1-0-0,{answer}".strip().split(",")[1]


@given(st.text(), st.sampled_from(sorted(exact.PATTERNS)), st.sampled_from(["nvlabs", "llm_adapters"]))
def test_what_is_extracted_is_in_the_text(text: str, task: str, rule: exact.Rule) -> None:
    found = exact.extracted(text, task, rule)
    assert found in text
    assert not found or exact.PATTERNS[task].fullmatch(found)


def test_the_table_of_contractions_is_the_published_one_without_its_empty_entries() -> None:
    assert len(CONTRACTIONS) == 118  # 120 less two that map to themselves
    assert {"Im", "Ive", "Id've", "I'dve"} < set(CONTRACTIONS)
    assert (CONTRACTIONS["'ow'sat"], CONTRACTIONS["y'all'dve"]) == ("'ow's'at", "y'all'd've")
    assert not {"shed", "wed", "well", "id", "shell"} & set(CONTRACTIONS)  # words of their own


@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from([*CONTRACTIONS, *DIGITS, *ARTICLES, "1,2", "-", "/", ".", "dog", "?"]), max_size=6).map(
        " ".join
    )
)
@pytest.mark.parametrize("normalise", [vqa.normalise, vqa.normalise_evalai])
def test_any_text_ends_in_plain_words(normalise: Callable[[str], str], text: str) -> None:
    words = normalise(text).split(" ")
    assert words == [""] or all(words)
    assert not {*words} & {*ARTICLES, *DIGITS}
    assert [word.lower() for word in words] == words
    assert normalise(f"\t{text.strip()} \n") == normalise(text.strip())


def distance(first: str, second: str) -> int:
    """Levenshtein's recursion as it is defined."""
    if not first or not second:
        return len(first) + len(second)
    rest = distance(first[1:], second[1:]) + (first[0] != second[0])
    return min(rest, distance(first[1:], second) + 1, distance(first, second[1:]) + 1)


@given(first=st.text(alphabet="abc", max_size=5), second=st.text(alphabet="abc", max_size=5))
def test_anls_is_by_the_edit_distance(first: str, second: str) -> None:
    assert exact.similarity("a" * 1_000_000, first) == 0.0  # at once
    share = 1 - distance(first, second) / max(len(first), len(second), 1)
    assert exact.similarity(first, second) == pytest.approx(share if share > 0.5 else 0.0)


FILES = {"openbookqa/test.json": 500, "ARC-Easy/test.json": 2376, "ARC-Challenge/test.json": 1172}
FILES |= dict.fromkeys([f"{task}/test_sample.json" for task in ("boolq", "piqa", "social_i_qa", "winogrande")], 40)


@pytest.mark.parametrize("file", FILES)
def test_the_published_commonsense_targets_score_full_marks(file: str) -> None:
    records = json.loads(shared(f"commonsense/{file}").read_text())
    assert len(records) == FILES[file]
    task = file.partition("/")[0]
    for rule in ("nvlabs", "llm_adapters"):
        assert [exact.extracted(row["output"], task, rule) for row in records] == [row["answer"] for row in records]
