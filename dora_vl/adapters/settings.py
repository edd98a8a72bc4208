"""An adapter folder's two JSON files: PEFT's fields and our own, written and read back.

Where PEFT would compute something else from the same tensors (magnitudes only, DVoRA, extras that are not whole
modules, dilated convolutions), `peft_type` is one that PEFT does not know, so that it refuses instead.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from dora_vl.adapters.files import LEAVES, PEFT_PREFIX, layers_beyond_peft, tied_names
from dora_vl.core.config import MAIN_PART, AdaptedPart, AdapterSettings, DoRAConfig
from dora_vl.core.inject import SHARED_NAME
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.linear import TransposedLinear
from dora_vl.core.other_layers import ExpertsProjection
from dora_vl.core.trainable import adapted_layers, kept_tensors, trained_parts
from dora_vl.errors import UserError, short_repr

log = logging.getLogger(__name__)

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's `--max-lora-rank` takes one of these."""

OWN_TYPES = {"full": "DORA_VL_FULL", "magnitude": "DORA_VL_MAGNITUDE"}
OWN_TYPE = "DORA_VL"
MATCHING_SECONDS = 1.0
"""Matching a pattern with a name may take this many seconds: it could take years, and `re` has no timeout."""
LOW_RANK_FIELDS = frozenset((
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora", "init_lora_weights",
    "use_dora",
))  # fmt: skip
"""A folder of whole weights has none of these fields."""
READ_TYPES = frozenset({"LORA", OWN_TYPE, *OWN_TYPES.values()})
BY_NAME = frozenset(("magnitude_targets", "rank_pattern", "alpha_pattern", "parts", "also_train", "also_keep"))
"""These settings name layers or tensors; a folder stores what they resolved to."""
OWN_FIELDS = tuple(setting.name for setting in fields(AdapterSettings) if setting.name not in BY_NAME)
"""`recipe.json` holds these settings unchanged."""
REFUSED_FIELDS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""These PEFT fields mean another forward pass when they are set."""
KNOWN_FIELDS = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora", *REFUSED_FIELDS,
))  # fmt: skip


def _most_common(values: Iterable[Any], *, default: Any) -> Any:
    counts = Counter(values).most_common(1)  # of equally common values the first
    return counts[0][0] if counts else default


def peft_fields(ranks: Mapping[str, int], alphas: Mapping[str, float], **fields: Any) -> dict[str, Any]:
    """Returns the stable subset of PEFT 0.21's `adapter_config.json`; its rank and alpha are the most common ones."""
    rank, alpha = _most_common(ranks.values(), default=1), _most_common(alphas.values(), default=1)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "lora_dropout": 0.0,
        "use_rslora": False,
        "init_lora_weights": True,
        "base_model_name_or_path": "",
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "task_type": None,
        "modules_to_save": None,
        "fan_in_fan_out": False,
        **fields,
    }


def new_config(ranks: Mapping[str, int], scales: Mapping[str, float], **fields: Any) -> dict[str, Any]:
    """Returns `peft_fields` for an adapter from elsewhere, with an alpha that gives each layer its scale."""
    alphas: dict[str, float] = {}
    for layer, rank in ranks.items():
        plain = round(scales[layer] * rank, 9)  # 32, not the 32.000000000000004 that 32 / 98 * 98 is
        alphas[layer] = plain if plain / rank == scales[layer] else scales[layer] * rank
    return peft_fields(ranks, alphas, **fields)


