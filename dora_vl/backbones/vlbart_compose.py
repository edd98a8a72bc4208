"""Makes a VL-BART folder: from a BART and a fresh visual embedding, from an original checkpoint, or small and random.

The published runs start from `facebook/bart-base`, whose tokens and weights are kept, with 200 new tokens and a
visual embedding drawn at random.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.bart.modeling_bart import BartForConditionalGeneration
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.adapters.files import read_tensors
from dora_vl.adapters.foreign import ALIASES, EMBEDDING
from dora_vl.backbones.loading import written_base
from dora_vl.backbones.specs import VlBartSpec
from dora_vl.backbones.tower_sources import measured, small_tokenizer, standardise, texts_of
from dora_vl.backbones.vlbart_model import VisualNorm, VlBartConfig, VlBartForConditionalGeneration
from dora_vl.errors import UserError, one_line
from dora_vl.files import NO_OWN_CODE, check_model_folder, opening

RAW_WEIGHT = ".weight_v"  # NVlabs' DoRA keeps the frozen weight under this name


@dataclass(frozen=True)
class OriginalState:
    """A file's weights of the base, and how its visual embedding is normed."""

    tensors: dict[str, Tensor]
    visual_norm: VisualNorm
    source: str

    @property
    def feature_width(self) -> int:
        """Returns the numbers of a picture token."""
        return self.tensors[f"{EMBEDDING}.feat_embedding.0.weight"].shape[1]


def as_original(tensors: Mapping[str, Tensor], *, source: str) -> OriginalState:
    """Takes the base's weights from a file's dictionary; adapters in it are left to `dora-vl convert`."""
    own = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("module.")
        if re.search(r"\.(weight_m|lora_A|lora_B)$|\.lora_(As|Bs)\.", name):
            continue
        own[f"{name.removesuffix(RAW_WEIGHT)}.weight" if name.endswith(RAW_WEIGHT) else name] = tensor
    if f"{EMBEDDING}.feat_embedding.0.weight" not in own:
        raise UserError(
            f"{source} holds no {EMBEDDING}.feat_embedding.0.weight; it is no VL-BART of VL-T5 or VL-Adapter"
        )
    norm: VisualNorm = "sum" if f"{EMBEDDING}.layer_norm.weight" in own else "none"
    if f"{EMBEDDING}.feat_embedding.1.weight" in own:
        norm = "each"
    return OriginalState(own, norm, source)


def load_original(model: VlBartForConditionalGeneration, state: OriginalState) -> None:
    """Loads strictly; where the file lacks a name of the shared tensor, another name's value fills it."""
    tokens = next((state.tensors[name] for name in ALIASES if name in state.tensors), None)
    aliases = {} if tokens is None else dict.fromkeys(ALIASES, tokens)
    try:
        model.load_state_dict({**aliases, **state.tensors}, strict=True)
    except RuntimeError as error:  # which names what is missing, unexpected or of another shape
        raise UserError(
            f"{one_line(f'{state.source} does not fit: {error}', 400)}; is feature_width {state.feature_width}, "
            f"visual_norm {state.visual_norm}?"
        ) from error


log = logging.getLogger(__name__)


def compose_vlbart(spec: VlBartSpec, folder: Path | str) -> None:
    """Writes a folder that `load_vlbart` opens; it appears under its name only when it is whole."""
    with written_base(Path(folder), spec) as unfinished:
        model, tokenizer = _composed(spec)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    log.info("composed %s: %d parameters", folder, sum(parameter.numel() for parameter in model.parameters()))


def _composed(spec: VlBartSpec) -> tuple[VlBartForConditionalGeneration, PreTrainedTokenizerBase]:
    tokenizer, shape, weights = _language(spec)
    add_picture_tokens(tokenizer)
    original = (
        None if spec.checkpoint is None else as_original(read_tensors(Path(spec.checkpoint)), source=spec.checkpoint)
    )
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = VlBartForConditionalGeneration(config)
    state = model.state_dict()
    for name, tensor in weights.items():  # the token embedding's new rows, at its end, stay as they were drawn
        filled, whole = (state[name].T, tensor.T) if name == "final_logits_bias" else (state[name], tensor)
        filled[: len(whole)] = whole
    if original is not None:
        load_original(model, original)
    elif spec.standardise is not None:
        first: Any = model.model.encoder.visual_embedding.feat_embedding[0]
        standardise(first, *measured(Path(spec.standardise)))
    return model, tokenizer


def add_picture_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds the 200 tokens of VL-T5 in its order: the last row of the vocabulary is `<vis_extra_id_0>`."""
    names = [f"<{kind}extra_id_{number}>" for kind in ("", "vis_") for number in reversed(range(100))]
    tokenizer.add_special_tokens({"additional_special_tokens": names})


def _language(spec: VlBartSpec) -> tuple[PreTrainedTokenizerBase, dict[str, Any], dict[str, Tensor]]:
    """Returns tokenizer, config fields and weights of the language part; a small one has no weights."""
    if spec.small is not None:
        small = spec.small
        tokenizer = small_tokenizer(texts_of(small), vocabulary=small.vocabulary, leading_space=True)
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
    with opening(f"model.compose.bart {spec.bart!r} cannot be opened as a BART"):
        loaded: Any = AutoTokenizer.from_pretrained(spec.bart, **NO_OWN_CODE)
        bart = BartForConditionalGeneration.from_pretrained(spec.bart, dtype=torch.float32)
    # A VL-BART sets these fields itself.
    own = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "dropout", "vocab_size"}
    own |= {"attention_dropout", "activation_dropout"}
    shape = {name: value for name, value in bart.config.to_dict().items() if name not in own}
    return loaded, shape, dict(bart.state_dict())
