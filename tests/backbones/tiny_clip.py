"""A CLIP of a few thousand weights."""

from __future__ import annotations

import torch
from transformers import CLIPConfig, CLIPModel


def small_clip(seed: int) -> CLIPModel:
    """The same for the same seed; four by four patches of 8 pixels."""
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**small, "image_size": 32, "patch_size": 8},
        text_config={**small, "vocab_size": 30},
        projection_dim=6,
    )
    return CLIPModel(config).eval()
