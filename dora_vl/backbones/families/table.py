"""Lists what training must know of model types: which are refused, and what a family's config does not tell.

Everything else is asked of transformers: the model of its config, the pictures and the text of its processor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from dora_vl.backbones.families.quirks import a_picture_for_each, patches_in_one_row, with_moved_pointers
from dora_vl.backbones.specs import FormatName
from dora_vl.data.batches import Join, concatenated

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


@dataclass(frozen=True, kw_only=True)
class ProcessorQuirks:
    """What a processor needs beyond the text and the pictures, and its model of a batch."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Goes to the processor in each call."""
    format: FormatName | None = None
    """The only prompt format that it takes, whatever the settings say of chat templates."""
    join: Join = concatenated
    """Joins the pictures of a batch."""


_MINICPM = ProcessorQuirks(join=patches_in_one_row)

PROCESSORS: Mapping[str, ProcessorQuirks] = MappingProxyType(
    {
        # or it puts a separator after every text
        "ChameleonProcessor": ProcessorQuirks(options={"return_for_text_completion": True}),
        "MiniCPMOcrProcessor": _MINICPM,
        "MiniCPMV4_6Processor": _MINICPM,
        "MiniCPMV4_7Processor": _MINICPM,
        # it lists them; its model refuses them
        "MiniMaxM3VLProcessor": ProcessorQuirks(options={"return_mm_token_type_ids": False}),
        "MllamaProcessor": ProcessorQuirks(join=a_picture_for_each),
        "Molmo2Processor": ProcessorQuirks(join=with_moved_pointers),
        "PaliGemmaProcessor": ProcessorQuirks(format="paligemma"),
    }
)
"""Maps the classes of transformers' processors that need more than others to what they need."""


def quirks_of(processor: Any) -> ProcessorQuirks:
    """Returns what a processor needs; nothing if it is not in the table."""
    return PROCESSORS.get(type(processor).__name__, ProcessorQuirks())
