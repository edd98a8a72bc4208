"""What a model forgets, beside cross-entropies written out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dora_vl.backbones.encoder import open_encoder
from dora_vl.backbones.model import open_backbone
from dora_vl.data.turns import Turn
from dora_vl.evaluation.assistant import Assistant, EncoderPrompts
from dora_vl.evaluation.forgetting import PASSAGES, abilities, forgetting, in_words
from tests.backbones.tiny_language import write_tiny_language


def test_the_base_s_answers_are_measured_on_both_models_without_what_closes_them(tmp_path: Path) -> None:
    base = write_tiny_language(tmp_path / "base")
    encoder = open_encoder(str(base), template="vicuna_v1", max_tokens=512)
    model = open_backbone(str(base), dtype=torch.float32).eval()
    assistant = Assistant(model, EncoderPrompts(encoder))
    before = abilities(assistant)
    with torch.no_grad():
        model.model.model.layers[0].self_attn.q_proj.weight.add_(0.3)
    after = abilities(assistant, base=before)
    assert before.answers is not None
    nats, tokens = 0.0, 0
    for question, answer in before.answers.items():
        prompt = encoder.encode_prompt([Turn("user", question)]).input_ids.tolist()
        ids = prompt + encoder.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        logits = model.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        places = range(len(prompt), len(ids))
        nats -= sum(float(logits[place - 1, ids[place]]) for place in places)
        tokens += len(places)
    assert after.answer_nats == pytest.approx(nats / tokens, rel=1e-4)
    assert before.answer_nats is not None
    assert before.answer_nats < nats / tokens

    entry = forgetting(before, after)
    assert entry["answers"]["nats"] == {"base": before.answer_nats, "adapted": after.answer_nats}
    assert entry["answers"]["n"] == len(PASSAGES["questions"])
    said = in_words(entry)
    assert f"{math.exp(after.nats) / math.exp(before.nats):.2f} times" in said["perplexity of other text"]
    assert f"{after.answer_nats:.2f} after" in said["answers to other questions"]
    assert in_words({"reason": "it takes no words"}) == {}
    assert in_words(None) == {}
