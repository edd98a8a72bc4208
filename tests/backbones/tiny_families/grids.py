"""Families whose pictures are grids of any size, as Qwen-VL's, most with positions in three dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from tests.backbones.tiny_families.family import CONVOLUTIONS, EXPERTS, UNTIED, WIDE, Family, text

tf: Any = transformers  # its classes come as they are asked for, and older versions lack some
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
WHOLE_ROPE = {**ROPE, "partial_rotary_factor": 1.0}
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
PAD_IDS = {"image_token_id": "@<|image_pad|>", "video_token_id": "@<|video_pad|>"}
QWEN_IDS = {**PAD_IDS, "vision_start_token_id": "@<|vision_start|>", "vision_end_token_id": "@<|vision_end|>"}
ENDS = {"video_start_token_id": "@<|begin_of_video|>", "video_end_token_id": "@<|end_of_video|>"}
VISION = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
QWEN2_5 = {
    "text_config": text(rope_parameters=ROPE),
    "vision_config": {**VISION, "patch_size": 4, "window_size": 32, "fullatt_block_indexes": [1]},
    **QWEN_IDS,
}
POSITIONED = {**VISION, "patch_size": 4, "num_position_embeddings": 16}
QWEN3 = {"vision_config": {**POSITIONED, "deepstack_visual_indexes": [0]}, **QWEN_IDS}
QWEN3_TEXT = text(rope_parameters=ROPE, head_dim=8)
QWEN3_5_TEXT = {
    **text(head_dim=8, layer_types=["linear_attention", "full_attention"], rope_parameters=WHOLE_ROPE),
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SMALL: Mapping[str, Any] = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 1024}}
SIDES: Mapping[str, Any] = {"patch_size": 4, "merge_size": 2}
GLM_SIZES: Mapping[str, Any] = {**SIDES, "size": {"shortest_edge": 64, "longest_edge": 2048}}
KIMI_SIZES: Mapping[str, Any] = {"patch_size": 4, "size": {"max_height": 32, "max_width": 32}}
SLICES: Mapping[str, Any] = {"scale_resolution": 32, "patch_size": 4, "max_slice_nums": 4}
ERNIE_NAMES = {
    "image_token": "<|image_pad|>",
    "image_start_token": "<|vision_start|>",
    "image_end_token": "<|vision_end|>",
    "video_token": "<|video_pad|>",
    "video_start_token": "<|begin_of_video|>",
    "video_end_token": "<|end_of_video|>",
}
MINICPM_NAMES = {
    "image_token": "<image>",
    "video_token": "<video>",
    "image_start_token": "<img>",
    "image_end_token": "</img>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
MINICPM = {
    "text_config": {"model_type": "qwen3_5_text", **QWEN3_5_TEXT},
    "vision_config": {**WIDE, "image_size": 32, "patch_size": 4, "insert_layer_id": 0},
    "insert_layer_id": 0,
    "image_size": 32,
    "image_token_id": "@<image>",
    "video_token_id": "@<video>",
}


def _qwen_images() -> Any:
    return tf.Qwen2VLImageProcessor(**SMALL, merge_size=2)


def _qwen2_vl(t: Any, processor: str = "Qwen2VLProcessor") -> Any:
    return getattr(tf, processor)(_qwen_images(), t, tf.Qwen2VLVideoProcessor(**SIDES))


def _qwen3_vl(t: Any, processor: str = "Qwen3VLProcessor") -> Any:
    return getattr(tf, processor)(_qwen_images(), t, tf.Qwen3VLVideoProcessor(**SIDES))


def _minicpm(t: Any, processor: str = "MiniCPMV4_6Processor") -> Any:
    images, videos = tf.MiniCPMV4_6ImageProcessor(**SLICES), tf.MiniCPMV4_6VideoProcessor(**SLICES)
    return getattr(tf, processor)(images, videos, t)


QWENS: Mapping[str, Family] = {
    "qwen2_vl": Family(
        {
            "text_config": text(rope_parameters=ROPE),
            "vision_config": {
                **{"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
            },
            **QWEN_IDS,
        },
        _qwen2_vl,
        QWEN_PICTURE,
        video=True,
    ),
    "qwen2_5_vl": Family(QWEN2_5, lambda t: _qwen2_vl(t, "Qwen2_5_VLProcessor"), QWEN_PICTURE, video=True),
    "qwen3_vl": Family({**QWEN3, "text_config": QWEN3_TEXT}, _qwen3_vl, QWEN_PICTURE, video=True),
    "qwen3_5": Family(
        {"text_config": QWEN3_5_TEXT, "vision_config": POSITIONED, **QWEN_IDS},
        _qwen3_vl,
        QWEN_PICTURE,
        adapted=15,
        unadapted=CONVOLUTIONS,
        video=True,
    ),
    "qwen3_vl_moe": Family(
        {**QWEN3, "text_config": {**QWEN3_TEXT, **QWEN_EXPERTS, "decoder_sparse_step": 1}},
        _qwen3_vl,
        QWEN_PICTURE,
        adapted=8,
        unadapted=EXPERTS,
        video=True,
    ),
    "qwen3_5_moe": Family(
        {
            "text_config": {**QWEN3_5_TEXT, **QWEN_EXPERTS, "shared_expert_intermediate_size": 16},
            "vision_config": POSITIONED,
            **QWEN_IDS,
        },
        _qwen3_vl,
        QWEN_PICTURE,
        adapted=17,
        unadapted=f"{EXPERTS}, {CONVOLUTIONS}",
        video=True,
    ),
    "cosmos3_edge": Family(
        {
            "text_config": QWEN3_TEXT,
            "vision_config": {**WIDE, "patch_size": 4, "num_patches": 16},
            "projector_hidden_size": 48,
            **QWEN_IDS,
        },
        lambda t: tf.Cosmos3EdgeProcessor(
            tf.Cosmos3EdgeImageProcessor(**SMALL), t, tf.Cosmos3EdgeVideoProcessor(patch_size=4)
        ),
        QWEN_PICTURE,
        video=True,
        adapted=12,
        since="5.24",
    ),
    "hy_v4_vl": Family(
        {
            "text_config": {
                **text(rope_parameters=ROPE, q_lora_rank=16, kv_lora_rank=16, v_head_dim=8),
                **{**ROUTED, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
                **{"index_topk": 256, "index_head_dim": 16, "index_n_heads": 2, "hc_mult": 2},
            },
            "vision_config": {**WIDE, "patch_size": 4, "out_hidden_size": 32, "max_image_size": 64},
            **PAD_IDS,
        },
        lambda t: tf.HYV4VLProcessor(tf.HYV4VLImageProcessor(**SMALL), t, tf.HYV4VLVideoProcessor(patch_size=4)),
        QWEN_PICTURE,
        video=True,
        unadapted=EXPERTS,
        adapted=18,
        since="5.24",
    ),
    "exaone4_5": Family(
        {
            **QWEN2_5,
            "text_config": text("exaone4", sliding_window=64, layer_types=["sliding_attention", "full_attention"]),
            "vision_config": {**QWEN2_5["vision_config"], "num_key_value_heads": 1},
        },
        lambda t: _qwen2_vl(t, "Exaone4_5_Processor"),
        QWEN_PICTURE,
        video=True,
    ),
    "video_llama_3": Family(
        {"text_config": text("qwen2"), "vision_config": {**WIDE, "patch_size": 4}, **PAD_IDS},
        lambda t: tf.VideoLlama3Processor(
            tf.VideoLlama3ImageProcessor(**SMALL), t, tf.VideoLlama3VideoProcessor(patch_size=4)
        ),
        "<|image_pad|>",
        video=True,
    ),
    "paddleocr_vl": Family(
        {"text_config": QWEN3_TEXT, "vision_config": {**WIDE, "patch_size": 4, "image_size": 32}, **UNTIED, **QWEN_IDS},
        lambda t: tf.PaddleOCRVLProcessor(tf.PaddleOCRVLImageProcessor(**SMALL), t),
        QWEN_PICTURE,
        names={"image_token": "<|image_pad|>"},
    ),
    "ernie4_5_vl_moe": Family(
        {
            "text_config": text(
                moe_num_experts=4,
                moe_k=2,
                moe_intermediate_size=[16, 16],
                moe_num_shared_experts=1,
                rope_parameters=ROPE,
            ),
            "vision_config": {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 4},
            **PAD_IDS,
            "image_start_token_id": "@<|vision_start|>",
            "image_end_token_id": "@<|vision_end|>",
            **ENDS,
            **UNTIED,
        },
        lambda t: tf.Ernie4_5_VLMoeProcessor(
            tf.Ernie4_5_VLMoeImageProcessor(**SMALL),
            t,
            tf.Ernie4_5_VLMoeVideoProcessor(patch_size=4, draw_on_frames=False),
        ),
        QWEN_PICTURE,
        names=ERNIE_NAMES,
        unadapted=EXPERTS,
        video=True,
    ),
    "minicpmv4_6": Family(MINICPM, _minicpm, names=MINICPM_NAMES, adapted=15, unadapted=CONVOLUTIONS, video=True),
    "minicpmv4_7": Family(
        {
            **MINICPM,
            "image_start_id": "@<img>",
            "image_end_id": "@</img>",
            "slice_start_id": "@<slice>",
            "slice_end_id": "@</slice>",
            "newline_id": lambda t: t.encode("\n", add_special_tokens=False)[0],
        },
        lambda t: _minicpm(t, "MiniCPMV4_7Processor"),
        names=MINICPM_NAMES,
        adapted=15,
        unadapted=CONVOLUTIONS,
        video=True,
    ),
}

GLM = {
    "vision_config": {**VISION, "intermediate_size": 48, "patch_size": 4, "image_size": 32},
    "image_token_id": "@<|image|>",
    "video_token_id": "@<|video_pad|>",
    "image_start_token_id": "@<|begin_of_image|>",
    "image_end_token_id": "@<|end_of_image|>",
    **ENDS,
}
GLM_TEXT = text(rope_parameters=WHOLE_ROPE)
GLM_PICTURE = "<|begin_of_image|><|image|><|end_of_image|>"


def _glm4v(t: Any) -> Any:
    return tf.Glm4vProcessor(tf.Glm4vImageProcessor(**GLM_SIZES), t, tf.Glm4vVideoProcessor(**SIDES))


def _glm46v(t: Any) -> Any:
    return tf.Glm46VProcessor(tf.Glm46VImageProcessor(**GLM_SIZES), t, tf.Glm46VVideoProcessor(**SIDES))


GLMS: Mapping[str, Family] = {
    "glm4v": Family({**GLM, "text_config": GLM_TEXT}, _glm4v, GLM_PICTURE, adapted=12, video=True),
    "glm46v": Family({**GLM, "text_config": GLM_TEXT}, _glm46v, GLM_PICTURE, adapted=12, video=True),
    "glm4v_moe": Family(
        {**GLM, "text_config": {**GLM_TEXT, **ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1}},
        _glm4v,
        GLM_PICTURE,
        unadapted=EXPERTS,
        video=True,
        peft=False,
    ),
    "glm_ocr": Family(
        {**GLM, "text_config": {**GLM_TEXT, "head_dim": 8}}, _glm46v, GLM_PICTURE, adapted=12, video=True
    ),
}

KIMI = {
    **text("deepseek_v3", kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=8),
    **{**ROUTED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
}
OTHERS: Mapping[str, Family] = {
    "kimi_k25": Family(
        {
            "text_config": KIMI,
            "vision_config": {**WIDE, "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8},
            "projection_hidden_size": 32,
            "image_token_id": "@<|media_pad|>",
            "video_token_id": "@<|video_pad|>",
            **UNTIED,
        },
        lambda t: tf.Kimi_K25Processor(
            tf.Kimi_K25ImageProcessor(**KIMI_SIZES), t, tf.Kimi_K25VideoProcessor(**KIMI_SIZES)
        ),
        "<|media_pad|>",
        names={"image_token": "<|media_pad|>", "video_token": "<|video_pad|>"},
        adapted=16,
        unadapted=EXPERTS,
        video=True,
    ),
    "cohere_compass": Family(
        {
            "text_config": text(
                layer_types=["sliding_attention", "full_attention"],
                sliding_window=512,
                rope_parameters={"sliding_attention": ROPE, "full_attention": None},
            ),
            "vision_config": {**POSITIONED, "deepstack_visual_indexes": [0]},
            "image_token_id": "@<|IMAGE_PAD|>",
            "video_token_id": "@<|VIDEO_PAD|>",
            "vision_start_token_id": "@<|VISION_START|>",
            "vision_end_token_id": "@<|VISION_END|>",
        },
        lambda t: tf.CohereCompassProcessor(
            tf.CohereCompassImageProcessor(**SMALL), t, tf.CohereCompassVideoProcessor(patch_size=4)
        ),
        "<|VISION_START|><|IMAGE_PAD|><|VISION_END|>",
        video=True,
    ),
    "lfm3_vl": Family(
        {
            "text_config": text("lfm3", head_dim=8, layer_types=["conv", "full_attention"]),
            "vision_config": {
                **{**WIDE, "patch_size": 4, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]}
            },
            "projector_hidden_size": 32,
            **UNTIED,
            **QWEN_IDS,
        },
        lambda t: _qwen3_vl(t, "Lfm3VlProcessor"),
        QWEN_PICTURE,
        adapted=13,
        unadapted=CONVOLUTIONS,
        video=True,
        since="5.23",
    ),
}
