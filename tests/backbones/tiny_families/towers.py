"""Families of a tower, a projector and a language model: pictures whole, in tiles, or through cross attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from tests.backbones.tiny_families.family import (
    CLIP,
    CONVOLUTIONS,
    CROPPED,
    EXPERTS,
    HEADS,
    NARROW,
    SIGLIP,
    SQUARE,
    UNTIED,
    WIDE,
    Family,
    text,
)

tf: Any = transformers  # its classes come as they are asked for, and older versions lack some
IMAGE_NAMES = {"image_token": "<image>"}
IDS = {"image_token_index": "@<image>"}
IMAGE_ID = {"image_token_id": "@<image>"}
PIXTRAL_NAMES = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
INTERNVL_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
COHERE2_NAMES = {
    "boi_token": "<|START_OF_IMG|>",
    "eoi_token": "<|END_OF_IMG|>",
    "image_token": "<|IMG_PATCH|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
}
GEMMA3_NAMES = {**IMAGE_NAMES, "boi_token": "<boi>", "eoi_token": "<eoi>"}
AUDIO_NAMES = {**GEMMA3_NAMES, "audio_token": "<audio>", "boa_token": "<boa>", "eoa_token": "<eoa>"}
EMU3_NAMES = {**GEMMA3_NAMES, "image_wrapper_token": "<img_wrap>", "eof_token": "<eof>"}
HUNYUAN_NAMES = {**IMAGE_NAMES, "image_start_token": "<boi>", "image_end_token": "<eoi>"}

DEFAULT = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
FULL = {"vision_feature_select_strategy": "full"}
CUT = {"crop_to_patches": True, "min_patches": 1, "max_patches": 3}
PINPOINTS = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
LLAVA = {"text_config": text("llama"), "vision_config": CLIP, **IDS, "image_seq_length": 16}
NEXT = {**LLAVA, **PINPOINTS, "vision_feature_layer": -2}


def _next_images() -> Any:
    return tf.LlavaNextImageProcessor(**CROPPED, **PINPOINTS)


def _paligemma(t: Any) -> Any:
    images = tf.SiglipImageProcessor(**SQUARE)
    images.image_seq_length = 16
    return tf.PaliGemmaProcessor(images, t)


LLAVAS: Mapping[str, Family] = {
    "llava": Family(
        {**LLAVA, "vision_feature_layer": -2},
        lambda t: tf.LlavaProcessor(tf.CLIPImageProcessor(**CROPPED), t, **DEFAULT),
        remark="prepared with LLaVA-1.5's exact pixels and wording",
    ),
    "vipllava": Family(
        {**LLAVA, "vision_feature_layers": [-1, -2]},
        lambda t: tf.LlavaProcessor(tf.CLIPImageProcessor(**CROPPED), t, **DEFAULT),
    ),
    "llava_next": Family(NEXT, lambda t: tf.LlavaNextProcessor(_next_images(), t, **DEFAULT)),
    "llava_next_video": Family(
        {**NEXT, "video_token_index": "@<video>"},
        lambda t: tf.LlavaNextVideoProcessor(
            image_processor=_next_images(), tokenizer=t, video_processor=tf.LlavaNextVideoVideoProcessor(), **DEFAULT
        ),
        video=True,
    ),
    "llava_onevision": Family(
        {"text_config": text("qwen2"), "vision_config": SIGLIP, **IDS, "video_token_index": "@<video>", **PINPOINTS},
        lambda t: tf.LlavaOnevisionProcessor(
            tf.LlavaOnevisionImageProcessor(**SQUARE, **PINPOINTS),
            t,
            tf.LlavaOnevisionVideoProcessor(**SQUARE),
            num_image_tokens=16,
            **FULL,
        ),
        video=True,
    ),
    "video_llava": Family(
        {**LLAVA, "vision_feature_layer": -2, "video_token_index": "@<video>"},
        lambda t: tf.VideoLlavaProcessor(
            tf.VideoLlavaImageProcessor(**CROPPED),
            tf.VideoLlavaVideoProcessor(**CROPPED),
            t,
            patch_size=4,
            vision_feature_select_strategy="default",
        ),
        video=True,
    ),
    "perception_lm": Family(
        {
            "text_config": text("llama"),
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": "vit_pe_core_large_patch14_336",
                "model_args": {
                    **{"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [16, 16], "patch_size": 4},
                    **{"global_pool": "", "use_post_transformer_norm": False, "init_values": 0.1},
                    "ref_feat_shape": [4, 4],
                },
            },
            "projector_pooling_ratio": 2,
            **IMAGE_ID,
            "video_token_id": "@<video>",
            **UNTIED,
        },
        lambda t: tf.PerceptionLMProcessor(
            tf.PerceptionLMVideoProcessor(**SQUARE),
            tf.PerceptionLMImageProcessor(tile_size=16, max_num_tiles=4),
            t,
            patch_size=4,
            pooling_ratio=2,
        ),
        names={**IMAGE_NAMES, "video_token": "<video>"},
        video=True,
    ),
    "fast_vlm": Family(
        {
            "text_config": text("qwen2"),
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": "fastvit_mci3",
                "model_args": {
                    **{"layers": [1, 1, 1, 1, 1], "embed_dims": [8, 16, 16, 32, 32], "mlp_ratios": [2, 2, 2, 2, 2]}
                },
                "hidden_size": 64,
            },
            **IDS,
            **UNTIED,
        },
        lambda t: tf.LlavaProcessor(
            tf.CLIPImageProcessor(size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128}),
            t,
            patch_size=64,
            num_additional_image_tokens=0,
            **FULL,
        ),
    ),
    "granite4_vision": Family(
        {
            "text_config": text("granite4_vision_text", num_hidden_layers=5),
            "vision_config": {**SIGLIP, "hidden_size": 64},
            "qformer_config": {
                **{"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 32},
                **{"cross_attention_frequency": 1, "max_position_embeddings": 64, "use_qformer_text_input": False},
                **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            },
            **IDS,
            **PINPOINTS,
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-2, 0]],
            **FULL,
            "vision_feature_layer": -1,
            "spatial_target_layers": [1, 2, 3, 4],
            "projector_dropout": 0.0,
        },
        lambda t: tf.Granite4VisionProcessor(_next_images(), t, patch_size=4, **FULL, downsample_rate="1/2"),
        adapted=35,
    ),
}

INTERNVL = {
    "text_config": text("qwen2"),
    "vision_config": {**NARROW, "image_size": [16, 16], "patch_size": [4, 4]},
    "image_token_id": "@<IMG_CONTEXT>",
    "image_seq_length": 4,
    "downsample_ratio": 0.5,
}
IDEFICS3_VISION = {**HEADS, "hidden_size": 32, "intermediate_size": 64, "image_size": 16, "patch_size": 4}
IDEFICS3 = {
    "text_config": text("llama"),
    "vision_config": IDEFICS3_VISION,
    "scale_factor": 2,
    **IMAGE_ID,
    "pad_token_id": 0,
}
AYA = {
    "text_config": text("cohere2", head_dim=8, layer_types=["full_attention"] * 2),
    "vision_config": SIGLIP,
    "downsample_factor": 2,
}
TILED: Mapping[str, Any] = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
TILES: Mapping[str, Family] = {
    "internvl": Family(
        INTERNVL,
        lambda t: tf.InternVLProcessor(
            tf.GotOcr2ImageProcessor(**SQUARE, **CUT), t, tf.InternVLVideoProcessor(**SQUARE), image_seq_length=4
        ),
        "<IMG_CONTEXT>",
        names=INTERNVL_NAMES,
        video=True,
    ),
    "idefics3": Family(
        IDEFICS3, lambda t: tf.Idefics3Processor(tf.Idefics3ImageProcessor(**TILED), t, image_seq_len=4)
    ),
    "smolvlm": Family(
        IDEFICS3,
        lambda t: tf.SmolVLMProcessor(
            tf.SmolVLMImageProcessor(**TILED), t, tf.SmolVLMVideoProcessor(), image_seq_len=4
        ),
        needs="num2words",
        video=True,
    ),
    "aya_vision": Family(
        {**AYA, "image_token_index": "@<|IMG_PATCH|>"},
        lambda t: tf.AyaVisionProcessor(
            tf.GotOcr2ImageProcessor(**SQUARE, **CUT), t, patch_size=4, img_size=16, downsample_factor=2
        ),
    ),
    "cohere2_vision": Family(
        {**AYA, "image_token_id": "@<|IMG_PATCH|>", "alignment_intermediate_size": 32},
        lambda t: tf.Cohere2VisionProcessor(tf.Cohere2VisionImageProcessor(**SQUARE, **CUT, patch_size=2), t),
        "<|IMG_PATCH|>",
        names=COHERE2_NAMES,
    ),
    "lfm2_vl": Family(
        {
            "text_config": text("lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
            "vision_config": {**NARROW, "model_type": "siglip2_vision_model", "patch_size": 4, "num_patches": 16},
            **IMAGE_ID,
            "projector_hidden_size": 32,
        },
        lambda t: tf.Lfm2VlProcessor(
            tf.Lfm2VlImageProcessor(
                tile_size=16,
                encoder_patch_size=4,
                min_image_tokens=1,
                max_image_tokens=4,
                max_tiles=4,
                downsample_factor=2,
            ),
            t,
        ),
        adapted=12,
        unadapted=CONVOLUTIONS,
    ),
    "idefics2": Family(
        {
            "text_config": text("mistral"),
            "vision_config": {**IDEFICS3_VISION, "image_size": 32},
            "perceiver_config": {
                **{"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2},
                **{"resampler_head_dim": 8, "num_key_value_heads": 1},
            },
            **IMAGE_ID,
        },
        lambda t: tf.Idefics2Processor(
            tf.Idefics2ImageProcessor(size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=False),
            t,
            image_seq_len=4,
        ),
        remark="its processor tells no characters, so an answer costs it two further calls",
    ),
    "qianfan_ocr": Family(
        {
            **INTERNVL,
            "text_config": text("qwen3", head_dim=8),
            "vision_config": {**NARROW, "image_size": [16, 16], "patch_size": [4, 4], "drop_path_rate": 0.0},
        },
        lambda t: tf.QianfanOCRProcessor(tf.GotOcr2ImageProcessor(**SQUARE, **CUT), t, image_seq_length=4),
        names=INTERNVL_NAMES,
    ),
    "granite_docling": Family(
        {
            "text_config": text(),
            "vision_config": {
                **IDEFICS3_VISION,
                **{"scale_factor": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0], "use_fine_route": False},
            },
            **IMAGE_ID,
            **UNTIED,
            "pad_token_id": 0,
        },
        lambda t: tf.GraniteDoclingProcessor(
            tf.GraniteDoclingImageProcessor(**SQUARE, min_patches=1, max_patches=3), t, image_seq_len=4
        ),
        since="5.23",
    ),
    "ovis2": Family(
        {
            "text_config": text("qwen2"),
            "vision_config": {**WIDE, "image_size": 16, "patch_size": 4, "hidden_stride": 2, "vocab_size": 40},
            "image_token_id": "@<IMG_ATOM>",
            "visual_indicator_token_ids": ["@<IMG_START>", "@<IMG_GRID>", "@<IMG_COL>", "@<IMG_ROW>", "@<IMG_END>"],
            "vocab_size": len,
            "hidden_size": 32,
            **UNTIED,
        },
        lambda t: tf.Ovis2Processor(
            tf.Ovis2ImageProcessor(**SQUARE, crop_to_patches=True, max_patches=3), t, image_seq_length=4
        ),
    ),
    "aria": Family(
        {
            "text_config": text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
            "vision_config": {**WIDE, "model_type": "idefics3_vision", "image_size": 980, "patch_size": 98},
            "projector_patch_to_query_dict": {"100": 4},
            **IDS,
        },
        # its processor knows 490 and 980 alone
        lambda t: tf.AriaProcessor(tf.AriaImageProcessor(), t, size_conversion={980: 4}),
        names=IMAGE_NAMES,
        unadapted=EXPERTS,
    ),
}

GEMMA4_IDS = {
    **IMAGE_ID,
    "video_token_id": "@<|video|>",
    "boi_token_id": "@<boi>",
    "eoi_token_id": "@<eoi>",
    "boa_token_id": "@<boa>",
    "eoa_token_index": "@<eoa>",
    "audio_token_id": "@<audio>",
    **UNTIED,
}
SLIDING = {"head_dim": 8, "sliding_window": 64}
BOTH = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
POOLED: Mapping[str, Any] = {"patch_size": 4, "pooling_kernel_size": 2}
GEMMAS: Mapping[str, Family] = {
    "gemma3": Family(
        {
            "text_config": text(**SLIDING, query_pre_attn_scalar=8),
            "vision_config": {**SIGLIP, "vision_use_head": False},
            "mm_tokens_per_image": 4,
            **IDS,
            "boi_token_index": "@<boi>",
            "eoi_token_index": "@<eoi>",
        },
        lambda t: tf.Gemma3Processor(tf.Gemma3ImageProcessor(**SQUARE), t, image_seq_length=4),
        "<boi>",
        names=GEMMA3_NAMES,
    ),
    "gemma4": Family(
        {
            "text_config": text(
                **BOTH, global_head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=len
            ),
            "vision_config": {
                **WIDE,
                **POOLED,
                **{"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64},
            },
            "audio_config": None,
            **GEMMA4_IDS,
        },
        lambda t: tf.Gemma4Processor(
            tf.Gemma4AudioFeatureExtractor(),
            tf.Gemma4ImageProcessor(**POOLED, max_soft_tokens=70),
            t,
            tf.Gemma4VideoProcessor(**POOLED),
        ),
        names=AUDIO_NAMES,
        adapted=19,
        video=True,
        remark="sound is left out",
    ),
    "gemma4_unified": Family(
        {
            "text_config": text(**BOTH, global_head_dim=8),
            "vision_config": {**POOLED, "mm_embed_dim": 32, "mm_posemb_size": 64, "output_proj_dims": 32},
            "audio_config": None,
            **GEMMA4_IDS,
        },
        lambda t: tf.Gemma4UnifiedProcessor(
            tf.Gemma4UnifiedAudioFeatureExtractor(),
            tf.Gemma4UnifiedImageProcessor(**POOLED, max_soft_tokens=70),
            t,
            tf.Gemma4UnifiedVideoProcessor(**POOLED),
        ),
        names=AUDIO_NAMES,
        video=True,
        unstored="pictures are patches of the decoder",
        remark="sound is left out",
    ),
    "gemma3n": Family(
        {
            "text_config": text(
                **BOTH,
                **{"hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0},
                **{"altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0]},
                vocab_size_per_layer_input=len,
            ),
            "vision_config": {
                "model_args": {"channel_multiplier": 0.02},
                "hidden_size": 2048,
                "vocab_size": 4,
                "vocab_offset": len,
            },
            "audio_config": {
                **{"hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "vocab_size": 4},
                **{"input_feat_size": 16, "sscp_conv_channel_size": [4, 4], "vocab_offset": lambda t: len(t) + 4},
            },
            "vision_soft_tokens_per_image": 256,
            **GEMMA4_IDS,
        },
        lambda t: tf.Gemma3nProcessor(
            tf.Gemma3nAudioFeatureExtractor(),
            tf.SiglipImageProcessor(size={"height": 64, "width": 64}),
            t,
            image_seq_length=256,
        ),
        names=AUDIO_NAMES,
        adapted=29,
        slow=True,
        unadapted="AltUp's correction coefficients",
        idle=("model.embed_vision.embedding", "model.embed_vision.hard_embedding_norm"),
        remark="sound is left out; its forward clamps a frozen weight in training",
    ),
    "paligemma": Family(
        {
            "text_config": text("gemma", head_dim=8),
            "vision_config": {**SIGLIP, "vision_use_head": False, "projection_dim": 32},
            "projection_dim": 32,
            "hidden_size": 32,
            **IDS,
            **UNTIED,
        },
        _paligemma,
        names=IMAGE_NAMES,
        format="paligemma",
    ),
}

PIXTRAL = {
    "vision_config": {**NARROW, "model_type": "pixtral", "image_size": 32, "patch_size": 4, "head_dim": 8},
    "spatial_merge_size": 2,
    **UNTIED,
}
DEEPSEEK = {"text_config": text("llama"), "vision_config": {**SIGLIP, "vision_use_head": False}, **IMAGE_ID, **UNTIED}
MERGED = {"patch_size": 4, "spatial_merge_size": 2}


def _pixtral_images() -> Any:
    return tf.PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})


ONE_SIZE: Mapping[str, Family] = {
    "mistral3": Family(
        {
            **PIXTRAL,
            "text_config": text("mistral", head_dim=8),
            "image_token_index": "@[IMG]",
            "vision_feature_layer": -1,
        },
        lambda t: tf.PixtralProcessor(_pixtral_images(), t, **MERGED),
        "[IMG]",
    ),
    "lighton_ocr": Family(
        {**PIXTRAL, "text_config": text("qwen3", head_dim=8), "image_token_id": "@[IMG]"},
        lambda t: tf.LightOnOcrProcessor(_pixtral_images(), t, **MERGED),
        "[IMG]",
        names=PIXTRAL_NAMES,
    ),
    "deepseek_vl": Family(
        DEEPSEEK,
        lambda t: tf.DeepseekVLProcessor(tf.DeepseekVLImageProcessor(**SQUARE), t, num_image_tokens=16),
        names=IMAGE_NAMES,
    ),
    "deepseek_vl_hybrid": Family(
        {
            **DEEPSEEK,
            "high_res_vision_config": {
                **{"model_type": "sam_vision_model", "hidden_size": 16, "output_channels": 8, **HEADS},
                **{"image_size": 64, "patch_size": 4, "mlp_dim": 32, "window_size": 4, "global_attn_indexes": [0, 1]},
            },
        },
        lambda t: tf.DeepseekVLHybridProcessor(
            tf.DeepseekVLHybridImageProcessor(**SQUARE, high_res_size={"height": 64, "width": 64}),
            t,
            num_image_tokens=16,
        ),
        names=IMAGE_NAMES,
    ),
    "janus": Family(
        {
            "text_config": text("llama"),
            "vision_config": {
                **{**HEADS, "hidden_size": 32, "image_size": 16, "patch_size": 4, "projection_dim": 32},
                **{"mlp_ratio": 2.0, "num_image_tokens": 16, "depth": 2},
            },
            "vq_config": {
                **{"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32},
                **{"channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 32, "num_patches": 4},
                "image_token_embed_dim": 32,
            },
            **IMAGE_ID,
        },
        lambda t: tf.JanusProcessor(tf.JanusImageProcessor(**SQUARE), t, num_image_tokens=16),
        names=GEMMA3_NAMES,
    ),
}

FEW_HEADS = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
VQ = {"embed_dim": 8, "latent_channels": 8, "base_channels": 32, "num_res_blocks": 1}
CROSSING: Mapping[str, Family] = {
    "mllama": Family(
        {
            "text_config": text("mllama_text_model", cross_attention_layers=[1]),
            "vision_config": {
                **{"hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2},
                **{"intermediate_size": 32, "image_size": 16, "patch_size": 4, "intermediate_layers_indices": [0]},
                **{"vision_output_dim": 32, "max_num_tiles": 4},
            },
            "image_token_index": "@<|image|>",
        },
        lambda t: tf.MllamaProcessor(tf.MllamaImageProcessor(**SQUARE, max_image_tiles=4), t),
        "<|image|>",
        unstored="pictures stand by row, padded",
        plain_rows="pictures are looked up by row",
        remark="pictures through cross attention, which words alone pass by",
    ),
    "molmo2": Family(
        {
            "text_config": text(head_dim=8, vocab_size=len, additional_vocab_size=8),
            "vision_config": {
                **{**FEW_HEADS, "num_hidden_layers": 2, "intermediate_size": 32, "image_size": [16, 16]},
                **{"patch_size": 4, "num_position_embeddings": 16},
            },
            "adapter_config": {
                **{**FEW_HEADS, "intermediate_size": 32, "text_hidden_size": 32, "vision_feature_layer": [-1, -2]}
            },
            "image_start_token_id": "@<im_start>",
            "low_res_image_start_token_id": "@<low_res_im_start>",
            "image_end_token_id": "@<im_end>",
            "image_patch_id": "@<im_patch>",
            "frame_start_token_id": "@<frame_start>",
            "frame_end_token_id": "@<frame_end>",
        },
        lambda t: tf.Molmo2Processor(
            tf.Molmo2ImageProcessor(**SQUARE, max_crops=3, overlap_margins=[0, 0], patch_size=4, pooling_size=[2, 2]),
            tf.Molmo2VideoProcessor(**SQUARE, patch_size=4),
            t,
        ),
        "<|image|>",
        video=True,
        merges=False,
        remark="its adapter cannot be merged: transformers splits the tensors of its files when it loads them",
    ),
    "hunyuan_vl": Family(
        {
            "text_config": text(
                head_dim=8,
                rope_parameters={
                    **{"rope_type": "xdrope", "rope_theta": 1e4, "alpha": 1.0, "factor": 1.0},
                    "xdrope_section": [1, 1, 1, 1],
                },
            ),
            "vision_config": {
                **{**WIDE, "patch_size": 4, "out_hidden_size": 32, "text_hidden_size": 32, "max_image_size": 64},
                "img_max_token_num": 64,
            },
            **IMAGE_ID,
            "im_start_id": "@<boi>",
            "im_end_id": "@<eoi>",
            "im_newline_id": "@<image_newline>",
            **UNTIED,
        },
        lambda t: tf.HunYuanVLProcessor(
            tf.HunYuanVLImageProcessor(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024}), t
        ),
        "<boi><image><eoi>",
        names=HUNYUAN_NAMES,
        idle=("model.vision_tower.patch_merger.image_sep",),
    ),
    "chameleon": Family(
        {
            **text(vocab_size=len),
            "vq_config": {**VQ, "num_embeddings": 4, "resolution": 16, "channel_multiplier": [1, 1]},
            "vocabulary_map": {"<image>": "@<image>", **{f"IMGIMG{letter}Z": f"@IMGIMG{letter}Z" for letter in "ABCD"}},
        },
        lambda t: tf.ChameleonProcessor(tf.ChameleonImageProcessor(**CROPPED), t, image_seq_length=64),
        names=GEMMA3_NAMES,
        format="question_answer",
        unadapted="convolutions of the picture codes",
        projector=False,
        unstored="pictures are tokens of the decoder",
        remark="pictures are codes of a frozen VQ-VAE; no projector",
        since="5.23",
    ),
    "emu3": Family(
        {
            "text_config": text(attention_dropout=0.0),
            "vq_config": {
                **{**VQ, "codebook_size": 4, "channel_multiplier": [1, 1, 1, 1], "hidden_size": 32},
                "attn_resolutions": [],
            },
            "vocabulary_map": {
                "<image>": "@<image>",
                "<|extra_200|>": "@<image_newline>",
                **{f"<|visual token {number:06d}|>": number + 20 for number in range(4)},
            },
        },
        lambda t: tf.Emu3Processor(tf.Emu3ImageProcessor(min_pixels=32 * 32, max_pixels=64 * 64), t),
        names=EMU3_NAMES,
        projector=False,
        unstored="pictures are tokens of the decoder",
        remark="pictures are codes of a frozen VQ-VAE; no projector",
    ),
}
