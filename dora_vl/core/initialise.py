"""How A and B start. The equation is not here: only values, each of which leaves the layer's output as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dora_vl.core import functional
from dora_vl.errors import UserError

if TYPE_CHECKING:
    from dora_vl.core.layer import AdaptedLayer


@torch.no_grad()
def initialise(layer: AdaptedLayer) -> None:
    """Fills A and B as `layer.adapter.init` says; with `pissa` A is zero until `fill_from_weights`."""
    for a, b in layer.factor_pairs():
        if a.device.type == "meta":
            return
        match layer.adapter.init:
            case "kaiming":
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            case "gaussian":
                nn.init.normal_(a, std=1 / layer.adapter.rank)
            case "orthogonal":
                start_A, start_B = orthogonal_factors(layer.matrix_shape(), layer.adapter.rank)
                a.copy_(start_A.view_as(a))
                b.copy_(start_B.view_as(b))
            case "pissa":
                nn.init.zeros_(a)


def orthogonal_factors(
    shape: tuple[int, int], rank: int
) -> tuple[Float[Tensor, "rank in_"], Float[Tensor, "out rank"]]:
    """Random A and B, neither of them zero, with B A = 0: A lives in odd rows of an orthogonal matrix, B in even."""
    out_features, in_features = shape
    # float64, so that B A is 0 to the last digits of whatever dtype the factors have.
    basis, _ = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64))
    a = basis[0::2].t() @ torch.randn(rank // 2, in_features, dtype=torch.float64) / 10
    b = torch.randn(out_features, rank // 2, dtype=torch.float64) @ basis[1::2] / 10
    return a, b


def principal_factors(
    matrix: Float[Tensor, "out in_"], rank: int, scale: float
) -> tuple[Float[Tensor, "rank in_"], Float[Tensor, "out rank"]]:
    """A and B with s B A the best approximation of `matrix` of that rank, its singular values shared evenly."""
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    root = (singular[:rank] / scale).sqrt()
    return root.unsqueeze(1) * right[:rank], left[:, :rank] * root


def take_from_weight(layer: AdaptedLayer, a: Tensor, b: Tensor) -> None:
    """Subtracts s B A from the frozen weight and remembers A and B, which the adapter folder then needs as well."""
    residual = functional.dense_direction(layer.as_matrix(layer.weight), a.flatten(1), b.flatten(1), -layer.scale())
    layer.weight.copy_(layer.from_matrix(residual).to(layer.weight.dtype))
    layer.register_buffer("start_A", a.detach().clone(), persistent=False)
    layer.register_buffer("start_B", b.detach().clone(), persistent=False)


@torch.no_grad()
def fill_from_weights(layers: Mapping[str, AdaptedLayer]) -> None:
    """Gives A and B of the `pissa` layers (by name) their start; no frozen weight changes.

    Raises:
        UserError: a rank above a weight's smaller side, or a weight that has no singular vectors.
    """
    for name, layer in layers.items():
        a, b = layer.lora_A, layer.lora_B
        if layer.adapter.init != "pissa" or a is None or b is None or a.device.type == "meta":
            continue
        if layer.adapter.rank > min(layer.matrix_shape()):
            shape = list(layer.matrix_shape())
            raise UserError(
                f"init: pissa: {name} has rank {layer.adapter.rank}, above the smaller side of its weight {shape}"
            )
        try:
            start_A, start_B = principal_factors(layer.dense_weight(), layer.adapter.rank, layer.scale())
        except torch.linalg.LinAlgError as error:
            raise UserError(
                f"init: pissa: {name}'s weight has no singular vectors ({error}); is it damaged?"
            ) from error
        a.copy_(start_A.view_as(a))
        b.copy_(start_B.view_as(b))


@torch.no_grad()
def take_starts(layers: Mapping[str, AdaptedLayer]) -> None:
    """Takes the start of each `pissa` layer out of its frozen weight; the magnitude is then the norm of both."""
    for layer in layers.values():
        a, b = layer.lora_A, layer.lora_B
        if layer.adapter.init != "pissa" or a is None or b is None or a.device.type == "meta":
            continue
        take_from_weight(layer, a, b)
        if layer.magnitude is not None:
            layer.magnitude.copy_(layer.live_norms())


@torch.no_grad()
def start_loftq(layer: AdaptedLayer, original_weight: Float[Tensor, "out in_"]) -> None:
    """Starts A and B from what quantisation lost: s B A is the best approximation of W - quantised W (LoftQ).

    One iteration, which leaves the quantised weight as it is, so the adapter folder needs nothing more. The
    magnitude becomes the norm of the corrected weight. Source: arXiv 2310.08659, algorithm 1 with T = 1.
    """
    if layer.lora_A is None or layer.lora_B is None:
        raise UserError("LoftQ starts A and B; this layer has none (method: magnitude or dvora)")
    lost = original_weight.to(torch.float32) - layer.dense_weight()
    start_A, start_B = principal_factors(lost, layer.adapter.rank, layer.scale())
    layer.lora_A.copy_(start_A.view_as(layer.lora_A))
    layer.lora_B.copy_(start_B.view_as(layer.lora_B))
    layer.forget_norms()
    if layer.magnitude is not None:
        layer.magnitude.copy_(layer.live_norms())


OriginalWeight = Callable[[str], Tensor]
"""The full-precision weight, as a matrix [out, in], of the layer with a full name."""
