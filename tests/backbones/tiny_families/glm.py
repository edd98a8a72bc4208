"""GLM-V: grids of any size, expert layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.backbones.tiny_families.family import TEXT, Family, token


def _glm4v_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32}
    return {
        "text_config": {
            **TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
                "partial_rotary_factor": 1.0,
            },
        },
        "vision_config": {**vision, "patch_size": 4, "image_size": 32},
        "image_token_id": token(t, "<|image|>"),
        "video_token_id": token(t, "<|video_pad|>"),
        "image_start_token_id": token(t, "<|begin_of_image|>"),
        "image_end_token_id": token(t, "<|end_of_image|>"),
        "video_start_token_id": token(t, "<|begin_of_video|>"),
        "video_end_token_id": token(t, "<|end_of_video|>"),
    }


def _glm4v(t: PreTrainedTokenizerFast) -> Any:
    from transformers import Glm4vImageProcessor, Glm4vProcessor
    from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor

    images = Glm4vImageProcessor(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 2048})
    return Glm4vProcessor(images, t, Glm4vVideoProcessor(patch_size=4, merge_size=2))


def _glm46v(t: PreTrainedTokenizerFast) -> Any:
    from transformers import Glm46VImageProcessor, Glm46VProcessor
    from transformers.models.glm46v.video_processing_glm46v import Glm46VVideoProcessor

    images = Glm46VImageProcessor(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 2048})
    return Glm46VProcessor(images, t, Glm46VVideoProcessor(patch_size=4, merge_size=2))


def _glm4v_moe_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    base = _glm4v_config(t)
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
    return {**base, "text_config": {**base["text_config"], **experts, "first_k_dense_replace": 1}}


def _glm_ocr_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    base = _glm4v_config(t)
    return {**base, "text_config": {**base["text_config"], "head_dim": 8}}


GLM_PICTURE = "<|begin_of_image|><|image|><|end_of_image|>"
FAMILIES: Mapping[str, Family] = {
    "glm4v": Family(_glm4v_config, _glm4v, GLM_PICTURE, adapted=12, video=True),
    "glm46v": Family(_glm4v_config, _glm46v, GLM_PICTURE, adapted=12, video=True),
    "glm4v_moe": Family(
        _glm4v_moe_config, _glm4v, GLM_PICTURE, unadapted="experts and their router", video=True, peft=False
    ),
    "glm_ocr": Family(_glm_ocr_config, _glm46v, GLM_PICTURE, adapted=12, video=True),
}
