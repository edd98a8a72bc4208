"""What every tiny family shares: its row in the tables, special tokens, sizes of the text model, and towers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from packaging.version import Version
from transformers import PreTrainedTokenizerFast

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
    *("<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
    *("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<im_end>", "<im_low>"),
    *("<frame_start>", "<frame_end>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
    *("<slice>", "</slice>", "<image_id>", "</image_id>", "<audio>", "<boa>", "<eoa>", "<|python_tag|>"),
    *("<image_newline>", "<eof>", "<img_wrap>", "<imgpad>", "<|media_pad|>", "<|media_start|>", "<|media_end|>"),
    *("<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>"),
    *("IMGIMGAZ", "IMGIMGBZ", "IMGIMGCZ", "IMGIMGDZ"),
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
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2}
NARROW = {**HEADS, "hidden_size": 16, "intermediate_size": 32}
WIDE = {**HEADS, "hidden_size": 32, "intermediate_size": 48}
CLIP = {**NARROW, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 4}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
UNTIED = {"tie_word_embeddings": False}
EXPERTS, CONVOLUTIONS = "experts and their router", "convolutions"
SQUARE: Mapping[str, Any] = {"size": {"height": 16, "width": 16}}
CROPPED: Mapping[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


def text(model_type: str = "", **more: Any) -> dict[str, Any]:
    """The language model's settings."""
    return {**({"model_type": model_type} if model_type else {}), **TEXT, **more}


@dataclass(frozen=True)
class Family:
    """How a tiny model of a family is made: config, processor, and what its template writes for a picture."""

    config: Mapping[str, Any]
    """`@` and a special token stand for its id, a function for what it gives of the tokenizer."""
    processor: Callable[[Any], Any]
    """Makes it of the tokenizer."""
    picture: str = "<image>"
    needs: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    """Special tokens that the family's processor asks its tokenizer for, by their names there."""
    format: str | None = None
    """The prompt format that stands in for a chat template; a family with one is written without a template."""
    adapted: int = 14
    """Linear layers of the tiny decoder: the seven of LLaMA, twice."""
    idle: tuple[str, ...] = ()
    """Beginnings of names that train and take part in no picture's features."""
    unadapted: str = ""
    """What holds weights of the decoder and is no linear layer."""
    projector: bool = True
    """Whether something stands between vision and language, and trains."""
    slow: bool = False
    """Whether its tests take more than ten seconds."""
    merges: bool = True
    """Whether an adapter can be merged: not where transformers splits the files' tensors when it loads them."""
    video: bool = False
    """Whether the processor takes videos as such; else their frames go in as pictures."""
    peft: bool = True
    """Whether PEFT opens an adapter of it; else it refuses the folder."""
    unstored: str = ""
    """Why the outputs of its frozen vision parts cannot be stored; empty where they can."""
    plain_rows: str = ""
    """Why rows of several samples do not fit it; empty where they do."""
    remark: str = ""
    since: str = ""
    """The first version of transformers that has it, where an older one is taken too."""


def why_not_here(since: str) -> str:
    """Why a test of what came with a version of transformers is skipped; nothing where this one has it."""
    if since and Version(transformers.__version__) < Version(since):
        return f"right from transformers {since} on, and this is {transformers.__version__}"
    return ""


def resolved(settings: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Settings of a `Family.config` with the tokenizer's numbers."""
    if isinstance(settings, Mapping):
        return {name: resolved(value, tokenizer) for name, value in settings.items()}
    if isinstance(settings, list):
        return [resolved(value, tokenizer) for value in settings]
    if isinstance(settings, str) and settings.startswith("@"):
        return tokenizer.convert_tokens_to_ids(settings[1:])
    return settings(tokenizer) if callable(settings) else settings
