"""LLaVA-1.5-7B on the meta device: the trained parameters that the DoRA paper counts (arXiv 2402.09353, table 5)."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from dora_vl.backbones.model import language_targets, projector_patterns
from dora_vl.core import DoRAConfig, apply_dora, trained_parts

PROJECTOR = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
LOW_RANK = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
MAGNITUDES = 32 * (4 * 4096 + 2 * 11008 + 4096)


@pytest.mark.parametrize(("method", "expected"), [("lora", 340_795_392), ("dora", 342_155_264)])
def test_llava_7b_at_rank_128(method: str, expected: int) -> None:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(vocab_size=32064),  # LlamaConfig's own defaults are LLaMA-7B's shapes
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    apply_dora(
        model,
        DoRAConfig(
            targets=language_targets(model),
            method=method,  # pyright: ignore
            rank=128,
            alpha=256.0,
            also_train={"projector": projector_patterns(model)},
        ),
    )
    counts: Counter[str] = Counter()
    for part in trained_parts(model):  # a part appears twice where only some of it has weight decay
        counts[part.name] += sum(weight.numel() for weight in part.parameters.values())
    part_names = {"dora.A", "dora.B", "projector"} | ({"dora.magnitude"} if method == "dora" else set())
    assert {name for name, count in counts.items() if count} == part_names
    assert counts["projector"] == PROJECTOR == 20_979_712
    assert counts["dora.A"] + counts["dora.B"] == LOW_RANK == 319_815_680
    assert counts["dora.magnitude"] == (MAGNITUDES if method == "dora" else 0)
    assert sum(counts.values()) == expected
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == expected
