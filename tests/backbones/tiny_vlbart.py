"""A VL-BART of a few thousand parameters, and bart-base's shape without values."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_vl.backbones.vision_store import FeatureWriter, MediumFeatures
from dora_vl.backbones.vlbart_model import VlBartConfig, VlBartForConditionalGeneration

BART_BASE: dict[str, Any] = {
    "vocab_size": 50465,
    "d_model": 768,
    **{f"{side}_layers": 6 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 12 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 3072 for side in ("encoder", "decoder")},
}
TINY: dict[str, Any] = {
    "vocab_size": 320,
    "d_model": 16,
    "max_position_embeddings": 64,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
}


def meta_bart_base(**changes: Any) -> VlBartForConditionalGeneration:
    with torch.device("meta"):
        return VlBartForConditionalGeneration(VlBartConfig(**{**BART_BASE, **changes}))


def tiny(seed: int = 0, **changes: Any) -> VlBartForConditionalGeneration:
    """Random weights, every vector moved away from its start too."""
    torch.manual_seed(seed)
    model = VlBartForConditionalGeneration(VlBartConfig(**{**TINY, "feature_width": 8, **changes})).eval()
    move(model)
    return model


@torch.no_grad()
def move(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 1 and parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.3)


def batch(rows: int = 3, images: int = 1, tokens: int = 49, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 100, (rows, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    labels = torch.randint(4, 100, (rows, 4), generator=generator)
    labels[0, 2:] = -100
    features = torch.randn(rows, images, tokens, 8, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "features": features}


def write_features(folder: Path, numbers: Tensor) -> Path:
    """A folder of features, a picture a row `[tokens, channels]`."""
    with FeatureWriter(folder, {"made": "here"}) as writer:
        for number, row in enumerate(numbers):
            writer.add(MediumFeatures(f"picture-{number}", row, "pillow"))
    return folder
