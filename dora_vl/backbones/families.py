"""Lists what training must know of model types: which are refused, and what a family's config does not tell.

Everything else is asked of transformers: the model of its config, the pictures and the text of its processor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from dora_vl.backbones import register_towers
from dora_vl.errors import UserError
from dora_vl.files import BRINGS_CODE, NO_OWN_CODE, check_place, opening

LLAVA = "llava"
"""This type's text is tokenised piece by piece between pictures, and pictures are prepared, as in LLaVA-1.5's code."""

_ENCODERS = (
    *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert"),
    *("data2vec-text", "electra", "ernie", "marian", "mbart", "megatron-bert", "mvp", "pegasus", "plbart"),
    *("prophetnet", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm"),
    *("xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod"),
)

_NO_CHAT = ("blip", "blip-2", "fuyu", "git", "idefics", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5")

_OF_AN_ENCODER = ("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder")

NOT_TRAINED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(_NO_CHAT, "it answers no conversation"),
        **dict.fromkeys(
            _OF_AN_ENCODER, "its decoder reads what an encoder made of the pictures, and its labels do not shift"
        ),
        **dict.fromkeys(
            ("got_ocr2", "pp_chart2table"),
            "it turns a picture into text by a prompt of its own, and answers no conversation",
        ),
        **dict.fromkeys(("pi0", "pi05"), "it gives movements, no text"),
        "diffusion_gemma": "it fills in masked blocks, and has no next-token loss",
        "evolla": "it reads proteins, no pictures",
        "llama4": "its forward in transformers 5.24 ends in an error (no image_outputs)",
        "mistral4": "it sees no pictures, and transformers knows it as no language model of its own",
        "shieldgemma2": "it judges pictures by rules, with yes or no",
        **dict.fromkeys(
            _ENCODERS, "it reads in both directions, or predicts something else than the next token of a text"
        ),
        **dict.fromkeys(
            ("moshi", "moss_transcribe_diarize", "musicgen", "musicgen_melody", "trocr", "whisper"),
            "it hears, or reads lines of print, and is the decoder of another model",
        ),
    }
)
"""Maps each model type of transformers that cannot be trained here to the reason."""

TURNED_UNDER_ZERO3: Mapping[str, Mapping[str, tuple[str, str, str]]] = MappingProxyType(
    {"qwen3_vl_moe": {".mlp.experts.down_proj": ("num_experts", "hidden_size", "moe_intermediate_size")}}
)
"""Maps model type and weight to the weight's shape in the model, by names of the text config. transformers 5.24
transposes such weights if they are stored in another shape; under ZeRO-3 it sees no shapes and always transposes."""

PROJECTORS = (
    "multi_modal_projector",
    "connector",
    "merger",
    "patch_merger",
    "deepstack_merger_list",
    "mm_projector",
    "projector",
    "layerwise_projectors",
    "spatial_projectors",
    "visual_embeddings_table",
    "resampler_model",
    "embed_vision",
    "vision_projection",
    "aligner",
    "mlp1",
    "visual_embedding",
)
"""The module between vision and language has a name that ends in one of these in transformers' families."""

BYPASSED = re.compile(r"\.altup\.correction_coefs$|\.indexer\.")
"""An adapter in a linear layer of such a name would silently learn nothing: the model uses the weight without calling
the layer (Gemma 3n while it trains), or the layer chooses which tokens are seen, without a gradient (HY 4)."""

CROSSING, SEES = "cross_attn", "full_text_row_masked_out_mask"
"""These name the attention module of a layer through which words look at pictures (mllama), and the input that says
which words see any."""
MOST: Mapping[str, int] = MappingProxyType({"num_hidden_layers": 10_000, "hidden_size": 1 << 20, "vocab_size": 1 << 26})
"""A config with more is refused; no model is that large, and to build one takes hours or all memory."""


def model_type_of(base: str, revision: str | None = None) -> str:
    """Reads the `model_type` of a folder or hub id; nothing but its config is read."""
    check_place(base)
    here = (
        "cannot be opened"
        if Path(base).is_dir()
        else f"is not a folder in {Path.cwd()}, and cannot be fetched as a hub id"
    )
    with opening(f"model.base {base!r} {here}"):
        config: Any = PreTrainedConfig.get_config_dict(base, revision=revision or "main")[0]
        model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UserError(f"model.base {base!r}: its config.json states no model_type; is it a model's folder?")
    parts = (config, *(value for value in config.values() if isinstance(value, dict)))
    for name, size in ((name, part.get(name)) for part in parts for name in MOST):
        if isinstance(size, int | float) and size > MOST[name]:
            raise UserError(f"model.base {base!r}: {name} in its config.json is {size:,}, above {MOST[name]:,}")
    if config.get("auto_map") and model_type not in CONFIG_MAPPING_NAMES:
        raise UserError(f"model.base {base!r} is a {model_type!r}: {BRINGS_CODE}")
    return model_type


def config_of(base: str, revision: str | None = None) -> Any:
    """Reads the config of a folder or hub id."""
    register_towers()
    model_type_of(base, revision)  # refuses before anything is built
    with opening(f"model.base {base!r} cannot be opened as its config.json says"):
        config = AutoConfig.from_pretrained(base, revision=revision or "main", **NO_OWN_CODE)
    if config.model_type == LLAVA:
        token, tokens = config.image_token_id, config.get_text_config().vocab_size
        if not 0 <= token < tokens:  # LLaVA's own code writes -200
            raise UserError(f"{base}: image_token_index in its config is {token}, and it has {tokens:,} tokens")
    return config


def sees_pictures(base: str, revision: str | None = None) -> bool:
    """Tells whether a folder or hub id is a vision-language model's; a language model takes text only."""
    return not is_language_model(model_type_of(base, revision))


def is_language_model(model_type: str) -> bool:
    """Tells whether transformers knows the type as a causal language model and not as a vision-language model."""
    is_causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return is_causal and model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def check_trained(base: str, model_type: str) -> None:
    """Refuses a model type that cannot be trained on conversations, before its weights are loaded."""
    what = f"model.base {base!r} is a {model_type!r}, which cannot be trained here"
    can = "take a vision-language model that answers chats, such as qwen2_5_vl, smolvlm, internvl, gemma3 or llava"
    if model_type in NOT_TRAINED:
        raise UserError(f"{what}: {NOT_TRAINED[model_type]}; {can}")
    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and not is_language_model(model_type):
        raise UserError(
            f"{what}: transformers knows it neither as an image-text-to-text nor as a causal language model; {can}"
        )
