"""A run's settings of its base, as plain dataclasses: --help reads them, so nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

TemplateName = Literal[
    "vicuna_v1", "llava_v1", "llama_2", "mistral_instruct", "chatml_direct", "chatml", "plain", "tokenizer"
]
FormatName = Literal["question_answer", "paligemma"]
Template = TemplateName | FormatName
VisionLibrary = Literal["timm", "open_clip", "transformers"]
PRETRAINED, RANDOM = "pretrained", "random"


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """The vision network to take, its library, and its part; `ComposeSpec` explains each field."""

    library: VisionLibrary
    name: str
    weights: str = PRETRAINED
    weights_in_order: bool = False
    layer: int | None = None
    grid_pool: int | None = None
    image_size: int | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class ComposeSpec:
    """The parts of a composed LLaVA; LLaVA-1.5's projector, `mlp2x_gelu`, is between them."""

    vision_library: VisionLibrary
    """Library that the vision tower comes from."""
    vision_name: str
    """timm's or open_clip's model name; for transformers a folder or hub id (a whole CLIP or its vision part)."""
    language_model: str | None = None
    """Folder or hub id of a causal language model; with `gguf_file`, the folder that file lies in."""
    gguf_file: str | None = None
    """A GGUF file in `language_model`; it is dequantised."""
    small: SmallLanguageModel | None = None
    """Makes a small Llama with random weights instead, and its vocabulary from texts."""
    vision_weights: str = "pretrained"
    """`pretrained` (the library's own download), `random`, an open_clip tag, or a .pth / .safetensors file."""
    vision_weights_in_order: bool = False
    """Matches the weights file to the network by position instead of by name, every shape checked."""
    vision_layer: int | None = None
    """Hidden state counted from the end; None is -2 for transformers (as in LLaVA-1.5), -1 for the others."""
    grid_pool: int | None = None
    """Side of the picture's grid after average pooling in the tower; None keeps the tower's grid."""
    image_size: int | None = None
    """Pixels along a side; None takes the tower's published value."""
    image_mean: tuple[float, float, float] | None = None
    """Colour mean, 0 to 1; None takes the tower's published value."""
    image_std: tuple[float, float, float] | None = None
    """Colour deviation, 0 to 1; None takes the tower's published value."""
    standardise: str | None = None
    """Folder of this tower's features (`data_prep.features`): the projector starts out normalised to their mean and
    spread."""
    projector_seed: int = 0
    """Seed of the projector's initial weights, and of a small Llama's."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """dtype of the weights in the folder; None keeps the language model's own (float32 for GGUF)."""

    def tower(self) -> TowerSpec:
        """Returns the fields about the vision tower."""
        own = vars(self)
        tower: dict[str, Any] = {
            field.name: own.get(f"vision_{field.name}", own.get(field.name)) for field in fields(TowerSpec)
        }
        return TowerSpec(**tower)


PromptName = Literal["nvlabs", "llm_adapters", "alpaca", "cloze"]
TrainOn = Literal["all", "answer"]


@dataclass(frozen=True, kw_only=True)
class LanguageSource:
    """A causal language model that is written once as a plain Hugging Face folder: a GGUF file, or another dtype."""

    folder: str
    """Folder or hub id of the model; with `gguf_file`, the folder that file lies in."""
    gguf_file: str | None = None
    """A GGUF file in `folder`; it is dequantised."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """dtype of the written weights; None keeps the folder's own (float32 for GGUF)."""


Boxes = Literal["zeros", "grid", "strip"]


@dataclass(frozen=True, kw_only=True)
class SmallLanguageModel:
    """A BART or Llama to be pretrained here, for data too small or too special for a published one."""

    texts: tuple[str, ...]
    """Files in any format that training reads; the vocabulary is made from their texts."""
    words: tuple[str, ...] = ()
    """More texts for the vocabulary, such as the words that the task writes around a question; otherwise they are
    spelled letter by letter."""
    vocabulary: int = 1000
    """The most tokens that the tokenizer learns; special ones are added to them."""
    width: int = 256
    """Width of the hidden states."""
    layers: int = 3
    """Layers of a Llama; of a BART's encoder, and of its decoder."""
    heads: int = 4
    """Heads of each attention."""
    feedforward: int = 1024
    """Width between the two linears of each MLP."""
    max_positions: int = 256
    """Tokens of the longest text."""
    init_std: float = 0.02
    """Spread of the random weights. 0.02 suits widths near 1000; small ones learn sooner with 1/sqrt(width)."""


@dataclass(frozen=True, kw_only=True)
class VlBartSpec:
    """The parts of a VL-BART."""

    bart: str = "facebook/bart-base"
    """Folder or hub id of a BART; its tokenizer and weights are taken."""
    small: SmallLanguageModel | None = None
    """Makes a small BART with random weights instead, and its vocabulary from texts."""
    checkpoint: str | None = None
    """A file of VL-T5 or VL-Adapter (`Epoch30.pth`, `LAST.pth`) whose weights the model starts from."""
    feature_width: int = 2048
    """Numbers of a picture token: 2048 for CLIP's RN101 grid, 512 for video frames of CLIP's ViT-B/32."""
    pooled_side: int | None = 6
    """Rows and columns that each picture's grid is max-pooled to; null keeps its tokens (video)."""
    boxes: Boxes = "zeros"
    """Box of each picture token. zeros: none, as published for grids and videos; grid: its cell's real box; strip: its
    box on a strip of a video's frames, which says when."""
    frame_side: int = 1
    """Rows and columns of one frame's tokens, for boxes: strip."""
    max_images: int = 2
    """Most pictures in one input."""
    dropout: float = 0.1
    """All of BART's dropouts; the published runs set all three to this."""
    standardise: str | None = None
    """Folder of features whose mean and spread the fresh visual embedding starts out normalised to. Features of simple
    pictures are much alike, and a random embedding would first have to learn to look past that."""
    seed: int = 9595
    """Seed of the visual embedding and the new tokens' rows."""
