"""An adapter's way into vLLM's slots: `magnitude` beside A and B in a layer's weights, then the layer's gains.

Written against the classes of vllm/lora without importing them: `patches` puts these functions into their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from dora_vl.app.vllm.layer import DoRALayer
from dora_vl.app.vllm.magnitudes import EXPORT, UnservableAdapter
from dora_vl.errors import shown_names

Lookup = Callable[[str], Any]
"""An adapter's weights of a layer, by vLLM's name of the layer; None where it has none."""


def magnitudes_in(weights: Any) -> list[Tensor]:
    """The magnitudes of a layer's weights: one, or those of the parts that were packed into one."""
    found = getattr(weights, "magnitude", None)
    return [one for one in (found if isinstance(found, list) else [found]) if one is not None]


def magnitude_of_parts(parts: Iterable[Any]) -> list[Tensor | None] | None:
    """What packed weights keep of their parts; a part that is not adapted, or has no magnitude, leaves a gap."""
    found = [getattr(one, "magnitude", None) for one in parts]
    return found if any(one is not None for one in found) else None


def magnitudes_of(adapter: Any) -> dict[str, list[Tensor]]:
    """The magnitudes of each of an adapter's layers, by vLLM's name of the layer."""
    found = {name: magnitudes_in(weights) for name, weights in adapter.loras.items()}
    return {name: magnitudes for name, magnitudes in found.items() if magnitudes}


def compute_gains(
    modules: Mapping[str, Any],
    before: Mapping[str, list[Tensor]],
    lookup: Lookup,
    *,
    max_rank: int,
    elsewhere: Callable[[str], bool] = lambda name: False,
) -> None:
    """Computes every layer's gains once, when vLLM has packed an adapter's weights and before it takes it in.

    Args:
        modules: the wrapped layers, by vLLM's names.
        before: `magnitudes_of` of the adapter before its weights were packed.
        lookup: the adapter's weights as packed.
        max_rank: rows of A in a slot.
        elsewhere: whether a layer is on another rank of a pipeline.

    Raises:
        ValueError: a magnitude found no layer that applies it, or no room; the adapter is not to be taken in then.
    """
    layers = {name: module for name, module in modules.items() if isinstance(module, DoRALayer)}
    served = {name: weights for name in layers if magnitudes_in(weights := lookup(name))}
    kept = {id(one) for weights in served.values() for one in magnitudes_in(weights)}
    lost = [name for name, ones in before.items() if not {id(one) for one in ones} <= kept and not elsewhere(name)]
    if lost:
        raise UnservableAdapter(
            f"vLLM applies no magnitudes to {len(lost)} of the adapter's layers: {shown_names(sorted(lost))} "
            f"(experts, embeddings, output heads, and what it keeps in a class of its own); {EXPORT}"
        )
    for name, weights in served.items():
        _refuse_ranks(name, weights, max_rank)
    for name, weights in served.items():
        weights.dora_minus_one = layers[name].dora_gains(name, weights).cpu()


def _refuse_ranks(name: str, weights: Any, max_rank: int) -> None:
    factors = weights.lora_a if isinstance(weights.lora_a, list) else [weights.lora_a]
    highest = max(len(one) for one in factors if one is not None)
    if highest > max_rank:
        raise UnservableAdapter(
            f"{name} has rank {highest}, above --max-lora-rank {max_rank}; start vLLM with a higher one"
        )


def write_gains(modules: Mapping[str, Any], slot: int, lookup: Lookup) -> None:
    """Writes an adapter's gains into a slot of every layer, so that none keeps those of the adapter before."""
    for name, module in modules.items():
        if isinstance(module, DoRALayer):
            module.put_dora(slot, getattr(lookup(name), "dora_minus_one", None))
