"""One linear layer as a model, for `dora_step.py --layer`."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn


class SingleLayer(nn.Module):
    """A linear layer under a name that the contenders' patterns find."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"q_proj": nn.Linear(width_in, width_out)})

    def forward(self, x: Tensor) -> Tensor:
        """The layer."""
        return self.block["q_proj"](x)


def layer_of_shape(shape: str, dtype: torch.dtype, device: str) -> SingleLayer:
    """A layer from `INxOUT`."""
    try:
        width_in, width_out = (int(part) for part in shape.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"--layer {shape}: write INxOUT, such as 576x1536") from None
    torch.manual_seed(0)
    return SingleLayer(width_in, width_out).to(device, dtype)


def single_layer_loss(model: Any, *, tokens: int) -> Tensor:
    """The output's sum over a fixed random input that wants its gradient too."""
    weight = next(one for one in model.parameters() if one.ndim == 2)  # the layer's own comes first
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    return model(x.requires_grad_()).float().square().mean()
