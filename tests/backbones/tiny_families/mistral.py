"""Pixtral towers: pictures of any size in rows of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.backbones.tiny_families.family import TEXT, Family, token


def _mistral3_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return {
        "text_config": {"model_type": "mistral", "head_dim": 8, **TEXT},
        "vision_config": {**vision, "num_attention_heads": 2, "image_size": 32, "patch_size": 4, "head_dim": 8},
        "image_token_index": token(t, "[IMG]"),
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
    }


def _mistral3(t: PreTrainedTokenizerFast) -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor

    images = PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    return PixtralProcessor(images, t, patch_size=4, spatial_merge_size=2)


def _lighton_ocr_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    base = _mistral3_config(t)
    return {
        "text_config": {"model_type": "qwen3", "head_dim": 8, **TEXT},
        "vision_config": base["vision_config"],
        "image_token_id": token(t, "[IMG]"),
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    }


def _lighton_ocr(t: PreTrainedTokenizerFast) -> Any:
    from transformers import PixtralImageProcessor
    from transformers.models.lighton_ocr.processing_lighton_ocr import LightOnOcrProcessor

    images = PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    return LightOnOcrProcessor(images, t, patch_size=4, spatial_merge_size=2)


PIXTRAL_NAMES = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}


FAMILIES: Mapping[str, Family] = {
    "mistral3": Family(_mistral3_config, _mistral3, "[IMG]"),
    "lighton_ocr": Family(_lighton_ocr_config, _lighton_ocr, "[IMG]", names=PIXTRAL_NAMES),
}
