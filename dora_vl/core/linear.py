"""An `nn.Linear` that carries its own adapter: same `weight` and `bias`, plus A, B and the magnitude."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from dora_vl.core import functional
from dora_vl.core.config import DoRAConfig
from dora_vl.core.fast.change import GainFamily
from dora_vl.core.fast.cpu_step import compiled_linear, compiled_pass, output_is_compiled
from dora_vl.core.fast.dropout import SharedDropout
from dora_vl.core.fast.products import ROW_HALVES
from dora_vl.core.gain import Gain, Snapshot, careful_gain, quick_gains
from dora_vl.core.layer import AdaptedLayer

SHARED_DROPOUT = SharedDropout()


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

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A and B, with their gradients; None for a magnitude alone."""
        return None if self.lora_A is None or self.lora_B is None else (self.lora_A, self.lora_B)

    # -- forward ---------------------------------------------------------------------------------------------

    def forward(self, input: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch out"]:
        """y = g (W x + s B A x) + b; W x + b alone while merged."""
        if self.merged:
            self.refuse_training_while_merged()
            return F.linear(*self._in_compute_dtype(input))
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return compiled_linear(self, input)
        x, weight, bias = self._in_compute_dtype(input)
        factors = self.factors()
        # Dropout before the question of a graph: reentrant checkpointing runs its first pass in training mode
        # without one, and must draw there what the recomputation draws again.
        probability = self.adapter.dropout if self.training and factors is not None else 0.0
        if probability and self.adapter.dropout_mode == "whole_change" and self.magnitude is not None:
            return self._whole_change(x, weight, bias, probability)
        dropped = SHARED_DROPOUT.draw(input, probability, id(self)) if probability else None
        if torch.is_grad_enabled():
            output = compiled_pass(self, x, weight, bias, dropped)
            if output is not None:
                return output
        gain = None if self.magnitude is None else self._current_gain(x.dtype)
        if not probability and not torch.is_grad_enabled():
            return self._infer(x, weight, bias, gain)
        magnitude = self.magnitude if self.adapter.detach_norm else self.magnitude_over_live_norm()
        a, b = factors or (None, None)
        product = functional.AdaptedProduct.apply(x, weight, bias, a, b, magnitude, gain, self.scale(), dropped)
        return cast(Tensor, product)

    def _in_compute_dtype(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        weight, bias = self.as_matrix(self.weight), self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        return x, weight, None if bias is None else bias.to(weight.dtype)

    def _infer(self, x: Tensor, weight: Tensor, bias: Tensor | None, gain: Gain | None) -> Float[Tensor, "*batch out"]:
        """The forward pass without a graph; in eval the cast factors are kept, so that decoding casts nothing."""
        hidden = b = None
        if self.adapter.method != "magnitude":
            factors = self._cast_factors(x.dtype)
            if factors.compiled and gain is not None:
                return torch.ops.dora_vl_cpu.adapted_output(x, weight, bias, factors.a, factors.b, gain.full)
            b = factors.b
            hidden = F.linear(x.reshape(-1, x.shape[-1]), factors.a)
        rows = x.reshape(-1, x.shape[-1])
        y = functional.changed_product_(ROW_HALVES.product(rows, weight.t(), bias), hidden, b, bias, gain)
        return y.view(*x.shape[:-1], self.out_features)

    def _whole_change(self, x: Tensor, weight: Tensor, bias: Tensor | None, probability: float) -> Tensor:
        factors, gain = self.factors(), self.gain()
        assert factors is not None
        assert gain is not None
        dropped_x = F.dropout(x, probability)
        low_rank = F.linear(F.linear(dropped_x, factors[0].to(x.dtype)), factors[1].to(x.dtype)) * self.scale()
        return functional.changed_output(F.linear(x, weight, bias), F.linear(dropped_x, weight), low_rank, gain)

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
        own = self.factors()
        assert own is not None
        cast_factors = own[0].detach().to(dtype), own[1].detach().to(dtype) * self.scale()
        compiled = not self.training and output_is_compiled(self, dtype)
        factors = CastFactors(*cast_factors, dtype, self.snapshot(), compiled)
        self._factors = None if self.training else factors
        return factors


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
