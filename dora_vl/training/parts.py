"""Puts the adapter into a run's base, gives each part its learning rate, and shows both in tables."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from dora_vl.adapters.base_weights import check_gradients
from dora_vl.adapters.files import (
    LEAVES,
    WEIGHTS_FILE,
    fields_of_the_change,
    first_difference,
    own_name,
    read_peft_config,
    read_recipe,
    refuse_geometry_that_peft_ignored,
)
from dora_vl.adapters.folder import no_adapter, read_weights
from dora_vl.adapters.settings import read_config
from dora_vl.backbones.families.targets import names_experts, resolved_targets, resolved_weights
from dora_vl.core import DoRAConfig, TrainedPart, adapted_layers, apply_dora, trained_parts
from dora_vl.core.config import AdapterSettings
from dora_vl.core.trainable import kept_rows, kept_tensors, split_rows
from dora_vl.errors import SettingError, UserError
from dora_vl.run.launch import gather_to_read, gather_to_write, without_sharding
from dora_vl.run.settings import AdapterConfig, Decayed, OptimConfig
from dora_vl.training.extras.vllm import refuse_unsent
from dora_vl.training.memory import Table, parameter_count, weight_count
from dora_vl.training.pipeline import Pipeline

logger = logging.getLogger(__name__)
cannot_start = partial(SettingError, "adapter.initial")

FACTORS = LEAVES - {"magnitude"}
"""The effect of these tensors depends on their layer's scale."""


def core_config(
    adapter: AdapterConfig,
    model: PreTrainedModel,
    *,
    targets: tuple[str, ...],
    also_train: Mapping[str, tuple[str, ...]] | None = None,
    also_keep: tuple[str, ...] = (),
) -> DoRAConfig:
    """Makes the core's config of a run's adapter section; presets (`language`, `vision`...) are looked up in the model.

    The backbone's `targets` apply where the section has none; its parts (`also_train`) and the frozen tensors that the
    folder carries (`also_keep`) are added to the section's, which wins where names are equal.
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
        targets = resolved_targets(model, adapter.targets, "adapter.targets", any_module=adapter.method == "full")
    named = (*targets, *(glob for part in settings["parts"].values() for glob in part.targets))
    if "experts" not in adapter.kinds and names_experts(model, named):
        settings["kinds"] = (*adapter.kinds, "experts")
    return DoRAConfig(targets=targets, **settings)


def check_initial(initial: str | None) -> None:
    """Checks that the folder to start from holds an adapter, before any weight is read."""
    if initial is not None and not (Path(initial) / WEIGHTS_FILE).is_file():
        raise cannot_start(f": {no_adapter(Path(initial))}")


def adapt(model: nn.Module, config: DoRAConfig, *, initial: str | None = None) -> None:
    """Puts the adapter in, decides what trains, and loads the folder `initial`."""
    apply_dora(model, config, gather=gather_to_write)
    check_gradients(model)
    if initial is not None:
        load_initial(model, Path(initial))


def load_initial(model: nn.Module, folder: Path) -> None:
    """Starts from the weights of an adapter folder, which may hold fewer parts (stage 1's projector alone).

    Frozen rows of the folder that this run's own folder will carry too (a VL-BART's picture tokens) are loaded as well.
    Other frozen tensors of the folder must equal the base's.
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
                raise cannot_start(f": {folder}: {name} is {list(tensor.shape)}, here it is {list(rows.shape)}")
            rows.copy_(tensor.view(rows.shape))
    for _, layer in adapted_layers(model):
        layer.forget_norms()
    logger.info("%s sets %d of %d trained tensors", folder, len(set(stored) & set(trained)), len(trained))


def _refuse_lost_values(model: nn.Module, folder: Path, frozen: Mapping[str, Tensor]) -> None:
    """Refuses frozen tensors that differ from the base's: this run would not write them again."""
    here = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    if unknown := sorted(name for name in frozen if split_rows(name)[0] not in here):
        raise cannot_start(f": {folder} holds {len(unknown)} tensors that do not train here: {unknown[:3]}")
    other = []
    for name, tensor in frozen.items():
        weight = here[split_rows(name)[0]]
        with gather_to_read([weight] if isinstance(weight, nn.Parameter) else []):
            rows = kept_rows(name, weight.detach())
            if rows.shape != tensor.shape or not torch.equal(tensor.to(rows), rows):
                other.append(name)
    if other:
        raise cannot_start(
            f": {folder} holds {len(other)} tensors that are frozen in this run and differ from the "
            f"base's: {sorted(other)[:3]}; train them as well, or merge the folder into its base (dora-vl merge)"
        )


def _refuse_another_meaning(model: nn.Module, folder: Path, stored: Mapping[str, Tensor]) -> None:
    """Refuses a folder whose settings differ: its A and B would start the run somewhere else."""
    owners = {name.rpartition(".")[0] for name in stored if name.rpartition(".")[2] in FACTORS}
    if not owners:
        return
    peft, recipe = read_peft_config(folder), read_recipe(folder).get("adapter", {})
    config = read_config(str(folder), peft, recipe, stored)
    refuse_geometry_that_peft_ignored(f"adapter.initial: {folder}", model, peft, recipe)
    for name, layer in adapted_layers(model):
        if name not in owners:
            continue
        theirs, ours = config.for_layer(name), layer.adapter
        difference = first_difference(theirs, ours, ["method", *fields_of_the_change(theirs, ours)])
        if difference is not None:
            field, in_folder, in_run = difference
            raise cannot_start(
                f": {folder}: {name} has {field} {in_folder!r} there (scale {theirs.scale:g}), and "
                f"{in_run!r} in this run (scale {ours.scale:g}); set adapter.{field}, or its pattern, to the folder's"
            )


