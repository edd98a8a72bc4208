"""Qwen-VL: grids of any size, positions in three dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.backbones.tiny_families.family import TEXT, Family, token


def _qwen2_text(**more: Any) -> dict[str, Any]:
    return {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}, **more}


def qwen_tokens(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "image_token_id": token(t, "<|image_pad|>"),
        "video_token_id": token(t, "<|video_pad|>"),
        "vision_start_token_id": token(t, "<|vision_start|>"),
        "vision_end_token_id": token(t, "<|vision_end|>"),
    }


def _qwen2_vl_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    return {"text_config": _qwen2_text(), "vision_config": vision, **qwen_tokens(t)}


def _qwen2_5_vl_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "window_size": 32}
    return {
        "text_config": _qwen2_text(),
        "vision_config": {**vision, "fullatt_block_indexes": [1]},
        **qwen_tokens(t),
    }


def _qwen3_vl_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "num_position_embeddings": 16}
    text = _qwen2_text(head_dim=8)
    return {"text_config": text, "vision_config": {**vision, "deepstack_visual_indexes": [0]}, **qwen_tokens(t)}


SMALL = {"shortest_edge": 64, "longest_edge": 1024}


def qwen_parts(patch_size: int = 4) -> tuple[Any, Any]:
    from transformers import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    sizes = {"patch_size": patch_size, "merge_size": 2}
    images = Qwen2VLImageProcessor(**sizes, size=SMALL)
    return images, Qwen2VLVideoProcessor(**sizes)


def _qwen2_vl(t: PreTrainedTokenizerFast) -> Any:
    from transformers import Qwen2VLProcessor

    images, videos = qwen_parts()
    return Qwen2VLProcessor(images, t, videos)


def _qwen2_5_vl(t: PreTrainedTokenizerFast) -> Any:
    from transformers import Qwen2_5_VLProcessor

    images, videos = qwen_parts()
    return Qwen2_5_VLProcessor(images, t, videos)


def _qwen3_vl(t: PreTrainedTokenizerFast) -> Any:
    from transformers import Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    images, _ = qwen_parts()
    return Qwen3VLProcessor(images, t, Qwen3VLVideoProcessor(patch_size=4, merge_size=2))


def _qwen3_5_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    linear |= {"linear_num_value_heads": 4}
    layers = ["linear_attention", "full_attention"]
    return {
        "text_config": {**TEXT, **linear, "head_dim": 8, "layer_types": layers, "rope_parameters": rope},
        "vision_config": {**vision, "patch_size": 4, "num_position_embeddings": 16},
        **qwen_tokens(t),
    }


def _qwen3_vl_moe_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    base = _qwen3_vl_config(t)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    return {**base, "text_config": {**base["text_config"], **experts}}


QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen3_5_moe_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    base = _qwen3_5_config(t)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return {**base, "text_config": {**base["text_config"], **experts, "shared_expert_intermediate_size": 16}}


def _exaone4_5_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    base = _qwen2_5_vl_config(t)
    text = {
        **TEXT,
        "model_type": "exaone4",
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision = {**base["vision_config"], "num_key_value_heads": 1}
    return {**base, "text_config": text, "vision_config": vision}


def _exaone4_5(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.exaone4_5.processing_exaone4_5 import Exaone4_5_Processor

    images, videos = qwen_parts()
    return Exaone4_5_Processor(images, t, videos)


def _video_llama_3_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {**vision, "patch_size": 4},
        "image_token_id": token(t, "<|image_pad|>"),
        "video_token_id": token(t, "<|video_pad|>"),
    }


def _video_llama_3(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.video_llama_3.image_processing_video_llama_3 import VideoLlama3ImageProcessor
    from transformers.models.video_llama_3.processing_video_llama_3 import VideoLlama3Processor
    from transformers.models.video_llama_3.video_processing_video_llama_3 import VideoLlama3VideoProcessor

    images = VideoLlama3ImageProcessor(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    return VideoLlama3Processor(images, t, VideoLlama3VideoProcessor(patch_size=4))


def _paddleocr_vl_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "text_config": _qwen2_text(head_dim=8),
        "vision_config": {**vision, "patch_size": 4, "image_size": 32},
        "tie_word_embeddings": False,
        **qwen_tokens(t),
    }


def _paddleocr_vl(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.paddleocr_vl.image_processing_paddleocr_vl import PaddleOCRVLImageProcessor
    from transformers.models.paddleocr_vl.processing_paddleocr_vl import PaddleOCRVLProcessor

    images = PaddleOCRVLImageProcessor(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    return PaddleOCRVLProcessor(images, t)


def _ernie4_5_vl_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 4}
    text = {**TEXT, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [16, 16], "moe_num_shared_experts": 1}
    return {
        "text_config": {
            **text,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        "vision_config": vision,
        "image_token_id": token(t, "<|image_pad|>"),
        "image_start_token_id": token(t, "<|vision_start|>"),
        "image_end_token_id": token(t, "<|vision_end|>"),
        "video_token_id": token(t, "<|video_pad|>"),
        "video_start_token_id": token(t, "<|begin_of_video|>"),
        "video_end_token_id": token(t, "<|end_of_video|>"),
        "tie_word_embeddings": False,
    }


ERNIE_NAMES = {
    "image_token": "<|image_pad|>",
    "image_start_token": "<|vision_start|>",
    "image_end_token": "<|vision_end|>",
    "video_token": "<|video_pad|>",
    "video_start_token": "<|begin_of_video|>",
    "video_end_token": "<|end_of_video|>",
}


def _ernie4_5_vl(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.ernie4_5_vl_moe.image_processing_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessor
    from transformers.models.ernie4_5_vl_moe.processing_ernie4_5_vl_moe import Ernie4_5_VLMoeProcessor
    from transformers.models.ernie4_5_vl_moe.video_processing_ernie4_5_vl_moe import Ernie4_5_VLMoeVideoProcessor

    images = Ernie4_5_VLMoeImageProcessor(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    return Ernie4_5_VLMoeProcessor(images, t, Ernie4_5_VLMoeVideoProcessor(patch_size=4, draw_on_frames=False))


def _minicpmv4_6_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**_qwen3_5_config(t)["text_config"], "model_type": "qwen3_5_text"}
    return {
        "text_config": text,
        "vision_config": {**vision, "image_size": 32, "patch_size": 4, "insert_layer_id": 0},
        "insert_layer_id": 0,
        "image_size": 32,
        "image_token_id": token(t, "<image>"),
        "video_token_id": token(t, "<video>"),
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


def _minicpmv4_6(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.minicpmv4_6.image_processing_minicpmv4_6 import MiniCPMV4_6ImageProcessor
    from transformers.models.minicpmv4_6.processing_minicpmv4_6 import MiniCPMV4_6Processor
    from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor

    sizes = {"scale_resolution": 32, "patch_size": 4, "max_slice_nums": 4}
    return MiniCPMV4_6Processor(MiniCPMV4_6ImageProcessor(**sizes), MiniCPMV4_6VideoProcessor(**sizes), t)


PADDLE_NAMES = {"image_token": "<|image_pad|>"}


def _minicpmv4_7_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    marks = {
        "image_start_id": "<img>",
        "image_end_id": "</img>",
        "slice_start_id": "<slice>",
        "slice_end_id": "</slice>",
    }
    newline = t.encode("\n", add_special_tokens=False)[0]
    return {**_minicpmv4_6_config(t), **{name: token(t, mark) for name, mark in marks.items()}, "newline_id": newline}


def _minicpmv4_7(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.minicpmv4_6.image_processing_minicpmv4_6 import MiniCPMV4_6ImageProcessor
    from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor
    from transformers.models.minicpmv4_7.processing_minicpmv4_7 import MiniCPMV4_7Processor

    sizes: dict[str, Any] = {"scale_resolution": 32, "patch_size": 4, "max_slice_nums": 4}
    return MiniCPMV4_7Processor(MiniCPMV4_6ImageProcessor(**sizes), MiniCPMV4_6VideoProcessor(**sizes), t)


def _cosmos3_edge_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "text_config": _qwen2_text(head_dim=8),
        "vision_config": {**vision, "patch_size": 4, "num_patches": 16},
        "projector_hidden_size": 48,
        **qwen_tokens(t),
    }


def _cosmos3_edge(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.cosmos3_edge.image_processing_cosmos3_edge import Cosmos3EdgeImageProcessor
    from transformers.models.cosmos3_edge.processing_cosmos3_edge import Cosmos3EdgeProcessor
    from transformers.models.cosmos3_edge.video_processing_cosmos3_edge import Cosmos3EdgeVideoProcessor

    images = Cosmos3EdgeImageProcessor(patch_size=4, size=SMALL)
    return Cosmos3EdgeProcessor(images, t, Cosmos3EdgeVideoProcessor(patch_size=4))


def _hy_v4_vl_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    looked_up = {"index_topk": 256, "index_head_dim": 16, "index_n_heads": 2, "hc_mult": 2}
    return {
        "text_config": {**_qwen2_text(), **latent, **experts, **looked_up},
        "vision_config": {**vision, "patch_size": 4, "out_hidden_size": 32, "max_image_size": 64},
        "image_token_id": token(t, "<|image_pad|>"),
        "video_token_id": token(t, "<|video_pad|>"),
    }


def _hy_v4_vl(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.hy_v4_vl.image_processing_hy_v4_vl import HYV4VLImageProcessor
    from transformers.models.hy_v4_vl.processing_hy_v4_vl import HYV4VLProcessor
    from transformers.models.hy_v4_vl.video_processing_hy_v4_vl import HYV4VLVideoProcessor

    return HYV4VLProcessor(HYV4VLImageProcessor(patch_size=4, size=SMALL), t, HYV4VLVideoProcessor(patch_size=4))


FAMILIES: Mapping[str, Family] = {
    "qwen2_vl": Family(_qwen2_vl_config, _qwen2_vl, QWEN_PICTURE, video=True),
    "qwen2_5_vl": Family(_qwen2_5_vl_config, _qwen2_5_vl, QWEN_PICTURE, video=True),
    "qwen3_vl": Family(_qwen3_vl_config, _qwen3_vl, QWEN_PICTURE, video=True),
    "qwen3_5": Family(_qwen3_5_config, _qwen3_vl, QWEN_PICTURE, adapted=15, unadapted="convolutions", video=True),
    "qwen3_vl_moe": Family(
        _qwen3_vl_moe_config, _qwen3_vl, QWEN_PICTURE, adapted=8, unadapted="experts and their router", video=True
    ),
    "qwen3_5_moe": Family(
        _qwen3_5_moe_config,
        _qwen3_vl,
        QWEN_PICTURE,
        adapted=17,
        unadapted="experts and their router, convolutions",
        video=True,
    ),
    "cosmos3_edge": Family(_cosmos3_edge_config, _cosmos3_edge, QWEN_PICTURE, video=True, adapted=12, since="5.24"),
    "hy_v4_vl": Family(
        _hy_v4_vl_config,
        _hy_v4_vl,
        QWEN_PICTURE,
        video=True,
        unadapted="experts and their router",
        adapted=18,
        since="5.24",
    ),
    "exaone4_5": Family(_exaone4_5_config, _exaone4_5, QWEN_PICTURE, video=True),
    "video_llama_3": Family(_video_llama_3_config, _video_llama_3, "<|image_pad|>", video=True),
    "paddleocr_vl": Family(_paddleocr_vl_config, _paddleocr_vl, QWEN_PICTURE, names=PADDLE_NAMES),
    "ernie4_5_vl_moe": Family(
        _ernie4_5_vl_config,
        _ernie4_5_vl,
        QWEN_PICTURE,
        names=ERNIE_NAMES,
        unadapted="experts and their router",
        video=True,
    ),
    "minicpmv4_6": Family(
        _minicpmv4_6_config, _minicpmv4_6, names=MINICPM_NAMES, adapted=15, unadapted="convolutions", video=True
    ),
    "minicpmv4_7": Family(
        _minicpmv4_7_config, _minicpmv4_7, names=MINICPM_NAMES, adapted=15, unadapted="convolutions", video=True
    ),
}
