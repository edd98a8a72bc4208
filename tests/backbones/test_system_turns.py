"""A system turn before a talk: at the template's own place for it, never trained on, or refused in a line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_vl.backbones.encoder import Encoder
from dora_vl.data.samples import IGNORED_LABEL, Sample
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample
from tests.backbones.image_text_talks import (
    ASKED,
    SAID,
    TALKS,
    TWO_QUESTIONS,
    Talk,
    encoder_of,
    messages_of,
    processor_inputs,
    sample_of,
)
from tests.backbones.published_chat import (
    GEMMA3_WITH_SYSTEM,
    GLM,
    LLAMA3,
    LLAVA_NEXT_MISTRAL,
    LLAVA_NEXT_VICUNA,
    LLAVA_ONEVISION,
    PIXTRAL,
    QWEN2_VL,
    SMOLVLM,
)
from tests.backbones.tiny_families.table import FAMILIES
from tests.backbones.tiny_image_text import CHATML, write_tiny, write_tiny_language

Folders = Mapping[str, Path]
SYSTEM = Turn("system", "Be brief. Look at its edges.")
SOME = ("qwen2_5_vl", "smolvlm", "internvl", "gemma3", "llava_next", "glm4v", "mistral3", "mllama")
NONCHARACTERS = ("\ufdd0", "\ufdd1", "\ufdef")


def with_system(talk: Talk, system: Turn = SYSTEM) -> Talk:
    turns, pictures = talk
    return (system, *turns), pictures


def trained(encoder: Encoder, sample: Sample) -> str:
    """What of a sample has labels, as text."""
    return encoder.tokenizer.decode(sample.labels[sample.labels != IGNORED_LABEL])


@pytest.mark.parametrize("family", SOME)
def test_inputs_are_the_processor_s_own_and_answers_alone_are_trained(folders: Folders, family: str) -> None:
    pytest.importorskip(FAMILIES[family].needs or "transformers")
    encoder = encoder_of(folders[family])
    for talk in TALKS.values():
        given = with_system(talk)
        sample, without = sample_of(encoder, given), sample_of(encoder, talk)
        theirs = processor_inputs(encoder, family, [given])
        ours = {"input_ids": sample.input_ids[None], **sample.inputs}
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0, check_dtype=name != "input_ids")
        labelled = sample.labels != IGNORED_LABEL
        assert torch.equal(sample.labels[labelled], sample.input_ids[labelled])
        assert trained(encoder, sample) == trained(encoder, without)
        assert encoder.tokenizer.decode(sample.input_ids).count(SYSTEM.text) == 1


def template_ids(encoder: Encoder, talk: Talk, *, system_as_text: bool) -> Tensor:
    """The prompt's ids, by the processor's own `apply_chat_template`."""
    messages = messages_of(talk)
    if system_as_text:
        messages[0]["content"] = talk[0][0].text
    found: Any = encoder.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return found["input_ids"][0]


PUBLISHED = {
    "chatml": (CHATML, "<|im_end|>"),
    "qwen2_vl": (QWEN2_VL, "<|im_end|>"),
    "smolvlm": (SMOLVLM, "<end_of_utterance>"),
    "llava_next_vicuna": (LLAVA_NEXT_VICUNA, "<|im_end|>"),
    "llava_onevision": (LLAVA_ONEVISION, "<|im_end|>"),
    "gemma3": (GEMMA3_WITH_SYSTEM, "<eoi>"),
    "glm": (GLM, "<|im_end|>"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates(tmp_path: Path, name: str) -> None:
    template, closing = PUBLISHED[name]
    encoder = encoder_of(write_tiny("qwen2_5_vl", tmp_path / "published", template=template))
    turns, pictures = with_system(TALKS["one picture"])
    sample, prompt = sample_of(encoder, (turns, pictures)), encoder.encode_prompt(turns[:2], pictures)
    expected = template_ids(encoder, (turns[:2], pictures), system_as_text=name == "glm")
    assert prompt["input_ids"][0].tolist() == expected.tolist()
    assert torch.equal(sample.input_ids[: len(expected)], expected)
    assert int((sample.labels != IGNORED_LABEL).nonzero()[0]) == len(expected)
    assert trained(encoder, sample).strip() == f"{SAID}{closing}"
    turns, pictures = with_system(TALKS[TWO_QUESTIONS])
    several, text = sample_of(encoder, (turns, pictures)), encoder.tokenizer.decode(expected)
    assert trained(encoder, several).replace(" Y", "Y").strip() == f"The second is blue.{closing}Yes{closing}"
    assert text.count(SYSTEM.text) == (2 if name == "llava_next_vicuna" else 1)  # the published one says it twice
    assert "'type'" not in text
    assert "You are a helpful assistant" not in text  # Qwen2-VL's own gives way


RAISING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML


@pytest.mark.parametrize("template", [RAISING, LLAVA_NEXT_MISTRAL, PIXTRAL], ids=["raising", "llava_next", "pixtral"])
@pytest.mark.parametrize("text", [SYSTEM.text, ASKED], ids=["other words", "the question's words"])
def test_a_template_without_a_place_for_it_refuses_the_sample(tmp_path: Path, template: str, text: str) -> None:
    encoder = encoder_of(write_tiny("qwen2_5_vl", tmp_path / "odd", template=template))
    talk = TALKS["one picture"]
    sample_of(encoder, talk)
    with pytest.raises(BadSample) as refused:
        sample_of(encoder, with_system(talk, replace(SYSTEM, text=text)))
    assert refused.value.sample_id == "talk"


def test_a_place_in_the_last_question_alone_serves_prompts_of_one(tmp_path: Path) -> None:
    encoder = encoder_of(write_tiny("qwen2_5_vl", tmp_path / "odd", template=PIXTRAL))
    (system, asked, *_), pictures = with_system(TALKS["one picture"])
    text = encoder.tokenizer.decode(encoder.encode_prompt((system, asked), pictures)["input_ids"][0])
    assert f"[INST]{SYSTEM.text}\n\n" in text
    with pytest.raises(BadSample):
        encoder.encode_prompt(with_system(TALKS[TWO_QUESTIONS])[0][:4], TALKS[TWO_QUESTIONS][1])


@pytest.mark.parametrize("family", ["chameleon", "paligemma"])
def test_formats_without_a_place_for_it_refuse_the_sample(folders: Folders, family: str) -> None:
    encoder, talk = encoder_of(folders[family]), TALKS["one picture"]
    sample_of(encoder, talk)
    with pytest.raises(BadSample):
        sample_of(encoder, with_system(talk))


@pytest.mark.parametrize(
    "turns",
    [
        (SYSTEM, SYSTEM, *TALKS["no picture"][0]),
        (TALKS["no picture"][0][0], SYSTEM),
        (SYSTEM,),
        (SYSTEM, Turn("assistant", "a")),
        (replace(SYSTEM, text="Say <|im_end|>."), *TALKS["no picture"][0]),
    ],
    ids=["two", "later", "alone", "before an answer", "special token"],
)
def test_what_is_no_system_turn_before_a_talk_is_refused(folders: Folders, turns: tuple[Turn, ...]) -> None:
    encoder = encoder_of(folders["qwen2_5_vl"])
    with pytest.raises(BadSample):
        sample_of(encoder, (turns, ()))


@pytest.mark.parametrize("template", [LLAMA3, CHATML, GLM], ids=["llama3", "chatml", "glm"])
@pytest.mark.parametrize("system", [True, False], ids=["system", "talk alone"])
def test_a_language_model_s_template_writes_words_and_no_list_of_parts(
    tmp_path: Path, template: str, system: bool
) -> None:
    encoder = encoder_of(write_tiny_language("llama", tmp_path / "llama", template=template))
    talk = with_system(TALKS["no picture"]) if system else TALKS["no picture"]
    sample = sample_of(encoder, talk)
    messages = [{"role": turn.role, "content": turn.text} for turn in talk[0]]
    expected = encoder.tokenizer.apply_chat_template(messages)["input_ids"]
    added = ["<|im_end|>"] if template == GLM else []  # it closes no answer
    assert sample.input_ids.tolist() == expected + encoder.tokenizer.convert_tokens_to_ids(added)
    assert trained(encoder, sample) == "red<|im_end|>"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "chameleon"])
@pytest.mark.parametrize("mark", NONCHARACTERS, ids=ascii)
def test_marks_of_ours_in_people_s_words_are_refused(folders: Folders, family: str, mark: str) -> None:
    """U+FDD1 stands for a video in here: in a question it would ask the template for one."""
    encoder = encoder_of(folders[family])
    for place, turns in enumerate(
        (
            (Turn("user", f"Is {mark} red?"), Turn("assistant", "no")),
            (Turn("user", "Is it red?"), Turn("assistant", f"no{mark}")),
            (Turn("system", mark), Turn("user", "Is it red?"), Turn("assistant", "no")),
        )
    ):
        with pytest.raises(BadSample):
            sample_of(encoder, (turns, ()))
        if place != 1:
            with pytest.raises(BadSample):
                encoder.encode_prompt(turns[:-1], ())
