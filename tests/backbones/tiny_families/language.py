"""Language models without eyes: what each type's config needs beyond the common sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ONE_HEAD: Mapping[str, Any] = {"head_dim": 8}
LANGUAGE_MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": ONE_HEAD,
    "qwen3_moe": {**ONE_HEAD, **EXPERTS},
    "mistral": ONE_HEAD,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral3": ONE_HEAD,
    "gemma": ONE_HEAD,
    "gemma2": {**ONE_HEAD, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "gemma3_text": {**ONE_HEAD, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "phi3": {"pad_token_id": 0},
    "smollm3": {},
    "olmo2": {},
    "granite": {},
    "cohere2": {"layer_types": ["full_attention"] * 2},
    "glm4": ONE_HEAD,
    "starcoder2": {},
    "stablelm": {},
    "exaone4": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "gpt_oss": {**ONE_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": ONE_HEAD,
}
"""Model types of `AutoModelForCausalLM`, written and trained from tokenizer and chat template alone."""
