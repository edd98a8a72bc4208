"""DVoRA: DoRA over VeRA. One frozen random A and B for all layers; each trains two vectors and its magnitude.

V = W + diag(b) B diag(d) A, with A and B cut to the layer's size (arXiv 2402.09353 section 5.5; VeRA is arXiv
2310.11454). Both vectors fold into B, so the layer is an ordinary one with the factors A and diag(b) B diag(d), and
its norm is factored as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dora_vl.core import functional
from dora_vl.core.config import DoRAConfig
from dora_vl.core.linear import DoRALinear

SHARED_NAME = "dvora_shared"
"""Name of the module that holds the random matrices, at the model's root."""
START_OF_D = 0.1
"""VeRA's starting value of d; b starts at 0."""


class SharedRandom(nn.Module):
    """The frozen A and B, large enough for every layer; buffers that the base's checkpoint does not know of."""

    random_A: Tensor
    random_B: Tensor

    def __init__(self, *, rank: int, in_features: int, out_features: int, seed: int, like: Tensor) -> None:
        super().__init__()
        dtype = functional.accumulation_dtype(like.dtype)
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("random_A", (rank, in_features)), ("random_B", (out_features, rank))):
            matrix = torch.empty(shape, dtype=dtype)
            # VeRA's start; fan-in is the second axis of either matrix.
            nn.init.kaiming_uniform_(matrix, generator=generator)
            self.register_buffer(name, matrix.to(like.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The input: a root that calls its children in turn, `nn.Sequential`, calls this one too."""
        return x


class DVoRALinear(DoRALinear):
    """A linear layer that trains d [rank], b [out] and the magnitude over the shared A and B."""

    FILE_LEAVES: ClassVar[Mapping[str, str]] = {
        "lambda_d": "vera_lambda_d",
        "lambda_b": "vera_lambda_b",
        "magnitude": "lora_magnitude_vector",
    }

    def __init__(self, base: nn.Linear, config: DoRAConfig, shared: SharedRandom) -> None:
        self._shared_matrices = (shared,)  # in a tuple: the module is the model's, not this layer's
        super().__init__(base, config)

    def create_parameters(self) -> None:
        """d = 0.1, b = 0 and the magnitude: nothing changes yet."""
        dtype, device = functional.accumulation_dtype(self.weight.dtype), self.weight.device
        self.lambda_d = nn.Parameter(torch.full((self.adapter.rank,), START_OF_D, dtype=dtype, device=device))
        self.lambda_b = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device))
        self.create_magnitude()

    def scale(self) -> float:
        """1: b takes the place of a scale."""
        return 1.0

    def factors(self) -> tuple[Float[Tensor, "rank in_"], Float[Tensor, "out rank"]]:
        """A, and B with both vectors folded in."""
        (shared,) = self._shared_matrices
        b = shared.random_B[: self.out_features] * self.lambda_d * self.lambda_b.unsqueeze(1)
        return shared.random_A[:, : self.in_features], b


def share_random(model: nn.Module, layers: list[nn.Linear], config: DoRAConfig) -> SharedRandom:
    """Gives the model its random matrices, as large as its largest layer needs."""
    shared = SharedRandom(
        rank=config.rank,
        in_features=max(layer.in_features for layer in layers),
        out_features=max(layer.out_features for layer in layers),
        seed=config.random_seed,
        like=cast(Tensor, layers[0].weight),
    )
    model.add_module(SHARED_NAME, shared)
    return shared
