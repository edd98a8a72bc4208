"""Language models that can be written as GGUF: llama.cpp's name for each, its settings, and what it stores otherwise.

A row is here when a model of its kind was written, read back by transformers and run by llama.cpp with equal logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dora_vl.errors import UserError, shown

LOCAL_BASE = 10_000.0
"""Base of the rotary positions of Gemma 3's sliding layers, which llama.cpp has in its code."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp holds one kind of language model.

    Attributes:
        name: of gguf's `MODEL_ARCH_NAMES`.
        activation: `hidden_act` that its code computes.
        interleaved: rows of q and k of each head stand in pairs (x0, x_half, x1, ...) instead of halves.
        norm_offset: what is added to the weights of norms, which the model multiplies by 1 + weight.
        more: what else it states of a model's configuration.
    """

    name: str
    activation: tuple[str, ...] = ("silu",)
    interleaved: bool = False
    norm_offset: float = 0.0
    more: Callable[[Any, Any], None] = lambda writer, config: None


def _gemma2(writer: Any, config: Any) -> None:
    _check_attention_scale(config)
    writer.add_sliding_window(config.sliding_window)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _gemma3(writer: Any, config: Any) -> None:
    _check_attention_scale(config)
    if config.final_logit_softcapping or config.attn_logit_softcapping:
        raise UserError("its logits are capped, which llama.cpp's gemma3 does not do")
    pattern = [
        "full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(len(config.layer_types))
    ]
    if list(config.layer_types) != pattern:
        raise UserError("its layers are not five of sliding attention to one of full, as llama.cpp's gemma3 has them")
    if config.rope_parameters["sliding_attention"]["rope_theta"] != LOCAL_BASE:
        raise UserError(f"its sliding layers' rotary base is not {LOCAL_BASE:g}, which llama.cpp's gemma3 has")
    writer.add_sliding_window(config.sliding_window)


def _check_attention_scale(config: Any) -> None:
    if config.query_pre_attn_scalar != config.head_dim:
        raise UserError(
            f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp scales by the head's width, "
            f"{config.head_dim}"
        )


_GEMMA = ("gelu_pytorch_tanh",)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(name="llama", interleaved=True),
        "mistral": Architecture(name="llama", interleaved=True),
        "qwen2": Architecture(name="qwen2"),
        "qwen3": Architecture(name="qwen3"),
        "gemma2": Architecture(name="gemma2", activation=_GEMMA, norm_offset=1.0, more=_gemma2),
        "gemma3_text": Architecture(name="gemma3", activation=_GEMMA, norm_offset=1.0, more=_gemma3),
    }
)
"""transformers' `model_type` of a language model -> llama.cpp's form."""


def architecture_of(config: Any, source: str) -> Architecture:
    """The row of a language model's configuration.

    Raises:
        UserError: llama.cpp has no such model, or it is not known here how it holds one.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise UserError(
            f"{source}: its language model is a {shown(config.model_type)}; as GGUF are written "
            f"{', '.join(ARCHITECTURES)}. dora-vl merge writes a plain folder, of which "
            "llama.cpp's own convert_hf_to_gguf.py may know more"
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in found.activation:
        raise UserError(
            f"{source}: hidden_act is {activation!r}, and llama.cpp's {found.name} has {found.activation[0]}"
        )
    return found


def add_settings(writer: Any, config: Any, found: Architecture, source: str) -> tuple[str, ...]:
    """Writes a language model's settings; returns what the file cannot keep, to be told.

    Raises:
        UserError: a kind of rotary positions, or another setting, that llama.cpp has no field for.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    context, told = _context(config, found)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    try:
        _add_positions(writer, config, head_dim)
        found.more(writer, config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return told


def _context(config: Any, found: Architecture) -> tuple[int, tuple[str, ...]]:
    """Tokens that the file says the model takes: no more than a window that llama.cpp does not know."""
    longest = config.max_position_embeddings
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None
    if found.name.startswith("gemma") or not slides or config.sliding_window >= longest:
        return longest, ()
    told = (
        f"attention slides over {config.sliding_window} tokens, which llama.cpp's {found.name} does not do: the file "
        f"states that many as its context instead of {longest}"
    )
    return config.sliding_window, (told,)


def _add_positions(writer: Any, config: Any, head_dim: int) -> None:
    rope = positions_of(config)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind not in ("default", "llama3"):
        raise UserError(f"its rotary positions are of type {kind!r}; written are default, linear and llama3")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("its rotary positions cover a part of each head, which is not written")


def positions_of(config: Any) -> Mapping[str, Any]:
    """The settings of rotary positions; of full attention where layers differ."""
    found = config.rope_parameters
    return found.get("full_attention", found)


def frequency_factors(config: Any) -> Tensor | None:
    """What each pair of a head turns slower by, where that is one number a pair (Llama 3.1); float32 [head / 2]."""
    rope = positions_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(scaled)
    plain = 1.0 / (float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size))
    return plain / scaled


def in_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k in llama.cpp's order: of each head, the two halves' rows in turn."""
    width = math.prod(weight.shape[1:])
    return weight.reshape(heads, 2, len(weight) // heads // 2, width).transpose(1, 2).reshape(weight.shape)
