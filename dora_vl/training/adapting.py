"""The adapter put into a run's base, and the folder that it may start from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dora_vl.adapters.agreement import LEAVES, fields_of_the_change, first_difference, refuse_pefts_other_result
from dora_vl.adapters.files import read_peft_config, read_recipe
from dora_vl.adapters.folder import WEIGHTS_FILE, no_adapter, own_name, read_weights
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
    own = {one.name: getattr(adapter, one.name) for one in fields(AdapterSettings)}
    default = {name: globs for name, globs in (also_train or {}).items() if name not in adapter.parts}
    chosen = {
        name: resolved_weights(model, globs, f"adapter.also_train.{name}") for name, globs in adapter.also_train.items()
    }
    own["also_train"] = {**default, **chosen}
    own["also_keep"] = (*also_keep, *adapter.also_keep)
    own["parts"] = {
        name: replace(part, targets=resolved_targets(model, part.targets, f"adapter.parts.{name}.targets"))
        for name, part in adapter.parts.items()
    }
    if adapter.targets is not None:
        targets = resolved_targets(model, adapter.targets, "adapter.targets", whole=adapter.method == "full")
    named = (*targets, *(glob for part in own["parts"].values() for glob in part.targets))
    if "experts" not in adapter.kinds and names_experts(model, named):
        own["kinds"] = (*adapter.kinds, "experts")
    return DoRAConfig(targets=targets, **own)


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
    found = {own_name(key): tensor for key, tensor in read_weights(folder).items()}
    trained = {name: one for part in trained_parts(model) for name, one in part.parameters.items()}
    taken = {**trained, **kept_tensors(model)}
    taken |= {name: trained[whole] for name in found if (whole := split_rows(name)[0]) in trained}
    _refuse_lost_values(model, folder, {name: tensor for name, tensor in found.items() if name not in taken})
    _refuse_another_meaning(model, folder, found)
    with torch.no_grad():
        for name in [name for name in found if name in taken]:
            _take_over(folder, name, taken[name], found[name])
    for _, layer in adapted_layers(model):
        layer.forget_norms()
    logger.info("%s sets %d of %d trained tensors", folder, len(set(found) & set(trained)), len(trained))


def _take_over(folder: Path, name: str, place: Tensor, tensor: Tensor) -> None:
    """Writes a folder's tensor to its place in the model, or to those rows of it that the name says."""
    with gather_to_write([place] if isinstance(place, nn.Parameter) else []):
        own = kept_rows(name, place)
        if own.numel() != tensor.numel():
            raise SettingError(
                "adapter.initial", f": {folder}: {name} is {list(tensor.shape)}, here it is {list(own.shape)}"
            )
        own.copy_(tensor.view(own.shape))


def _refuse_lost_values(model: nn.Module, folder: Path, frozen: Mapping[str, Tensor]) -> None:
    """What does not train here may be in the folder only where it is the base's: this run would not write it again."""
    here = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    if unknown := sorted(name for name in frozen if split_rows(name)[0] not in here):
        raise SettingError(
            "adapter.initial", f": {folder} holds {len(unknown)} tensors that do not train here: {unknown[:3]}"
        )
    other = []
    for name, tensor in frozen.items():
        place = here[split_rows(name)[0]]
        with gather_to_read([place] if isinstance(place, nn.Parameter) else []):
            own = kept_rows(name, place.detach())
            if own.shape != tensor.shape or not torch.equal(tensor.to(own), own):
                other.append(name)
    if other:
        raise SettingError(
            "adapter.initial",
            f": {folder} holds {len(other)} tensors that are frozen in this run and differ from the "
            f"base's: {sorted(other)[:3]}; train them as well, or merge the folder into its base (dora-vl merge)",
        )


def _refuse_another_meaning(model: nn.Module, folder: Path, found: Mapping[str, Tensor]) -> None:
    """A and B mean what the folder's settings say; under others they would start the run somewhere else."""
    owners = {name.rpartition(".")[0] for name in found if name.rpartition(".")[2] in FACTORS}
    if not owners:
        return
    peft, own = read_peft_config(folder), read_recipe(folder).get("adapter", {})
    config = read_config(str(folder), peft, own, found)
    refuse_pefts_other_result(f"adapter.initial: {folder}", model, peft, own)
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
