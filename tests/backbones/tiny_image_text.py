"""Tiny random vision-language models of many families, each a folder with its processor and chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

SPECIAL = (
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<video>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    "<boi>",
    "<eoi>",
    "<|image_start|>",
    "<|image_end|>",
    "<|img_thumbnail|>",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
    "<|START_OF_IMG|>",
    "<|END_OF_IMG|>",
    "<|IMG_PATCH|>",
    "<|IMG_LINE_BREAK|>",
    "TILE",
    "TILE_GLOBAL",
    "<|image|>",
    "<|video|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
)
TEXT: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 4,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}PICTURE{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLIP = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
CLIP |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}


@dataclass(frozen=True)
class Family:
    """How a tiny model of a family is made: config, processor, and what its template writes for a picture."""

    config: Callable[[PreTrainedTokenizerFast], dict[str, Any]]
    processor: Callable[[PreTrainedTokenizerFast], Any]
    picture: str = "<image>"
    needs: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    """Special tokens that the family's processor asks its tokenizer for, by their names there."""


def tiny_tokenizer(names: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with every family's special tokens."""
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words.train_from_iterator(["user assistant What colour is it? It is red green blue. Say the colour."], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="<|im_end|>", pad_token="<unk>",
        extra_special_tokens=dict(names),
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return tokenizer


def write_tiny(model_type: str, folder: Path, *, template: str | None = None, width: int = TEXT["hidden_size"]) -> Path:
    """Model and processor of one family; the same weights at every call.

    Args:
        width: of the language model's hidden states.
    """
    family = FAMILIES[model_type]
    tokenizer = tiny_tokenizer(family.names)
    settings = family.config(tokenizer)
    settings["text_config"] = {"vocab_size": len(tokenizer), **settings["text_config"]}
    if width != TEXT["hidden_size"]:
        heads = width // 8
        settings["text_config"] |= {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 2 * width}
        if "out_hidden_size" in settings["vision_config"]:
            settings["vision_config"] = {**settings["vision_config"], "out_hidden_size": width}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **settings))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor = family.processor(tokenizer)
    processor.chat_template = (template or CHATML).replace("PICTURE", family.picture)
    processor.save_pretrained(folder)
    return folder


def token(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """A special token's id."""
    found = tokenizer.convert_tokens_to_ids(text)
    assert isinstance(found, int)
    return found


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


def _qwen2_text(**more: Any) -> dict[str, Any]:
    return {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}, **more}


def _qwen_tokens(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "image_token_id": token(t, "<|image_pad|>"),
        "video_token_id": token(t, "<|video_pad|>"),
        "vision_start_token_id": token(t, "<|vision_start|>"),
        "vision_end_token_id": token(t, "<|vision_end|>"),
    }


def _qwen2_vl_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    return {"text_config": _qwen2_text(), "vision_config": vision, **_qwen_tokens(t)}


def _qwen2_5_vl_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "window_size": 32}
    return {
        "text_config": _qwen2_text(),
        "vision_config": {**vision, "fullatt_block_indexes": [1]},
        **_qwen_tokens(t),
    }


def _qwen3_vl_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "num_position_embeddings": 16}
    text = _qwen2_text(head_dim=8)
    return {"text_config": text, "vision_config": {**vision, "deepstack_visual_indexes": [0]}, **_qwen_tokens(t)}


def _qwen_parts(patch_size: int = 4) -> tuple[Any, Any]:
    from transformers import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    sizes = {"patch_size": patch_size, "merge_size": 2}
    images = Qwen2VLImageProcessor(**sizes, size={"shortest_edge": 64, "longest_edge": 1024})
    return images, Qwen2VLVideoProcessor(**sizes)


def _qwen2_vl(t: PreTrainedTokenizerFast) -> Any:
    from transformers import Qwen2VLProcessor

    images, videos = _qwen_parts()
    return Qwen2VLProcessor(images, t, videos)


def _qwen2_5_vl(t: PreTrainedTokenizerFast) -> Any:
    from transformers import Qwen2_5_VLProcessor

    images, videos = _qwen_parts()
    return Qwen2_5_VLProcessor(images, t, videos)


def _qwen3_vl(t: PreTrainedTokenizerFast) -> Any:
    from transformers import Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    images, _ = _qwen_parts()
    return Qwen3VLProcessor(images, t, Qwen3VLVideoProcessor(patch_size=4, merge_size=2))


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


def _mistral3_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return {
        "text_config": {"model_type": "mistral", "head_dim": 8, **TEXT},
        "vision_config": {**vision, "num_attention_heads": 2, "image_size": 32, "patch_size": 4, "head_dim": 8},
        "image_token_index": token(t, "[IMG]"),
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
    }


def _mistral3(t: PreTrainedTokenizerFast) -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor

    images = PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    return PixtralProcessor(images, t, patch_size=4, spatial_merge_size=2)


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


def _qwen3_5_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    linear |= {"linear_num_value_heads": 4}
    layers = ["linear_attention", "full_attention"]
    return {
        "text_config": {**TEXT, **linear, "head_dim": 8, "layer_types": layers, "rope_parameters": rope},
        "vision_config": {**vision, "patch_size": 4, "num_position_embeddings": 16},
        **_qwen_tokens(t),
    }


def _qwen3_vl_moe_config(t: PreTrainedTokenizerFast) -> dict[str, Any]:
    base = _qwen3_vl_config(t)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    return {**base, "text_config": {**base["text_config"], **experts}}


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


GEMMA3_NAMES = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}

QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
FAMILIES: Mapping[str, Family] = {
    "llava": Family(_llava_config, _llava),
    "vipllava": Family(_vipllava_config, _llava),
    "llava_next": Family(_llava_next_config, _llava_next),
    "llava_next_video": Family(_llava_next_video_config, _llava_next_video),
    "llava_onevision": Family(_onevision_config, _onevision),
    "qwen2_vl": Family(_qwen2_vl_config, _qwen2_vl, QWEN_PICTURE),
    "qwen2_5_vl": Family(_qwen2_5_vl_config, _qwen2_5_vl, QWEN_PICTURE),
    "qwen3_vl": Family(_qwen3_vl_config, _qwen3_vl, QWEN_PICTURE),
    "internvl": Family(_internvl_config, _internvl, "<IMG_CONTEXT>", names=INTERNVL_NAMES),
    "idefics3": Family(_idefics3_config, _idefics3),
    "smolvlm": Family(_idefics3_config, _smolvlm, needs="num2words"),
    "gemma3": Family(_gemma3_config, _gemma3, "<boi>", names=GEMMA3_NAMES),
    "mistral3": Family(_mistral3_config, _mistral3, "[IMG]"),
    "aya_vision": Family(_aya_vision_config, _aya_vision),
    "cohere2_vision": Family(_cohere2_vision_config, _cohere2_vision, "<|IMG_PATCH|>", names=COHERE2_NAMES),
    "glm4v": Family(_glm4v_config, _glm4v, "<|begin_of_image|><|image|><|end_of_image|>"),
    "qwen3_5": Family(_qwen3_5_config, _qwen3_vl, QWEN_PICTURE),
    "qwen3_vl_moe": Family(_qwen3_vl_moe_config, _qwen3_vl, QWEN_PICTURE),
    "lfm2_vl": Family(_lfm2_vl_config, _lfm2_vl),
}
