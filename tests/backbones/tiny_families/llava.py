"""LLaVA and its kin: a tower, a projector and a language model, pictures whole or in tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.backbones.tiny_families.family import CLIP, SIGLIP, TEXT, Family, token


def _llava_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": CLIP,
        "image_token_index": token(t, "<image>"),
        "image_seq_length": 16,
        "vision_feature_layer": -2,
    }


def _llava(t: PreTrainedTokenizerFast) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        images, t, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _vipllava_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    base = _llava_config(t)
    del base["vision_feature_layer"]
    return {**base, "vision_feature_layers": [-1, -2]}


PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def _llava_next_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {**_llava_config(t), "image_grid_pinpoints": PINPOINTS}


def _llava_next(t: PreTrainedTokenizerFast) -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    images = LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextProcessor(
        images, t, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _llava_next_video(t: PreTrainedTokenizerFast) -> Any:
    from transformers import LlavaNextVideoProcessor
    from transformers.models.llava_next_video.video_processing_llava_next_video import LlavaNextVideoVideoProcessor

    return LlavaNextVideoProcessor(
        image_processor=_llava_next(t).image_processor, tokenizer=t, video_processor=LlavaNextVideoVideoProcessor(),
        patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def _llava_next_video_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {**_llava_next_config(t), "video_token_index": token(t, "<video>")}


def _onevision_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": SIGLIP,
        "image_token_index": token(t, "<image>"),
        "video_token_index": token(t, "<video>"),
        "image_grid_pinpoints": PINPOINTS,
    }


def _onevision(t: PreTrainedTokenizerFast) -> Any:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor
    from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor

    images = LlavaOnevisionImageProcessor(size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS)
    videos = LlavaOnevisionVideoProcessor(size={"height": 16, "width": 16})
    return LlavaOnevisionProcessor(images, t, videos, num_image_tokens=16, vision_feature_select_strategy="full")


def _video_llava_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {**_llava_config(t), "video_token_index": token(t, "<video>")}


def _video_llava(t: PreTrainedTokenizerFast) -> Any:
    from transformers import VideoLlavaProcessor
    from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor
    from transformers.models.video_llava.video_processing_video_llava import VideoLlavaVideoProcessor

    sizes: dict[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    images, videos = VideoLlavaImageProcessor(**sizes), VideoLlavaVideoProcessor(**sizes)
    return VideoLlavaProcessor(images, videos, t, patch_size=4, vision_feature_select_strategy="default")


def _perception_lm_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [16, 16], "patch_size": 4, "global_pool": ""}
    sizes |= {"use_post_transformer_norm": False, "init_values": 0.1, "ref_feat_shape": [4, 4]}
    return {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": sizes,
        },
        "projector_pooling_ratio": 2,
        "image_token_id": token(t, "<image>"),
        "video_token_id": token(t, "<video>"),
        "tie_word_embeddings": False,
    }


def _perception_lm(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.perception_lm.image_processing_perception_lm import PerceptionLMImageProcessor
    from transformers.models.perception_lm.processing_perception_lm import PerceptionLMProcessor
    from transformers.models.perception_lm.video_processing_perception_lm import PerceptionLMVideoProcessor

    images = PerceptionLMImageProcessor(tile_size=16, max_num_tiles=4)
    videos = PerceptionLMVideoProcessor(size={"height": 16, "width": 16})
    return PerceptionLMProcessor(videos, images, t, patch_size=4, pooling_ratio=2)


def _fast_vlm_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    sizes = {"layers": [1, 1, 1, 1, 1], "embed_dims": [8, 16, 16, 32, 32], "mlp_ratios": [2, 2, 2, 2, 2]}
    return {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "model_args": sizes,
            "hidden_size": 64,
        },
        "image_token_index": token(t, "<image>"),
        "tie_word_embeddings": False,
    }


def _fast_vlm(t: PreTrainedTokenizerFast) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128})
    return LlavaProcessor(
        images, t, patch_size=64, vision_feature_select_strategy="full", num_additional_image_tokens=0
    )


def _granite4_vision_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {**SIGLIP, "hidden_size": 64, "num_attention_heads": 2}
    return {
        "text_config": {**TEXT, "model_type": "granite4_vision_text", "num_hidden_layers": 5},
        "vision_config": vision,
        "qformer_config": {"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 32}
        | {"cross_attention_frequency": 1, "max_position_embeddings": 64, "use_qformer_text_input": False}
        | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "image_token_index": token(t, "<image>"),
        "image_grid_pinpoints": PINPOINTS,
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-2, 0]],
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "spatial_target_layers": [1, 2, 3, 4],
        "projector_dropout": 0.0,
    }


def _granite4_vision(t: PreTrainedTokenizerFast) -> Any:
    from transformers import LlavaNextImageProcessor
    from transformers.models.granite4_vision.processing_granite4_vision import Granite4VisionProcessor

    images = LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS
    )
    return Granite4VisionProcessor(
        images, t, patch_size=4, vision_feature_select_strategy="full", downsample_rate="1/2"
    )


MEDIA_NAMES = {"image_token": "<image>", "video_token": "<video>"}


FAMILIES: Mapping[str, Family] = {
    "llava": Family(_llava_config, _llava, remark="prepared with LLaVA-1.5's exact pixels and wording"),
    "vipllava": Family(_vipllava_config, _llava),
    "llava_next": Family(_llava_next_config, _llava_next),
    "llava_next_video": Family(_llava_next_video_config, _llava_next_video, video=True),
    "llava_onevision": Family(_onevision_config, _onevision, video=True),
    "video_llava": Family(_video_llava_config, _video_llava, video=True),
    "perception_lm": Family(_perception_lm_config, _perception_lm, names=MEDIA_NAMES, video=True),
    "fast_vlm": Family(_fast_vlm_config, _fast_vlm),
    "granite4_vision": Family(_granite4_vision_config, _granite4_vision, adapted=35),
}
