"""Prompts of models without a chat template: what the formats write, take and refuse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from dora_vl.backbones.encoder import open_encoder
from dora_vl.backbones.prompts import QuestionAnswer
from dora_vl.data.example import Example
from dora_vl.data.samples import IGNORED_LABEL
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from tests.backbones.image_text_conversations import (
    RED,
    SAID,
    TALKS,
    TWO_QUESTIONS,
    adapted_backbone,
    encoder_of,
    sample_of,
)
from tests.backbones.tiny_language import write_tiny_language

Folders = Mapping[str, Path]


def test_question_answer_writes_a_line_for_each_round(folders: Folders) -> None:
    encoder = encoder_of(folders["chameleon"])
    sample = sample_of(encoder, TALKS[TWO_QUESTIONS])
    picture = "<boi>" + "<image>" * 64 + "<eoi>"
    assert encoder.tokenizer.decode(sample.input_ids) == (
        f"Question: Is {picture}or {picture}blue? Answer: The second is blue.<|im_end|>\n"
        "Question: Sure? Answer: Yes<|im_end|>"
    )
    trained = sample.labels != IGNORED_LABEL
    assert encoder.tokenizer.decode(sample.labels[trained]) == " The second is blue.<|im_end|> Yes<|im_end|>"


def test_question_answer_closes_a_language_model_s_answer_with_its_end_token(tmp_path: Path) -> None:
    encoder = open_encoder(str(write_tiny_language(tmp_path / "plain")), template="question_answer", max_tokens=256)
    sample = encoder.encode(Example("1", turns=(Turn("user", "Who runs?"), Turn("assistant", "The river."))))
    ids, end = sample.input_ids.tolist(), encoder.tokenizer.eos_token_id
    assert ids[-1] == sample.labels[-1] == end


@pytest.mark.parametrize("family", ["chameleon", "paligemma"])
def test_a_prompt_is_the_beginning_of_what_is_trained(folders: Folders, family: str) -> None:
    encoder = encoder_of(folders[family])
    turns, pictures = TALKS["one picture"]
    sample, prompt = sample_of(encoder, (turns, pictures)), encoder.encode_prompt(turns[:1], pictures)
    ids = prompt.input_ids
    assert torch.equal(ids, sample.input_ids[: len(ids)])
    assert int((sample.labels != IGNORED_LABEL).nonzero()[0]) == len(ids)


def test_paligemma_sees_the_question_both_ways_and_the_answer_one_way(folders: Folders) -> None:
    encoder, backbone = encoder_of(folders["paligemma"]), adapted_backbone(folders["paligemma"]).eval()
    sample = sample_of(encoder, TALKS["one picture"])
    types = sample.inputs["token_type_ids"][0]
    answer = sample.labels != IGNORED_LABEL
    assert torch.equal(types == 1, answer)
    assert encoder.tokenizer.decode(sample.input_ids[answer]) == f"{SAID}<|im_end|>"
    inputs = {name: value for name, value in sample.inputs.items() if name != "attention_mask"}
    mask = torch.ones(1, len(types), dtype=torch.int64)
    last_asked = int((~answer).nonzero()[-2])  # before the break that ends the question
    with torch.no_grad():
        whole = backbone.model(input_ids=sample.input_ids[None], attention_mask=mask, **inputs).logits[0]
        changed = sample.input_ids.clone()
        changed[last_asked] = 300
        question = backbone.model(input_ids=changed[None], attention_mask=mask, **inputs).logits[0]
    assert (whole[:last_asked] - question[:last_asked]).abs().max() > 1e-4  # what comes later in it is seen


@pytest.mark.parametrize(
    ("turns", "pictures"),
    [
        (TALKS[TWO_QUESTIONS][0], 2),
        ((Turn("user", "Is <image> red?"), Turn("assistant", "yes")), 1),
        (TALKS["no picture"][0], 0),
        ((Turn("user", "<image>\nWhat is <eos>?"), Turn("assistant", "<|im_end|>")), 1),
    ],
    ids=["two questions", "picture inside", "no picture", "special token"],
)
def test_what_paligemma_does_not_take_is_refused_by_id(
    folders: Folders, turns: tuple[Turn, ...], pictures: int
) -> None:
    encoder = encoder_of(folders["paligemma"])
    with pytest.raises(BadSample) as error:
        sample_of(encoder, (turns, (RED,) * pictures))
    assert error.value.sample_id == "conversation"


def test_a_processor_that_puts_a_separator_behind_every_text_is_refused(folders: Folders) -> None:
    """As Chameleon's of transformers before 5.23, which passes over what it is asked."""
    processor = AutoProcessor.from_pretrained(folders["chameleon"])
    QuestionAnswer(processor, "chameleon", pictures=True)
    name, now = "ChameleonProcessor", type(processor)
    processor.__class__ = type(
        name, (now,), {"__call__": lambda self, text, **_: now.__call__(self, text=[f"{item}</s>" for item in text])}
    )
    with pytest.raises(UserError):
        QuestionAnswer(processor, "chameleon", pictures=True)


def test_a_format_goes_before_the_chat_template(folders: Folders) -> None:
    encoder = encoder_of(folders["qwen2_5_vl"], template="question_answer")
    ids = sample_of(encoder, TALKS["no picture"]).input_ids
    assert encoder.tokenizer.decode(ids) == "Question: Say the colour red. Answer: red<|im_end|>"