# Learning rates and weight decay.


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rate by part.

    Attributes:
        by_part: rate of a part (`dora`, `vision`, `projector`), of a factor in every part (`magnitude`), or of one
            factor in one part (`vision.magnitude`).
        b_ratio: B's rate as a multiple of its part's (LoRA+).
    """

    default: float
    by_part: Mapping[str, float]
    b_ratio: float = 1.0

    def of(self, part: TrainedPart) -> float:
        """Returns the rate of a part: by its whole name, by its part, by its factor, or the default, in this order."""
        if part.name in self.by_part:
            return self.by_part[part.name]
        keys = (key for key in (part.part, part.factor) if key is not None and key in self.by_part)
        rate = next((self.by_part[key] for key in keys), self.default)
        follows = part.factor == "B" and "B" not in self.by_part
        return rate * self.b_ratio if follows else rate


def rates_of(optim: OptimConfig, default: float, parts: Sequence[TrainedPart]) -> LearningRates:
    """Reads the rates of a run's `optim:` section for the parts that train; `training.learning_rate` is the default.

    B trains at `b_learning_rate_ratio` times its part's rate (LoRA+), magnitudes never with it. Refuses a rate for a
    part that does not train; the error names the nearest.
    """
    named = {"projector": optim.projector_learning_rate, "magnitude": optim.magnitude_learning_rate}
    short = {name: rate for name, rate in named.items() if rate is not None}
    if twice := sorted(short.keys() & optim.rates.keys()):
        key = f"optim.rates.{twice[0]}"
        raise SettingError(key, f" and optim.{twice[0]}_learning_rate say the same; leave one out")
    rates = LearningRates(default, {**short, **optim.rates}, optim.b_learning_rate_ratio)
    trained = {name for part in parts for name in (part.name, part.part, part.factor) if name is not None}
    for unknown in sorted(set(rates.by_part) - trained):
        close = get_close_matches(unknown, trained, n=1, cutoff=0.5)
        names = ", ".join(dict.fromkeys(part.part for part in parts))
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"a learning rate is set for {unknown}, but what trains is {names}{hint}")
    return rates


def check_parts(pipeline: Pipeline, arguments: TrainingArguments) -> None:
    """Refuses patterns and rates of parts that the model does not have, on a model without weights."""
    adapter, optim, by_vllm = pipeline.config.adapter, pipeline.config.optim, pipeline.config.objective.vllm
    if not (adapter.targets or adapter.parts or adapter.also_train or adapter.also_keep or optim.rates or by_vllm):
        return
    with without_sharding(arguments):
        backbone = pipeline.skeleton()
    apply_dora(backbone.model, replace(pipeline.dora_config(backbone), init="kaiming"))
    rates_of(optim, arguments.learning_rate, trained_parts(backbone.model))
    if by_vllm:
        refuse_unsent(backbone.model)


def with_decay(parts: Sequence[TrainedPart], decayed: Decayed) -> tuple[TrainedPart, ...]:
    """Chooses which trained tensors decay: `matrices` as the list says, or `all_but_biases`.

    VL-T5's optimizer leaves out names with "bias" or "LayerNorm.weight", the second of which BART's names never have.
    """
    if decayed == "matrices":
        return tuple(parts)

    split: list[TrainedPart] = []
    for part in parts:
        for biases in (False, True):
            names = [name for name in part.parameters if (name.rpartition(".")[2] == "bias") == biases]
            parameters = {name: part.parameters[name] for name in names}
            split += [replace(part, parameters=parameters, weight_decay=not biases)] if names else []
    return tuple(split)


def parameter_groups(
    parts: Sequence[TrainedPart], rates: LearningRates, *, weight_decay: float
) -> list[dict[str, Any]]:
    """Makes groups for a torch optimizer. Vectors (magnitudes, norms, biases) decay only where `with_decay` says so."""
    return [
        {
            "name": part.name,
            "params": list(part.parameters.values()),
            "lr": rates.of(part),
            "weight_decay": weight_decay if part.weight_decay else 0.0,
        }
        for part in parts
        if part.parameters
    ]


def trained_table(model: nn.Module, parts: Sequence[TrainedPart], rates: LearningRates) -> Table:
    """Lists each part that trains: layers, numbers, their share of all, rank and learning rate."""
    total = weight_count(model)
    layers = dict(adapted_layers(model))
    by_name: dict[str, list[TrainedPart]] = {}
    for part in parts:
        by_name.setdefault(part.name, []).append(part)
    rows = []
    for name, same in by_name.items():
        if not (count := sum(map(_count, same))):
            continue
        owners = dict.fromkeys(owner.rpartition(".")[0] for part in same for owner in part.parameters)
        ranks = {layers[owner].adapter.rank for owner in owners} if same[0].factor in ("A", "B", "d") else set()
        rank = "-".join(map(str, sorted({min(ranks), max(ranks)}))) if ranks else ""
        rows.append((name, f"{len(owners):,}", *_share(count, total), rank, f"{rates.of(same[0]):g}"))
    trained = sum(map(_count, parts))
    for name, count in (("trained", trained), ("frozen", total - trained), ("all", total)):
        rows.append((name, "", *_share(count, total), "", ""))
    return Table(("part", "layers", "parameters", "share", "rank", "learning rate"), tuple(rows))


def _count(part: TrainedPart) -> int:
    return sum(map(parameter_count, part.parameters.values()))


def _share(count: int, total: int) -> tuple[str, str]:
    return f"{count:,}", f"{count / max(total, 1):.3%}"
