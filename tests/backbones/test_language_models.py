"""Language models without eyes, through the same backbone and encoder: conversations of words alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dora_vl.backbones.generation import generation_loss
from dora_vl.backbones.model import open_backbone, projector_patterns
from dora_vl.data.samples import IGNORED_LABEL
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from tests.backbones.image_text_talks import TALKS, adapted_backbone, batch_of, encoder_of, sample_of
from tests.backbones.tiny_families.language import LANGUAGE_MODELS
from tests.backbones.tiny_image_text import write_tiny_language

ROUNDS = (
    (
        Turn("user", "Say the colour red."),
        Turn("assistant", "red"),
        Turn("user", "Sure?"),
        Turn("assistant", "Yes, it is."),
    ),
    (),
)


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_ids_are_the_chat_template_s_and_the_loss_is_the_model_s_own(tmp_path: Path, model_type: str) -> None:
    folder = write_tiny_language(model_type, tmp_path / model_type)
    backbone = adapted_backbone(folder)
    encoder = encoder_of(folder)
    sample = sample_of(encoder, ROUNDS)
    messages = [{"role": turn.role, "content": turn.text} for turn in ROUNDS[0]]
    assert sample.input_ids.tolist() == encoder.tokenizer.apply_chat_template(messages)["input_ids"]
    trained = sample.labels[sample.labels != IGNORED_LABEL]
    assert encoder.tokenizer.decode(trained) == "red<|im_end|>Yes, it is.<|im_end|>"
    batch = batch_of(encoder, [ROUNDS, TALKS["no picture"]])
    features = backbone(**batch)
    loss = generation_loss(features.logits, features.targets).loss
    torch.testing.assert_close(loss, backbone.model(**batch).loss, rtol=0, atol=1e-5)
    loss.backward()
    assert all(one.grad is not None for one in backbone.parameters() if one.requires_grad)


def test_a_picture_is_refused_by_the_sample_s_id(tmp_path: Path) -> None:
    encoder = encoder_of(write_tiny_language("llama", tmp_path / "llama"))
    with pytest.raises(BadSample) as raised:
        sample_of(encoder, TALKS["one picture"])
    assert raised.value.sample_id == "talk"


def test_it_answers(tmp_path: Path) -> None:
    folder = write_tiny_language("qwen2", tmp_path / "qwen2")
    encoder, backbone = encoder_of(folder), open_backbone(str(folder))
    prompt = encoder.encode_prompt(ROUNDS[0][:1], ())
    answer = backbone.generate(**prompt, max_new_tokens=3)
    assert 1 <= answer.shape[1] <= 3
    assert projector_patterns(backbone.model) == ()


def test_without_chat_template_a_format_must_be_named(tmp_path: Path) -> None:
    folder = write_tiny_language("llama", tmp_path / "llama")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError):
        encoder_of(folder)
    sample = sample_of(encoder_of(folder, template="question_answer"), ROUNDS)
    text = "Question: Say the colour red. Answer: red<|im_end|>\nQuestion: Sure? Answer: Yes, it is.<|im_end|>"
    assert encoder_of(folder, template="question_answer").tokenizer.decode(sample.input_ids) == text
