"""An `nn.Linear` that carries its own adapter: same `weight` and `bias`, plus A, B and the magnitude."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from dora_vl.core import functional
from dora_vl.core.config import DoRAConfig
from dora_vl.core.fast import cpu_step
from dora_vl.core.fast.dropout import SHARED_DROPOUT, Dropped
from dora_vl.core.fast.products import frozen_product, takes_halves, triton_kernels
from dora_vl.core.gain import NORM_RANGE, SHARD_MARKS, Gain, careful_gain, is_plain_parameter, quick_gains
from dora_vl.core.layer import AdaptedLayer, is_traced

LARGEST_BATCH_BYTES = 2**26
"""Of one batch's factors in float32; a family of wide layers is taken in several."""


class CastFactors(NamedTuple):
    """A and s B in the activations' dtype, and whether the compiled operation takes them."""

    a: Float[Tensor, "rank in_"]
    b: Float[Tensor, "out rank"]
    compiled: bool


class ProductLayer(AdaptedLayer):
    """A layer that multiplies by one dense weight: the hot path of training and decoding."""

    in_features: int
    out_features: int
    family: GainFamily | None = None
    """The layers of this shape in the model, with which the gain is computed in one go."""

    def matrix_shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    def forward(self, input: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch out"]:
        """y = g (W x + s B A x) + b; W x + b alone while merged."""
        self.refuse_what_would_not_train()
        if not self.merged and is_traced():
            return self._traced_forward(input)
        x, weight, bias = input, self.as_matrix(self.weight), self.bias
        if dtype := functional.autocast_dtype(x.device):
            x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(weight.dtype)
        if self.merged:
            return F.linear(x, weight, bias)
        a, b = self.factors() or (None, None)
        # Dropout before the question of a graph: reentrant checkpointing runs its first pass in training mode
        # without one, and must draw there what the recomputation draws again.
        probability = self.adapter.dropout if self.training and a is not None else 0.0
        if probability and self.adapter.dropout_mode == "whole_change" and self.magnitude is not None:
            assert a is not None
            assert b is not None
            dropped_x = F.dropout(x, probability)
            low_rank = F.linear(F.linear(dropped_x, a.to(x.dtype)), b.to(x.dtype)) * self.adapter.scale
            frozen = F.linear(dropped_x, weight)
            return functional.changed_output(F.linear(x, weight, bias), frozen, low_rank, self.gain())
        dropped = SHARED_DROPOUT.draw(input, probability, id(self)) if probability else None
        numbers = x.numel() // max(x.shape[-1], 1) * len(weight)
        if torch.is_grad_enabled() and numbers >= cpu_step.SMALLEST_OUTPUT:
            output = self._compiled_pass(x, weight, bias, dropped)
            if output is not None:
                return output
        gain = None if self.magnitude is None else self._current_gain(x.dtype)
        if not probability and not torch.is_grad_enabled():
            return self._infer(x, weight, bias, gain)
        magnitude = self.magnitude if self.adapter.detach_norm else self.magnitude_over_live_norm()
        product = functional.AdaptedProduct.apply(x, weight, bias, a, b, magnitude, gain, self.adapter.scale, dropped)
        return cast(Tensor, product)

    def _traced_forward(self, input: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch out"]:
        """`forward` for `torch.compile`: plain operations, without Python state, so that no graph breaks."""
        factors, weight, bias = self.factors(), self.as_matrix(self.weight), self.bias
        dropping = self.training and factors is not None
        dropped = F.dropout(input, self.adapter.dropout) if dropping else input
        product = F.linear(input, weight)
        output = product if bias is None else product + bias.to(product.dtype)
        low_rank = None
        if factors is not None:
            a, b = (factor.to(product.dtype) for factor in factors)
            low_rank = self.adapter.scale * F.linear(F.linear(dropped.to(product.dtype), a), b)
        whole_change = dropping and self.adapter.dropout_mode == "whole_change"
        frozen = F.linear(dropped, weight) if whole_change else product
        return functional.changed_output(output, frozen, low_rank, self.gain())

    def _compiled_pass(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, dropped: Dropped | None
    ) -> Float[Tensor, "*batch out"] | None:
        """The output with its graph by `cpu_step.cpp`; None where that does not know the case.

        It knows float32 and bfloat16 on a CPU, whole plain parameters, a detached norm, and no rows that need care.
        """
        alike = x.dtype in cpu_step.DTYPES and x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
        if not (alike and self.adapter.detach_norm and self.is_here("cpu")):
            return None
        operations = cpu_step.compiled_operations()
        if operations is None:
            return None
        gain = self.recall("compiled gain")
        due = gain is None
        if due:
            gain = self.keep("compiled gain", [torch.empty(len(weight)) for _ in range(3)])
        elif not gain:  # unsound since the last change
            return None
        rows = x.reshape(-1, x.shape[-1])
        halves = (
            rows.is_contiguous() and takes_halves(len(rows), weight.t(), bias),
            takes_halves(len(rows), weight, None),
        )
        dropout = (1.0, None, None, None)
        if dropped is not None:
            masked = dropped.shared_copy(rows)
            dropout = (1 - dropped.probability, masked, dropped.positions, dropped.shared_taken(rows))
        parameters = (self.lora_A, self.lora_B, self.magnitude)
        frozen = self.weight_norms_squared()
        output, sound = operations.adapted_product(
            x, weight, bias, *parameters, frozen, gain, due, self.adapter.scale, *dropout, *halves
        )
        if not sound:
            gain.clear()
            return None
        return cast(Tensor, output)

    def _infer(self, x: Tensor, weight: Tensor, bias: Tensor | None, gain: Gain | None) -> Float[Tensor, "*batch out"]:
        """The forward pass without a graph; in eval the cast factors are kept, so that decoding casts nothing."""
        hidden = b = None
        rows = x.reshape(-1, x.shape[-1])
        if self.adapter.method != "magnitude":
            factors = self._cast_factors(x.dtype)
            if factors.compiled and gain is not None:
                return torch.ops.dora_vl_cpu.adapted_output(x, weight, bias, factors.a, factors.b, gain.full)
            hidden, b = F.linear(rows, factors.a), factors.b
        y = functional.changed_product_(frozen_product(rows, weight.t(), bias), hidden, b, bias, gain)
        return y.view(*x.shape[:-1], self.out_features)

    # -- gain and cast factors, kept between calls ---------------------------------------------------------------

    def _current_gain(self, dtype: torch.dtype) -> Gain:
        gain = self.recall("gain")
        if gain is None or gain.minus_one.dtype != dtype:
            layers = [self] if self.family is None else self.family.due(self)
            size = max(2, LARGEST_BATCH_BYTES // (4 * self.adapter.rank * (self.in_features + self.out_features)))
            for start in range(0, len(layers), size):
                compute_gains(layers[start : start + size], dtype)
            gain, _ = self._kept["gain"]
        return gain

    def _cast_factors(self, dtype: torch.dtype) -> CastFactors:
        """A and s B in the activations' dtype; kept between calls in eval only."""
        # They are dropped with the gain, where there is one, so that nothing is asked twice.
        last = self.recall("factors") if self.magnitude is None else self._kept.get("factors", (None,))[0]
        if last is not None and last.a.dtype == dtype:
            return last
        factors = self.factors()
        assert factors is not None
        a, b = factors[0].detach().to(dtype), factors[1].detach().to(dtype) * self.adapter.scale
        large = dtype in cpu_step.DTYPES and self.weight.numel() >= cpu_step.SMALLEST_WEIGHT
        compiled = not self.training and large and self.is_here("cpu") and cpu_step.compiled_operations() is not None
        cast_factors = CastFactors(a, b, compiled)
        return cast_factors if self.training else self.keep("factors", cast_factors)

    def is_here(self, device_type: str | None = None) -> bool:
        """Whether weight, A, B and magnitude are on one device (of this type), and nothing shards them."""
        tensors, device = (self.weight, self.lora_A, self.lora_B, self.magnitude), self.weight.device
        return device_type in (None, device.type) and all(
            is_plain_parameter(tensor) and tensor.device == device and SHARD_MARKS.isdisjoint(vars(tensor))
            for tensor in tensors
        )


class DoRALinear(ProductLayer, nn.Linear):
    """An adapted `nn.Linear`."""

    def __init__(self, base: nn.Linear, config: DoRAConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.start_adapter(base, config)


class TransposedLinear(ProductLayer):
    """An adapted linear layer that keeps its weight as [in, out]: transformers' `Conv1D` (GPT-2)."""

    def __init__(self, base: nn.Module, config: DoRAConfig) -> None:
        super().__init__()
        self.weight, self.bias = cast(nn.Parameter, base.weight), cast("nn.Parameter | None", base.bias)
        self.in_features, self.out_features = self.weight.shape
        self.start_adapter(base, config)

    def as_matrix(self, weight: Tensor) -> Float[Tensor, "out in_"]:
        """[out, in]."""
        return weight.t()

    def from_matrix(self, matrix: Float[Tensor, "out in_"]) -> Tensor:
        """[in, out]."""
        return matrix.t()


class GainFamily:
    """Layers of one shape and rank, whose gains are computed in one go by the first that finds its own out of date.

    A gain is due once an optimizer step, for every layer at once. One layer takes some twenty operations on small
    tensors, and a model has hundreds of layers: dispatched one by one that is a twentieth of a training step of a
    135M-parameter model on CPU. Members are held weakly; a copy, by `copy.deepcopy` or pickle, is a family without
    members, which the copied layers join when they compute their first gain.
    """

    def __init__(self) -> None:
        self._members: weakref.WeakValueDictionary[int, ProductLayer] = weakref.WeakValueDictionary()

    def __reduce__(self) -> tuple[type[GainFamily], tuple[()]]:
        return GainFamily, ()

    def join(self, layer: ProductLayer) -> None:
        """Makes a layer a member."""
        self._members[id(layer)] = layer

    def due(self, caller: ProductLayer) -> list[ProductLayer]:
        """`caller` and all other layers of its shape whose gains are out of date.

        Layers whose tensors are not here in whole and at rest are left out: the next shards of ZeRO-3 and FSDP may be
        on their way, and offloaded weights are elsewhere.
        """
        self._members[id(caller)] = caller
        if not caller.is_here():
            return [caller]
        settings = caller.weight.device, caller.weight.dtype, caller.adapter.rank, caller.adapter.scale
        return [caller] + [
            layer
            for layer in self._members.values()
            if (layer.weight.device, layer.weight.dtype, layer.adapter.rank, layer.adapter.scale) == settings
            and not (layer is caller or layer.merged or layer.recall("gain"))
            and layer.is_here()
        ]


@torch.no_grad()
def compute_gains(layers: Sequence[ProductLayer], dtype: torch.dtype) -> None:
    """Computes and keeps the gains of layers of one shape and rank: the bits that each would compute alone."""
    magnitudes = torch.stack([layer.magnitude.detach() for layer in layers if layer.magnitude is not None])
    frozen = torch.stack([layer.weight_norms_squared() for layer in layers])
    biases = None
    if any(layer.bias is not None for layer in layers):
        biases = torch.zeros_like(magnitudes)
        for row, layer in zip(biases, layers, strict=True):
            if layer.bias is not None:
                row.copy_(layer.bias.detach())
    squared = layers[0].norms_squared()[None] if len(layers) == 1 else norms_squared_of(layers, frozen)
    quick = quick_gains(magnitudes, frozen, squared, biases, dtype)
    for layer, gain, magnitude, layer_squared in zip(layers, quick, magnitudes, squared, strict=True):
        if gain is None:
            norms = layer.trusted_norms(layer_squared)
            gain = careful_gain(functional.gain(magnitude, norms), norms, layer.bias, dtype)
        layer._kept.pop("factors", None)
        layer.keep("gain", gain)


def norms_squared_of(
    layers: Sequence[ProductLayer], frozen: Float[Tensor, "layers out"]
) -> Float[Tensor, "layers out"]:
    """The squared norms of several layers of one shape: those that each would compute alone, on CPU to the bit.

    B A A^T is one product for all, at rank 128 four times as fast as one for each. W A^T and A A^T are taken layer by
    layer: W would have to be copied, and how the cores divide the sums of A A^T depends on the number of layers.
    """
    weights = [layer.as_matrix(layer.weight) for layer in layers]
    (rows, columns), rank, count = weights[0].shape, layers[0].adapter.rank, len(layers)
    a, b = weights[0].new_empty(count, rank, columns), weights[0].new_empty(count, rows, rank)
    dtype = torch.promote_types(b.dtype, NORM_RANGE)
    weight_on_A, gram = torch.empty_like(b), a.new_empty(count, rank, rank, dtype=dtype)
    with functional.without_autocast(b.device):
        for number, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
            # Stacked and cast in one copy; at rank 128 a stack first and a cast after it took a tenth longer.
            for stack, factor in zip((a, b), layer.factors() or (), strict=True):
                stack[number].copy_(factor)
            torch.mm(weight, a[number].t(), out=weight_on_A[number])
            wide = a[number].to(dtype)
            torch.mm(wide, wide.t(), out=gram[number])
        kernels = triton_kernels(b)
        squared = functional.with_growth if kernels is None else kernels.norms_squared
        return squared(frozen, b.to(dtype), weight_on_A.to(dtype), gram, layers[0].adapter.scale)