def peft_config(model: nn.Module, base_model: str) -> dict[str, Any]:
    """Returns PEFT's fields of the model as it is adapted now."""
    layers = dict(adapted_layers(model))
    extras = {name for part in trained_parts(model) if not part.adapts for name in part.parameters}
    first = _main_layer(layers).adapter if layers else AdapterSettings(method="full")
    # 2 where the file holds A and B beside their start (PiSSA): to others, a change of the whole weight.
    copies = {name: 2 if "start_A" in layer._buffers else 1 for name, layer in layers.items()}
    alphas = {  # that give the same scale at the file's rank
        name: layer.adapter.alpha * copies[name] ** (1 if layer.adapter.rank_scaling == "linear" else 0.5)
        for name, layer in layers.items()
    }
    config = peft_fields(
        {name: layer.adapter.rank * copies[name] for name, layer in layers.items()},
        alphas,
        lora_dropout=first.dropout,
        use_rslora=first.rank_scaling == "sqrt",
        base_model_name_or_path=base_model,
        modules_to_save=whole_modules(model, extras) or None,
        fan_in_fan_out=any(isinstance(layer, TransposedLinear) for layer in layers.values()),
        use_dora=first.method == "dora",
    )
    if not layers:
        return {"peft_type": OWN_TYPES["full"], **{f: v for f, v in config.items() if f not in LOW_RANK_FIELDS}}
    if {layer.adapter.method for layer in layers.values()} == {"magnitude"}:
        return {**config, "peft_type": OWN_TYPES["magnitude"]}
    adapting = {name for part in trained_parts(model) if part.adapts for name in part.parameters}
    tied = {name for group in tied_names(model) for name in group}  # PEFT trains each for itself
    same_in_peft = (
        type_of({*adapting, *extras, *kept_tensors(model)}, config) == "LORA"
        and not extras & tied
        and len({isinstance(layer, TransposedLinear) for layer in layers.values()}) == 1
        and not _renamed_by_peft(model, layers)
    )
    if same_in_peft and (beyond := layers_beyond_peft(layers)):
        name, setting = next(iter(beyond.items()))
        log.warning(
            "%s has %s (%d such layers), which PEFT leaves out of its low-rank path: peft_type is %s, which "
            "load_adapter reads and PEFT refuses. For PEFT, take such layers out of targets or merge the adapter.",
            *(name, setting, len(beyond), OWN_TYPE),
        )
        same_in_peft = False
    return config if same_in_peft else {**config, "peft_type": OWN_TYPE}


def own_settings(model: nn.Module) -> dict[str, Any]:
    """Returns `adapter` of `recipe.json`: what neither the tensors' names nor PEFT's fields say."""
    layers = dict(adapted_layers(model))
    parts: dict[str, list[str]] = {}
    adapted: dict[str, dict[str, None]] = {}
    for part in trained_parts(model):
        if not part.adapts:
            parts.setdefault(part.name, []).extend(part.parameters)
        elif part.part != MAIN_PART:
            owners = adapted.setdefault(part.part, {})
            owners.update(dict.fromkeys(name.rpartition(".")[0] for name in part.parameters))
    common: dict[str, Any] = {"parts": parts, "kept": list(kept_tensors(model))}
    if adapted:
        common["adapted_parts"] = {name: list(owners) for name, owners in adapted.items()}
    if not layers:
        return {"method": "full", **common}
    if experts := [name for name, layer in layers.items() if isinstance(layer, ExpertsProjection)]:
        common["experts"] = experts
    first = _main_layer(layers).adapter
    magnitude_only = [name for name, layer in layers.items() if layer.adapter.method == "magnitude"]
    low_rank = {name: layer.adapter for name, layer in layers.items() if name not in magnitude_only}
    return {
        **{field: getattr(first, field) for field in OWN_FIELDS},
        "rank_pattern": {name: layer.rank for name, layer in low_rank.items() if layer.rank != first.rank},
        "alpha_pattern": {name: layer.alpha for name, layer in low_rank.items() if layer.alpha != first.alpha},
        "magnitude_targets": magnitude_only if first.method != "magnitude" else [],
        **common,
    }


def _main_layer(layers: Mapping[str, AdaptedLayer]) -> AdaptedLayer:
    """Returns the first layer with more than a magnitude, whose settings are the folder's; else the first."""
    low_rank = (layer for layer in layers.values() if layer.adapter.method != "magnitude")
    return next(low_rank, next(iter(layers.values())))


def whole_modules(model: nn.Module, parameters: set[str]) -> list[str]:
    """Lists the topmost modules whose parameters are all named, PEFT's `modules_to_save`; of a list, its members."""
    chosen: list[str] = []
    for name, module in model.named_modules():
        inside = {f"{name}.{leaf}" for leaf, _ in module.named_parameters()}
        is_chosen = any(name.startswith(f"{outer}.") for outer in chosen)
        is_list = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
        if name and inside and inside <= parameters and not is_chosen and not is_list:
            chosen.append(name)
    return chosen


def type_of(names: Iterable[str], config: Mapping[str, Any]) -> str:
    """Chooses `peft_type`: LORA where PEFT takes every tensor into account, otherwise one that it refuses."""
    factors = {"lora_A", "lora_B", *(["magnitude"] if config.get("use_dora") else [])}
    modules = tuple(f".{module}." for module in config.get("modules_to_save") or ())
    biases = config.get("bias", "none") != "none"
    layers: dict[str, set[str]] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        if leaf in LEAVES:
            layers.setdefault(owner, set()).add(leaf)
        elif not (any(module in f".{name}" for module in modules) or (biases and leaf == "bias")):
            return OWN_TYPE
    return "LORA" if all(leaves == factors for leaves in layers.values()) else OWN_TYPE


