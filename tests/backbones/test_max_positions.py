"""A text longer than the model's positions is cut and counted, or refused with both numbers; it is no index error."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlavaConfig

from dora_vl.backbones.base import max_positions
from dora_vl.backbones.model import DecoderBackbone
from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.backbones.templates import Prompt
from dora_vl.backbones.tower_sources import small_tokenizer
from dora_vl.backbones.vlbart import VlBartBackbone
from dora_vl.errors import BadSample
from dora_vl.evaluation.assistant import check_room
from tests.backbones.tiny_vlbart import tiny

WORDS = "hello there how are you [Subs] [Q] is it red?"
POSITIONS = 64
"""Of the tiny VL-BART, where bart-base has 1,024."""


@pytest.fixture(scope="module")
def encoder() -> Seq2SeqEncoder:
    return Seq2SeqEncoder(small_tokenizer(iter([WORDS] * 4), vocabulary=310), max_positions=POSITIONS)


@pytest.mark.parametrize("max_tokens", [None, 600])
@pytest.mark.parametrize("subtitles", ["", " hello there" * 200])
def test_the_longest_text_of_a_vlbart_is_what_its_encoder_reads(
    encoder: Seq2SeqEncoder, max_tokens: int | None, subtitles: str
) -> None:
    question = "[Q] is it red?" if subtitles else "[Q] is it red? " * 40
    prompt = Prompt(subtitles_before="[Subs]", subtitles=subtitles, text=question)
    ids, cut = encoder.encode(prompt, max_tokens=max_tokens)
    whole, nothing = Seq2SeqEncoder(encoder.tokenizer).encode(prompt, max_tokens=None)
    assert (len(ids), cut, nothing) == (POSITIONS, len(whole) - POSITIONS, 0)
    if subtitles:  # they go first, the question stays
        assert str(encoder.tokenizer.decode(ids.tolist())).endswith("[Q] is it red?</s>")
    backbone, features = VlBartBackbone(tiny()), torch.randn(1, 1, 4, 8)
    labels = encoder.labels("hello " * 100, max_tokens=500)
    assert len(labels) == POSITIONS
    scores = backbone.likelihoods(ids[None], torch.ones_like(ids)[None], features, labels[None])
    assert scores.isfinite().all()
    longest = backbone.generate(ids[None], torch.ones_like(ids)[None], features, max_length=POSITIONS + 9)
    assert longest.shape[1] <= POSITIONS
    with pytest.raises(IndexError):  # what happened before
        backbone.encode(whole[None], torch.ones_like(whole)[None], features)


def test_a_shorter_limit_still_counts(encoder: Seq2SeqEncoder) -> None:
    prompt = Prompt(text="is it red? " * 40)
    ids, cut = encoder.encode(prompt, max_tokens=20)
    assert len(ids) == 20
    assert cut == len(encoder.tokenizer(prompt.text, add_special_tokens=False).input_ids) - 18
    assert len(encoder.labels("hello " * 100, max_tokens=7)) == 7


def test_the_number_stands_in_the_text_models_config() -> None:
    assert max_positions(GPT2Config(n_positions=48)) == 48
    nested = LlavaConfig(text_config={"model_type": "llama", "max_position_embeddings": 77})
    assert max_positions(nested) == 77
    assert max_positions(tiny().config) == POSITIONS


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused_with_both_numbers() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_positions=24, n_embd=8, n_layer=1, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=None)
    backbone = DecoderBackbone(GPT2LMHeadModel(config).eval())
    positions = max_positions(backbone.config)
    ids = torch.arange(18)[None] + 2
    check_room(18, 6, positions, "q1")
    assert backbone.generate(ids, torch.ones_like(ids), max_new_tokens=6).shape == (1, 6)
    with pytest.raises(BadSample) as error:
        check_room(19, 6, positions, "q2")
    assert error.value.sample_id == "q2"
    check_room(10**6, 6, None, "q3")  # a model that states no number
