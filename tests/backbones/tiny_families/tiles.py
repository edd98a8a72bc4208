"""Pictures cut into tiles of one size, and an overview."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.backbones.tiny_families.family import SIGLIP, TEXT, Family, token


def _internvl_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {**vision, "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": token(t, "<IMG_CONTEXT>"),
        "image_seq_length": 4,
        "downsample_ratio": 0.5,
    }


def _internvl(t: PreTrainedTokenizerFast) -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    size = {"height": 16, "width": 16}
    images = GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=3)
    return InternVLProcessor(images, t, InternVLVideoProcessor(size=size), image_seq_length=4)


INTERNVL_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def _idefics3_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {**vision, "image_size": 16, "patch_size": 4},
        "scale_factor": 2,
        "image_token_id": token(t, "<image>"),
        "pad_token_id": 0,
    }


def _idefics3(t: PreTrainedTokenizerFast) -> Any:
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    images = Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return Idefics3Processor(images, t, image_seq_len=4)


def _smolvlm(t: PreTrainedTokenizerFast) -> Any:
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    images = SmolVLMImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return SmolVLMProcessor(images, t, SmolVLMVideoProcessor(), image_seq_len=4)


def _aya_vision_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "cohere2", **TEXT, "head_dim": 8, "layer_types": ["full_attention"] * 2},
        "vision_config": SIGLIP,
        "image_token_index": token(t, "<|IMG_PATCH|>"),
        "downsample_factor": 2,
    }


def _aya_vision(t: PreTrainedTokenizerFast) -> Any:
    from transformers import AyaVisionProcessor, GotOcr2ImageProcessor

    images = GotOcr2ImageProcessor(size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=3)
    return AyaVisionProcessor(images, t, patch_size=4, img_size=16, downsample_factor=2)


def _cohere2_vision_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    base = _aya_vision_config(t)
    del base["image_token_index"]
    return {**base, "image_token_id": token(t, "<|IMG_PATCH|>"), "alignment_intermediate_size": 32}


def _cohere2_vision(t: PreTrainedTokenizerFast) -> Any:
    from transformers import Cohere2VisionProcessor
    from transformers.models.cohere2_vision.image_processing_cohere2_vision import Cohere2VisionImageProcessor

    images = Cohere2VisionImageProcessor(
        size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=3, patch_size=2
    )
    return Cohere2VisionProcessor(images, t)


COHERE2_NAMES = {
    "boi_token": "<|START_OF_IMG|>",
    "eoi_token": "<|END_OF_IMG|>",
    "image_token": "<|IMG_PATCH|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
}


def _lfm2_vl_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"model_type": "siglip2_vision_model", "hidden_size": 16, "intermediate_size": 32}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "num_patches": 16}
    text = {**TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    return {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": token(t, "<image>"),
        "projector_hidden_size": 32,
    }


def _lfm2_vl(t: PreTrainedTokenizerFast) -> Any:
    from transformers import Lfm2VlProcessor
    from transformers.models.lfm2_vl.image_processing_lfm2_vl import Lfm2VlImageProcessor

    images = Lfm2VlImageProcessor(
        tile_size=16, encoder_patch_size=4, min_image_tokens=1, max_image_tokens=4, max_tiles=4, downsample_factor=2
    )
    return Lfm2VlProcessor(images, t)


def _idefics2_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    perceiver = {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2}
    return {
        "text_config": {"model_type": "mistral", **TEXT},
        "vision_config": {**vision, "image_size": 32, "patch_size": 4},
        "perceiver_config": {**perceiver, "resampler_head_dim": 8, "num_key_value_heads": 1},
        "image_token_id": token(t, "<image>"),
    }


def _idefics2(t: PreTrainedTokenizerFast) -> Any:
    from transformers import Idefics2ImageProcessor, Idefics2Processor

    images = Idefics2ImageProcessor(size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=False)
    return Idefics2Processor(images, t, image_seq_len=4)


def _qianfan_ocr_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    base = _internvl_config(t)
    text = {"model_type": "qwen3", **TEXT, "head_dim": 8}
    return {**base, "text_config": text, "vision_config": {**base["vision_config"], "drop_path_rate": 0.0}}


def _qianfan_ocr(t: PreTrainedTokenizerFast) -> Any:
    from transformers import GotOcr2ImageProcessor
    from transformers.models.qianfan_ocr.processing_qianfan_ocr import QianfanOCRProcessor

    size = {"height": 16, "width": 16}
    images = GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=3)
    return QianfanOCRProcessor(images, t, image_seq_length=4)


def _granite_docling_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vision |= {"image_size": 16, "patch_size": 4, "scale_factor": 2, "out_hidden_size": 32}
    return {
        "text_config": TEXT,
        "vision_config": {**vision, "deepstack_visual_indexes": [0], "use_fine_route": False},
        "image_token_id": token(t, "<image>"),
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }


def _granite_docling(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.granite_docling.image_processing_granite_docling import GraniteDoclingImageProcessor
    from transformers.models.granite_docling.processing_granite_docling import GraniteDoclingProcessor

    images = GraniteDoclingImageProcessor(size={"height": 16, "width": 16}, min_patches=1, max_patches=3)
    return GraniteDoclingProcessor(images, t, image_seq_len=4)


def _ovis2_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    marks = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    return {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {**vision, "image_size": 16, "patch_size": 4, "hidden_stride": 2, "vocab_size": 40},
        "image_token_id": token(t, "<IMG_ATOM>"),
        "visual_indicator_token_ids": [token(t, mark) for mark in marks],
        "vocab_size": len(t),
        "hidden_size": 32,
        "tie_word_embeddings": False,
    }


def _ovis2(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.ovis2.image_processing_ovis2 import Ovis2ImageProcessor
    from transformers.models.ovis2.processing_ovis2 import Ovis2Processor

    images = Ovis2ImageProcessor(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=3)
    return Ovis2Processor(images, t, image_seq_length=4)


def _aria_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"model_type": "idefics3_vision", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    return {
        "text_config": {**TEXT, "model_type": "aria_text", **experts},
        "vision_config": {**vision, "intermediate_size": 48, "image_size": 980, "patch_size": 98},
        "projector_patch_to_query_dict": {"100": 4},
        "image_token_index": token(t, "<image>"),
    }


def _aria(t: PreTrainedTokenizerFast) -> Any:
    from transformers.models.aria.image_processing_aria import AriaImageProcessor
    from transformers.models.aria.processing_aria import AriaProcessor

    words: Any = t  # typed there for another class
    return AriaProcessor(AriaImageProcessor(), words, size_conversion={980: 4})  # its processor knows 490 and 980 alone


IMAGE_NAMES = {"image_token": "<image>"}


FAMILIES: Mapping[str, Family] = {
    "internvl": Family(_internvl_config, _internvl, "<IMG_CONTEXT>", names=INTERNVL_NAMES, video=True),
    "idefics3": Family(_idefics3_config, _idefics3),
    "smolvlm": Family(_idefics3_config, _smolvlm, needs="num2words", video=True),
    "aya_vision": Family(_aya_vision_config, _aya_vision),
    "cohere2_vision": Family(_cohere2_vision_config, _cohere2_vision, "<|IMG_PATCH|>", names=COHERE2_NAMES),
    "lfm2_vl": Family(_lfm2_vl_config, _lfm2_vl, adapted=12, unadapted="convolutions"),
    "idefics2": Family(
        _idefics2_config, _idefics2, remark="its processor tells no characters, so an answer costs it two further calls"
    ),
    "qianfan_ocr": Family(_qianfan_ocr_config, _qianfan_ocr, names=INTERNVL_NAMES),
    "granite_docling": Family(_granite_docling_config, _granite_docling, since="5.23"),
    "ovis2": Family(_ovis2_config, _ovis2),
    "aria": Family(_aria_config, _aria, names=IMAGE_NAMES, unadapted="experts and their router"),
}