def _renamed_by_peft(model: nn.Module, layers: Collection[str]) -> bool:
    """Tells whether PEFT takes the layers' names, or their targets, for those of older models, and then misses them."""
    from transformers import PreTrainedModel

    renaming = ("transformers.conversion_mapping", "peft.utils.transformers_weight_conversion")
    if not isinstance(model, PreTrainedModel) or not all(map(find_spec, renaming)):  # before these, nothing is renamed
        return False
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
        convert_peft_config_for_transformers,
    )

    config = LoraConfig(target_modules=list(layers))
    tensors = {f"{PEFT_PREFIX}{name}.lora_A.weight": torch.empty(1, 1, device="meta") for name in layers}
    read = convert_peft_adapter_state_dict_for_transformers(model, config, dict(tensors))
    convert_peft_config_for_transformers(config, model, None)
    return read.keys() != tensors.keys() or set(config.target_modules or ()) != set(layers)


def _patterns_from_tensors(
    source: str, peft: Mapping[str, Any], named: Mapping[str, Tensor]
) -> tuple[dict[str, int], dict[str, float]]:
    """Returns the ranks and alphas of layers that differ from PEFT's `r` and `lora_alpha`."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, tensor in named.items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "lora_A":
            continue
        rank = rank_of(peft, layer)
        if rank != tensor.shape[0]:
            raise UserError(f"{source}: {layer} has rank {rank} in the configuration, and {tensor.shape[0]} in {name}")
        if rank != peft.get("r"):
            ranks[layer] = rank
        alpha = float(by_peft_pattern(peft.get("alpha_pattern"), layer, peft.get("lora_alpha", 8)))
        if alpha != peft.get("lora_alpha"):
            alphas[layer] = alpha
    return ranks, alphas


def read_config(
    source: str, peft: Mapping[str, Any], own: Mapping[str, Any], named: Mapping[str, Tensor]
) -> DoRAConfig:
    """Reads the configuration a folder was written with; layers and parts come from the tensors' names."""
    check_peft_fields(source, peft)
    refuse_contradiction(source, peft, own)
    owners = {name.rpartition(".")[0] for name in named if name.rpartition(".")[2] in LEAVES}
    kept = tuple(own.get("kept", ()))
    parts = {part: tuple(names) for part, names in own.get("parts", {}).items()}
    stated_names = {name for names in (kept, *parts.values()) for name in names}
    if extras := tuple(n for n in named if n.rpartition(".")[2] not in LEAVES and n not in stated_names):
        parts["extra"] = extras
    full = tuple(parts.pop("full", ()))
    method = own.get("method") or ("dora" if peft.get("use_dora") else "lora")
    magnitude_only = tuple(own.get("magnitude_targets", ()))
    adapted = {part: AdaptedPart(targets=tuple(names)) for part, names in own.get("adapted_parts", {}).items()}
    in_parts = {name for part in adapted.values() for name in part.targets}
    elsewhere = in_parts.union(magnitude_only)
    targets = {name.rpartition(".")[0] for name in full} if method == "full" else owners - elsewhere
    if not targets and not adapted:
        raise UserError(f"{source} holds no adapter tensor (lora_A, lora_B, lora_magnitude_vector)")
    ranks, alphas = dict(own.get("rank_pattern", {})), dict(own.get("alpha_pattern", {}))
    if not own:
        ranks, alphas = _patterns_from_tensors(source, peft, named)
    fields = {
        "method": method,
        "rank": int(peft.get("r", 1)),
        "alpha": float(peft.get("lora_alpha", 1.0)),
        # PEFT's own folders have no recipe; its defaults differ from ours.
        "dropout_mode": "whole_change",
        "kinds": ("linear", "embedding", "conv"),
        **{name: tuple(own[name]) if isinstance(own[name], list) else own[name] for name in OWN_FIELDS if name in own},
        "dropout": float(peft.get("lora_dropout", 0.0)),
        "rank_scaling": "sqrt" if peft.get("use_rslora") else "linear",
    }
    return DoRAConfig(
        targets=tuple(sorted(targets)),
        magnitude_targets=magnitude_only,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        parts=adapted,
        also_train=parts,
        also_keep=tuple(name for name in kept if not name.startswith(f"{SHARED_NAME}.")),
        **fields,
    )


