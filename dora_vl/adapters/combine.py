"""The weighted sum of what several adapters do to a weight, written as one adapter.

With W'_i what adapter i alone makes of a layer's weight W, the combination with weights w_i is

    W' = W + sum_i w_i (W'_i - W)

so that weight 1 of one adapter is that adapter, and 0 is the base. Adding the factors instead, as LoRA allows,
leaves every gain g_i out (12 % error for a single DoRA adapter with weight 1, PEFT issue 3761). Since
W'_i = g_i * (W + s_i B_i A_i), row by row,

    W' = c * W + sum_i w_i g_i s_i B_i A_i      with  c = 1 + sum_i w_i (g_i - 1)
       = c * (W + B A)                          with  B = [w_i g_i s_i / c * B_i ...],  A = [A_i ...]

which is a DoRA of rank sum_i r_i with magnitude c ||W + B A||: exact, without an SVD, whatever the adapters are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from dora_vl.adapters.adapter import IMAGE_ASPECT, Adapter, Factors
from dora_vl.adapters.agreement import PEFT_PREFIX
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.exports import truncated
from dora_vl.adapters.merge import planned_factors
from dora_vl.adapters.settings import new_config, own_recipe
from dora_vl.core import functional
from dora_vl.core.trainable import kept_rows, split_rows
from dora_vl.errors import UserError

SMALLEST_GAIN = 1e-5
"""c is kept this far from 0, where no DoRA over W gives the row exactly; the row is then off by 1e-5 of W's."""


@dataclass(frozen=True)
class Combination:
    """One adapter that does what several do together."""

    adapter: Adapter
    errors: dict[str, float]
    """Relative error of each layer's change where a smaller rank was asked for; empty for the exact form."""


def combine_factors(weight: Tensor, parts: Sequence[tuple[float, Factors]], *, as_dora: bool = False) -> Factors:
    """Combines (weight of the adapter, its factors) on one layer, exactly; ranks add up and the scale is 1.

    A single adapter of weight 1 stays as it is. `as_dora` adds a magnitude where no part has one, which LoRA layers
    beside DoRA layers need.
    """
    parts = [(share, factors) for share, factors in parts if share != 0]
    plain = not as_dora and all(factors.magnitude is None for _, factors in parts)
    if len(parts) == 1 and parts[0][0] == 1 and (plain or parts[0][1].magnitude is not None):
        return parts[0][1]
    gains = [factors.gain_on(weight) for _, factors in parts]
    c = 1 + sum((share * (g - 1) for (share, _), g in zip(parts, gains, strict=True)), torch.zeros(()))
    c = torch.where(c.abs() < SMALLEST_GAIN, torch.where(c < 0, -SMALLEST_GAIN, SMALLEST_GAIN), c)
    blocks_A, blocks_B = [], []
    for (share, factors), g in zip(parts, gains, strict=True):
        if factors.lora_A is not None and factors.lora_B is not None:
            blocks_A.append(factors.lora_A.to(g.dtype))
            blocks_B.append((share * factors.scale * g / c).unsqueeze(1) * factors.lora_B.to(g.dtype))
    a, b = (torch.cat(blocks_A), torch.cat(blocks_B, dim=1)) if blocks_A else (None, None)
    shape = parts[0][1]
    result = replace(shape, lora_A=a, lora_B=b, magnitude=None, scale=1.0)
    return result if plain else replace(result, magnitude=_magnitude(result, weight, c))


