"""Adapted linear layers whose weight is packed (quantised), or of a class unknown here.

The norm needs W only as W A^T and ||W||^2. A quantised layer's come from W as its class dequantises it, which is let go
again: its forward pass may round its input, pack its weight for inference or cast its bias. A layer of an unknown class
is only called: on A's rows, and once on the identity's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from dora_vl.core import functional
from dora_vl.core.config import DoRAConfig
from dora_vl.core.gain import norms_with_grad
from dora_vl.core.layer import is_traced
from dora_vl.core.linear import LinearLayer
from dora_vl.errors import UserError
from dora_vl.shapes import Float

IDENTITY_ROWS = 256
"""This many columns of W are read at a time."""


@dataclass(frozen=True)
class QuantisedKind:
    """Says what must be known of a class of opaque linear layer."""

    dtype: Callable[[Any], torch.dtype]
    """Returns the dtype of W."""
    weight: Callable[[Any], Float[Tensor, "out in_"]] | None = None
    """Returns W as the class itself dequantises it; None if the layer can only be called."""
    settle: Callable[[str, Any], None] = lambda name, layer: None
    """Takes a layer with its full name; makes W and the gradient through it the same in training and in evaluation."""
    loose_tensors: Callable[[Any], Iterator[Tensor]] = lambda layer: iter(())
    """Yields the tensors that W is made of and that are neither parameters nor buffers."""


def _four_bit_state(layer: Any) -> Any:
    return vars(layer.weight).get("quant_state") or layer.quant_state


def _four_bit_dtype(layer: Any) -> torch.dtype:
    state = _four_bit_state(layer)  # a copy of the layer without values has none
    return state.dtype if state is not None else layer.compute_dtype or torch.float32


def _four_bit_weight(layer: Any) -> Tensor:
    if torch.compiler.is_compiling():  # its tensors cannot be traced
        return cast(Tensor, torch.compiler.disable(_four_bit_weight)(layer))
    return import_module("bitsandbytes.functional").dequantize_4bit(layer.weight.data, _four_bit_state(layer))


def _keep_packing(name: str, layer: Any) -> None:
    """Stops bitsandbytes (0.50) from packing a 4-bit weight anew at the first pass in eval mode.

    On a CPU with AVX512-BF16 it does so for speed, in place: no gradient passes such a weight, its scales are rounded
    to bfloat16 for good, so that training, asking and merging would each see other values, and it ends where the
    outputs are not a multiple of 32.
    """
    if getattr(_four_bit_state(layer), "packing_format_for_cpu", False):
        raise UserError(
            f"{name}: bitsandbytes has packed its 4-bit weight for inference, at a pass in eval mode, so that no "
            "gradient comes through; load the base again and adapt it before its first pass"
        )
    layer.support_avx512bf16_for_cpu = False


def _int8_weight(layer: Any) -> Tensor:
    holder = layer.weight if layer.state.CB is None else layer.state
    return holder.CB * (holder.SCB.float() / 127).unsqueeze(1)


def _hold_own_codes(name: str, layer: Any) -> None:
    """Moves the codes off the weight; else the first of two copies that share it takes them along at its first pass."""
    if vars(layer.weight).get("CB") is not None:  # a copy's weight has none
        layer.init_8bit_state()


FOUR_BITS = QuantisedKind(_four_bit_dtype, _four_bit_weight, _keep_packing)
QUANTISED_KINDS: Mapping[str, QuantisedKind] = {
    "bitsandbytes.nn.modules.Linear4bit": FOUR_BITS,
    "bitsandbytes.nn.modules.LinearNF4": FOUR_BITS,
    "bitsandbytes.nn.modules.LinearFP4": FOUR_BITS,
    "bitsandbytes.nn.modules.Linear8bitLt": QuantisedKind(
        lambda layer: torch.float32,
        _int8_weight,
        _hold_own_codes,
        lambda layer: (tensor for tensor in (layer.state.CB, layer.state.SCB) if tensor is not None),
    ),
}
TENSOR_SUBCLASS = QuantisedKind(lambda layer: layer.weight.dtype)
"""Describes an `nn.Linear` whose weight is a tensor subclass (torchao)."""
UNKNOWN_LINEAR = QuantisedKind(lambda layer: torch.float32)
"""Describes a class that the user named."""


def class_path(module: nn.Module) -> str:
    """Returns a module's class as the tables write it."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_quantised(module: nn.Module) -> bool:
    """Tells whether a module is a quantised linear layer of a class known here."""
    return class_path(module) in QUANTISED_KINDS


def quantised_in(model: nn.Module) -> Iterator[tuple[str, Any, QuantisedKind]]:
    """Yields a model's quantised linear layers, by full name, with what is known of their class."""
    for name, module in model.named_modules():
        if is_quantised(module):
            yield name, module, QUANTISED_KINDS[class_path(module)]


def settle_quantised(model: nn.Module) -> None:
    """Makes all quantised layers, adapted or not, keep W and the gradient through it the same in training and eval."""
    for name, layer, kind in quantised_in(model):
        kind.settle(name, layer)


def dequantised(layer: nn.Module) -> Float[Tensor, "out in_"]:
    """Returns the weight that a quantised layer multiplies by."""
    weight = QUANTISED_KINDS[class_path(layer)].weight
    assert weight is not None
    return weight(layer)


