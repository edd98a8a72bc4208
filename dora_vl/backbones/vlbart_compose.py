"""Makes a VL-BART folder: from a BART and a fresh visual embedding, from an original checkpoint, or small and random.

The published runs start from `facebook/bart-base`, whose tokens and weights are kept, with 200 new tokens and a
visual embedding drawn at random.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.bart.modeling_bart import BartForConditionalGeneration
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.backbones.feature_spread import measured, standardise
from dora_vl.backbones.vlbart_config import Boxes, VisualNorm, VlBartConfig
from dora_vl.backbones.vlbart_model import VlBartForConditionalGeneration
from dora_vl.backbones.vlbart_names import load_original, original_state
from dora_vl.backbones.written_base import written_base
from dora_vl.data.examples import Example, iterate_examples
from dora_vl.errors import UserError
from dora_vl.model_files import check_model_folder

log = logging.getLogger(__name__)

NOT_BARTS = frozenset(
    ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "dropout", "attention_dropout")
)
"""Fields of a BART's config that its VL-BART has of its own, dropouts among them."""


@dataclass(frozen=True, kw_only=True)
class SmallBart:
    """A BART to be pretrained here, for data too small or too special for a published one."""

    texts: tuple[str, ...]
    """Records files whose texts its vocabulary is made from."""
    words: tuple[str, ...] = ()
    """More texts for the vocabulary: what the task writes around a question, which is spelled letter by letter
    otherwise."""
    vocabulary: int = 1000
    """Tokens before the added ones, at most."""
    width: int = 256
    layers: int = 3
    """Of the encoder, and of the decoder."""
    heads: int = 4
    feedforward: int = 1024
    max_positions: int = 256
    """Longest text."""
    init_std: float = 0.02
    """Spread of the random weights. BART's 0.02 suits widths near 1000: with it, a width of 128 had learned to count
    and nothing else after 600 steps on moving shapes; with 0.1, near 1/sqrt(width), it found colors after 200."""


@dataclass(frozen=True, kw_only=True)
class VlBartSpec:
    """What a VL-BART is made of."""

    bart: str = "facebook/bart-base"
    """Folder or hub id of a BART; its tokenizer and weights are taken."""
    small: SmallBart | None = None
    """Makes a small BART with random weights instead, and its vocabulary from texts."""
    checkpoint: str | None = None
    """A file of VL-T5 or VL-Adapter (`Epoch30.pth`, `LAST.pth`) whose weights the model starts from."""
    feature_width: int = 2048
    """Numbers of a picture token: 2048 for CLIP's RN101 grid, 512 for video frames of CLIP's ViT-B/32."""
    pooled_side: int | None = 6
    """Max-pools each picture's grid to so many rows and columns; null keeps its tokens (video)."""
    boxes: Boxes = "zeros"
    """A picture token's place: zeros as published for grids and videos; its cell's real box; or its box on a strip of
    a video's frames, which says when."""
    frame_side: int = 1
    """Rows and columns of one frame's tokens, for boxes: strip."""
    max_images: int = 2
    """Pictures that one input may have."""
    dropout: float = 0.1
    """All of BART's dropouts; the published runs set all three to this."""
    standardise: str | None = None
    """Folder of features: the fresh visual embedding begins as if each of their numbers had mean 0 and spread 1.
    Deep features of simple pictures have much in common, which a randomly initialised model has
    to learn to look past."""
    seed: int = 9595
    """Draws the visual embedding and the new tokens' rows."""


def compose_vlbart(spec: VlBartSpec, folder: Path | str) -> None:
    """Writes a folder that `load_vlbart` opens; it appears under its name only when it is whole.

    Raises:
        UserError: the folder exists, or a part cannot be read or does not fit.
    """
    with written_base(Path(folder), spec) as unfinished:
        model, tokenizer = _composed(spec)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    log.info("composed %s: %d parameters", folder, sum(one.numel() for one in model.parameters()))


