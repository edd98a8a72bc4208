"""An `nn.Linear` that carries its own adapter: same `weight` and `bias`, plus A, B and the magnitude."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from dora_vl.core import functional
from dora_vl.core.config import DoRAConfig
from dora_vl.core.dropout import SharedDropout
from dora_vl.core.steps import OPTIMIZER_STEPS

SHARED_DROPOUT = SharedDropout()


class DoRALinear(nn.Linear):
    """A frozen linear layer with DoRA, LoRA or a magnitude alone (`config.method`), in the layer's own place.

    `weight` and `bias` keep their names and are the same parameters, so a base checkpoint has the same keys before
    and after, and a sharded engine gathers everything at one module. A, B and the magnitude are float32 over a
    half-precision base. The norm is computed once per optimizer step, whatever the number of micro-batches and
    checkpoint recomputations.
    """

    def __init__(self, base: nn.Linear, config: DoRAConfig) -> None:
        nn.Module.__init__(self)
        OPTIMIZER_STEPS.watch()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.adapter = config
        self.merged = False
        self.training = base.training
        self._base_weight: Tensor | None = None
        self._norms_squared: Tensor | None = None
        self._norms_squared_key: tuple[object, ...] = ()
        self._gain: functional.Gain | None = None
        self._gain_key: tuple[object, ...] = ()
        self._factors: tuple[Tensor, Tensor] | None = None
        self._create_adapter()

    def _create_adapter(self) -> None:
        dtype, device = functional.accumulation_dtype(self.weight.dtype), self.weight.device
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.magnitude: nn.Parameter | None = None
        if self.adapter.method != "magnitude":
            self.lora_A = nn.Parameter(torch.empty(self.adapter.rank, self.in_features, dtype=dtype, device=device))
            self.lora_B = nn.Parameter(torch.zeros(self.out_features, self.adapter.rank, dtype=dtype, device=device))
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if self.adapter.method != "lora":
            self.magnitude = nn.Parameter(functional.root(self.weight_norms_squared()).clone())

    # -- forward ---------------------------------------------------------------------------------------------

    def forward(self, input: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch out"]:
        """y = g (W x + s B A x) + b; W x + b alone while merged."""
        if self.merged:
            return self._merged_forward(input)
        x, weight, bias = self._in_compute_dtype(input)
        gain = self._current_gain(x.dtype) if self.magnitude is not None else None
        # Dropout before the question of a graph: reentrant checkpointing runs its first pass in training mode
        # without one, and must draw there what the recomputation draws again.
        probability = self.adapter.dropout if self.training and self.lora_A is not None else 0.0
        if probability and self.adapter.dropout_mode == "whole_change" and gain is not None:
            return self._whole_change(x, weight, bias, probability)
        if not probability and not torch.is_grad_enabled():
            return self._infer(x, weight, bias, gain)
        dropped = SHARED_DROPOUT.draw(input, probability, id(self)) if probability else None
        magnitude = self.magnitude if self.adapter.detach_norm else self._magnitude_over_live_norm()
        return cast(
            Tensor,
            functional.AdaptedProduct.apply(
                x, weight, bias, self.lora_A, self.lora_B, magnitude, gain, self.adapter.scale, dropped
            ),
        )

    def _merged_forward(self, input: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            raise RuntimeError("the adapter is merged into the weight and would not train; unmerge_dora(model) first")
        return F.linear(input, self.weight, self.bias)

    def _in_compute_dtype(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        return x, weight, None if bias is None else bias.to(weight.dtype)

    def _infer(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, gain: functional.Gain | None
    ) -> Float[Tensor, "*batch out"]:
        """The forward pass without a graph; in eval the cast factors are kept, so that decoding casts nothing."""
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, weight, bias)
        if self.lora_A is not None:
            a, b_transposed = self._cast_factors(x.dtype)
            y.addmm_(F.linear(rows, a), b_transposed)
        if gain is not None:
            y = functional.apply_gain(y, bias, gain)
        return y.view(*x.shape[:-1], self.out_features)

    def _whole_change(self, x: Tensor, weight: Tensor, bias: Tensor | None, probability: float) -> Tensor:
        assert self.lora_A is not None
        assert self.lora_B is not None
        assert self.magnitude is not None
        dropped_x = F.dropout(x, probability)
        low_rank = F.linear(F.linear(dropped_x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) * self.adapter.scale
        norms = self._norms() if self.adapter.detach_norm else self._live_norms()
        gain = functional.gain(self.magnitude, norms)
        return functional.whole_change_product(x, weight, bias, low_rank, gain, dropped_x)

    # -- norm and gain ---------------------------------------------------------------------------------------

    def weight_norms_squared(self) -> Float[Tensor, " out"]:
        """||W_i||^2 in float32; computed once, since W is frozen, and again after an edit in place."""
        weight = self._frozen_weight()
        key = (weight.device, weight._version)
        if self._norms_squared is None or self._norms_squared_key != key:
            self._norms_squared, self._norms_squared_key = functional.row_norms_squared(weight), key
        return self._norms_squared

    def forget_norms(self) -> None:
        """Drops what was computed from the parameters; call it after changing them where no optimizer steps."""
        self._gain, self._factors = None, None

    def _frozen_weight(self) -> Tensor:
        return self.weight if self._base_weight is None else self._base_weight

    def _live_norms(self) -> Float[Tensor, " out"]:
        """n with its gradient in A and B; the rows that cancel are taken from the dense direction."""
        if self.lora_A is None or self.lora_B is None:
            return functional.root(self.weight_norms_squared())
        weight, scale = self._frozen_weight(), self.adapter.scale
        with torch.autocast(self.weight.device.type, enabled=False):
            weight_on_A = F.linear(self.lora_A.to(weight.dtype), weight)
            norms, cancelled = functional.direction_norms(
                self.weight_norms_squared(), self.lora_A, self.lora_B, weight_on_A, scale
            )
            if cancelled.numel():
                dense = functional.dense_direction(weight[cancelled], self.lora_A, self.lora_B[cancelled], scale)
                norms = norms.index_copy(0, cancelled, functional.root(dense.square().sum(dim=1)))
        return norms

    @torch.no_grad()
    def _norms(self) -> Float[Tensor, " out"]:
        return self._live_norms()

    def _magnitude_over_live_norm(self) -> Float[Tensor, " out"] | None:
        """m n / n_live: m's value, with the gradient through the norm that `detach_norm` leaves out."""
        if self.magnitude is None:
            return None
        live = self._live_norms()
        return self.magnitude * torch.where(live > 0, live.detach() / torch.where(live > 0, live, 1.0), 1.0)

    def _current_gain(self, dtype: torch.dtype) -> functional.Gain:
        key = self._state_key(dtype)
        if self._gain is None or self._gain_key != key:
            assert self.magnitude is not None
            with torch.no_grad():
                self._gain = functional.make_gain(self.magnitude, self._norms(), dtype)
            self._gain_key, self._factors = key, None
        return self._gain

    def _state_key(self, dtype: torch.dtype) -> tuple[object, ...]:
        """Changes with every optimizer step, in-place edit or new scale; dtype is the activations'."""
        versions = [0 if p is None else p._version for p in (self.lora_A, self.lora_B, self.magnitude)]
        return (OPTIMIZER_STEPS.count, dtype, self.adapter, self.weight._version, *versions)

    def _cast_factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and s B^T in the activations' dtype; kept between calls in eval only."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        key = self._state_key(dtype)
        if self._factors is None or self.training or self._gain_key != key:
            a = self.lora_A.detach().to(dtype)
            self._factors = (a, (self.lora_B.detach().to(dtype) * self.adapter.scale).t())
            self._gain_key = key
        return self._factors

    # -- merging ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, *, keep_base: bool = True) -> None:
        """Folds the adapter into `weight`, computed in float32; with `keep_base`, `unmerge` restores it bit by bit."""
        if self.merged:
            return
        merged = functional.merged_weight(self.weight, self.lora_A, self.lora_B, self.magnitude, self.adapter.scale)
        self._base_weight = self.weight.detach().clone() if keep_base else None
        self.weight.copy_(merged)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the base weight back.

        Raises:
            RuntimeError: the layer was merged with `keep_base=False`.
        """
        if not self.merged:
            return
        if self._base_weight is None:
            raise RuntimeError("the base weight was not kept when merging; load the base model again")
        self.weight.copy_(self._base_weight)
        self._base_weight, self.merged = None, False
        self.forget_norms()

    # -- what makes cached norms untrue ----------------------------------------------------------------------

    def train(self, mode: bool = True) -> DoRALinear:
        """Switches dropout and, when the mode really changes, drops the cached norm.

        Trainers call `train()` before every micro-batch; dropping it then would cost a norm each.
        """
        if mode != self.training:
            self.forget_norms()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DoRALinear:
        self.forget_norms()
        self._norms_squared = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any, **named: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)
        self.forget_norms()
        if f"{prefix}weight" in state_dict:
            self._norms_squared = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickled layer may wake in a process where no layer was built, so that nothing counts steps yet.
        super().__setstate__(state)
        OPTIMIZER_STEPS.watch()
        self.forget_norms()

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        adapter = self.adapter
        return f"{super().extra_repr()}, method={adapter.method}, rank={adapter.rank}, scale={adapter.scale:g}"
