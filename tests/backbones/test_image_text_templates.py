"""Chat templates of many forms: which answers they let train, and which are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dora_vl.data.samples import IGNORED_LABEL
from dora_vl.errors import BadSample, UserError
from tests.backbones.image_text_talks import SAID, TALKS, encoder_of, sample_of
from tests.backbones.published_chat import (
    GEMMA3,
    LLAVA_NEXT_MISTRAL,
    LLAVA_NEXT_VICUNA,
    LLAVA_ONEVISION,
    QWEN2_VL,
    SMOLVLM,
)
from tests.backbones.tiny_image_text import CHATML, write_tiny

TURN = "{{ m.role }}: {% for p in m.content %}{% if p.type == 'image' %}PICTURE{% else %}{{ p.text }}{% endif %}"


OPEN = "{% if add_generation_prompt %}assistant: {% endif %}"


PLAIN = "{% for m in messages %}" + TURN + "{% endfor %} {% endfor %}" + OPEN


def test_a_template_that_closes_no_answer_gets_the_end_token(tmp_path: Path) -> None:
    encoder = encoder_of(write_tiny("qwen2_5_vl", tmp_path / "open", template=PLAIN))
    turns, pictures = TALKS["two pictures, two questions"]
    sample = sample_of(encoder, (turns, pictures))
    assert encoder.tokenizer.decode(sample.labels[sample.labels != IGNORED_LABEL]) == (
        "The second is blue.<|im_end|>Yes<|im_end|>"
    )


STRIPPING = CHATML.replace(
    "{% if m.content is string %}", "{% if m.role != 'user' and m != messages[-1] %}...{% elif m.content is string %}"
)


REWRITING = CHATML.replace(
    "{% for part in m.content %}",
    "{% if m.role == 'assistant' and m == messages[-1] %}<think></think>{% endif %}{% for part in m.content %}",
)


NO_PICTURES = CHATML.replace("PICTURE", "")


@pytest.mark.parametrize("template", [NO_PICTURES, "{% for m in messages %}{{ m.role }}{% endfor %}"])
def test_a_template_that_cannot_be_trained_on_is_refused(tmp_path: Path, template: str) -> None:
    folder = write_tiny("qwen2_5_vl", tmp_path / "odd", template=template)
    with pytest.raises(UserError):
        encoder_of(folder)


@pytest.mark.parametrize("template", [STRIPPING, REWRITING])
def test_a_template_that_rewrites_earlier_answers_takes_one_question_at_a_time(tmp_path: Path, template: str) -> None:
    encoder = encoder_of(write_tiny("qwen2_5_vl", tmp_path / "odd", template=template))
    sample = sample_of(encoder, TALKS["one picture"])
    assert encoder.tokenizer.decode(sample.labels[sample.labels != IGNORED_LABEL]).endswith(f"{SAID}<|im_end|>")
    with pytest.raises(BadSample):
        sample_of(encoder, TALKS["two pictures, two questions"])


THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}").replace(
    "{% for part in m.content %}",
    "{% if m.role == 'assistant' and m == messages[-1] %}<think>\n\n</think>\n\n{% endif %}{% for part in m.content %}",
)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (QWEN2_VL, "It is red.<|im_end|>"),
        (SMOLVLM, " It is red.<end_of_utterance>"),
        (LLAVA_NEXT_VICUNA, " It is red.<|im_end|>"),
        (LLAVA_NEXT_MISTRAL, " It is red.<|im_end|>"),
        (LLAVA_ONEVISION, "It is red.<|im_end|>"),
        (GEMMA3, "It is red.<eoi>"),
        (THINKING, "It is red.<|im_end|>"),
    ],
    ids=["qwen2_vl", "smolvlm", "llava_next_vicuna", "llava_next_mistral", "llava_onevision", "gemma3", "thinking"],
)
def test_published_templates(tmp_path: Path, template: str, said: str) -> None:
    encoder = encoder_of(write_tiny("qwen2_5_vl", tmp_path / "published", template=template))
    turns, pictures = TALKS["one picture"]
    sample = sample_of(encoder, (turns, pictures))
    assert encoder.tokenizer.decode(sample.labels[sample.labels != IGNORED_LABEL]) == said
    begin = encoder.tokenizer.bos_token_id
    assert int((sample.input_ids == begin).sum()) == (1 if template == GEMMA3 else 0)
    prompt = encoder.encode_prompt(turns[:1], pictures)["input_ids"][0]
    assert torch.equal(prompt, sample.input_ids[: len(prompt)])
    assert int((sample.labels != IGNORED_LABEL).nonzero()[0]) == len(prompt)


def test_answers_are_trained_behind_what_is_asked(tmp_path: Path) -> None:
    """The published LLaVA-OneVision opens an answer with a space and a line break, and asks without the space."""
    encoder = encoder_of(write_tiny("qwen2_5_vl", tmp_path / "published", template=LLAVA_ONEVISION))
    turns, pictures = TALKS["two pictures, two questions"]
    sample = sample_of(encoder, (turns, pictures))
    text = encoder.tokenizer.decode(sample.input_ids)
    assert text.count("<|im_start|>assistant\n") == 2
    assert "assistant \n" not in text
    assert text.endswith(f"{turns[-1].text}<|im_end|>")
    said = encoder.tokenizer.decode(sample.labels[sample.labels != IGNORED_LABEL])
    assert said == "".join(f"{turn.text}<|im_end|>" for turn in turns if turn.role == "assistant")
