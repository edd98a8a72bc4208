"""A layer's gain g = m / n, and whether one that was kept is still true.

A gain is computed once an optimizer step and read at every pass. It is untrue after an optimizer step, an edit of any
kind, or with other tensors in place of its own. Two sources tell, since neither sees all. A parameter's `_version` and
`data_ptr` stay the same under DeepSpeed ZeRO 0-3 when the engine updates it (measured); torch's optimizer post-hook
fires at every step of every optimizer, DeepSpeed's included (checked under ZeRO 1, 2, 3), and needs no Trainer.
Everything else is an edit, which torch counts in the tensor's version, or another tensor. Torch does not count what
goes through `.data`: `WatchedParameter` does.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class OptimizerSteps:
    """Optimizer steps of this process, counted once `watch_optimizers` was called."""

    count = 0


@cache
def watch_optimizers() -> None:
    """Starts counting; called by the first adapted layer, so that importing changes nothing."""

    def advance(*_: object) -> None:
        OptimizerSteps.count += 1

    register_optimizer_step_post_hook(advance)


SHARD_MARKS = frozenset({"ds_status", "_fsdp_flattened"})
"""Attributes of parameters whose `.data` DeepSpeed ZeRO-3 and FSDP1 replace at every pass, without a new value."""


class WatchedParameter(nn.Parameter):
    """An `nn.Parameter` whose `.data` leaves a trace: what is written through it counts as an edit.

    Averaged weights are swapped in by `p.data.copy_`, hand-written optimizers step by `p.data.add_`, and
    `vector_to_parameters` assigns `p.data`. No torch counter moves for any of them.
    """

    data_replaced = 0
    """How often `.data` was assigned."""

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The values, without a graph and with this parameter's count of edits."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # pyright: ignore[reportAttributeAccessIssue]
        if SHARD_MARKS.isdisjoint(vars(self)):
            self.data_replaced += 1


def unwatch(tensor: Tensor) -> None:
    """Makes a parameter that a `Snapshot` watches a plain one again."""
    if type(tensor) is WatchedParameter:
        tensor.__class__ = nn.Parameter  # pyright: ignore[reportAttributeAccessIssue]


def is_plain_parameter(tensor: object) -> TypeGuard[nn.Parameter]:
    """Whether it is an ordinary parameter, watched or not, and none of a quantising or sharding library."""
    return type(tensor) in (nn.Parameter, WatchedParameter)


def version_of(tensor: Tensor) -> int:
    """The count of edits, a shard's and those through `.data` too; tensors made under `inference_mode` keep none."""
    if tensor.is_inference():
        return -1
    local = getattr(tensor, "_local_tensor", None)  # what `dcp.load` and `to_local()` write to under a `DTensor`
    edits = tensor._version if local is None else tensor._version + local._version
    return edits + tensor.data_replaced if type(tensor) is WatchedParameter else edits


class Snapshot:
    """Some tensors as they are now, and whatever else a value was computed from.

    The tensors are held weakly and compared as objects: an address or an `id` may come again, and another tensor may
    have the same version.
    """

    __slots__ = ("_also", "_tensors", "_versions")

    def __init__(self, tensors: Iterable[Tensor | None], *also: object) -> None:
        present = [tensor for tensor in tensors if tensor is not None]
        for tensor in present:
            if type(tensor) is nn.Parameter:
                tensor.__class__ = WatchedParameter
        self._tensors = [weakref.ref(tensor) for tensor in present]
        self._versions = [version_of(tensor) for tensor in present]
        self._also = also

    def holds(self, tensors: Iterable[Tensor | None], *also: object) -> bool:
        """Whether these are the same tensors, unchanged, and the rest is equal."""
        present = [tensor for tensor in tensors if tensor is not None]
        return (
            len(present) == len(self._tensors)
            and all(ref() is tensor for ref, tensor in zip(self._tensors, present, strict=True))
            and self._versions == [version_of(tensor) for tensor in present]
            and self._also == also
        )


