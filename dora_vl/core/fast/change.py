"""The change of a layer whose frozen product is its own affair (a quantised one), through the CUDA kernels.

Letters as in `functional.py`. The layer has given f = W x + b and differentiates it itself; here are

    y = g (f - b + h B^T) + b        h = s A x

and the gradients of f, x, A, B, m and of the b that stands outside. f is kept, not y: y then belongs to whoever reads
it, who may change it in place, and no row needs g to be away from 0.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dora_vl.core import functional
from dora_vl.core.fast.dropout import Dropped
from dora_vl.core.fast.products import triton_kernels
from dora_vl.core.gain import SHARD_MARKS, Gain, is_plain_parameter, quick_gains

if TYPE_CHECKING:
    from dora_vl.core.linear import ProductLayer


def gain_over_norm(magnitude: Float[Tensor, " out"], norms: Float[Tensor, " out"], dtype: torch.dtype) -> Gain:
    """A gain for `FusedChange`: in place of 1 / m it holds 1 / n, since what is kept is not scaled by g yet."""
    full = functional.gain(magnitude.detach(), norms)
    return Gain(full, (full - 1).to(dtype), torch.where(norms > 0, norms.reciprocal(), 0.0))


class FusedChange(torch.autograd.Function):
    """y from f; keeps x, h and f, and of dropout its seed. `gain` comes from `gain_over_norm`."""

    @staticmethod
    def forward(  # noqa: PLR0913 - the operands of the equation
        ctx: Any,
        frozen: Float[Tensor, "*batch out"],
        x: Float[Tensor, "*batch in_"],
        bias: Float[Tensor, " out"] | None,
        lora_A: Float[Tensor, "rank in_"] | None,
        lora_B: Float[Tensor, "out rank"] | None,
        magnitude: Float[Tensor, " out"],
        gain: Gain,
        scale: float,
        dropped: Dropped | None,
    ) -> Float[Tensor, "*batch out"]:
        """Runs the change; f and x in one dtype."""
        rows = masked = x.reshape(-1, x.shape[-1])
        kernels, hidden = triton_kernels(frozen), None
        assert kernels is not None
        if lora_A is not None and lora_B is not None:
            if dropped is not None:
                masked, scale = dropped.shared_copy(rows), scale / (1 - dropped.probability)
                rows = dropped.kept(rows, masked)
            hidden = functional.scaled_product(masked, lora_A.to(x.dtype).t(), scale)
        y = kernels.adapted_output(frozen, hidden, lora_B, bias, gain.minus_one)
        ctx.probability, positions = (None, None) if dropped is None else (dropped.probability, dropped.positions)
        kept = frozen if magnitude.requires_grad else None
        ctx.save_for_backward(rows if hidden is not None else None, bias, lora_A, lora_B, hidden, kept, positions)
        ctx.gain, ctx.scale, ctx.shapes = gain, scale, (frozen.shape, x.shape)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - `once_differentiable` hides the names
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        """Gradients of f, x, b, A, B and m."""
        rows, bias, lora_A, lora_B, hidden, frozen, positions = ctx.saved_tensors
        gain, needs = ctx.gain, ctx.needs_input_grad
        dy = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        product = None if frozen is None else frozen.reshape(dy.shape)
        kernels = triton_kernels(dy)
        assert kernels is not None
        done = kernels.backward_pass(dy, product, lora_B, bias, gain, ctx.scale, with_bias_sum=needs[2])
        frozen_shape, input_shape = ctx.shapes
        dx = dA = dB = None
        dm = done.dm
        if hidden is not None:
            dropped = None if positions is None else Dropped(ctx.probability, positions)
            dx = _input_gradient(done.dh, lora_A.to(dy.dtype), dropped).view(input_shape) if needs[1] else None
            masked = rows if dropped is None else dropped.masked(rows)
            dA = (done.dh.t() @ masked).to(lora_A.dtype)
            unscaled = (dy.t() @ hidden).to(lora_B.dtype)
            dB = gain.full[:, None] * unscaled
            if dm is not None:  # what h B^T adds to the product that m scales
                dm = dm + gain.per_magnitude * (lora_B * unscaled).sum(dim=1)
        db = None if done.db is None else -gain.minus_one * done.db  # f has b's gradient too, times g
        return done.dz.view(frozen_shape), dx, db, dA, dB, dm, None, None, None


def _input_gradient(dh: Tensor, lora_A: Tensor, dropped: Dropped | None) -> Float[Tensor, "rows in_"]:
    product = dh @ lora_A
    return product if dropped is None else dropped.apply_(product)


# Layers of one shape compute their gains together: a few batched operations instead of about twenty for each layer.
#
# A gain is due once an optimizer step, for every layer at once. One layer takes some twenty operations on small
# tensors, and a model has hundreds of layers: dispatched one by one that is a twentieth of a training step of a
# 135M-parameter model on CPU. The first layer that finds its own gain out of date brings its family's up to date.


LARGEST_BATCH_BYTES = 2**26
"""Of one batch's factors in float32; a family of wide layers is taken in several."""


