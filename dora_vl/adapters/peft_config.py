"""PEFT's `adapter_config.json`: what its fields say of a layer, and the few that we write ourselves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from dora_vl.adapters.settings import by_peft_pattern


def alpha_of(config: Mapping[str, Any], layer: str) -> float:
    """alpha of one layer, `alpha_pattern` first, as PEFT matches it: a regular expression at the name's end."""
    return float(by_peft_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha", 8)))


def rank_of(config: Mapping[str, Any], layer: str) -> int:
    """Rank of one layer, `rank_pattern` first."""
    return int(by_peft_pattern(config.get("rank_pattern"), layer, config.get("r", 8)))


def scale_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """s of one layer: alpha over rank, or over its root with rsLoRA."""
    return alpha_of(config, layer) / (math.sqrt(rank) if config.get("use_rslora") else rank)


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
    alphas = {layer: _alpha(scales[layer], rank) for layer, rank in ranks.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())  # 1 where there are magnitudes alone
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


def own_recipe(
    config: Mapping[str, Any], extras: Iterable[str] = (), kept: Iterable[str] = (), alone: Iterable[str] = ()
) -> dict[str, Any]:
    """The `recipe.json` of an adapter that holds more than A and B.

    Args:
        config: PEFT's fields.
        extras: names of its other tensors.
        kept: those of them that do not train.
        alone: layers with a magnitude alone.
    """
    kept, alone = sorted(kept), sorted(alone)
    method = "magnitude" if not config["target_modules"] else "dora" if config["use_dora"] else "lora"
    return {
        "adapter": {
            **{"method": method, "rank": config["r"], "alpha": float(config["lora_alpha"])},
            **{field: config[field] for field in ("rank_pattern", "alpha_pattern")},
            **{"parts": {"extra": sorted(set(extras) - set(kept))}, "kept": kept},
            "magnitude_targets": alone if method != "magnitude" else [],
        }
    }


def _alpha(scale: float, rank: int) -> float:
    """The alpha that a scale came from: 32, not the 32.000000000000004 that 32 / 98 * 98 is."""
    plain = round(scale * rank, 9)
    return plain if plain / rank == scale else scale * rank


def _commonest(values: Iterable[Any]) -> Any:
    found = list(values)
    return max(sorted(set(found)), key=found.count, default=1)
