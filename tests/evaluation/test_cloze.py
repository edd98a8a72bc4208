"""The cloze form: records of every published form, likelihoods as lm-eval finds them, both accuracies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dora_vl.backbones.families.formats import Instruction
from dora_vl.cli import main
from dora_vl.data.benchmarks.commonsense import cloze_row
from dora_vl.data.example import Example, iterate_examples
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample
from dora_vl.evaluation.predictions import read_predictions
from dora_vl.evaluation.scores.exact import PATTERNS, cloze_score
from dora_vl.evaluation.test_sets import score_lines
from tests.backbones.tiny_language import write_tiny_language

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS: dict[str, dict[str, Any]] = {
    row["form"]: row
    for row in map(json.loads, Path(__file__).with_name("cloze_rows.jsonl").read_text("utf-8").splitlines())
}
"""By form a published file's row, and the contexts, endings and right choice that it becomes."""


@pytest.mark.parametrize("form", ROWS)
def test_rows_of_every_form(form: str) -> None:
    expected = ROWS[form]
    example = cloze_row({**expected["row"], "row": 7}, task=expected["task"], split="test")
    assert example.id == f"{expected['task']}-test-7"
    assert example.extra == {name: expected[name] for name in ("task", "correct", "contexts", "endings")}
    right = (expected[name][expected["correct"]] for name in ("contexts", "endings"))
    assert (example.question, example.answers[0].text) == (*right,)


@pytest.mark.parametrize(
    ("task", "raw"),
    [
        ("boolq", {"instruction": "Please answer: x?\n\nAnswer format: true/false", "answer": "true"}),
        ("winogrande", {"sentence": "No blank.", "option1": "a", "option2": "b", "answer": "1"}),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": "2"}),
        ("piqa", {"title": "x"}),
    ],
)
def test_rows_that_cannot_be_used_are_named(task: str, raw: dict[str, Any]) -> None:
    with pytest.raises(BadSample) as caught:
        cloze_row({**raw, "row": 3}, task=task, split="train")
    assert caught.value.sample_id == f"{task}-train-3"


def test_a_sample_is_trained_on_what_follows_the_context() -> None:
    prompt = Instruction(name="cloze", train_on="answer", end="</s>")
    chat = prompt.render([Turn("user", "Question: q\nAnswer:"), Turn("assistant", "fire")])
    ((start, end),) = chat.answer_spans
    assert (chat.text, chat.text[start:end]) == ("Question: q\nAnswer: fire</s>", " fire</s>")


def example(name: str, task: str, endings: list[str], correct: int) -> Example:
    contexts = [f"c {number}" for number in range(len(endings))] if task == "winogrande" else ["c"] * len(endings)
    extra = {"task": task, "correct": correct, "contexts": contexts, "endings": endings}
    return Example(id=name, extra=extra)


def test_both_accuracies_by_hand() -> None:
    examples = [
        example("a", "piqa", ["x", "long one"], 1),  # -2 > -4, but -2/1 < -4/8
        example("b", "piqa", ["x", "y"], 0),
        example("c", "winogrande", ["same", "same"], 0),
        example("d", "winogrande", ["same", "same"], 0),
    ]
    answers = {"a": "-2.0 -4.0", "b": "-1.5 -1.5", "c": "-3 -2", "d": "-1 -2"}
    scored = cloze_score(examples, answers)
    assert scored.metrics == {"average": 50.0, "piqa": 50.0, "winogrande": 50.0, "normalised piqa": 100.0}
    assert scored.shares == {"a": 0.0, "b": 1.0, "c": 0.0, "d": 1.0}
    for task in PATTERNS:  # the normalised one is of the sets whose task file in lm-eval has acc_norm
        scored = cloze_score([example("a", task, ["x", "long one"], 1)], {"a": "-2.0 -4.0"})
        has_it = task not in ("boolq", "social_i_qa", "winogrande")
        assert scored.metrics == {"average": 0.0, task: 0.0} | ({f"normalised {task}": 100.0} if has_it else {})


@pytest.fixture(scope="module")
def scored_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cloze")
    write_tiny_language(folder / "model")
    for name, form in (("piqa", "piqa"), ("winogrande", "winogrande"), ("ARC-Easy", "arc")):
        rows = [ROWS[form]["row"] | ({"goal": f"Dry {n} hands"} if form == "piqa" else {}) for n in range(3)]
        (folder / "raw" / name).mkdir(parents=True)
        (folder / "raw" / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["prepare", "cloze", "--from", str(folder / "raw"), "--to", str(folder / "records")])
    words = ["--benchmarks", "piqa,winogrande,ARC-Easy", "--answer-by", "cloze", "--template", "cloze"]
    words += ["--records", str(folder / "records"), "--to", str(folder / "scores"), "--batch-size", "4"]
    main(["evaluate", "--model", str(folder / "model"), *words])
    return folder


def answers_to(folder: Path, task: str) -> dict[str, str]:
    rows = read_predictions(folder / "scores" / "predictions.jsonl")[task]
    return {name: row.prediction for name, row in rows.items()}


def likelihood(model: Any, tokenizer: Any, context: str, ending: str) -> float:
    """Written out: the log-softmax of each token of the ending, summed."""
    ids, before = tokenizer(f"{context} {ending}")["input_ids"], len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(scores[position - 1, ids[position]]) for position in range(before, len(ids)))


def test_likelihoods_are_the_model_s(scored_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(scored_folder / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(scored_folder / "model")
    scores = {(line["set"], line["id"]): line for line in score_lines(scored_folder / "scores")}
    for task in ("piqa", "winogrande", "ARC-Easy"):
        examples = list(iterate_examples(scored_folder / "records" / task / "test.jsonl"))
        answers = answers_to(scored_folder, task)
        assert set(answers) == {example.id for example in examples}
        for example in examples:
            pairs = zip(example.extra["contexts"], example.extra["endings"], strict=True)
            expected = [likelihood(model, tokenizer, *pair) for pair in pairs]
            assert [float(number) for number in answers[example.id].split()] == pytest.approx(expected, abs=2e-4)
            endings = [ending.strip() for ending in example.extra["endings"]]
            compared = scores[task, example.id]
            assert compared["truth"] == endings[example.extra["correct"]]
            assert compared["answer"] == endings[expected.index(max(expected))]
