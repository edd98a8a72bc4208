"""What a linear layer of vLLM does beside its slots of A and B: each token's output times its adapter's gains.

vLLM's classes differ (column- and row-parallel, packed, fully sharded); `DoRALayer` stands in front of each alike and
asks of them what all have. `places` has looked at that before any of it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from dora_vl.app.vllm.gains import FrozenLayer, Slice, alone, frozen_layer, gains_minus_one
from dora_vl.app.vllm.magnitudes import UnservableAdapter
from dora_vl.core.gain import apply_gain

if TYPE_CHECKING:
    Wrapper = Any
else:
    Wrapper = object


class DoRALayer(Wrapper):
    """In front of one of vLLM's LoRA wrappers of a linear layer (vllm/lora/layers/base_linear.py).

    Attributes:
        dora_minus_one: g - 1 of what stands in each slot, behind a row of zeros for tokens of the base (slot -1).
    """

    dora_minus_one: Float[Tensor, "slots_and_base out"]
    sum_of_ranks: Callable[[Tensor], Tensor] = staticmethod(alone)
    """For wrappers of row-parallel layers, whose ranks hold columns of W."""
    shards_inputs: bool = False
    """Whether they do."""

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """vLLM's slots, and the gains beside them."""
        super().create_lora_weights(max_loras, lora_config, model_config)
        shape, dtype = (max_loras + 1, self.output_size), self.base_layer.params_dtype
        self.dora_minus_one = torch.zeros(shape, dtype=dtype, device=self.device)
        self._recovered: FrozenLayer | None = None  # what took a pass over the identity; a weight is looked at anew

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """vLLM's W x + B A x + b, then each row's gains, in place.

        vLLM gives `bias` where the output has it inside: not on later ranks of a row-parallel layer, nor where the
        model adds it itself.

        A CUDA graph reads vLLM's buffer of slots anew at each replay. Behind the step's tokens the buffer is stale, and
        rows that only pad a graph would look for a slot that is none: hence the clamp.
        """
        y = super().apply(x, bias)
        flat = y.view(-1, y.shape[-1])
        slots = self.punica_wrapper._token_lora_indices[: flat.shape[0]]
        rows = slots.add(1).clamp_(0, self.dora_minus_one.shape[0] - 1)
        apply_gain(flat, bias, self.dora_minus_one.index_select(0, rows).to(flat.dtype))
        return y

    def put_dora(self, slot: int, minus_one: Float[Tensor, " out"] | None) -> None:
        """Writes a slot's row whole, so that nothing stays of the adapter before; None is one without magnitudes."""
        row = self.dora_minus_one[slot + 1]
        row.zero_() if minus_one is None else row.copy_(minus_one)

    def dora_gains(self, name: str, weights: Any) -> Float[Tensor, " out"]:
        """g - 1 of this rank's outputs, from an adapter's weights as vLLM packs them, with their `magnitude`.

        Raises:
            ValueError: they are of another layer, or nobody can say what this one's weight is.
        """
        sizes = tuple(self.output_slices) if self.n_slices > 1 else (self.output_size,)
        slices = self._slices(name, weights)
        for one, size in zip(slices, sizes, strict=True):
            if one is not None:
                _refuse_other_sizes(name, one, self.input_size, size)
        frozen = self._recovered or self._look_at_weight(name)
        if frozen.weight is None:
            self._recovered = frozen
        return gains_minus_one(frozen, slices, sizes)

    def _slices(self, name: str, weights: Any) -> list[Slice | None]:
        """What an adapter changes in each slice, as far as this rank holds it."""
        a, b, m = (
            one if isinstance(one, list) else [one] for one in (weights.lora_a, weights.lora_b, weights.magnitude)
        )
        if len(m) != self.n_slices:
            raise UnservableAdapter(f"{name} is {self.n_slices} layers in one, and the adapter has {len(m)}")
        m = [None if one is None else one.view(-1, 1) for one in m]
        if self.tp_size > 1 and self.shards_inputs:
            a = [self.slice_lora_a(a[0])]
        elif self.tp_size > 1:
            b, m = self._own_rows(b), self._own_rows(m)
        return [_slice(*parts) for parts in zip(a, b, m, strict=True)]

    def _own_rows(self, parts: Sequence[Tensor | None]) -> list[Tensor | None]:
        """This rank's outputs of a column-parallel layer, as vLLM cuts B."""
        if self.n_slices > 1:
            return self.slice_lora_b(parts)
        return [self.slice_lora_b(parts[0])]

    def _look_at_weight(self, name: str) -> FrozenLayer:
        layer = self.base_layer
        place = layer.params_dtype, self.device

        def product(rows: Tensor) -> Tensor:
            return layer.quant_method.apply(layer, rows, None)

        weight = getattr(layer, "weight", None)
        total = self.sum_of_ranks if self.tp_size > 1 else alone  # a layer may be whole on each of several ranks
        return frozen_layer(name, product, weight, self.input_size, place, total)


def _slice(lora_A: Tensor | None, lora_B: Tensor | None, magnitude: Tensor | None) -> Slice | None:
    """None for a part that has no adapter; all of vLLM's tensors of it are None then."""
    if lora_A is None or lora_B is None or magnitude is None:
        return None
    return Slice(lora_A, lora_B, magnitude.view(-1))


def _refuse_other_sizes(name: str, part: Slice, inputs: int, outputs: int) -> None:
    found = tuple(part.lora_B.shape[:1]) + tuple(part.lora_A.shape[1:])
    if found != (outputs, inputs) or part.magnitude.numel() != outputs:
        raise UnservableAdapter(
            f"{name} is {outputs} x {inputs} here, and the adapter's layer {found[0]} x {found[1]}; it was trained on "
            "another base"
        )
