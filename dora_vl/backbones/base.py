"""What every base has: a config that is read first, a decoder and a head; as a backbone it hands features to a head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from dora_vl.backbones import register_towers
from dora_vl.backbones.families.table import LLAVA, NOT_TRAINED
from dora_vl.data.samples import BOOKKEEPING
from dora_vl.errors import UserError
from dora_vl.files import BRINGS_CODE, NO_OWN_CODE, check_place, opening
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

    `targets` are the token ids one position later; `samples` says which sample of the batch each belongs to, so that a
    loss can normalise per sample. Without labels there is one position per sequence, its last, and `targets` is -100
    there. `losses` are the labels' cross-entropy; `logits` are kept where they are asked for. A tuple, because
    DeepSpeed's ZeRO-3 hooks look for tensors in tuples and not in other classes.
    """

    hidden: Float[Tensor, "labelled width"]
    losses: Float[Tensor, " labelled"]
    targets: Int[Tensor, " labelled"]
    samples: Int[Tensor, " labelled"]
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


def model_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Moves a batch to the model's device, and floating-point inputs to its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in batch.items()
        if name not in (*BOOKKEEPING, "labels")
    }


def max_positions(config: Any) -> int | None:
    """Returns the tokens, picture tokens included, that a model of this config takes; None if it states no number."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


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


def why_refused(model_type: str) -> str | None:
    """Says why a model type can be neither trained on conversations nor asked; None if it can be."""
    if model_type in NOT_TRAINED:
        return NOT_TRAINED[model_type]
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or is_language_model(model_type):
        return None
    return "transformers knows it neither as an image-text-to-text nor as a causal language model"


def check_trained(base: str, model_type: str) -> None:
    """Refuses a model type that cannot be trained on conversations, before its weights are loaded."""
    if reason := why_refused(model_type):
        raise UserError(
            f"model.base {base!r} is a {model_type!r}, which cannot be trained here: {reason}; take a vision-language "
            "model that answers chats, such as qwen2_5_vl, smolvlm, internvl, gemma3 or llava"
        )
