"""DeepSeek-VL and Janus: pictures of one size, with a second tower of higher resolution in the hybrid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.backbones.tiny_families.family import SIGLIP, TEXT, Family, token


def _deepseek_vl_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {**SIGLIP, "vision_use_head": False},
        "image_token_id": token(t, "<image>"),
        "tie_word_embeddings": False,
    }


def _deepseek_vl(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.deepseek_vl.image_processing_deepseek_vl import DeepseekVLImageProcessor
    from transformers.models.deepseek_vl.processing_deepseek_vl import DeepseekVLProcessor

    images = DeepseekVLImageProcessor(size={"height": 16, "width": 16})
    return DeepseekVLProcessor(images, t, num_image_tokens=16)


def _deepseek_vl_hybrid_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    sam = {"model_type": "sam_vision_model", "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2}
    sam |= {"num_attention_heads": 2, "image_size": 64, "patch_size": 4, "mlp_dim": 32, "window_size": 4}
    return {**_deepseek_vl_config(t), "high_res_vision_config": {**sam, "global_attn_indexes": [0, 1]}}


def _deepseek_vl_hybrid(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.deepseek_vl_hybrid.image_processing_deepseek_vl_hybrid import (
        DeepseekVLHybridImageProcessor,
    )
    from transformers.models.deepseek_vl_hybrid.processing_deepseek_vl_hybrid import DeepseekVLHybridProcessor

    images = DeepseekVLHybridImageProcessor(size={"height": 16, "width": 16}, high_res_size={"height": 64, "width": 64})
    return DeepseekVLHybridProcessor(images, t, num_image_tokens=16)


def _janus_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    vision |= {"projection_dim": 32, "mlp_ratio": 2.0, "num_image_tokens": 16, "depth": 2}
    vq = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1]}
    vq |= {"num_res_blocks": 1, "projection_dim": 32, "num_patches": 4, "image_token_embed_dim": 32}
    return {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": vision,
        "vq_config": vq,
        "image_token_id": token(t, "<image>"),
    }


def _janus(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.janus.image_processing_janus import JanusImageProcessor
    from transformers.models.janus.processing_janus import JanusProcessor

    return JanusProcessor(JanusImageProcessor(size={"height": 16, "width": 16}), t, num_image_tokens=16)


IMAGE_NAMES = {"image_token": "<image>"}
JANUS_NAMES = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
FAMILIES: Mapping[str, Family] = {
    "deepseek_vl": Family(_deepseek_vl_config, _deepseek_vl, names=IMAGE_NAMES),
    "deepseek_vl_hybrid": Family(_deepseek_vl_hybrid_config, _deepseek_vl_hybrid, names=IMAGE_NAMES),
    "janus": Family(_janus_config, _janus, names=JANUS_NAMES),
}
