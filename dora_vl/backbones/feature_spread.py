"""A fresh visual embedding that begins with standardised features, whatever scale the vision network gave them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dora_vl.vision.feature_files import open_features

MOST_FILES = 2000
LEAST_SPREAD = 0.1
"""Of all numbers' own spread: what hardly ever varies is not blown up into noise."""


def measured(folder: Path) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Mean and spread of each number of a token, over the tokens of the folder's first files.

    Raises:
        UserError: the folder holds no features.
    """
    source = open_features(folder)
    tokens = torch.cat([source.read(name).double() for name in islice(source.names(), MOST_FILES)])
    spread = tokens.std(dim=0, correction=0)
    least = LEAST_SPREAD * float(tokens.std(correction=0))
    return tokens.mean(dim=0).float(), spread.clamp_min(least).float()


@torch.no_grad()
def standardise(linear: nn.Linear, mean: Float[Tensor, " channels"], spread: Float[Tensor, " channels"]) -> None:
    """Changes a layer so that it does with raw numbers what it did with standardised ones."""
    linear.weight.div_(spread)
    linear.bias.sub_(linear.weight @ mean)
