"""The published prompts to the last space, and the labels they are trained with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import normalizers

from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.pieces import PieceProcessor
from dora_vl.backbones.prompts import prompts_of
from dora_vl.backbones.templates import PROMPTS
from dora_vl.data.example import Example
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from tests.backbones.tiny_language import byte_tokenizer

QUESTION = "Please answer: is {input} </s> a question?\n\nAnswer format: true/false"


def said(instruction: str, output: str, *, added: str = "") -> Example:
    question = Turn("user", f"{instruction}\n{added}" if added else instruction, len(added))
    return Example("0", (), (question, Turn("assistant", output)))


TASK = said(QUESTION, "the correct answer is true")


SPACES = " " * 16
PLAIN = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request."
)
ADDED = "hello {instruction}"


def laid_out(first: str, blank: str, added: str = "") -> str:
    """NVlabs/DoRA's and LLM-Adapters' `generate_prompt`."""
    middle = f"{SPACES}### Input:\n{SPACES}{added}\n{blank}\n" if added else ""
    return f"{first}\n\n{SPACES}### Instruction:\n{SPACES}{QUESTION}\n{blank}\n{middle}{SPACES}### Response:\n{SPACES}"


@pytest.mark.parametrize(
    ("prompt", "added", "test", "expected"),
    [
        ("nvlabs", "", False, laid_out(f"{PLAIN}  ", SPACES)),
        ("nvlabs", ADDED, False, laid_out(f"{PAIRED} ", SPACES, ADDED)),
        ("nvlabs", "", True, laid_out(f"{PLAIN} ", "")),
        ("nvlabs", ADDED, True, laid_out(PAIRED, "", ADDED)),
        ("llm_adapters", "", False, laid_out(f"{PLAIN}  # noqa: E501", SPACES)),
        ("llm_adapters", "", True, laid_out(f"{PLAIN} ", "")),
        ("alpaca", "", False, f"{PLAIN}\n\n### Instruction:\n{QUESTION}\n\n### Response:\n"),
        ("alpaca", "", True, f"{PLAIN}\n\n### Instruction:\n{QUESTION}\n\n### Response:\n"),
    ],
)
def test_the_prompts_as_published(prompt: str, added: str, test: bool, expected: str) -> None:
    assert PROMPTS[prompt].before_output(QUESTION, added, test=test) == expected


def encoder(prompt: str = "nvlabs", train_on: Any = "answer", max_tokens: int = 400) -> Encoder:
    processor = PieceProcessor(byte_tokenizer())
    prompts = prompts_of(processor, "test", prompt, pictures=False, train_on=train_on)
    return Encoder(processor, prompts, max_tokens=max_tokens)


@pytest.mark.parametrize("left", ["", "b"])
def test_a_tokenizer_that_drops_or_rewrites_letters_is_refused_or_read(left: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", left)
    if left:
        assert PieceProcessor(tokenizer).begin_text == tokenizer.bos_token
        return
    with pytest.raises(UserError):
        PieceProcessor(tokenizer)


def test_ids_are_the_tokenizers_own_and_the_answer_alone_is_labelled() -> None:
    tokenizer = byte_tokenizer()
    plain = said("Is it so?", "the correct answer is true")
    prompt = PROMPTS["nvlabs"].before_output("Is it so?", "", test=False)
    whole = tokenizer(prompt + "the correct answer is true", return_offsets_mapping=True)
    encoded = encoder().encode(plain)
    assert encoded.input_ids.tolist() == [*whole.input_ids, tokenizer.eos_token_id]
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    labelled = encoded.labels != -100
    # A token that begins in the prompt's last space and ends in the output is the output's, as in the reference.
    assert labelled.tolist() == [*(end > len(prompt) for _, end in whole.offset_mapping), True]
    assert str(tokenizer.decode(encoded.labels[labelled])).strip() == "the correct answer is true</s>"
    assert torch.equal(encoded.labels[labelled], encoded.input_ids[labelled])
    everything = encoder(train_on="all").encode(plain)
    assert torch.equal(everything.labels, everything.input_ids)


def test_an_end_token_in_a_question_stays_text() -> None:
    ids = encoder().encode(TASK).input_ids.tolist()
    assert ids.count(byte_tokenizer().eos_token_id) == 1
    assert ids[-1] == byte_tokenizer().eos_token_id


def test_a_cut_sample_loses_its_end_and_says_so() -> None:
    whole = encoder(train_on="all").encode(TASK)
    length = len(whole.input_ids)
    cut = encoder(train_on="all", max_tokens=length - 6).encode(TASK)
    assert cut.cut_tokens == 6
    assert torch.equal(cut.input_ids, whole.input_ids[: length - 6])
    exactly = encoder(train_on="all", max_tokens=length - 1).encode(TASK)
    assert exactly.cut_tokens == 1
    assert exactly.input_ids[-1] != byte_tokenizer().eos_token_id  # as in the references: no room for it
    with pytest.raises(BadSample):
        encoder(max_tokens=20).encode(TASK)


@pytest.mark.parametrize("prompt", ["nvlabs", "alpaca"])
def test_a_choice_is_tokenised_with_its_prompt(prompt: str) -> None:
    coder = encoder(prompt=prompt)
    turns = [Turn("user", "Is it so?")]
    encoded = coder.encode_choice(turns, "the correct answer is true")
    ids, start = encoded.input_ids, int((encoded.labels != -100).int().argmax())
    text = PROMPTS[prompt].before_output("Is it so?", "", test=True)
    tokenizer = byte_tokenizer()
    assert ids.tolist() == [*tokenizer(text + "the correct answer is true").input_ids, tokenizer.eos_token_id]
    assert coder.decode(ids[start:]).strip() == "the correct answer is true"
    assert coder.encode_prompt(turns).input_ids.tolist() == byte_tokenizer()(text).input_ids


@pytest.mark.parametrize("added", ["", "hello {instruction}", " \n two lines "])
def test_an_input_has_its_own_place_in_training_and_test(added: str) -> None:
    conversation = said("Say it.", "hello", added=added)
    tokenizer = byte_tokenizer()
    train, test = (PROMPTS["nvlabs"].before_output("Say it.", added, test=test) for test in (False, True))
    ids = encoder(max_tokens=900).encode(conversation).input_ids
    assert ids.tolist() == [*tokenizer(f"{train}hello").input_ids, tokenizer.eos_token_id]
    assert encoder().encode_prompt(conversation.turns[:1]).input_ids.tolist() == tokenizer(test).input_ids


@pytest.mark.parametrize(
    "conversation",
    [
        Example("0", (), (Turn("system", "s"), *TASK.turns)),
        Example("0", (), (*TASK.turns, *TASK.turns)),
        said("  ", "hello"),
        said("", "hello", added="to this"),
    ],
)
def test_what_is_no_single_instruction_is_named(conversation: Example) -> None:
    with pytest.raises(BadSample) as error:
        encoder(train_on="all").encode(conversation)
    assert error.value.sample_id == conversation.id