def refuse_contradiction(source: str, peft: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuses a folder whose files disagree on rank, scale or method: one of them was changed by hand."""
    if not own:
        return
    copies = 2 if own.get("init") == "pissa" else 1  # the file has A and B beside their start
    linear = own.get("rank_scaling", "linear") == "linear"
    meant = {
        "use_dora": own["method"] == "dora" if "method" in own else None,
        "use_rslora": None if "rank_scaling" not in own else not linear,
        "r": own["rank"] * copies if "rank" in own else None,
        "lora_alpha": own["alpha"] * (copies if linear else copies**0.5) if "alpha" in own else None,
    }
    for name, value in meant.items():
        if value is None or name not in peft:
            continue
        pattern = peft.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}.get(name, "")) or {}
        if not any(math.isclose(other, value) for other in (peft[name], *pattern.values())):
            raise UserError(
                f"{source}: {name} is {short_repr(peft[name])} in adapter_config.json, and recipe.json means "
                f"{short_repr(value)}; take the folder as it was written, or remove recipe.json to load it as PEFT "
                "would"
            )


def check_peft_fields(source: str, peft: Mapping[str, Any]) -> None:
    """Refuses a configuration that this package would compute differently from PEFT."""
    kind = peft.get("peft_type", "LORA")
    if kind not in READ_TYPES:
        raise UserError(f"{source}: peft_type is {kind!r}; only LORA (with or without DoRA) is read")
    # A start that PEFT took out of the base's weights: over the original base the tensors mean something else. Our own
    # PiSSA folders hold the change of the original weight and say `true`, as PEFT's conversion does.
    start = peft.get("init_lora_weights")
    # These leave the base unchanged; pissa, olora, corda, lora_ga and loftq do not.
    if start not in (None, True, False, "gaussian", "eva", "orthogonal", "mica"):
        remedy = "merge it in PEFT (merge_and_unload), whose conversion would lose a part of this one"
        # PEFT's conversion only writes A and B, and LoftQ's quantised base plus its start is not the original base.
        if start != "loftq" and not peft.get("use_dora") and not peft.get("modules_to_save"):
            remedy = "in PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion=folder_before_training)"
        raise UserError(f"{source}: init_lora_weights is {start!r}, which starts from the base's weights; {remedy}")
    changing = sorted(name for name in REFUSED_FIELDS if peft.get(name))
    if changing:
        raise UserError(
            f"{source}: {', '.join(changing)} is set, which is not computed here; merge it in PEFT (merge_and_unload)"
        )
    unknown = sorted(name for name, value in peft.items() if name not in KNOWN_FIELDS and value not in (None, False))
    if unknown:
        nearest = get_close_matches(unknown[0], KNOWN_FIELDS, n=1, cutoff=0.0)[0]
        raise UserError(
            f"{source}: unknown field {', '.join(map(repr, unknown))} (nearest known: {nearest!r}); rename or remove it"
        )


def by_peft_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """Looks up a layer in PEFT's `rank_pattern` or `alpha_pattern`: regular expressions that match the name's end."""
    if not patterns:
        return default
    import regex  # which most adapters need not

    for pattern, value in patterns.items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", layer, timeout=MATCHING_SECONDS):
                return value
        except (regex.error, TimeoutError) as error:
            slow = f"takes over {MATCHING_SECONDS:g} s for {short_repr(layer)}"
            reason = slow if isinstance(error, TimeoutError) else error
            raise UserError(f"adapter_config.json: pattern {short_repr(pattern)}: {reason}") from None
    return default


def rank_of(config: Mapping[str, Any], layer: str) -> int:
    """Returns a layer's rank, `rank_pattern` first."""
    return int(by_peft_pattern(config.get("rank_pattern"), layer, config.get("r", 8)))


def scale_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Returns a layer's s, `alpha_pattern` first: alpha over rank, or over its root with rsLoRA."""
    alpha = float(by_peft_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def own_recipe(
    config: Mapping[str, Any], extras: Iterable[str] = (), kept: Iterable[str] = (), magnitude_only: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns `recipe.json` for an adapter that holds more than A and B."""
    kept, magnitude_only = sorted(kept), sorted(magnitude_only)
    method = "magnitude"
    if config["target_modules"]:
        method = "dora" if config["use_dora"] else "lora"
    own = {
        "method": method,
        "rank": config["r"],
        "alpha": float(config["lora_alpha"]),
        "rank_pattern": config["rank_pattern"],
        "alpha_pattern": config["alpha_pattern"],
        "parts": {"extra": sorted(set(extras) - set(kept))},
        "kept": kept,
        "magnitude_targets": magnitude_only if method != "magnitude" else [],
    }
    return {"adapter": own}
