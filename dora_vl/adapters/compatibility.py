"""Checks that an adapter's tensors mean the same in a model, by their names and the settings on both sides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dora_vl.adapters.files import TRAINED_IN, not_trained_in
from dora_vl.core.config import DoRAConfig
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.trainable import adapted_layers
from dora_vl.errors import UserError

PEFT_PREFIX = "base_model.model."
FILE_TO_LEAF = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "vera_lambda_d": "lambda_d",
    "vera_lambda_b": "lambda_b",
}
"""Maps every spelling that a file may have of an adapter's tensor to the layer's own name of it."""
LEAVES = frozenset(FILE_TO_LEAF.values())
_FACTOR = re.compile(rf"(.+)\.({'|'.join(map(re.escape, FILE_TO_LEAF))})")


def split_key(key: str) -> tuple[str, str | None]:
    """Splits a PEFT key into the layer's full name and the tensor's own; (key, None) for a tensor of no adapter."""
    match = _FACTOR.fullmatch(key.removeprefix(PEFT_PREFIX))
    return (key, None) if match is None else (match[1], FILE_TO_LEAF[match[2]])


def own_name(key: str) -> str:
    """Returns the model's own name of a tensor in an adapter file."""
    name = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    layer, leaf = split_key(name)
    return name if leaf is None else f"{layer}.{leaf}"


def by_own_name(source: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns an adapter file's tensors by the model's own names, and apart from them PEFT's copies of weights.

    PEFT saves `lm_head.base_layer.weight`, which did not train, beside the factors of an embedding or output head.
    """
    adapted = {owner for owner, _, leaf in (own_name(key).rpartition(".") for key in tensors) if leaf in LEAVES}
    own: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = own_name(key)
        owner, _, leaf = name.rpartition(".")
        if leaf in LEAVES and tensor.dtype not in TRAINED_IN:
            raise not_trained_in(source, name, tensor)
        group = copies if key.endswith(".base_layer.weight") and owner in adapted else own
        if name in group:
            raise UserError(f"{source} holds {name} twice, the second time as {key}; save the adapter again")
        group[name] = tensor
    return own, copies


def refuse_other_copy(source: str, name: str, copy: Tensor, weight: Tensor) -> None:
    """Raises a `UserError` unless PEFT's copy of an adapted layer's weight is the base's own, rounding left aside."""
    narrow = min(copy.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    if copy.shape != weight.shape or not torch.equal(copy.to(narrow), weight.detach().to(copy.device, narrow)):
        raise UserError(
            f"{source} has another {name} ({list(copy.shape)}) than the base ({list(weight.shape)}), of which "
            "PEFT saved a copy beside A and B; give the base that it was trained on, tokens added and weights trained"
        )


def tied_names(model: nn.Module) -> list[frozenset[str]]:
    """Lists all names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [frozenset(group) for group in names.values() if len(group) > 1]


def untied(source: str, name: str, others: Iterable[str], change: str) -> UserError:
    """Makes the error for a change of one of several tied tensors, which would change the others too."""
    return UserError(
        f"{source} {change} {name}, which in this base is one tensor with {', '.join(sorted(others))}, and that would "
        "change too; give a base that stores both (tie_word_embeddings: false in its config.json)"
    )


def refuse_untied_values(source: str, model: nn.Module, names: Iterable[str]) -> None:
    """Raises a `UserError` if PEFT trained one of several tied tensors, which it holds apart from the others."""
    tied = {name: group - {name} for group in tied_names(model) for name in group}
    for name in names:
        if name in tied:
            raise untied(source, name, tied[name], "trained")


def file_name(model: nn.Module, name: str) -> str:
    """Returns the name under which a tensor of the model is saved."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, AdaptedLayer):
        leaf = module.FILE_LEAVES.get(leaf, leaf)
    return f"{PEFT_PREFIX}{owner}.{leaf}" if owner else f"{PEFT_PREFIX}{leaf}"


def whole_change(config: DoRAConfig) -> DoRAConfig:
    """Rewrites a PiSSA folder's configuration as PEFT reads it: a change of the original weight, at twice the rank."""
    if config.init != "pissa":
        return config
    factor = 2 if config.rank_scaling == "linear" else 2**0.5
    return replace(
        config,
        init="kaiming",
        rank=2 * config.rank,
        alpha=factor * config.alpha,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: factor * alpha for name, alpha in config.alpha_pattern.items()},
    )


def fields_of_the_change(expected: DoRAConfig, own: DoRAConfig) -> list[str]:
    """Names the settings of a layer that say what its A and B mean."""
    return [*(["init"] if "pissa" in (expected.init, own.init) else ()), "rank", "alpha", "rank_scaling"]


def first_difference(expected: DoRAConfig, own: DoRAConfig, fields: Sequence[str]) -> tuple[str, object, object] | None:
    """Returns the first field in which two layers' settings differ, with both values."""
    pairs = ((field, getattr(expected, field), getattr(own, field)) for field in fields)
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def refuse_other_settings(source: str, model: nn.Module, config: DoRAConfig, *, dropout_mode_is_stated: bool) -> None:
    """Raises a `UserError` if a folder's tensors would mean something else with a model's own settings.

    The probability of dropout is the model's own; where both drop, they must drop from the same path.
    """
    advice = "; load it into a fresh base model, or adapt the model as the folder says"
    layers = dict(adapted_layers(model))
    if (config.method == "full") != (not layers):
        raise UserError(f"{source}: method is {config.method!r}, this model has {len(layers)} adapted layers{advice}")
    for name, layer in layers.items():
        expected, own = config.for_layer(name, magnitude_only=name in config.magnitude_targets), layer.adapter
        fields = ["method"]
        if own.method in ("dora", "lora"):
            fields += fields_of_the_change(expected, own)
            if dropout_mode_is_stated and expected.dropout and own.dropout:
                fields.append("dropout_mode")
        if (difference := first_difference(expected, own, fields)) is not None:
            field, theirs, ours = difference
            raise UserError(f"{source}: {name} has {field} {theirs!r} there, and {ours!r} in this model{advice}")


def layers_beyond_peft(layers: Mapping[str, AdaptedLayer]) -> dict[str, str]:
    """Maps layers to the setting which PEFT's low-rank path leaves out."""
    settings = {name: layer.setting_beyond_peft() for name, layer in layers.items() if layer.lora_A is not None}
    return {name: setting for name, setting in settings.items() if setting is not None}


def refuse_geometry_that_peft_ignored(
    source: str, model: nn.Module, peft: Mapping[str, Any], own: Mapping[str, Any]
) -> None:
    """Raises a `UserError` if PEFT trained A and B of a layer under another geometry than its weight's.

    `peft` is the folder's `adapter_config.json`. With `own` settings beside it the folder is this package's, whose A
    and B go through the layer's own geometry, whatever version wrote it.
    """
    if own or peft.get("peft_type", "LORA") != "LORA":
        return
    for name, setting in layers_beyond_peft(dict(adapted_layers(model))).items():
        raise UserError(
            f"{source}: {name} has {setting}, which PEFT leaves out of its low-rank path, so that its A and B mean "
            "another change there; train without such layers in target_modules, or train them here"
        )
