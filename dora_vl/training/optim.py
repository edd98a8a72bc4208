"""Parameter groups, one for each trained part and weight decay, and the tables of what trains before the first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from operator import itemgetter
from typing import Any

from torch import nn
from transformers import TrainingArguments

from dora_vl.core import TrainedPart, adapted_layers, apply_dora, trained_parts
from dora_vl.errors import UserError
from dora_vl.run.launch import without_sharding
from dora_vl.run.settings import Decayed, OptimConfig
from dora_vl.training.memory import Table, parameter_count, unpacked_sizes, weight_count
from dora_vl.training.pipeline import Pipeline


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
        """The rate of a part: by its whole name, by its part, by its factor, or the default, in this order."""
        if part.name in self.by_part:
            return self.by_part[part.name]
        keys = (key for key in (part.part, part.factor) if key is not None and key in self.by_part)
        rate = next((self.by_part[key] for key in keys), self.default)
        follows = part.factor == "B" and "B" not in self.by_part
        return rate * self.b_ratio if follows else rate


def rates_of(optim: OptimConfig, default: float) -> LearningRates:
    """The rates that a run's `optim:` section says, `training.learning_rate` being the default.

    B trains at `b_learning_rate_ratio` times its part's rate (LoRA+), magnitudes never with it.

    Raises:
        UserError: a rate that is said twice.
    """
    named = {"projector": optim.projector_learning_rate, "magnitude": optim.magnitude_learning_rate}
    short = {name: rate for name, rate in named.items() if rate is not None}
    if twice := sorted(short.keys() & optim.rates.keys()):
        raise UserError(f"optim.rates.{twice[0]} and optim.{twice[0]}_learning_rate say the same; leave one out")
    return LearningRates(default, {**short, **optim.rates}, optim.b_learning_rate_ratio)


def refuse_unknown_parts(parts: Sequence[TrainedPart], rates: LearningRates) -> None:
    """Raises a `UserError` where a learning rate is for a part that this run does not train; it names the nearest."""
    trained = {name for part in parts for name in (part.name, part.part, part.factor) if name is not None}
    for unknown in sorted(set(rates.by_part) - trained):
        close = get_close_matches(unknown, trained, n=1, cutoff=0.5)
        names = ", ".join(dict.fromkeys(part.part for part in parts))
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"a learning rate is set for {unknown}, but what trains is {names}{hint}")


def check_parts(pipeline: Pipeline, arguments: TrainingArguments) -> None:
    """Refuses patterns and rates of parts that the model does not have, on a model without weights.

    Raises:
        UserError: one line, before any weight is read.
    """
    adapter, optim = pipeline.config.adapter, pipeline.config.optim
    if not (adapter.targets or adapter.parts or adapter.also_train or adapter.also_keep or optim.rates):
        return
    with without_sharding(arguments):
        backbone = pipeline.skeleton()
    apply_dora(backbone.model, replace(pipeline.dora_config(backbone), init="kaiming"))
    refuse_unknown_parts(trained_parts(backbone.model), rates_of(optim, arguments.learning_rate))


def with_decay(parts: Sequence[TrainedPart], decayed: Decayed) -> tuple[TrainedPart, ...]:
    """What trains, with the tensors that decay chosen anew: `matrices` as the list says, or `all_but_biases`.

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
    """Groups for a torch optimizer. Vectors (magnitudes, norms, biases) do not decay, unless `with_decay` says so.

    Raises:
        UserError: a learning rate for a part that this run does not train.
    """
    refuse_unknown_parts(parts, rates)
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


EXPERTS, TIED, EMBEDDINGS, LINEARS, CONVOLUTIONS, OTHERS = KINDS = (
    "experts that are one tensor",
    "embeddings, tied to the head",
    "embeddings",
    "linear layers",
    "convolutions",
    "vectors and others",
)


def trained_table(model: nn.Module, parts: Sequence[TrainedPart], rates: LearningRates) -> Table:
    """A row for each part that trains: layers, numbers, their share of all, rank and learning rate."""
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


def frozen_table(model: nn.Module) -> Table:
    """What is not adapted and does not train: a row for each kind of weight, with its share and its largest."""
    total = weight_count(model)
    weights: dict[str, list[tuple[str, int]]] = {}
    for kind, name, count in _out_of_reach(model):
        weights.setdefault(kind, []).append((name, count))
    rows = [
        (kind, *_share(sum(count for _, count in weights[kind]), total), max(weights[kind], key=itemgetter(1))[0])
        for kind in KINDS
        if kind in weights
    ]
    return Table(("not adapted", "parameters", "share", "such as"), tuple(rows))


def _out_of_reach(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    """Kind, name and size of every frozen weight that no adapter changes."""
    heads = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    seen = {id(layer.weight) for _, layer in adapted_layers(model)}
    unpacked = unpacked_sizes(model)
    for owner, module in model.named_modules():
        for leaf, weight in module.named_parameters(recurse=False):
            if weight.requires_grad or id(weight) in seen:
                continue
            seen.add(id(weight))
            size = unpacked.get(id(weight), parameter_count(weight))
            yield _kind(module, weight, heads), f"{owner}.{leaf}".strip("."), size


def _kind(module: nn.Module, weight: nn.Parameter, heads: set[int]) -> str:
    axes = len(vars(weight).get("ds_shape", weight.shape))
    if isinstance(module, nn.Embedding):
        return TIED if id(weight) in heads else EMBEDDINGS
    if axes < 2:
        return OTHERS
    if isinstance(module, nn.Linear):
        return LINEARS
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return CONVOLUTIONS
    return EXPERTS if axes == 3 else OTHERS
