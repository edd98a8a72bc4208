"""The reference that the core is held to: DoRA written out dense and plain, with torch's own autograd.

Nothing here is shared with `dora_vl.core`: the direction is a full matrix, the norm is torch's, dropout is a
product with a given mask.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dora_vl.core import DoRAConfig, DoRALinear, trained_parts
from dora_vl.core.layer import AdaptedLayer


def config(**changes: Any) -> DoRAConfig:
    """Settings where nothing is neutral: alpha is not the rank."""
    return DoRAConfig(**{"targets": ("*",), "rank": 2, "alpha": 6.0, "dropout": 0.0, **changes})


def dense_dora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: tuple[Tensor, Tensor] | None,
    magnitude: Tensor | None,
    *,
    scale: float,
    detach_norm: bool = True,
    kept: Tensor | None = None,
    whole_change: bool = False,
) -> Tensor:
    """y of one layer; `kept` is the dropout factor of every element of x (0 or 1/(1-p))."""
    direction = weight if factors is None else weight + scale * factors[1] @ factors[0]
    gain = torch.ones(len(weight), dtype=weight.dtype)
    if magnitude is not None:
        norm = torch.linalg.vector_norm(direction, dim=1)
        gain = magnitude / (norm.detach() if detach_norm else norm)
    dropped = x if kept is None else x * kept
    low_rank = torch.zeros(()) if factors is None else scale * (dropped @ factors[0].t()) @ factors[1].t()
    if whole_change and magnitude is not None:
        y = x @ weight.t() + (gain - 1) * (dropped @ weight.t()) + gain * low_rank
    else:
        y = gain * (x @ weight.t() + low_rank)
    return y if bias is None else y + bias


def at_strength(layer: AdaptedLayer, weight: Tensor, bias: Tensor | None, x: Tensor, strength: float) -> Tensor:
    """y of one layer at a share of its adapter, with a dense direction."""
    factors = layer.factors()
    change = torch.zeros_like(weight) if factors is None else layer.adapter.scale * factors[1] @ factors[0]
    direction = weight + strength * change
    if layer.magnitude is not None:
        before = torch.linalg.vector_norm(weight, dim=1)
        magnitude = ((1 - strength) * before + strength * layer.magnitude).clamp_min(0)
        direction = magnitude.unsqueeze(1) * direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    y = x @ direction.t()
    return y if bias is None else y + bias


def passed(
    model: nn.Module, x: Tensor, upstream: Tensor | None = None, run: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Output of a pass, and the gradients of its input and of all that trains; without `upstream` of the squares."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = (model if run is None else run)(x)
    y.backward(2 * y.detach() if upstream is None else upstream.to(y.dtype))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **({} if x.grad is None else {"x": x.grad}), **gradients}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Holds the block to leave a model's modules, tensors and what of it trains as they are."""
    modules, flags = list(model.named_modules()), [parameter.requires_grad for parameter in model.parameters()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    assert list(model.named_modules()) == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert before.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name


@torch.no_grad()
def move_layer(layer: AdaptedLayer) -> None:
    if layer.lora_B is not None:
        layer.lora_B.normal_(std=0.3)
    if layer.magnitude is not None:
        layer.magnitude.mul_(torch.linspace(0.5, 1.7, layer.magnitude.numel(), device=layer.magnitude.device))


def move(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, DoRALinear):
            move_layer(module)


@torch.no_grad()
def move_trained(model: nn.Module, seed: int = 1, amount: float = 0.3) -> None:
    draw = torch.Generator().manual_seed(seed)
    for part in trained_parts(model):
        for name, parameter in part.parameters.items():
            if name.endswith("magnitude"):
                parameter.mul_(torch.rand(parameter.shape, generator=draw) + 0.5)
            else:
                parameter.add_(amount * torch.randn(parameter.shape, generator=draw))


def moved_layer(
    settings: DoRAConfig,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    in_features: int = 6,
    out_features: int = 5,
) -> DoRALinear:
    """A layer where nothing is neutral: B is not zero, the magnitude not the norm."""
    layer = DoRALinear(nn.Linear(in_features, out_features, bias=bias, dtype=dtype), settings)
    move_layer(layer)
    layer.weight.requires_grad_(False)
    return layer


def reference_of(layer: DoRALinear, x: Tensor, *, kept: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference's output on leaf copies of everything; returns it with the copies, by name."""
    leaves = {
        name: parameter.detach().clone().requires_grad_(parameter.requires_grad)
        for name, parameter in layer.named_parameters()
    }
    leaves["x"] = x.detach().clone().requires_grad_(x.requires_grad)
    y = dense_dora(
        leaves["x"],
        leaves["weight"],
        leaves.get("bias"),
        (leaves["lora_A"], leaves["lora_B"]) if "lora_A" in leaves else None,
        leaves.get("magnitude"),
        scale=layer.adapter.alpha / layer.adapter.rank,
        detach_norm=layer.adapter.detach_norm,
        kept=kept,
        whole_change=layer.adapter.dropout_mode == "whole_change",
    )
    return y, leaves


def assert_same_gradients(
    layer: DoRALinear, x: Tensor, y: Tensor, reference: tuple[Tensor, dict[str, Tensor]], *, tolerance: float
) -> None:
    """Holds the output and every gradient of `layer` to the reference's, under one random upstream gradient."""
    expected, leaves = reference
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(7))
    y.backward(upstream)
    expected.backward(upstream)
    tensors = {**dict(layer.named_parameters()), "x": x}
    for name, leaf in leaves.items():
        torch.testing.assert_close(tensors[name].grad, leaf.grad, rtol=tolerance, atol=tolerance, msg=name)


def assert_fresh(layer: DoRALinear) -> None:
    """Holds the layer to the reference of its present parameters, with a graph and without."""
    x = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected, _ = reference_of(layer, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
