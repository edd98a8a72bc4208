"""Likelihoods of outputs behind one prompt against each output run by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dora_vl.backbones.model import DecoderBackbone
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.likelihood import branches, choose, log_likelihoods, outputs_of
from dora_vl.evaluation.predictions import PredictionsFile
from dora_vl.evaluation.questions import Question
from tests.backbones.tiny_language import tiny_language

OUTPUTS = [  # one is the beginning of another but for its end token, 2
    [[5, 6, 7, 8, 9, 2], [5, 6, 7, 8, 10, 2], [5, 6, 7, 8, 9, 11, 2]],
    [[30, 31, 2], [30, 40, 41, 42, 2]],
]
START = [3, 1]


def question(text: str, truth: str, answer: str, *, name: str = "q", added: str = "") -> Question:
    asked = Turn("user", f"{text}\n{added}" if added else text, len(added))
    return Question(id=name, images=(), turns=(asked,), truth=truth, answer=answer)


def test_as_each_output_by_itself() -> None:
    model = tiny_language()
    encoded = [[(torch.tensor(ids), start) for ids in one] for one, start in zip(OUTPUTS, START, strict=True)]
    found = log_likelihoods(DecoderBackbone(model), [branches(one) for one in encoded], device=torch.device("cpu"))
    for scores, outputs, start in zip(found, OUTPUTS, START, strict=True):
        alone = []
        for ids in outputs:
            predicted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            alone.append(sum(float(predicted[place - 1, ids[place]].detach()) for place in range(start, len(ids))))
        # What the outputs have in common is left out: differences are what is compared.
        torch.testing.assert_close(scores - scores[0], torch.tensor(alone) - alone[0], atol=1e-4, rtol=1e-4)


def test_the_choices_stand_in_the_questions_last_line() -> None:
    text, truth = "Is it?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2", "the correct answer is answer2"
    outputs = ["the correct answer is answer1", "the correct answer is answer2"]
    assert outputs_of(question(text, truth, "answer2")) == outputs
    assert outputs_of(question(text, truth, "answer2", added="a text\nabout it")) == outputs  # of the instruction
    with pytest.raises(BadSample, match="names no choices"):
        outputs_of(question("Is it?", truth, "answer2"))
    with pytest.raises(BadSample, match="'answer3' is not one of answer1/answer2"):
        outputs_of(question(text, truth, "answer3"))


def test_writes_the_likeliest_and_names_what_cannot_be_asked(tmp_path: Path) -> None:
    text = "Answer format: a/b/c"
    table = {"say a": [5, 6, 2], "say b": [5, 7, 2], "say c": [5, 8, 2]}
    model = tiny_language()
    best = max(table, key=lambda name: likelihood(model, table[name]))
    questions = [question(text, "say b", "b"), question("?", "x", "x", name="bad")]
    with PredictionsFile(tmp_path / "predictions.jsonl", {}) as file:
        failed = choose(
            DecoderBackbone(model),
            lambda _, output: (torch.tensor(table[output]), 1),
            questions,
            file=file,
            batch_size=4,
        )
        assert file.done["q"].prediction == best
    assert list(failed) == ["bad"]
    with (
        PredictionsFile(tmp_path / "others.jsonl", {}) as file,
        pytest.raises(UserError, match="no question can be scored by likelihood; bad: "),
    ):
        choose(DecoderBackbone(model), lambda _, output: (torch.tensor([1]), 0), questions[1:], file=file, batch_size=4)


def test_likelihoods_that_are_no_numbers_choose_nothing(tmp_path: Path) -> None:
    table, model = {"say a": [5, 6, 2], "say b": [5, 7, 2], "say c": [5, 8, 2], "say d": [5, 9, 2]}, tiny_language()
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = float("nan")
    questions = [
        question("Answer format: a/d", "say a", "a", name="broken"),
        question("Answer format: a/b/c", "say b", "b", name="whole"),
    ]
    with (
        PredictionsFile(tmp_path / "predictions.jsonl", {}) as file,
        pytest.raises(UserError, match=r"^question broken: the model's scores of the next word are no numbers"),
    ):
        choose(
            DecoderBackbone(model),
            lambda _, output: (torch.tensor(table[output]), 1),
            questions,
            file=file,
            batch_size=4,
        )
    assert list(file.done) == ["whole"]


def likelihood(model: torch.nn.Module, ids: list[int]) -> float:
    predicted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float((predicted[0, ids[1]] + predicted[1, ids[2]]).detach())
