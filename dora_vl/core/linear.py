"""An `nn.Linear` that carries its own adapter: same `weight` and `bias`, plus A, B and the magnitude."""

from __future__ import annotations

import weakref
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from dora_vl.core import functional
from dora_vl.core.config import DoRAConfig
from dora_vl.core.fast import cpu_step
from dora_vl.core.fast.dropout import SHARED_DROPOUT, Dropped
from dora_vl.core.fast.products import ROW_HALVES, triton_kernels
from dora_vl.core.gain import Gain, Snapshot, careful_gain, is_whole_parameter, quick_gains
from dora_vl.core.layer import AdaptedLayer, is_traced

LARGEST_BATCH_BYTES = 2**26
"""Of one batch's factors in float32; a family of wide layers is taken in several."""


class CastFactors(NamedTuple):
    """A and s B in the activations' dtype, what they came from, and whether the compiled operation takes them."""

    a: Float[Tensor, "rank in_"]
    b: Float[Tensor, "out rank"]
    dtype: torch.dtype
    snapshot: Snapshot
    compiled: bool


class ProductLayer(AdaptedLayer):
    """A layer that multiplies by one dense weight: the hot path of training and decoding, hence its own caches."""

    in_features: int
    out_features: int
    family: GainFamily | None = None
    """The layers of this shape in the model, with which the gain is computed in one go."""

    def matrix_shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    def forget_norms(self, *, frozen: bool = False) -> None:
        """Drops what was computed from A, B and the magnitude, and with `frozen` from the frozen weight too."""
        super().forget_norms(frozen=frozen)
        self._gain: tuple[Gain, torch.dtype, Snapshot] | None = None
        self._factors: CastFactors | None = None
        self.compiled_gain: tuple[list[Tensor] | None, Snapshot] | None = None

    def forward(self, input: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch out"]:
        """y = g (W x + s B A x) + b; W x + b alone while merged."""
        if not self.merged and is_traced():
            return self._traced_forward(input)
        x, weight, bias = input, self.as_matrix(self.weight), self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(weight.dtype)
        if self.merged:
            self.refuse_training_while_merged()
            return F.linear(x, weight, bias)
        a, b = self.factors() or (None, None)
        # Dropout before the question of a graph: reentrant checkpointing runs its first pass in training mode
        # without one, and must draw there what the recomputation draws again.
        probability = self.adapter.dropout if self.training and a is not None else 0.0
        if probability and self.adapter.dropout_mode == "whole_change" and self.magnitude is not None:
            assert a is not None
            assert b is not None
            dropped_x = F.dropout(x, probability)
            low_rank = F.linear(F.linear(dropped_x, a.to(x.dtype)), b.to(x.dtype)) * self.scale()
            frozen = F.linear(dropped_x, weight)
            return functional.changed_output(F.linear(x, weight, bias), frozen, low_rank, self.gain())
        dropped = SHARED_DROPOUT.draw(input, probability, id(self)) if probability else None
        if torch.is_grad_enabled():
            output = self._compiled_pass(x, weight, bias, dropped)
            if output is not None:
                return output
        gain = None if self.magnitude is None else self._current_gain(x.dtype)
        if not probability and not torch.is_grad_enabled():
            return self._infer(x, weight, bias, gain)
        magnitude = self.magnitude if self.adapter.detach_norm else self.magnitude_over_live_norm()
        product = functional.AdaptedProduct.apply(x, weight, bias, a, b, magnitude, gain, self.scale(), dropped)
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
            low_rank = self.scale() * F.linear(F.linear(dropped.to(product.dtype), a), b)
        whole_change = dropping and self.adapter.dropout_mode == "whole_change"
        frozen = F.linear(dropped, weight) if whole_change else product
        return functional.changed_output(output, frozen, low_rank, self.gain())

    def _compiled_pass(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, dropped: Dropped | None
    ) -> Float[Tensor, "*batch out"] | None:
        """The output with its graph by `cpu_step.cpp`; None where that does not know the case.

        It knows float32 and bfloat16 on a CPU, whole plain parameters, a detached norm, and no rows that need care.
        """
        large = x.numel() // max(x.shape[-1], 1) * len(weight) >= cpu_step.SMALLEST_OUTPUT
        alike = x.dtype in cpu_step.DTYPES and x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
        if not (large and alike and self.adapter.detach_norm and self._is_on_cpu()):
            return None
        operations = cpu_step.compiled_operations()
        if operations is None:
            return None
        kept = self.compiled_gain
        due = kept is None or not self.still_holds(kept[1])
        if due or kept is None:
            kept = self.compiled_gain = [torch.empty(len(weight)) for _ in range(3)], self.snapshot()
        gain, snapshot = kept
        if gain is None:  # unsound since the last change
            return None
        rows = x.reshape(-1, x.shape[-1])
        halves = (
            rows.is_contiguous() and ROW_HALVES.halves(len(rows), weight.t(), bias),
            ROW_HALVES.halves(len(rows), weight, None),
        )
        dropout = (1.0, None, None, None)
        if dropped is not None:
            masked = dropped.shared_copy(rows)
            dropout = (1 - dropped.probability, masked, dropped.positions, dropped.shared_taken(rows))
        parameters = (self.lora_A, self.lora_B, self.magnitude)
        frozen = self.weight_norms_squared()
        output, sound = operations.adapted_product(
            x, weight, bias, *parameters, frozen, gain, due, self.scale(), *dropout, *halves
        )
        if not sound:
            self.compiled_gain = None, snapshot
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
        y = functional.changed_product_(ROW_HALVES.product(rows, weight.t(), bias), hidden, b, bias, gain)
        return y.view(*x.shape[:-1], self.out_features)

    # -- gain and cast factors, kept between calls ---------------------------------------------------------------

    def _current_gain(self, dtype: torch.dtype) -> Gain:
        if self._gain is None or self._gain[1] != dtype or not self.still_holds(self._gain[2]):
            with torch.no_grad():
                if self.family is None or not self.family.refresh(self, dtype):
                    self.keep_gain(self._own_gain(dtype), dtype)
        assert self._gain is not None
        return self._gain[0]

    def gain_is_out_of_date(self) -> bool:
        """Whether the gain must be computed before the next forward pass, for whatever dtype."""
        return self._gain is None or not self.still_holds(self._gain[2])

    def keep_gain(self, gain: Gain, dtype: torch.dtype) -> None:
        """Keeps a gain that was computed from the present parameters."""
        self._gain, self._factors = (gain, dtype, self.snapshot()), None

    def careful_gain(self, norms_squared: Float[Tensor, " out"], dtype: torch.dtype) -> Gain:
        """The gain where some row of the direction cancels, is zero or has a gain near 0."""
        assert self.magnitude is not None
        norms = self.trusted_norms(norms_squared)
        return careful_gain(functional.gain(self.magnitude.detach(), norms), norms, self.bias, dtype)

    def _own_gain(self, dtype: torch.dtype) -> Gain:
        assert self.magnitude is not None
        squared = self.norms_squared()
        bias = None if self.bias is None else self.bias.detach()[None]
        magnitude, frozen = self.magnitude.detach()[None], self.weight_norms_squared()[None]
        (quick,) = quick_gains(magnitude, frozen, squared[None], bias, dtype)
        return quick or self.careful_gain(squared, dtype)

    def _cast_factors(self, dtype: torch.dtype) -> CastFactors:
        """A and s B in the activations' dtype; kept between calls in eval only."""
        kept = self._factors  # dropped with the gain, where there is one, so that is not asked twice
        if kept is not None and kept.dtype == dtype and (self._gain is not None or self.still_holds(kept.snapshot)):
            return kept
        factors = self.factors()
        assert factors is not None
        a, b = factors[0].detach().to(dtype), factors[1].detach().to(dtype) * self.scale()
        large = dtype in cpu_step.DTYPES and self.weight.numel() >= cpu_step.SMALLEST_WEIGHT
        compiled = not self.training and large and self._is_on_cpu() and cpu_step.compiled_operations() is not None
        cast_factors = CastFactors(a, b, dtype, self.snapshot(), compiled)
        self._factors = None if self.training else cast_factors
        return cast_factors

    def is_here(self, device: torch.device) -> bool:
        """Whether weight, A, B and magnitude are there, on this device, and nothing shards them."""
        tensors = (self.weight, self.lora_A, self.lora_B, self.magnitude)
        return all(is_whole_parameter(tensor, device) for tensor in tensors)

    def _is_on_cpu(self) -> bool:
        return self.weight.device.type == "cpu" and self.is_here(self.weight.device)


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

    def refresh(self, caller: ProductLayer, dtype: torch.dtype) -> bool:
        """Updates `caller` and all other layers of its shape that are out of date; False if there are none.

        Layers whose tensors are not here in whole and at rest are left out: the next shards of ZeRO-3 and FSDP may be
        on their way, and offloaded weights are elsewhere.
        """

        def is_due(layer: ProductLayer) -> bool:
            alike = (layer.adapter.rank, layer.scale(), layer.weight.dtype) == settings
            return alike and not layer.merged and layer.gain_is_out_of_date() and layer.is_here(device)

        self._members[id(caller)] = caller
        device, settings = caller.weight.device, (caller.adapter.rank, caller.scale(), caller.weight.dtype)
        if not caller.is_here(device):
            return False
        due = [layer for layer in self._members.values() if layer is caller or is_due(layer)]
        if len(due) < 2:
            return False
        size = max(2, LARGEST_BATCH_BYTES // (4 * caller.adapter.rank * sum(caller.matrix_shape())))
        for start in range(0, len(due), size):
            layers = due[start : start + size]
            magnitudes = torch.stack([layer.magnitude.detach() for layer in layers if layer.magnitude is not None])
            frozen = torch.stack([layer.weight_norms_squared() for layer in layers])
            biases = None
            if any(layer.bias is not None for layer in layers):
                biases = torch.zeros_like(magnitudes)
                for row, layer in zip(biases, layers, strict=True):
                    if layer.bias is not None:
                        row.copy_(layer.bias.detach())
            with torch.autocast(device.type, enabled=False):
                squared = _norms_squared(layers, frozen)
            quick = quick_gains(magnitudes, frozen, squared, biases, dtype)
            for layer, gain, layer_squared in zip(layers, quick, squared, strict=True):
                layer.keep_gain(gain or layer.careful_gain(layer_squared, dtype), dtype)
        return True


def _norms_squared(layers: list[ProductLayer], frozen: Float[Tensor, "layers out"]) -> Float[Tensor, "layers out"]:
    """The squared norms of layers of one shape: those that each would compute alone, on CPU to the bit.

    B A A^T is one product for all, at rank 128 four times as fast as one for each. W A^T and A A^T are taken layer by
    layer: W would have to be copied, and how the cores divide the sums of A A^T depends on the number of layers.
    """
    weights = [layer.as_matrix(layer.weight) for layer in layers]
    (rows, columns), rank, count = layers[0].matrix_shape(), layers[0].adapter.rank, len(layers)
    a, b = (weights[0].new_empty(count, *shape) for shape in ((rank, columns), (rows, rank)))
    weight_on_A, gram = torch.empty_like(b), a.new_empty(count, rank, rank)
    for number, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        # Stacked and cast in one copy; at rank 128 a stack first and a cast after it took a tenth longer.
        for stack, factor in zip((a, b), layer.factors() or (), strict=True):
            stack[number].copy_(factor)
        torch.mm(weight, a[number].t(), out=weight_on_A[number])
        torch.mm(a[number], a[number].t(), out=gram[number])
    kernels = triton_kernels(b)
    norms_squared = functional.with_growth if kernels is None else kernels.norms_squared
    return norms_squared(frozen, b, weight_on_A, gram, layers[0].scale())