def loose_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Lists tensors of quantised layers that are neither parameters nor buffers, which a copy of a model needs."""
    for _, layer, kind in quantised_in(model):
        yield from kind.loose_tensors(layer)


@torch.no_grad()
def columns_by_product(
    product: Callable[[Tensor], Tensor], in_features: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[int, Float[Tensor, "columns out"]]]:
    """Yields the columns of a weight of which only W x is known, in blocks, each with the index of its first."""
    for start in range(0, in_features, IDENTITY_ROWS):
        count = min(IDENTITY_ROWS, in_features - start)
        rows = torch.zeros(count, in_features, dtype=dtype, device=device)
        rows[torch.arange(count), start + torch.arange(count)] = 1
        yield start, product(rows)


class ProductOfPacked(torch.autograd.Function):
    """Rows times a weight that is dequantised in each direction and kept in neither."""

    @staticmethod
    def forward(ctx: Any, rows: Float[Tensor, "rows in_"], weight: Callable[[], Tensor]) -> Float[Tensor, "rows out"]:
        """Multiplies by the dense W that `weight` computes."""
        ctx.weight, ctx.dtype, dense = weight, rows.dtype, weight()
        return rows.to(dense.dtype) @ dense.t()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        """Returns the rows' gradient; W is frozen."""
        return (grad_outputs[0] @ ctx.weight()).to(ctx.dtype), None


class QuantisedLinear(LinearLayer):
    """An adapter around a linear layer whose weight is packed; the layer stays whole, as the child `base`."""

    weight_is_readable: ClassVar[bool] = False

    def __init__(self, base: nn.Module, config: DoRAConfig, kind: QuantisedKind = UNKNOWN_LINEAR) -> None:
        super().__init__()
        self.base, self.kind = base, kind
        self.in_features, self.out_features = cast(int, base.in_features), cast(int, base.out_features)
        self.start_adapter(base, config)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Returns the frozen weight for its place and version; its values are not read."""
        return next(self.base.parameters())

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Returns the layer's own bias."""
        return cast("Tensor | None", self.base.bias)

    def compute_dtype(self) -> torch.dtype:
        """Returns the dtype of W."""
        return self.kind.dtype(self.base)

    def forward(self, input: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch out"]:
        """Computes y = g (base(x) - b + s B A x) + b."""
        self.refuse_what_would_not_train()
        bias = self.bias
        if bias is not None and self.kind.weight is not None:  # a trained one is float32, the product as the input
            bias = bias.to(input.dtype)
        return self.adapted(input, self.base, bias)

    def frozen_tensors(self) -> list[Tensor | None]:
        """Lists all of the layer's tensors but its bias, which may train; which of them hold W is not known.

        A loose one made in inference mode has no version; nothing but inference mode can edit it in place, and that is
        not seen.
        """
        tensors = *self.base.parameters(), *self.base.buffers(), *self.kind.loose_tensors(self.base)
        bias = self.bias
        return [tensor for tensor in tensors if tensor is not bias]

    def tensors(self) -> list[Tensor | None]:
        """Lists the adapter's own tensors, and those of the layer inside."""
        adapter = [getattr(self, name) for name in self.FILE_LEAVES]
        return [*adapter, self.bias, *self._shards.values(), *self.frozen_tensors()]

    # -- the norm ----------------------------------------------------------------------------------------------

    def compute_norms(self) -> Float[Tensor, " out"]:
        """Computes n without a gradient; for a layer that can only be called, by its product."""
        return norms_with_grad(self) if self.kind.weight is None else super().compute_norms()

    def frozen_product(self, rows: Float[Tensor, "rows in_"]) -> Float[Tensor, "out rows"]:
        """Computes W A^T of rows A, without the bias; W is dequantised anew for the backward pass."""
        if self.kind.weight is None:
            return self._without_bias(self.base(rows.to(self.compute_dtype()))).t()
        if is_traced():
            return super().frozen_product(rows)
        return cast(Tensor, ProductOfPacked.apply(rows, self.frozen_matrix)).t()

    def frozen_matrix(self) -> Float[Tensor, "out in_"]:
        """Computes W."""
        if self.weight.device.type == "meta":
            return torch.empty(self.matrix_shape(), dtype=self.compute_dtype(), device="meta")
        if self.kind.weight is not None:
            return self.kind.weight(self.base)
        return torch.cat([columns for _, columns in self._columns()]).t()

    @torch.no_grad()
    def frozen_norms_squared(self) -> Float[Tensor, " out"]:
        """Computes ||W_i||^2 of every row; for a layer that is only called, from its columns, a block at a time."""
        if self.kind.weight is not None or self.weight.device.type == "meta":
            return super().frozen_norms_squared()
        dtype = functional.accumulation_dtype(self.compute_dtype())
        total = torch.zeros(self.out_features, dtype=dtype, device=self.weight.device)
        for _, columns in self._columns():
            total += columns.to(dtype).square().sum(dim=0)
        return total

    def _columns(self) -> Iterator[tuple[int, Float[Tensor, "columns out"]]]:
        dtype, device = self.compute_dtype(), self.weight.device
        return columns_by_product(lambda rows: self._without_bias(self.base(rows)), self.in_features, dtype, device)

    def _without_bias(self, output: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch out"]:
        return output if self.bias is None else output - self.bias.to(output.dtype)

    # -- not possible here -------------------------------------------------------------------------------------

    def refuse_merging(self, name: str) -> None:
        """Raises a `UserError` that names the layer."""
        what = f"a {type(self.base).__name__} cannot hold merged weights"
        raise UserError(f"{name}: {what}; load the base without quantisation and merge there")

    def original_layer(self) -> nn.Module:
        """Returns the original layer."""
        return self.base.train(self.training)
