"""Files for servers and judges hold what each takes; read back by the official rule they give the score as shown."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dora_vl.data.example import Answer, Example, from_record
from dora_vl.evaluation.benchmarks import BENCHMARKS
from dora_vl.evaluation.scores import llava
from dora_vl.evaluation.scores.benchmark import Benchmark
from dora_vl.evaluation.scores.llava import chosen
from dora_vl.evaluation.scores.vqa import accuracy, leave_one_out, normalise_evalai
from tests.shared_data import shared

TEXTS = (
    *("True", "False", " true", "True,0.9", "", "a dog.", "The Dog", "1,2/3", "two's", "Yes.", "no", "NO..", "a0"),
    *("a1", "a1", "a3", "B", "B.", "(C)", "x\ny", "tab\there", '"quoted", twice', "dont", "none", "3. 4."),
    *("it's a man's hat", "ü"),
)
Rule = Callable[[Sequence[Example], str], float]


def percent(points: Sequence[float]) -> float:
    return 100 * sum(points) / len(points)


def nlvr2(examples: Sequence[Example], text: str) -> float:
    """metrics.py: `line.strip().split(",")`, the second field against the label, letter case aside."""
    lines = [line.strip().split(",") for line in text.splitlines()]
    texts = {fields[0]: fields[1] for fields in lines}
    return percent([texts[example.id].lower() == example.answers[0].text.lower() for example in examples])


def vqav2(version: str) -> Rule:
    def rule(examples: Sequence[Example], text: str) -> float:
        texts = {str(row["question_id"]): row["answer"] for row in json.loads(text)}
        return percent([accuracy(texts[example.id], example.extra["human_answers"], version) for example in examples])

    return rule


def vizwiz(examples: Sequence[Example], text: str) -> float:
    texts = {row["image"]: normalise_evalai(row["answer"]) for row in json.loads(text)}
    truth = [[normalise_evalai(answer) for answer in example.extra["human_answers"]] for example in examples]
    return percent([leave_one_out(texts[row.images[0]], people) for row, people in zip(examples, truth, strict=True)])


def gqa(examples: Sequence[Example], text: str) -> float:
    """eval.py: letter by letter."""
    texts = {row["questionId"]: row["prediction"] for row in json.loads(text)}
    return percent([texts[example.id] == example.answers[0].text for example in examples])


def mmbench(examples: Sequence[Example], text: str) -> float:
    rows = {row["index"]: row for row in csv.DictReader(io.StringIO(text), delimiter="\t")}
    right = []
    for example in examples:
        row = rows[str(example.extra["index"])]
        choices = {letter: row[letter] for letter in "ABCD" if row[letter]}
        assert (row["question"], row["hint"], row["category"]) == ("which?", "a\tb", "c")
        right.append(chosen(row["prediction"], choices, "2025") == "ABCD"[example.extra["correct"]])
    return percent(right)


def value_choice(examples: Sequence[Example], text: str) -> float:
    choices = {name: int(index) for name, index in json.loads(text).items()}
    return round(percent([choices[example.id] == example.extra["correct"] for example in examples]), 2)


OFFICIAL: Mapping[tuple[str, str], tuple[str, Rule]] = {
    ("nlvr2", ""): ("accuracy", nlvr2),
    ("vqav2", "after_2021"): ("upload accuracy", vqav2("after_2021")),
    ("vqav2", "before_2021"): ("upload accuracy", vqav2("before_2021")),
    ("vizwiz", ""): ("accuracy", vizwiz),
    ("gqa", "llava"): ("accuracy", gqa),
    ("gqa", "vl_t5"): ("accuracy", gqa),
    ("mmbench", "2025"): ("accuracy", mmbench),
    ("tvqa", ""): ("value_accuracy", value_choice),
    ("how2qa", ""): ("value_accuracy", value_choice),
}
"""Benchmark and version -> the metric of the official script, and the script's rule over the file."""
ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in Path(__file__).with_name("submissions.jsonl").read_text().splitlines()
]
"""Records of a benchmark, answers, and the file's name and rows; some ids are no numbers, or hardly."""


def made(number: int, rng: random.Random) -> Example:
    correct = rng.randrange(4)
    extra = {"human_answers": rng.choices(TEXTS, k=10), "index": number, "correct": correct, "clip_id": number // 2}
    extra |= {"hint": "a\tb", "category": "c"}
    return Example(
        id=f"dev-{number}-0-0",
        images=(f"{number}.jpg",),
        question="which?",
        answers=(Answer(text=rng.choice(("True", "False", "yes", "a dog"))),),
        choices=("dog", "a cat", "x y", "none"),
        extra=extra,
    )


@pytest.mark.parametrize(("name", "mode"), OFFICIAL)
def test_an_upload_scores_as_metrics_json_says(name: str, mode: str) -> None:
    benchmark: Benchmark = BENCHMARKS[name]
    metric, rule = OFFICIAL[name, mode]
    rng = random.Random(7)
    examples = [made(number, rng) for number in range(400)]
    answers = {example.id: rng.choice(TEXTS) for example in examples if rng.random() < 0.8}
    write = benchmark.submissions.get(mode, benchmark.submission)
    scored = benchmark.modes[mode](examples, answers)
    assert 0 < scored.metrics[metric] < 100
    assert rule(examples, write(examples, answers)[1]) == pytest.approx(scored.metrics[metric], abs=1e-9)


def written(name: str, examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    write = BENCHMARKS[name].submission
    return write(examples, answers)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['benchmark']}-{row['examples'][0]['id']:.9}")
def test_files_hold_what_the_server_takes(row: dict[str, Any]) -> None:
    examples = [from_record(record) for record in row["examples"]]
    name, text = written(row["benchmark"], examples, row["answers"])
    rows = [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else json.loads(text)
    assert (name, rows) == (row["file"], row["content"])


@pytest.mark.parametrize("name", ["tvc", "yc2c"])
def test_value_files_have_the_published_form(name: str) -> None:
    with shared(f"value/{name}_val_predictions_sample.jsonl").open() as file:
        published = [json.loads(line) for line in file]
    examples, answers = [], {}
    for row in published:
        extra = {"clip_id": row["clip_id"], "vid_name": row.get("video_id") or row["vid_name"]}
        extra |= {"ts": row["ts"]} if "ts" in row else {}
        examples.append(Example(id=str(row["clip_id"]), answers=(Answer(text="x"),), extra=extra))
        answers[str(row["clip_id"])] = row["descs"][0]["desc"]
    file_name, text = written(name, examples, answers)
    assert file_name == f"{name}_test_predictions.jsonl"
    assert [json.loads(line) for line in text.splitlines()] == published


def test_a_judges_request_holds_all_it_needs() -> None:
    extra = {"category": "conv", "context": "a cat"}
    example = Example(id="0", question="q0", answers=(Answer(text="ref"),), extra=extra)
    (first,) = llava.judge_requests([example], {"0": "mine"})
    assert first["category"] == "conv"
    positions = [first["text"].index(part) for part in ("a cat", "q0", "ref", "mine")]
    assert positions == sorted(positions)
