"""Pictures' features as tokens beside the text's (VL-T5, arXiv 2102.02779, as VL-Adapter's runs set it up)."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from dora_vl.backbones.vlbart_config import VlBartConfig
from dora_vl.errors import UserError

BOX_NUMBERS = 5  # x1, x2, y1, y2 and the area


class VisualEmbedding(nn.Module):
    """The sum of what a token shows, where it is, which picture it is of and which of its tokens it is.

    Which token it is, is said by a row of BART's own token embedding, counted from its end (`<vis_extra_id_i>`): with
    the token embedding frozen, these are frozen random vectors.
    """

    def __init__(self, config: VlBartConfig) -> None:
        super().__init__()
        width = int(config.d_model or 0)
        feature: list[Any] = [nn.Linear(config.feature_width, width)]
        position: list[Any] = [nn.Linear(BOX_NUMBERS, width)]
        if config.visual_norm == "each":
            feature.append(nn.LayerNorm(width))
            position.append(nn.LayerNorm(width))
        self.feat_embedding = nn.Sequential(*feature)
        self.absolute_vis_pos_embedding = nn.Sequential(*position)
        if config.visual_norm == "sum":
            self.layer_norm = nn.LayerNorm(width)
        self.obj_order_embedding = nn.Embedding(int(config.vocab_size or 0), width)
        self.img_order_embedding = nn.Embedding(config.max_images, width)
        self._norm_of_sum = config.visual_norm == "sum"

    def forward(
        self,
        features: Float[Tensor, "batch visual channels"],
        boxes: Float[Tensor, "batch visual 4"],
        image_ids: Int[Tensor, " visual"],
        order_ids: Int[Tensor, " visual"],
    ) -> Float[Tensor, "batch visual width"]:
        """Boxes are (x1, x2, y1, y2), each from 0 to 1; order i takes the i-th row from the vocabulary's end."""
        area = (boxes[..., 1] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 2])
        places = torch.cat([boxes, area.unsqueeze(-1)], dim=-1)
        row = self.obj_order_embedding.num_embeddings - 1 - order_ids
        total = self.feat_embedding(features) + self.absolute_vis_pos_embedding(places)
        total = total + self.img_order_embedding(image_ids) + self.obj_order_embedding(row)
        return self.layer_norm(total) if self._norm_of_sum else total


def pool_grid(features: Float[Tensor, "rows tokens channels"], side: int) -> Float[Tensor, "rows pooled channels"]:
    """A square grid's tokens, max-pooled to `side` rows and columns; from 7x7 to 6x6 each is of a 2x2 window.

    Raises:
        UserError: the tokens are no square grid.
    """
    before = math.isqrt(features.shape[1])
    if before**2 != features.shape[1]:
        raise UserError(
            f"{features.shape[1]} picture tokens are no square grid, so they cannot be pooled to {side}x{side}; "
            "set the model's pooled_side to null"
        )
    grid = features.transpose(1, 2).unflatten(2, (before, before))
    pooled = functional.adaptive_max_pool2d(grid.float(), side).to(features.dtype)
    return pooled.flatten(2).transpose(1, 2)


def grid_boxes(before: int, after: int | None) -> Float[Tensor, "cells 4"]:
    """Boxes (x1, x2, y1, y2) of a square grid's cells, row by row; of pooled cells, all that they are made from."""
    side = before if after is None else after
    starts = torch.arange(side) * before // side
    ends = -((torch.arange(side) + 1) * -before // side)
    low, high = starts / before, ends / before
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([low[columns], high[columns], low[rows], high[rows]], dim=-1).flatten(0, 1)


def strip_boxes(tokens: int, side: int) -> Float[Tensor, "tokens 4"]:
    """Boxes (x1, x2, y1, y2) of a video's tokens on a strip of its frames, each with `side` rows and columns.

    Raises:
        UserError: the tokens are no whole number of frames.
    """
    frames, rest = divmod(tokens, side**2)
    if rest:
        raise UserError(f"{tokens} picture tokens are no whole number of frames of {side}x{side}; set frame_side")
    within = grid_boxes(side, None).repeat(frames, 1)
    when = torch.arange(frames).repeat_interleave(side**2).unsqueeze(-1)
    return torch.cat([(within[:, :2] + when) / frames, within[:, 2:]], dim=-1)
