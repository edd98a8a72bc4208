"""What trains and what does not, as the two tables that are logged before the first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter

from torch import nn

from dora_vl.core import TrainedPart, adapted_layers
from dora_vl.core.layer import AdaptedLayer
from dora_vl.training.memory_estimate import parameter_count, table, unpacked_sizes, weight_count
from dora_vl.training.optim import LearningRates

EXPERTS, EMBEDDINGS, LINEARS, CONVOLUTIONS, OTHERS = (
    "experts that are one tensor",
    "embeddings",
    "linear layers",
    "convolutions",
    "vectors and others",
)
TIED = "embeddings, tied to the head"


def trained_table(model: nn.Module, parts: Sequence[TrainedPart], rates: LearningRates) -> str:
    """A line for each part that trains: layers, numbers, their share of all, rank and learning rate."""
    total = weight_count(model)
    layers = dict(adapted_layers(model))
    lines: dict[str, list[TrainedPart]] = {}
    for part in parts:
        lines.setdefault(part.name, []).append(part)
    rows = [(name, *_line(found, layers, total, rates)) for name, found in lines.items() if any(map(_count, found))]
    trained = sum(map(_count, parts))
    rows += [
        (what, "", *_share(count, total), "", "")
        for what, count in (("trained", trained), ("frozen", total - trained), ("all", total))
    ]
    return table(("part", "layers", "parameters", "share", "rank", "learning rate"), rows)


def _line(
    parts: Sequence[TrainedPart], layers: Mapping[str, AdaptedLayer], total: int, rates: LearningRates
) -> tuple[str, ...]:
    owners = dict.fromkeys(name.rpartition(".")[0] for part in parts for name in part.parameters)
    ranks = {layers[name].adapter.rank for name in owners} if parts[0].factor in ("A", "B", "d") else set()
    rank = "-".join(str(one) for one in sorted({min(ranks), max(ranks)})) if ranks else ""
    return (f"{len(owners):,}", *_share(sum(map(_count, parts)), total), rank, f"{rates.of(parts[0]):g}")


def _count(part: TrainedPart) -> int:
    return sum(map(parameter_count, part.parameters.values()))


def _share(count: int, total: int) -> tuple[str, str]:
    return f"{count:,}", f"{count / max(total, 1):.3%}"


def frozen_table(model: nn.Module) -> str:
    """What is not adapted and does not train: a line for each kind of weight, with its share and its largest."""
    total = weight_count(model)
    found: dict[str, list[tuple[str, int]]] = {}
    for kind, name, count in _out_of_reach(model):
        found.setdefault(kind, []).append((name, count))
    rows = [
        (kind, *_share(sum(count for _, count in found[kind]), total), max(found[kind], key=itemgetter(1))[0])
        for kind in (EXPERTS, TIED, EMBEDDINGS, LINEARS, CONVOLUTIONS, OTHERS)
        if kind in found
    ]
    return table(("not adapted", "parameters", "share", "such as"), rows)


def _out_of_reach(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    """Kind, name and size of every frozen weight that no adapter changes."""
    heads = {id(one.weight) for one in model.modules() if isinstance(one, nn.Linear)}
    adapted = {id(layer.weight) for _, layer in adapted_layers(model)}
    unpacked = unpacked_sizes(model)
    seen: set[int] = set()
    for owner, module in model.named_modules():
        for leaf, weight in module.named_parameters(recurse=False):
            if weight.requires_grad or id(weight) in adapted or id(weight) in seen:
                continue
            seen.add(id(weight))
            yield (
                _kind(module, weight, heads),
                f"{owner}.{leaf}".strip("."),
                unpacked.get(id(weight), parameter_count(weight)),
            )


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
