"""The adapter put into a run's base, and the folder that it may start from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dora_vl.adapters.agreement import (
    LEAVES,
    fields_of_the_change,
    first_difference,
    own_name,
    refuse_pefts_other_result,
)
from dora_vl.adapters.files import WEIGHTS_FILE, read_peft_config, read_recipe
from dora_vl.adapters.folder import no_adapter, read_weights
from dora_vl.adapters.quantised_base import check_gradients
from dora_vl.adapters.settings import read_config
from dora_vl.backbones.places import names_experts, resolved_targets, resolved_weights
from dora_vl.core import DoRAConfig, adapted_layers, apply_dora, trained_parts
from dora_vl.core.config import AdapterSettings
from dora_vl.core.trainable import kept_rows, kept_tensors, split_rows
from dora_vl.errors import SettingError
from dora_vl.run.launch import gather_to_read, gather_to_write
from dora_vl.run.settings import AdapterConfig

logger = logging.getLogger(__name__)

FACTORS = LEAVES - {"magnitude"}
"""Tensors of a layer whose effect depends on its scale."""


def core_config(
    adapter: AdapterConfig,
    model: PreTrainedModel,
    *,
    targets: tuple[str, ...],
    also_train: Mapping[str, tuple[str, ...]] | None = None,
    also_keep: tuple[str, ...] = (),
) -> DoRAConfig:
    """The core's config of a run's adapter section; a backbone says what its own places are.

    Args:
        model: where presets (`language`, `vision`...) are looked up.
        targets: the backbone's, unless the section names others.
        also_train: the backbone's further parts, beside the section's; one of the same name, adapted or whole, is the
            section's.
        also_keep: the backbone's frozen tensors that the folder carries, beside the section's.
    """
    settings = {field.name: getattr(adapter, field.name) for field in fields(AdapterSettings)}
    default = {name: globs for name, globs in (also_train or {}).items() if name not in adapter.parts}
    chosen = {
        name: resolved_weights(model, globs, f"adapter.also_train.{name}") for name, globs in adapter.also_train.items()
    }
    settings["also_train"] = {**default, **chosen}
    settings["also_keep"] = (*also_keep, *adapter.also_keep)
    settings["parts"] = {
        name: replace(part, targets=resolved_targets(model, part.targets, f"adapter.parts.{name}.targets"))
        for name, part in adapter.parts.items()
    }
    if adapter.targets is not None:
        targets = resolved_targets(model, adapter.targets, "adapter.targets", whole=adapter.method == "full")
    named = (*targets, *(glob for part in settings["parts"].values() for glob in part.targets))
    if "experts" not in adapter.kinds and names_experts(model, named):
        settings["kinds"] = (*adapter.kinds, "experts")
    return DoRAConfig(targets=targets, **settings)


def check_initial(initial: str | None) -> None:
    """Sees before any weight is read that the folder to start from holds an adapter."""
    if initial is not None and not (Path(initial) / WEIGHTS_FILE).is_file():
        raise SettingError("adapter.initial", f": {no_adapter(Path(initial))}")


def adapt(model: nn.Module, config: DoRAConfig, *, initial: str | None = None) -> list[str]:
    """Puts the adapter in, decides what trains, and loads the folder `initial`; returns the adapted layers' names."""
    names = apply_dora(model, config, gather=gather_to_write)
    check_gradients(model)
    if initial is not None:
        load_initial(model, Path(initial))
    return names


def load_initial(model: nn.Module, folder: Path) -> None:
    """Starts from the weights of an adapter folder, which may hold fewer parts (stage 1's projector alone).

    Frozen rows that the folder carries and this run's own folder will carry too (a VL-BART's picture tokens) are taken
    over as well. Other frozen tensors of the folder must be the base's.
    """
    stored = {own_name(key): tensor for key, tensor in read_weights(folder).items()}
    trained = {name: weight for part in trained_parts(model) for name, weight in part.parameters.items()}
    taken_over = {**trained, **kept_tensors(model)}
    taken_over |= {name: trained[tensor] for name in stored if (tensor := split_rows(name)[0]) in trained}
    _refuse_lost_values(model, folder, {name: tensor for name, tensor in stored.items() if name not in taken_over})
    _refuse_another_meaning(model, folder, stored)
    for name in [name for name in stored if name in taken_over]:
        weight, tensor = taken_over[name], stored[name]
        with torch.no_grad(), gather_to_write([weight] if isinstance(weight, nn.Parameter) else []):
            rows = kept_rows(name, weight)  # all of it, or those that the name says
            if rows.numel() != tensor.numel():
                raise SettingError(
                    "adapter.initial", f": {folder}: {name} is {list(tensor.shape)}, here it is {list(rows.shape)}"
                )
            rows.copy_(tensor.view(rows.shape))
    for _, layer in adapted_layers(model):
        layer.forget_norms()
    logger.info("%s sets %d of %d trained tensors", folder, len(set(stored) & set(trained)), len(trained))


def _refuse_lost_values(model: nn.Module, folder: Path, frozen: Mapping[str, Tensor]) -> None:
    """What does not train here may be in the folder only where it is the base's: this run would not write it again."""
    here = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    if unknown := sorted(name for name in frozen if split_rows(name)[0] not in here):
        raise SettingError(
            "adapter.initial", f": {folder} holds {len(unknown)} tensors that do not train here: {unknown[:3]}"
        )
    other = []
    for name, tensor in frozen.items():
        weight = here[split_rows(name)[0]]
        with gather_to_read([weight] if isinstance(weight, nn.Parameter) else []):
            rows = kept_rows(name, weight.detach())
            if rows.shape != tensor.shape or not torch.equal(tensor.to(rows), rows):
                other.append(name)
    if other:
        raise SettingError(
            "adapter.initial",
            f": {folder} holds {len(other)} tensors that are frozen in this run and differ from the "
            f"base's: {sorted(other)[:3]}; train them as well, or merge the folder into its base (dora-vl merge)",
        )


def _refuse_another_meaning(model: nn.Module, folder: Path, stored: Mapping[str, Tensor]) -> None:
    """A and B mean what the folder's settings say; under others they would start the run somewhere else."""
    owners = {name.rpartition(".")[0] for name in stored if name.rpartition(".")[2] in FACTORS}
    if not owners:
        return
    peft, recipe = read_peft_config(folder), read_recipe(folder).get("adapter", {})
    config = read_config(str(folder), peft, recipe, stored)
    refuse_pefts_other_result(f"adapter.initial: {folder}", model, peft, recipe)
    for name, layer in adapted_layers(model):
        if name not in owners:
            continue
        theirs, ours = config.for_layer(name), layer.adapter
        difference = first_difference(theirs, ours, ["method", *fields_of_the_change(theirs, ours)])
        if difference is not None:
            field, there, here = difference
            raise SettingError(
                "adapter.initial",
                f": {folder}: {name} has {field} {there!r} there (scale {theirs.scale:g}), and "
                f"{here!r} in this run (scale {ours.scale:g}); set adapter.{field}, or its pattern, to the folder's",
            )
