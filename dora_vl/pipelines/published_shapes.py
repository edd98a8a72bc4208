"""Sizes of published models, for estimates where no folder of the model is at hand; from their `config.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_vl.errors import UserError

_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def _llava(width: int, inner: int, layers: int) -> dict[str, Any]:
    """LLaVA-1.5 on a Vicuna (llava-hf/llava-1.5-7b-hf, llava-1.5-13b-hf)."""
    text = {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 128,
        "num_key_value_heads": width // 128,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 32000,
        "image_seq_length": 576,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": _CLIP,
        "text_config": text,
        "tie_word_embeddings": False,
    }


def _qwen2_5_vl(
    width: int, inner: int, layers: int, heads: int, *, key_heads: int, vision_inner: int
) -> dict[str, Any]:
    """Qwen2.5-VL (Qwen/Qwen2.5-VL-7B-Instruct, Qwen2.5-VL-32B-Instruct)."""
    rotary = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = {
        "vocab_size": 152064,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 128000,
        "rope_parameters": rotary,
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": vision_inner,
        "num_heads": 16,
        "out_hidden_size": width,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_config": vision,
        "text_config": text,
        "tie_word_embeddings": False,
    }


SHAPES: Mapping[str, dict[str, Any]] = {
    "llava-1.5-7b": _llava(4096, 11008, 32),
    "llava-1.5-13b": _llava(5120, 13824, 40),
    "qwen2.5-vl-7b": _qwen2_5_vl(3584, 18944, 28, 28, key_heads=4, vision_inner=3420),
    "qwen2.5-vl-32b": _qwen2_5_vl(5120, 27648, 64, 40, key_heads=8, vision_inner=3456),
}
"""Name -> what its `config.json` says of sizes."""


def with_shape(config: Any, shape: str | None, folder: Path) -> Any:
    """The settings over a folder with a published model's config; as they are where no shape is named.

    Raises:
        UserError: there is no such shape, or none is named and the base is still to be composed.
    """
    written_here = {one.name for one in dataclasses.fields(config.model)} & {"compose", "source"}
    if shape is None:
        if "compose" in written_here and config.model.compose is not None and not Path(config.model.base).exists():
            named = " or ".join(SHAPES)
            raise UserError(f"model.base {config.model.base} is not composed yet; name its sizes by --shape: {named}")
        return config
    if shape not in SHAPES:
        raise UserError(f"--shape {shape} is not known; there are {', '.join(SHAPES)}")
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]), encoding="utf-8")
    changed: dict[str, Any] = {"base": str(folder), "revision": None}
    changed |= dict.fromkeys(written_here)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changed))
