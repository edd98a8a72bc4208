"""Families that stand alone: pictures through cross attention, pooled crops, grids of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.backbones.tiny_families.family import TEXT, Family, token


def _mllama_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2}
    vision |= {"intermediate_size": 32, "image_size": 16, "patch_size": 4, "intermediate_layers_indices": [0]}
    return {
        "text_config": {**TEXT, "model_type": "mllama_text_model", "cross_attention_layers": [1]},
        "vision_config": {**vision, "vision_output_dim": 32, "max_num_tiles": 4},
        "image_token_index": token(t, "<|image|>"),
    }


def _mllama(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.mllama.image_processing_mllama import MllamaImageProcessor
    from transformers.models.mllama.processing_mllama import MllamaProcessor

    return MllamaProcessor(MllamaImageProcessor(size={"height": 16, "width": 16}, max_image_tiles=4), t)


def _molmo2_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    adapter = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    return {
        "text_config": {**TEXT, "head_dim": 8, "vocab_size": len(t), "additional_vocab_size": 8},
        "vision_config": {**vision, "head_dim": 8, "intermediate_size": 32, "image_size": [16, 16], "patch_size": 4}
        | {"num_position_embeddings": 16},
        "adapter_config": {
            **adapter,
            "intermediate_size": 32,
            "text_hidden_size": 32,
            "vision_feature_layer": [-1, -2],
        },
        "image_start_token_id": token(t, "<im_start>"),
        "low_res_image_start_token_id": token(t, "<low_res_im_start>"),
        "image_end_token_id": token(t, "<im_end>"),
        "image_patch_id": token(t, "<im_patch>"),
        "frame_start_token_id": token(t, "<frame_start>"),
        "frame_end_token_id": token(t, "<frame_end>"),
    }


def _molmo2(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor
    from transformers.models.molmo2.processing_molmo2 import Molmo2Processor
    from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessor

    size = {"height": 16, "width": 16}
    images = Molmo2ImageProcessor(size=size, max_crops=3, overlap_margins=[0, 0], patch_size=4, pooling_size=[2, 2])
    return Molmo2Processor(images, Molmo2VideoProcessor(size=size, patch_size=4), t)


def _hunyuan_vl_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    vision |= {"patch_size": 4, "out_hidden_size": 32, "text_hidden_size": 32, "max_image_size": 64}
    rope = {"rope_type": "xdrope", "rope_theta": 1e4, "alpha": 1.0, "factor": 1.0, "xdrope_section": [1, 1, 1, 1]}
    return {
        "text_config": {**TEXT, "head_dim": 8, "rope_parameters": rope},
        "vision_config": {**vision, "img_max_token_num": 64},
        "image_token_id": token(t, "<image>"),
        "im_start_id": token(t, "<boi>"),
        "im_end_id": token(t, "<eoi>"),
        "im_newline_id": token(t, "<image_newline>"),
        "tie_word_embeddings": False,
    }


def _hunyuan_vl(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.hunyuan_vl.image_processing_hunyuan_vl import HunYuanVLImageProcessor
    from transformers.models.hunyuan_vl.processing_hunyuan_vl import HunYuanVLProcessor

    images = HunYuanVLImageProcessor(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    return HunYuanVLProcessor(images, t)


HUNYUAN_NAMES = {"image_token": "<image>", "image_start_token": "<boi>", "image_end_token": "<eoi>"}
VQ = {"embed_dim": 8, "latent_channels": 8, "base_channels": 32, "num_res_blocks": 1}


def _chameleon_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vq = {**VQ, "num_embeddings": 4, "resolution": 16, "channel_multiplier": [1, 1]}
    codes = {f"IMGIMG{letter}Z": token(t, f"IMGIMG{letter}Z") for letter in "ABCD"}
    return {
        **TEXT,
        "vocab_size": len(t),
        "vq_config": vq,
        "vocabulary_map": {"<image>": token(t, "<image>"), **codes},
    }


def _chameleon(t: PreTrainedTokenizerFast) -> Any:
    from transformers import ChameleonProcessor
    from transformers.models.chameleon.image_processing_chameleon import ChameleonImageProcessor

    images = ChameleonImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return ChameleonProcessor(images, t, image_seq_length=64)


def _emu3_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    codes = {f"<|visual token {number:06d}|>": number + 20 for number in range(4)}
    vq = {**VQ, "codebook_size": 4, "channel_multiplier": [1, 1, 1, 1], "hidden_size": 32, "attn_resolutions": []}
    return {
        "text_config": {**TEXT, "attention_dropout": 0.0},
        "vq_config": vq,
        "vocabulary_map": {"<image>": token(t, "<image>"), "<|extra_200|>": token(t, "<image_newline>"), **codes},
    }


def _emu3(t: PreTrainedTokenizerFast) -> Any:
    from transformers import Emu3Processor
    from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor

    return Emu3Processor(Emu3ImageProcessor(min_pixels=32 * 32, max_pixels=64 * 64), t)


JANUS_NAMES = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
EMU3_NAMES = {**JANUS_NAMES, "image_wrapper_token": "<img_wrap>", "eof_token": "<eof>"}


FAMILIES: Mapping[str, Family] = {
    "mllama": Family(
        _mllama_config,
        _mllama,
        "<|image|>",
        unstored="pictures stand by row, padded",
        remark="pictures through cross attention, which words alone pass by",
    ),
    "molmo2": Family(
        _molmo2_config,
        _molmo2,
        "<|image|>",
        video=True,
        merges=False,
        remark="its adapter cannot be merged: transformers splits the tensors of its files when it loads them",
    ),
    "hunyuan_vl": Family(
        _hunyuan_vl_config,
        _hunyuan_vl,
        "<boi><image><eoi>",
        names=HUNYUAN_NAMES,
        idle=("model.vision_tower.patch_merger.image_sep",),
    ),
    "chameleon": Family(
        _chameleon_config,
        _chameleon,
        names=JANUS_NAMES,
        format="question_answer",
        unadapted="convolutions of the picture codes",
        projector=False,
        unstored="pictures are tokens of the decoder",
        remark="pictures are codes of a frozen VQ-VAE; no projector",
        since="5.23",
    ),
    "emu3": Family(
        _emu3_config,
        _emu3,
        names=EMU3_NAMES,
        projector=False,
        unstored="pictures are tokens of the decoder",
        remark="pictures are codes of a frozen VQ-VAE; no projector",
    ),
}
