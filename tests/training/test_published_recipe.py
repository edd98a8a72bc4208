"""The published 7B recipes run from `tokenizer.model` to a merged folder that any tool opens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from dora_vl.adapters.folder import load_adapter
from dora_vl.backbones.loading import load_tokenizer
from dora_vl.backbones.model import open_backbone
from tests.training.published_recipe import run_all
from tests.training.tiny_run import logged_losses, weights_of


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_stages_and_the_merge(tmp_path: Path) -> None:
    run_all(tmp_path, python=Path(sys.executable))
    runs = tmp_path / "runs"
    assert len(logged_losses(runs / "pretrain")) == 4
    stage_2 = logged_losses(runs / "dora")
    assert len(stage_2) == 6
    assert sum(stage_2[3:]) < sum(stage_2[:3])
    assert len(weights_of(runs / "pretrain")) == 4  # weight and bias of the projector's two linears
    tokenizer = load_tokenizer(str(runs / "merged"))
    picture = tokenizer.convert_tokens_to_ids("<image>")
    ids = torch.tensor([[*tokenizer(" Is it").input_ids, *[picture] * 4, *tokenizer("red?").input_ids[1:]]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    adapted = open_backbone(str(runs / "base"))
    before = adapted.model(**inputs).logits
    load_adapter(adapted.model, runs / "dora" / "adapter")
    expected = adapted.model(**inputs).logits
    merged = LlavaForConditionalGeneration.from_pretrained(runs / "merged", dtype=torch.float32)
    error = (merged(**inputs).logits - expected).abs().max()
    assert error < 0.05 * (expected - before).abs().max()  # the merged weights are rounded to bfloat16
