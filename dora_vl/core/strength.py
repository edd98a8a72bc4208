"""How much of an adapter is applied: strength t, where 0 is the base, 1 the adapter, and beyond 1 more of the same.

    V_t = W + t s B A        m_t = (1 - t) ||W|| + t m        y = m_t / ||V_t|| (W x + t s B A x) + b

What an adapter changed as a whole (a norm, a projector, a bias) lies on the line between the base's values and its
own. The equation itself is in `functional.py`. For inference only.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from dora_vl.core import functional
from dora_vl.core.gain import kept_norms
from dora_vl.core.layer import AdaptedLayer
from dora_vl.errors import UserError, short_repr
from dora_vl.shapes import Float

MOST_STRENGTH = 10.0
"""A larger strength is refused: the model's answers would make no sense, and its numbers could overflow."""
SECOND_FACTORS = ("lora_B", "lambda_b")
"""Each kind of layer has one of these factors in B A, so that t times the factor is t times the change."""
Module = TypeVar("Module", bound=nn.Module)


class AppliedAdapter(NamedTuple):
    """An adapter and how much of it is applied."""

    key: str
    strength: float = 1.0


def checked_strength(value: object) -> float:
    """Returns the strength as a float; refuses any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_STRENGTH:
        raise UserError(
            f"the strength is {short_repr(value)}; it must be a number from 0 (the base) to {MOST_STRENGTH:g} (1 is "
            "the adapter as trained)"
        )
    return float(value)


@dataclass(frozen=True)
class GainByStrength:
    """Makes a layer's gain at any strength; no weight is read for it again."""

    base_norms: Float[Tensor, " out"]
    """Holds ||W_i|| of each output row."""
    norms: Float[Tensor, " out"]
    """Holds ||V_i|| at strength 1."""
    change_squared: Float[Tensor, " out"]
    """Holds ||(s B A)_i||^2 of each output row."""
    magnitude: Float[Tensor, " out"]

    @classmethod
    @torch.no_grad()
    def of(cls, layer: AdaptedLayer) -> GainByStrength | None:
        """Takes the norms of an adapted layer; None for plain LoRA, which has no gain."""
        if layer.magnitude is None:
            return None
        norms, factors = kept_norms(layer), layer.factors()
        squared = torch.zeros_like(norms)
        if factors is not None:  # s^2 B_i (A A^T) B_i^T of each row: memory out*rank
            dtype = functional.accumulation_dtype(factors[0].dtype)
            a, b = factors[0].to(dtype), factors[1].to(dtype)
            squared = torch.linalg.vecdot(b @ (a @ a.t()), b).clamp_min(0) * layer.adapter.scale**2
        return cls(functional.safe_sqrt(layer.weight_norms_squared()), norms, squared, layer.magnitude.detach())

    def norms_at(self, strength: float) -> Float[Tensor, " out"]:
        """Computes ||V_t|| of each row from ||W||, n = ||V|| and ||s B A||^2; no product of W.

        V_t lies on the line through W and V, so ||V_t||^2 = (1 - t) ||W||^2 + t n^2 - t (1 - t) ||s B A||^2 (Stewart's
        theorem). The sum is float64: its terms may cancel, and a float32 number's square has its root exactly, so that
        at t = 0 and t = 1 these are ||W|| and n to the last bit.
        """
        base, adapted, change = (self.base_norms.double().square(), self.norms.double().square(), self.change_squared)
        squared = (1 - strength) * base + strength * adapted - strength * (1 - strength) * change.double()
        return functional.safe_sqrt(squared).to(self.norms.dtype)

    def at(self, strength: float) -> Float[Tensor, " out"]:
        """Computes g_t: 1 at strength 0, m / n at 1."""
        return functional.gain(magnitude_between(self.base_norms, self.magnitude, strength), self.norms_at(strength))


def magnitude_between(
    base_norms: Float[Tensor, " out"], magnitude: Float[Tensor, " out"], strength: float
) -> Float[Tensor, " out"]:
    """Computes m_t = (1 - t) ||W|| + t m; beyond t = 1 a magnitude above 0 ends at 0, so that no row changes sign."""
    moved = torch.lerp(base_norms, magnitude.to(base_norms.dtype), strength)
    return torch.where(magnitude > 0, moved.clamp_min(0), moved) if strength > 1 else moved


@torch.no_grad()
def layer_between(base: nn.Module, changed: Module, strength: float) -> Module:
    """Makes an adapter's own layer at a strength, for the base's place; what does not differ is shared with both."""
    between = copy.copy(changed)
    inner = changed._modules.get("base") if isinstance(changed, AdaptedLayer) else None
    modules: dict[str, nn.Module | None] = {}
    for name, child in changed._modules.items():
        plain = base if child is inner else base._modules[name]
        modules[name] = None if child is None else layer_between(cast(nn.Module, plain), child, strength)
    vars(between)["_modules"] = modules
    before = {**base._parameters, **base._buffers}
    for kind in ("_parameters", "_buffers"):
        tensors = cast("dict[str, Tensor | None]", vars(changed)[kind])
        vars(between)[kind] = {
            leaf: _tensor_between(before.get(leaf), tensor, strength) for leaf, tensor in tensors.items()
        }
    if isinstance(changed, AdaptedLayer):
        adapted = cast(AdaptedLayer, between)
        for leaf in SECOND_FACTORS:
            factor = changed._parameters.get(leaf)
            if factor is not None:
                adapted._parameters[leaf] = _frozen(factor * strength)
        if changed.magnitude is not None:
            norms = functional.safe_sqrt(changed.weight_norms_squared())
            adapted.magnitude = _frozen(magnitude_between(norms, changed.magnitude, strength))
        adapted.forget_norms()
    return between


def whole_model_between(base: nn.Module, changed: nn.Module, strength: float) -> None:
    """Sets a whole adapted model to a strength, in place."""
    adapted: list[str] = []
    for name, module in list(changed.named_modules()):
        if isinstance(module, AdaptedLayer) and not name.startswith(tuple(f"{outer}." for outer in adapted)):
            adapted.append(name)
    for name in adapted:
        changed.set_submodule(name, layer_between(base.get_submodule(name), changed.get_submodule(name), strength))
    below = tuple(f"{name}." for name in adapted)
    for name, module in changed.named_modules():
        if name in adapted or name.startswith(below):
            continue
        before = vars(base.get_submodule(name))
        for kind in ("_parameters", "_buffers"):
            tensors = vars(module)[kind]
            for leaf, tensor in tensors.items():
                tensors[leaf] = _tensor_between(before[kind].get(leaf), tensor, strength)


def _tensor_between(base: Tensor | None, changed: Tensor | None, strength: float) -> Tensor | None:
    if changed is None or base is None or base is changed or not changed.is_floating_point():
        return changed
    between = torch.lerp(base.to(changed.dtype), changed, strength)
    return _frozen(between) if isinstance(changed, nn.Parameter) else between


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
