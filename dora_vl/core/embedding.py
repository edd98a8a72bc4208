"""Adapted embeddings: a linear layer on one-hot rows, so W is the table transposed and each column has one norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dora_vl.core import functional
from dora_vl.core.config import DoRAConfig
from dora_vl.core.layer import AdaptedLayer
from dora_vl.errors import UserError

SCALED_EMBEDDINGS: Mapping[str, str] = {
    "transformers.models.bart.modeling_bart.BartScaledWordEmbedding": "embed_scale",
    "transformers.models.mbart.modeling_mbart.MBartScaledWordEmbedding": "embed_scale",
}
"""Class path of an embedding that multiplies its rows -> the attribute that holds the factor."""


class DoRAEmbedding(AdaptedLayer, nn.Embedding):
    """An adapted `nn.Embedding`; the magnitude has one number for each of the embedding's dimensions, as in PEFT.

    There is no dropout here: its input are token ids.
    """

    FILE_LEAVES: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_embedding_A",
        "lora_B": "lora_embedding_B",
        "magnitude": "lora_magnitude_vector",
    }

    def __init__(self, base: nn.Embedding, config: DoRAConfig) -> None:
        nn.Module.__init__(self)
        if base.max_norm is not None:
            raise UserError("an embedding with max_norm rewrites its weight in every pass and cannot be adapted")
        for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"):
            setattr(self, name, vars(base)[name])
        self.sparse = False
        kind = f"{type(base).__module__}.{type(base).__qualname__}"
        self.output_factor = float(vars(base)[SCALED_EMBEDDINGS[kind]]) if kind in SCALED_EMBEDDINGS else 1.0
        self.weight, self.bias = base.weight, None
        self.start_adapter(base, config)

    def matrix_shape(self) -> tuple[int, int]:
        """(embedding dimension, vocabulary)."""
        return self.embedding_dim, self.num_embeddings

    def as_matrix(self, weight: Tensor) -> Float[Tensor, "out in_"]:
        """[dimension, vocabulary]."""
        return weight.t()

    def from_matrix(self, matrix: Float[Tensor, "out in_"]) -> Tensor:
        """[vocabulary, dimension]."""
        return matrix.t()

    def plain(self) -> nn.Module:
        """The embedding that was here before."""
        base = cast(nn.Embedding, self._replaced[0])
        base.weight = self.weight
        return base.train(self.training)

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """y = g (W[id] + s B A[id]), times the model's own factor where the embedding has one."""
        rows = F.embedding(input, self.weight, self.padding_idx)
        if self.merged:
            self.refuse_training_while_merged()
            return rows * self.output_factor if self.output_factor != 1 else rows
        low_rank = None
        if self.lora_A is not None and self.lora_B is not None:
            hidden = F.embedding(input, self.lora_A.t(), self.padding_idx)
            low_rank = (self.scale() * F.linear(hidden, self.lora_B)).to(rows.dtype)
        rows = functional.changed_output(rows, rows, low_rank, self.gain())
        return rows * self.output_factor if self.output_factor != 1 else rows
