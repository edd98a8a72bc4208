"""One row of each source all the way: the publisher's row, the prompt made of it, its target, the score of an answer.

`rows_to_scores.jsonl` is written out by hand from the fixtures of `tests/data` and the official scripts. A line
names a row of a split and holds some of: `asked`, what a LLaVA is asked by `dora-vl evaluate`; `vlbart`, the task of a
VL-BART with its text and target; `trained`, a template and what it makes of the row with the part that is trained on;
`instruction`, a plain language model's prompt and output; `scores`, answers with the row's share of the
headline (of captions 100 times CIDEr, worked out with pycocoevalcap).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dora_vl.backbones.families.formats import PROMPTS, TEMPLATES
from dora_vl.data import prepare
from dora_vl.data.benchmarks.table import SOURCES
from dora_vl.data.example import Example
from dora_vl.data.readers import read_row
from dora_vl.evaluation import vlbart_tasks
from dora_vl.evaluation.benchmarks import BENCHMARKS, read_set
from dora_vl.evaluation.scores.benchmark import prompt_turns
from dora_vl.evaluation.scores.exact import PATTERNS
from dora_vl.evaluation.vlbart_tasks import Subtask

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in Path(__file__).with_name("rows_to_scores.jsonl").read_text("utf-8").splitlines()
]
SUBTASKS: Mapping[str, Subtask] = {**vlbart_tasks.image_subtasks(), **vlbart_tasks.video_subtasks()}
OF_ONES_OWN = {"cloze", "llava-json"}  # several forms; test_cloze, test_prepare


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['fixture']}-{row['split']}")
def test_a_row_becomes_prompt_target_and_score(row: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", "")  # without Java, which takes eight seconds for each score of a caption
    file = prepared(row, tmp_path)
    assert {"asked", "vlbart", "trained", "instruction"} & set(row), "nothing is expected of the prompt"
    benchmark = row.get("benchmark", row["split"].partition("/")[0])
    questions = read_set(f"{benchmark}={file}", tmp_path)
    (example,) = (item for item in questions.examples if item.id == row["id"])
    if "asked" in row:
        (turn,) = prompt_turns(example, questions.benchmark.prompt)
        assert turn.text == row["asked"]
    if "vlbart" in row:
        expected = row["vlbart"]
        assert seq2seq_text(SUBTASKS[expected["task"]], example) == (expected["text"], expected["target"])
    if "trained" in row:
        expected = row["trained"]
        assert trained_text(expected["template"], file, row["id"]) == (expected["text"], expected["answers"])
    if "instruction" in row:
        prompt = PROMPTS["nvlabs"].before_output(example.question, "", test=True)
        assert (prompt, example.extra["output"]) == (row["instruction"]["text"], row["instruction"]["target"])
    assert bool(row["scores"]) == (questions.score is not None)  # a judge scores the others
    for prediction, share in row["scores"].items():
        scored = questions.score(questions.examples, {example.id: prediction})
        assert scored.shares[example.id] == pytest.approx(share, rel=1e-9), prediction


def test_every_source_is_followed_to_its_score() -> None:
    assert {row["source"] for row in ROWS} | OF_ONES_OWN == set(SOURCES)
    assert {row.get("benchmark", row["split"].partition("/")[0]) for row in ROWS} >= set(BENCHMARKS) - set(PATTERNS)


def prepared(row: Mapping[str, Any], to: Path) -> Path:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    words = [row["source"], "--from", str(FIXTURES / row["fixture"]), "--to", str(to)]
    list(prepare.run(parser.parse_args(words)))
    return to / f"{row['split']}.jsonl"


def seq2seq_text(subtask: Subtask, example: Example) -> tuple[str, str]:
    prompt = subtask.prompt(example)
    return prompt.subtitles_before + prompt.subtitles + prompt.text, subtask.target(example, 0, Random(0)).text


def trained_text(template: str, file: Path, name: str) -> tuple[str, list[str]]:
    """A conversation under a template, and the parts of it that carry labels."""
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    (record,) = (row for row in rows if row["id"] == name)
    rendered = TEMPLATES[template].render(read_row(record).turns)
    return rendered.text, [rendered.text[start:end] for start, end in rendered.answer_spans]