def _composed(spec: VlBartSpec) -> tuple[VlBartForConditionalGeneration, PreTrainedTokenizerBase]:
    tokenizer, shape, weights = _language(spec)
    add_picture_tokens(tokenizer)
    original = None if spec.checkpoint is None else original_state(Path(spec.checkpoint))
    norm: VisualNorm = "each" if original is None else original.visual_norm
    config = VlBartConfig(
        **shape,
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), spec.dropout),
        vocab_size=len(tokenizer),
        feature_width=spec.feature_width,
        pooled_side=spec.pooled_side,
        visual_norm=norm,
        boxes=spec.boxes,
        max_images=spec.max_images,
        frame_side=spec.frame_side,
    )
    model = drawn(config, seed=spec.seed)
    if weights:
        take_bart(model, weights)
    if original is not None:
        load_original(model, original)
    elif spec.standardise is not None:
        first: Any = model.model.encoder.visual_embedding.feat_embedding[0]
        standardise(first, *measured(Path(spec.standardise)))
    return model, tokenizer


def drawn(config: VlBartConfig, *, seed: int) -> VlBartForConditionalGeneration:
    """A model with random weights, N(0, init_std) for embeddings and matrices, from this seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VlBartForConditionalGeneration(config)


@torch.no_grad()
def take_bart(model: VlBartForConditionalGeneration, weights: dict[str, Tensor]) -> None:
    """Puts a BART's weights in; the token embedding's new rows, at its end, stay as they were drawn."""
    state = model.state_dict()
    for name, tensor in weights.items():
        place = state[name]
        if name == "final_logits_bias":
            place[:, : tensor.shape[1]] = tensor
        else:
            place[: len(tensor)] = tensor


def add_picture_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """The 200 tokens of VL-T5, in its order: the last row of the vocabulary is `<vis_extra_id_0>`."""
    names = [f"<{kind}extra_id_{number}>" for kind in ("", "vis_") for number in reversed(range(100))]
    tokenizer.add_special_tokens({"additional_special_tokens": names})


def _language(spec: VlBartSpec) -> tuple[PreTrainedTokenizerBase, dict[str, Any], dict[str, Tensor]]:
    """Tokenizer, config fields and weights (none for a small one) of the language part."""
    if spec.small is not None:
        small = spec.small
        texts = chain(_texts(small.texts), small.words)
        tokenizer = small_tokenizer(texts, vocabulary=small.vocabulary, leading_space=True)
        shape = {
            "d_model": small.width,
            "max_position_embeddings": small.max_positions,
            "init_std": small.init_std,
            **{f"{side}_layers": small.layers for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": small.heads for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": small.feedforward for side in ("encoder", "decoder")},
        }
        return tokenizer, shape, {}
    check_model_folder(spec.bart)
    try:
        loaded: Any = AutoTokenizer.from_pretrained(spec.bart)
        bart = BartForConditionalGeneration.from_pretrained(spec.bart, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"model.compose.bart {spec.bart!r} cannot be opened as a BART: {error}") from error
    shape = {name: value for name, value in bart.config.to_dict().items() if name not in NOT_BARTS}
    shape.pop("activation_dropout", None)
    shape.pop("vocab_size")
    return loaded, shape, dict(bart.state_dict())


def small_tokenizer(texts: Iterator[str], *, vocabulary: int, leading_space: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts with BART's special tokens at BART's ids: no text is unknown to it.

    Args:
        leading_space: a text begins with a space, so that an answer's first word is the token that it is inside a
            question; BART's own does not.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=leading_space)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", special.index("<s>")), ("</s>", special.index("</s>"))]
    )
    named = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


def _texts(files: tuple[str, ...]) -> Iterator[str]:
    for file in files:
        for example in iterate_examples(Path(file)):
            yield from texts_of(example)


def texts_of(example: Example) -> Iterator[str]:
    """Everything that is said in an example."""
    if example.question:
        yield example.question
    yield from example.choices
    yield from (answer.text for answer in example.answers)
    yield from (subtitle.text for subtitle in example.subtitles)
