"""Gemma: a fixed number of tokens a picture, seen in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.backbones.tiny_families.family import SIGLIP, TEXT, Family, token


def _gemma3_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "text_config": {**TEXT, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
        "vision_config": {**SIGLIP, "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": token(t, "<image>"),
        "boi_token_index": token(t, "<boi>"),
        "eoi_token_index": token(t, "<eoi>"),
    }


def _gemma3(t: PreTrainedTokenizerFast) -> Any:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    return Gemma3Processor(Gemma3ImageProcessor(size={"height": 16, "width": 16}), t, image_seq_length=4)


GEMMA3_NAMES = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}


def _gemma4_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    text = {**TEXT, "head_dim": 8, "global_head_dim": 8, "sliding_window": 64, "hidden_size_per_layer_input": 8}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": len(t)}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2}
    return {
        "text_config": text,
        "vision_config": {**vision, "position_embedding_size": 64},
        "audio_config": None,
        "tie_word_embeddings": False,
        **_gemma4_tokens(t),
    }


def _gemma4_tokens(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "image_token_id": token(t, "<image>"),
        "video_token_id": token(t, "<|video|>"),
        "boi_token_id": token(t, "<boi>"),
        "eoi_token_id": token(t, "<eoi>"),
        "boa_token_id": token(t, "<boa>"),
        "eoa_token_index": token(t, "<eoa>"),
        "audio_token_id": token(t, "<audio>"),
    }


def _gemma4(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
    from transformers.models.gemma4.image_processing_gemma4 import Gemma4ImageProcessor
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
    from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor

    sizes: dict[str, Any] = {"patch_size": 4, "pooling_kernel_size": 2}
    images, videos = Gemma4ImageProcessor(**sizes, max_soft_tokens=70), Gemma4VideoProcessor(**sizes)
    return Gemma4Processor(Gemma4AudioFeatureExtractor(), images, t, videos)


def _gemma4_unified_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    text = {**TEXT, "head_dim": 8, "global_head_dim": 8, "sliding_window": 64}
    vision = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 64}
    return {
        "text_config": {**text, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {**vision, "output_proj_dims": 32},
        "audio_config": None,
        "tie_word_embeddings": False,
        **_gemma4_tokens(t),
    }


def _gemma4_unified(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import (
        Gemma4UnifiedAudioFeatureExtractor,
    )
    from transformers.models.gemma4_unified.image_processing_gemma4_unified import Gemma4UnifiedImageProcessor
    from transformers.models.gemma4_unified.processing_gemma4_unified import Gemma4UnifiedProcessor
    from transformers.models.gemma4_unified.video_processing_gemma4_unified import Gemma4UnifiedVideoProcessor

    sizes: dict[str, Any] = {"patch_size": 4, "pooling_kernel_size": 2}
    images, videos = Gemma4UnifiedImageProcessor(**sizes, max_soft_tokens=70), Gemma4UnifiedVideoProcessor(**sizes)
    return Gemma4UnifiedProcessor(Gemma4UnifiedAudioFeatureExtractor(), images, t, videos)


def _gemma3n_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    text = {**TEXT, "head_dim": 8, "sliding_window": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
    text |= {"altup_num_inputs": 2, "vocab_size_per_layer_input": len(t), "activation_sparsity_pattern": [0.0, 0.0]}
    audio = {"hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "vocab_size": 4}
    audio |= {"input_feat_size": 16, "sscp_conv_channel_size": [4, 4], "vocab_offset": len(t) + 4}
    return {
        "text_config": text,
        "vision_config": {
            "model_args": {"channel_multiplier": 0.02},
            "hidden_size": 2048,
            "vocab_size": 4,
            "vocab_offset": len(t),
        },
        "audio_config": audio,
        "vision_soft_tokens_per_image": 256,
        "tie_word_embeddings": False,
        **_gemma4_tokens(t),
    }


def _gemma3n(t: PreTrainedTokenizerFast) -> Any:
    from transformers import SiglipImageProcessor
    from transformers.models.gemma3n.feature_extraction_gemma3n import Gemma3nAudioFeatureExtractor
    from transformers.models.gemma3n.processing_gemma3n import Gemma3nProcessor

    images = SiglipImageProcessor(size={"height": 64, "width": 64})
    return Gemma3nProcessor(Gemma3nAudioFeatureExtractor(), images, t, image_seq_length=256)


AUDIO_NAMES = {**GEMMA3_NAMES, "audio_token": "<audio>", "boa_token": "<boa>", "eoa_token": "<eoa>"}


def _paligemma_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "text_config": {**TEXT, "model_type": "gemma", "head_dim": 8},
        "vision_config": {**SIGLIP, "vision_use_head": False, "projection_dim": 32},
        "projection_dim": 32,
        "hidden_size": 32,
        "image_token_index": token(t, "<image>"),
        "tie_word_embeddings": False,
    }


def _paligemma(t: PreTrainedTokenizerFast) -> Any:
    from transformers import PaliGemmaProcessor, SiglipImageProcessor

    images: Any = SiglipImageProcessor(size={"height": 16, "width": 16})
    images.image_seq_length = 16
    return PaliGemmaProcessor(images, t)


FAMILIES: Mapping[str, Family] = {
    "gemma3": Family(_gemma3_config, _gemma3, "<boi>", names=GEMMA3_NAMES),
    "gemma4": Family(_gemma4_config, _gemma4, names=AUDIO_NAMES, adapted=19, video=True, remark="sound is left out"),
    "gemma4_unified": Family(
        _gemma4_unified_config,
        _gemma4_unified,
        names=AUDIO_NAMES,
        video=True,
        unstored="pictures are patches of the decoder",
        remark="sound is left out",
    ),
    "gemma3n": Family(
        _gemma3n_config,
        _gemma3n,
        names=AUDIO_NAMES,
        adapted=29,
        slow=True,
        unadapted="AltUp's correction coefficients",
        idle=("model.embed_vision.embedding", "model.embed_vision.hard_embedding_norm"),
        remark="sound is left out; its forward clamps a frozen weight in training",
    ),
    "paligemma": Family(_paligemma_config, _paligemma, names={"image_token": "<image>"}, format="paligemma"),
}