class GainFamily:
    """The layers whose gains are computed in one go.

    Members are held weakly. A copy, by `copy.deepcopy` or pickle, is a family without members, which the copied
    layers join when they compute their first gain.
    """

    def __init__(self) -> None:
        self._members: weakref.WeakValueDictionary[int, ProductLayer] = weakref.WeakValueDictionary()

    def __deepcopy__(self, memo: dict[int, object]) -> GainFamily:
        return GainFamily()

    def __reduce__(self) -> tuple[type[GainFamily], tuple[()]]:
        return GainFamily, ()

    def join(self, layer: ProductLayer) -> None:
        """Makes a layer a member."""
        self._members[id(layer)] = layer

    def refresh(self, caller: ProductLayer, dtype: torch.dtype) -> bool:
        """Updates `caller` and all other layers of its shape that are out of date; False if there are none.

        Layers whose tensors are not here in whole and at rest are left out: the next shards of ZeRO-3 and FSDP may be
        on their way, and offloaded weights are elsewhere.
        """
        self.join(caller)
        if not _is_here(caller, caller.weight.device):
            return False
        due = [layer for layer in self._members.values() if layer is caller or _is_due(layer, caller)]
        if len(due) < 2:
            return False
        for batch in _batches(due):
            gains, squared = _gains(batch, dtype)
            for layer, gain, own_squared in zip(batch, gains, squared, strict=True):
                layer.keep_gain(gain or layer.careful_gain(own_squared, dtype), dtype)
        return True


def found_families(layers: Iterable[ProductLayer]) -> None:
    """Gives layers of one shape and rank one family."""
    families: defaultdict[tuple[object, ...], GainFamily] = defaultdict(GainFamily)
    for layer in layers:
        layer.family = families[layer.matrix_shape(), layer.adapter.rank]
        layer.family.join(layer)


def _is_due(layer: ProductLayer, caller: ProductLayer) -> bool:
    alike = (layer.adapter.rank, layer.scale(), layer.weight.dtype) == (
        caller.adapter.rank,
        caller.scale(),
        caller.weight.dtype,
    )
    return alike and not layer.merged and layer.gain_is_out_of_date() and _is_here(layer, caller.weight.device)


def _is_here(layer: ProductLayer, device: torch.device) -> bool:
    """Whether every tensor of the layer is a plain one on this device that nothing shards."""
    return all(
        isinstance(tensor, nn.Parameter)
        and is_plain_parameter(tensor)
        and tensor.device == device
        and SHARD_MARKS.isdisjoint(vars(tensor))
        for tensor in (layer.weight, layer.lora_A, layer.lora_B, layer.magnitude)
    )


def _batches(layers: list[ProductLayer]) -> Iterable[list[ProductLayer]]:
    rows, columns = layers[0].matrix_shape()
    size = max(2, LARGEST_BATCH_BYTES // (4 * layers[0].adapter.rank * (rows + columns)))
    return (layers[start : start + size] for start in range(0, len(layers), size))


def _gains(layers: list[ProductLayer], dtype: torch.dtype) -> tuple[list[Gain | None], Float[Tensor, "layers out"]]:
    magnitudes = torch.stack([layer.magnitude.detach() for layer in layers if layer.magnitude is not None])
    frozen = torch.stack([layer.weight_norms_squared() for layer in layers])
    with torch.autocast(frozen.device.type, enabled=False):
        squared = _norms_squared(layers, frozen)
    return quick_gains(magnitudes, frozen, squared, _biases(layers, magnitudes), dtype), squared


def _biases(layers: list[ProductLayer], like: Float[Tensor, "layers out"]) -> Float[Tensor, "layers out"] | None:
    """The layers' biases, zero where one has none; None where none has."""
    if all(layer.bias is None for layer in layers):
        return None
    biases = torch.zeros_like(like)
    for place, layer in zip(biases, layers, strict=True):
        if layer.bias is not None:
            place.copy_(layer.bias.detach())
    return biases


def _norms_squared(layers: list[ProductLayer], frozen: Float[Tensor, "layers out"]) -> Float[Tensor, "layers out"]:
    """The squared norms of layers of one shape: those that each would compute alone, on CPU to the bit.

    B A A^T is one product for all, at rank 128 four times as fast as one for each. W A^T and A A^T are taken layer by
    layer: W would have to be copied, and how the cores divide the sums of A A^T depends on the number of layers.
    """
    weights = [layer.as_matrix(layer.weight) for layer in layers]
    factors = zip(*(layer.factors() or () for layer in layers), strict=True)
    a, b = (_stacked(one, weights[0].dtype) for one in factors)
    weight_on_A, gram = torch.empty_like(b), a.new_empty(len(a), a.shape[1], a.shape[1])
    for weight, own_a, place, gram_place in zip(weights, a, weight_on_A, gram, strict=True):
        torch.mm(weight, own_a.t(), out=place)
        torch.mm(own_a, own_a.t(), out=gram_place)
    kernels = triton_kernels(b)
    grown = functional.with_growth if kernels is None else kernels.norms_squared
    return grown(frozen, b, weight_on_A, gram, layers[0].scale())


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Float[Tensor, "layers rows columns"]:
    """Stacked and cast in one copy; at rank 128 a stack first and a cast after it took a tenth longer."""
    stack = factors[0].new_empty(len(factors), *factors[0].shape, dtype=dtype)
    for place, factor in zip(stack.unbind(), factors, strict=True):
        place.copy_(factor)
    return stack
