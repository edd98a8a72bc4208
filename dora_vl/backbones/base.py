"""Every backbone is a Hugging Face model that hands features to a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from dora_vl.shapes import Float, Int

Model = TypeVar("Model", bound=PreTrainedModel)
Attention = str | Mapping[str, str] | None
"""Names attention kernels as transformers does: one name, or one per part by its config's name, with "" for the rest;
None lets transformers choose."""


class Backbone(nn.Module, Generic[Model]):
    """Holds a Hugging Face model under `model`; adapters, files and parameter names are that model's."""

    model: Model


class Features(NamedTuple):
    """The positions of a batch that predict a label, one after another, and what they predict.

    `targets` are the token ids one position later; `rows` says which row of the batch each comes from, so
    that a head can normalise per sample. Without labels there is one position per row, its last, and `targets` is -100
    there. `losses` are the labels' cross-entropy; `logits` are kept where they are asked for. A tuple, because
    DeepSpeed's ZeRO-3 hooks look for tensors in tuples and not in other classes.
    """

    hidden: Float[Tensor, "labelled width"]
    losses: Float[Tensor, " labelled"]
    targets: Int[Tensor, " labelled"]
    rows: Int[Tensor, " labelled"]
    logits: Float[Tensor, "labelled vocab"] | None = None


class Expected(NamedTuple):
    """The scores that another model gives where some samples of a batch have labels; the loss is the divergence.

    `scores` come sample by sample, each sample's in the order of its labels; `samples` ascend.
    """

    samples: Int[Tensor, " some"]
    scores: Float[Tensor, "labelled vocab"]


def attention_of(model: PreTrainedModel) -> Attention:
    """Returns the attention kernels that a model was opened with."""
    parts = {type(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    kinds = {name: type(getattr(model.config, name)) for name in model.config.sub_configs}
    kernels: dict[str, Any] = {name: parts[kind]._attn_implementation for name, kind in kinds.items() if kind in parts}
    kernels[""] = model.config._attn_implementation
    return kernels if len({*kernels.values()}) > 1 else kernels[""]


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Returns the language model's layers without its output head; the model itself where it has no decoder."""
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel) or decoder.get_output_embeddings() is None:
        return decoder
    inner: nn.Module = decoder.get_decoder()  # a whole causal model has one
    return getattr(decoder, "model", decoder) if inner is decoder else inner


def head_of(model: PreTrainedModel) -> Any:
    """Returns the output head, also from a causal language model inside the model; None if there is none."""
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    return decoder.get_output_embeddings() if head is None and isinstance(decoder, PreTrainedModel) else head


def max_positions(config: Any) -> int | None:
    """Returns the tokens, picture tokens included, that a model of this config takes; None if it states no number."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None