def _magnitude(factors: Factors, weight: Tensor, gain: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
    direction = functional.dense_direction(factors.as_matrix(weight), factors.lora_A, factors.lora_B, factors.scale)
    return gain * functional.root(functional.row_norms_squared(direction))


def reduce_rank(factors: Factors, weight: Tensor, rank: int) -> Factors:
    """Reduces B A to the nearest product of rank `rank`, gains kept; exact where `rank` suffices."""
    if factors.lora_A is None or factors.lora_B is None or rank >= factors.rank:
        return factors
    left, right = torch.linalg.qr(factors.lora_B), torch.linalg.qr(factors.lora_A.t())
    a, b = truncated(left.R @ right.R.t(), rank)
    smaller = replace(factors, lora_A=a @ right.Q.t(), lora_B=left.Q @ b)
    if factors.magnitude is None:
        return smaller
    return replace(smaller, magnitude=_magnitude(smaller, weight, factors.gain_on(weight)))


def combine(
    adapters: Mapping[str, Adapter], shares: Mapping[str, float], base: BaseWeights, *, rank: int | None = None
) -> Combination:
    """Combines adapters of one base by weights; `rank` asks for the nearest adapter of that rank, by an SVD.

    Other tensors (projector, biases) combine as the change of each from the base does.
    """
    unknown = sorted(set(shares) - set(adapters))
    if unknown or not any(shares.values()):
        raise UserError(f"cannot combine {dict(shares)}: there are {sorted(adapters)}, and one weight must not be 0")
    active = {name: share for name, share in shares.items() if share != 0}
    if list(active.values()) == [1]:
        return Combination(adapters[next(iter(active))], {})
    factors_of = {name: planned_factors(base, adapters[name]) for name in active}
    for adapter in (adapters[name] for name in active):
        if others := adapter.not_linear | adapter.input_axis:
            raise UserError(f"{adapter.source}: {min(others)} is no linear layer with a magnitude a row; merge instead")
    # PEFT has one method an adapter: a layer that only LoRA adapters touch gets the magnitude that changes nothing.
    as_dora = any(part.magnitude is not None for factors in factors_of.values() for part in factors.values())
    results: dict[str, Factors] = {}
    errors: dict[str, float] = {}
    for layer in sorted({layer for factors in factors_of.values() for layer in factors}):
        weight = base.weight_of(layer)
        parts = [(share, factors_of[name][layer]) for name, share in active.items() if layer in factors_of[name]]
        results[layer] = exact = combine_factors(weight, parts, as_dora=as_dora)
        if rank is not None:
            results[layer] = reduce_rank(exact, weight, rank)
            merged = exact.merged(weight)
            change = float((merged - weight.to(merged.dtype)).norm())
            errors[layer] = float((results[layer].merged(weight) - merged).norm()) / change if change else 0.0
    extras: dict[str, Tensor] = {}
    for name in sorted({extra for key in active for extra in adapters[key].extras}):
        start = kept_rows(name, base.read(split_rows(name)[0]))
        start = start.to(functional.accumulation_dtype(start.dtype))
        extras[name] = start
        for key, share in active.items():
            if name in adapters[key].extras:
                extras[name] = extras[name] + share * (adapters[key].extras[name].to(start.dtype) - start)
    return Combination(_as_adapter(results, extras, [adapters[name] for name in active]), errors)


def _as_adapter(results: Mapping[str, Factors], extras: Mapping[str, Tensor], adapters: Sequence[Adapter]) -> Adapter:
    tensors: dict[str, Tensor] = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in extras.items()}
    for layer, factors in results.items():
        tensors |= factors.tensors(layer)
    adapted = {layer: factors for layer, factors in results.items() if factors.rank}
    modules = {module for adapter in adapters for module in adapter.config.get("modules_to_save") or ()}
    config = new_config(
        {layer: factors.rank for layer, factors in adapted.items()},
        {layer: factors.scale for layer, factors in adapted.items()},
        base_model_name_or_path=str(adapters[0].config.get("base_model_name_or_path") or ""),
        modules_to_save=sorted(modules) or None,
        fan_in_fan_out=adapters[0].config.get("fan_in_fan_out", False),
        use_dora=any(factors.magnitude is not None for factors in adapted.values()),
    )
    kept = {name for adapter in adapters for name in adapter.recipe.get("adapter", {}).get("kept", ())} & extras.keys()
    recipe = own_recipe(config, extras, kept, results.keys() - adapted.keys())
    recipe[IMAGE_ASPECT] = adapters[0].recipe.get(IMAGE_ASPECT)
    return Adapter(tensors, config, recipe, source="combination")
