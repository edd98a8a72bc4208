"""Grids of any size as Qwen-VL's, on other language models: Kimi, Compass, LFM3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.backbones.tiny_families.family import TEXT, Family, token
from tests.backbones.tiny_families.qwen import QWEN_PICTURE, qwen_parts, qwen_tokens

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}


def _kimi_k25_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1}
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8}
    text = {**TEXT, "num_key_value_heads": 4, "model_type": "deepseek_v3", **experts, **latent}
    return {
        "text_config": {**text, "topk_group": 1, "first_k_dense_replace": 1},
        "vision_config": {**VISION, "pos_emb_height": 8, "pos_emb_width": 8},
        "projection_hidden_size": 32,
        "image_token_id": token(t, "<|media_pad|>"),
        "video_token_id": token(t, "<|video_pad|>"),
        "tie_word_embeddings": False,
    }


def _kimi_k25(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.kimi_k25.image_processing_kimi_k25 import Kimi_K25ImageProcessor
    from transformers.models.kimi_k25.processing_kimi_k25 import Kimi_K25Processor
    from transformers.models.kimi_k25.video_processing_kimi_k25 import Kimi_K25VideoProcessor

    sizes: dict[str, Any] = {"patch_size": 4, "size": {"max_height": 32, "max_width": 32}}
    return Kimi_K25Processor(Kimi_K25ImageProcessor(**sizes), t, Kimi_K25VideoProcessor(**sizes))


def _cohere_compass_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    text = {**TEXT, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512}
    return {
        "text_config": {**text, "rope_parameters": {**rope, "full_attention": None}},
        "vision_config": vision,
        "image_token_id": token(t, "<|IMAGE_PAD|>"),
        "video_token_id": token(t, "<|VIDEO_PAD|>"),
        "vision_start_token_id": token(t, "<|VISION_START|>"),
        "vision_end_token_id": token(t, "<|VISION_END|>"),
    }


def _cohere_compass(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.cohere_compass.image_processing_cohere_compass import CohereCompassImageProcessor
    from transformers.models.cohere_compass.processing_cohere_compass import CohereCompassProcessor
    from transformers.models.cohere_compass.video_processing_cohere_compass import CohereCompassVideoProcessor

    images = CohereCompassImageProcessor(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    return CohereCompassProcessor(images, t, CohereCompassVideoProcessor(patch_size=4))


def _lfm3_vl_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {**VISION, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]}
    text = {**TEXT, "model_type": "lfm3", "head_dim": 8, "layer_types": ["conv", "full_attention"]}
    return {
        "text_config": text,
        "vision_config": vision,
        "projector_hidden_size": 32,
        "tie_word_embeddings": False,
        **qwen_tokens(t),
    }


def _lfm3_vl(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.lfm3_vl.processing_lfm3_vl import Lfm3VlProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    return Lfm3VlProcessor(qwen_parts()[0], t, Qwen3VLVideoProcessor(patch_size=4, merge_size=2))


KIMI_NAMES = {"image_token": "<|media_pad|>", "video_token": "<|video_pad|>"}
FAMILIES: Mapping[str, Family] = {
    "kimi_k25": Family(
        _kimi_k25_config,
        _kimi_k25,
        "<|media_pad|>",
        names=KIMI_NAMES,
        adapted=16,
        unadapted="experts and their router",
        video=True,
    ),
    "cohere_compass": Family(
        _cohere_compass_config, _cohere_compass, "<|VISION_START|><|IMAGE_PAD|><|VISION_END|>", video=True
    ),
    "lfm3_vl": Family(
        _lfm3_vl_config, _lfm3_vl, QWEN_PICTURE, adapted=13, unadapted="convolutions", video=True, since="5.23"
    ),
}