CANCELLATION = 0.15
"""Where a row's squared norm falls below this share of its frozen weight's, the factored form lost too many digits."""
NORM_RANGE = torch.bfloat16
"""Its range is what the products of a norm need: A A^T leaves float16's where a row of A is longer than 255."""
FRAGILE_GAIN = 0.05
"""Below it a row's product cannot be rebuilt from the output in the backward pass."""
LARGE_BIAS = 8.0
"""Above this multiple of the magnitude, which is the product's size for inputs near one, a bias hides its digits."""


class Fragile(NamedTuple):
    """Some output rows, and one over the norm of each."""

    rows: Int[Tensor, " fragile"]
    per_norm: Float[Tensor, " fragile"]


@dataclass(frozen=True)
class Gain:
    """The gain of one layer, valid until its factors or magnitude change.

    Gain minus one is kept beside it in the activations' dtype, because a half-precision gain rounds small changes of
    magnitude away (bfloat16 has nothing between 1 and 1.0078) while the difference keeps its digits; `z + (gain - 1) z`
    then rounds once.
    """

    full: Float[Tensor, " out"]
    """In float32."""
    minus_one: Float[Tensor, " out"]
    per_magnitude: Float[Tensor, " out"]
    """One over the magnitude, in float32: turns the sum of output times its gradient into the magnitude's gradient."""
    fragile: Fragile | None = None
    """Rows whose product is kept for the backward pass: of a gain near 0, or a bias far larger than the product."""


def careful_gain(
    full: Float[Tensor, " out"], norms: Float[Tensor, " out"], bias: Float[Tensor, " out"] | None, dtype: torch.dtype
) -> Gain:
    """A gain from its float32 values and the norms they came from, whatever the rows hold."""
    per_norm = torch.where(norms > 0, norms.reciprocal(), 0.0)  # a row without a direction gives m no gradient
    unsound = full.abs() < FRAGILE_GAIN
    if bias is not None:
        unsound = unsound | (bias.detach().abs() > LARGE_BIAS * (full * norms).abs())
    rows = unsound.nonzero().flatten()
    fragile = Fragile(rows, per_norm[rows]) if rows.numel() else None
    return Gain(full, (full - 1).to(dtype), per_norm / full, fragile)


def quick_gains(
    magnitudes: Float[Tensor, "layers out"],
    weight_norms_squared: Float[Tensor, "layers out"],
    norms_squared: Float[Tensor, "layers out"],
    biases: Float[Tensor, "layers out"] | None,
    dtype: torch.dtype,
) -> list[Gain | None]:
    """The gains of several layers in a third of the operations; None for a layer with a row that needs more care.

    An adapted model has hundreds of layers, and on CPU an operation on a vector costs its dispatch. One number says
    whether all rows of a layer are sound: the least of its squared norms beside the frozen weight's and, brought to
    the same bound, of its gains and of its magnitudes beside the bias.
    """
    full = magnitudes / norms_squared.sqrt()
    shares = torch.minimum(norms_squared / weight_norms_squared, full.abs() * (CANCELLATION / FRAGILE_GAIN))
    if biases is not None:
        shares = torch.minimum(shares, magnitudes.abs() * (CANCELLATION * LARGE_BIAS) / biases.abs())
    sound = (shares.amin(dim=-1) > CANCELLATION).tolist()  # False for NaN too
    parts = zip(full, (full - 1).to(dtype), magnitudes.reciprocal(), strict=True)
    return [Gain(*part) if is_sound else None for is_sound, part in zip(sound, parts, strict=True)]


def apply_gain(
    product: Float[Tensor, "*batch out"], bias: Float[Tensor, " out"] | None, minus_one: Float[Tensor, "*broadcast out"]
) -> Float[Tensor, "*batch out"]:
    """Scales a product that carries its bias already, in place, the bias left as it is; bitwise nothing at gain 1.

    `minus_one` is the gain minus one, of all rows or of each.
    """
    product.addcmul_(product, minus_one)
    if bias is not None:
        product.sub_(minus_one * bias)
    return product
