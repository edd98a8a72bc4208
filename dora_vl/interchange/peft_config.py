"""PEFT's `adapter_config.json`: which fields change the arithmetic, and the few we write ourselves."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from dora_vl.core.adapter_settings import OWN_TYPE, OWN_TYPES
from dora_vl.errors import UserError

READ_OR_CARRIED = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
    }
)
"""Fields of PEFT 0.21 that the equation reads, or that say how the adapter came about; all are kept on write-back."""

CHANGES_THE_EQUATION = frozenset(
    {
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "layer_replication",
        "lora_bias",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_qalora",
        "velora_config",
    }
)
"""Fields of PEFT 0.21 that mean another forward pass when they are set; refused rather than dropped."""

INITIALISATION_ONLY = frozenset({"corda_config", "eva_config", "lora_ga_config"})

OWN_PEFT_TYPES = frozenset({OWN_TYPE, *OWN_TYPES.values()})
"""`peft_type` of our own folders that hold what PEFT does not know: magnitudes alone, biases, kept rows."""


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Refuses a configuration that this package would compute differently from PEFT.

    Raises:
        UserError: an unknown field, a variant that is not DoRA or LoRA, or another method altogether.
    """
    known = READ_OR_CARRIED | CHANGES_THE_EQUATION | INITIALISATION_ONLY
    for field in config:
        if field not in known:
            nearest = get_close_matches(field, known, n=1, cutoff=0.0)[0]
            raise UserError(f"{source}: unknown field {field!r} (nearest known: {nearest!r}); remove or rename it")
    if config.get("peft_type", "LORA") not in {"LORA", *OWN_PEFT_TYPES}:
        raise UserError(f"{source}: peft_type is {config['peft_type']!r}; only LORA (with or without DoRA) is read")
    set_fields = sorted(field for field in CHANGES_THE_EQUATION if config.get(field))
    if set_fields:
        raise UserError(f"{source}: {', '.join(set_fields)} is set, which changes the forward pass; not supported")


def alpha_of(config: Mapping[str, Any], layer: str) -> float:
    """alpha of one layer, `alpha_pattern` first, as PEFT matches it: a regular expression at the name's end."""
    return float(_by_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha", 8)))


def rank_of(config: Mapping[str, Any], layer: str) -> int:
    """Rank of one layer, `rank_pattern` first."""
    return int(_by_pattern(config.get("rank_pattern"), layer, config.get("r", 8)))


def scale_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """s of one layer: alpha over rank, or over its root with rsLoRA."""
    return alpha_of(config, layer) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def new_config(
    *,
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    use_dora: bool,
    whole_modules: Iterable[str] = (),
    base_model: str = "",
    dropout: float = 0.0,
) -> dict[str, Any]:
    """The stable subset of PEFT's fields for an adapter that came from elsewhere.

    The commonest rank and alpha are the defaults; layers that differ go into the patterns, so that
    alpha / rank gives each layer its scale.
    """
    alphas = {layer: scales[layer] * rank for layer, rank in ranks.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "alpha_pattern": {layer: value for layer, value in alphas.items() if value != alpha},
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": sorted(whole_modules) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {layer: value for layer, value in ranks.items() if value != rank},
        "target_modules": sorted(ranks),
        "task_type": None,
        "use_dora": use_dora,
        "use_rslora": False,
    }


def own_recipe(config: Mapping[str, Any], parts: list[str], kept: list[str]) -> dict[str, Any]:
    """The `recipe.json` of an adapter with other tensors beside it: which of them train, and what PEFT's fields say."""
    own = {"method": "dora" if config["use_dora"] else "lora", "rank": config["r"], "alpha": config["lora_alpha"]}
    patterns = {field: config[field] for field in ("rank_pattern", "alpha_pattern")}
    return {"adapter": {**own, **patterns, "parts": {"extra": parts}, "kept": kept}}


def _commonest(values: Iterable[Any]) -> Any:
    found = list(values)
    return max(sorted(set(found)), key=found.count)
