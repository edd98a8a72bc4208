"""VL-BART as a transformers model: BART whose encoder reads picture tokens after the text.

Only what differs from transformers' BART is here; its layers, decoder, generation and files are the library's.
State-dict names are those of VL-T5 and VL-Adapter, so that their files load as they are.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any, Literal, no_type_check

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart.configuration_bart import BartConfig
from transformers.models.bart.modeling_bart import (
    BartDecoder,
    BartEncoder,
    BartForConditionalGeneration,
    BartModel,
    BartPreTrainedModel,
    BartScaledWordEmbedding,
)

from dora_vl.backbones.specs import Boxes
from dora_vl.errors import UserError
from dora_vl.heads.answer import AnswerHead
from dora_vl.shapes import Float, Int

VisualNorm = Literal["each", "sum", "none"]


# transformers' generated __init__ takes more names than its signature says; a checker that reads it refuses them.
@no_type_check
class VlBartConfig(BartConfig):
    """BART with a visual embedding; every dropout is 0.1, as in the published runs, unless it is given."""

    model_type = "vlbart"

    attention_dropout: float | int | None = 0.1
    activation_dropout: float | int | None = 0.1
    feature_width: int = 2048
    """Numbers of one picture token."""
    pooled_side: int | None = 6
    """Rows and columns that each picture's square grid is max-pooled to; None keeps its tokens."""
    visual_norm: VisualNorm = "each"
    """Layer norms of the feature and the position branch (`each`, the published runs), one after the sum (`sum`,
    VL-T5's pretrained files), or `none`."""
    boxes: Boxes = "zeros"
    """A token's box where none is given: `zeros` as in the published grid runs, or the `grid` cell's real box, or its
    box on a film `strip`, a video's frames side by side from left to right, so that it says when."""
    max_images: int = 2
    """How many pictures an input may have; each has its own embedding."""
    frame_side: int = 1
    """Rows and columns of one frame's tokens on a strip."""
    closed_answers: dict[str, list[str]] = field(default_factory=dict)
    """The answer list of each task that is answered by a head of its own instead of in words."""


class VisualEmbedding(nn.Module):
    """Embeds picture tokens: the sum of feature, box, picture number and token number.

    A row of BART's own token embedding, counted from its end (`<vis_extra_id_i>`), represents the token number: with
    the token embedding frozen, these are frozen random vectors.
    """

    def __init__(self, config: VlBartConfig) -> None:
        super().__init__()
        width = int(config.d_model or 0)
        feature: list[Any] = [nn.Linear(config.feature_width, width)]
        position: list[Any] = [nn.Linear(5, width)]  # x1, x2, y1, y2 and the area
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
        """Takes boxes (x1, x2, y1, y2), each from 0 to 1; order i reads the i-th row from the vocabulary's end."""
        area = (boxes[..., 1] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 2])
        positions = torch.cat([boxes, area.unsqueeze(-1)], dim=-1)
        row = self.obj_order_embedding.num_embeddings - 1 - order_ids
        total = self.feat_embedding(features) + self.absolute_vis_pos_embedding(positions)
        total = total + self.img_order_embedding(image_ids) + self.obj_order_embedding(row)
        return self.layer_norm(total) if self._norm_of_sum else total


def pool_grid(features: Float[Tensor, "rows tokens channels"], side: int) -> Float[Tensor, "rows pooled channels"]:
    """Max-pools a square grid's tokens to `side` rows and columns; from 7x7 to 6x6 each takes a 2x2 window."""
    before = math.isqrt(features.shape[1])
    if before**2 != features.shape[1]:
        raise UserError(
            f"{features.shape[1]} picture tokens are not a square grid, so they cannot be pooled to {side}x{side}; "
            "set the model's pooled_side to null"
        )
    grid = features.transpose(1, 2).unflatten(2, (before, before))
    pooled = functional.adaptive_max_pool2d(grid.float(), side).to(features.dtype)
    return pooled.flatten(2).transpose(1, 2)


def grid_boxes(before: int, after: int | None) -> Float[Tensor, "cells 4"]:
    """Returns boxes (x1, x2, y1, y2) of a square grid's cells, row by row; a pooled cell covers all its cells."""
    side = before if after is None else after
    starts = torch.arange(side) * before // side
    ends = -((torch.arange(side) + 1) * -before // side)
    low, high = starts / before, ends / before
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([low[columns], high[columns], low[rows], high[rows]], dim=-1).flatten(0, 1)


def strip_boxes(tokens: int, side: int) -> Float[Tensor, "tokens 4"]:
    """Returns boxes (x1, x2, y1, y2) of a video's tokens on a strip of frames, each of `side` rows and columns."""
    frames, rest = divmod(tokens, side**2)
    if rest:
        raise UserError(f"{tokens} picture tokens are not a whole number of frames of {side}x{side}; set frame_side")
    within = grid_boxes(side, None).repeat(frames, 1)
    when = torch.arange(frames).repeat_interleave(side**2).unsqueeze(-1)
    return torch.cat([(within[:, :2] + when) / frames, within[:, 2:]], dim=-1)


ORDER_ROWS = "visual_embedding.obj_order_embedding.weight"


class VlBartEncoder(BartEncoder):
    """BART's encoder over text and picture tokens, all of which see each other.

    Picture tokens get neither BART's positions nor its embedding norm. None of them is masked, not even frames of
    zeros that fill up a short video: so it was published.
    """

    def __init__(self, config: VlBartConfig) -> None:
        super().__init__(config)
        self.settings = config
        self.visual_embedding = VisualEmbedding(config)
        self.post_init()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (another encoder, in the same place)
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        features: Float[Tensor, "batch images tokens channels"],
        **_: Any,
    ) -> BaseModelOutput:
        """Returns hidden states of the text, then of each picture's tokens."""
        words = self.embed_tokens(input_ids)
        text = self.layernorm_embedding(words + self.embed_positions(input_ids))
        hidden = torch.cat([text, self.visual_tokens(features).to(text.dtype)], dim=1)
        hidden = nn.functional.dropout(hidden, p=float(self.dropout or 0), training=self.training)
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=joint_mask(attention_mask, hidden.shape[1])
        )
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return BaseModelOutput(last_hidden_state=hidden)

    def visual_tokens(
        self, features: Float[Tensor, "batch images tokens channels"]
    ) -> Float[Tensor, "batch visual width"]:
        """Pools each picture on its own and embeds all; orders start anew with every picture."""
        batch, images, tokens, _ = features.shape
        if images > self.settings.max_images:
            raise UserError(f"{images} pictures in one input; this model has embeddings for {self.settings.max_images}")
        side = self.settings.pooled_side
        if side is not None:
            features = pool_grid(features.flatten(0, 1), side).unflatten(0, (batch, images))
        boxes = self._boxes(tokens).to(features).expand(batch, images, -1, -1)
        features, boxes, count = features.to(self.dtype), boxes.to(self.dtype), features.shape[2]
        image_ids = torch.arange(images, device=features.device).repeat_interleave(count)
        order_ids = torch.arange(count, device=features.device).repeat(images)
        return self.visual_embedding(features.flatten(1, 2), boxes.flatten(1, 2), image_ids, order_ids)

    def _boxes(self, tokens: int) -> Tensor:
        side = self.settings.pooled_side
        if self.settings.boxes == "zeros":
            return torch.zeros(tokens if side is None else side**2, 4)
        if self.settings.boxes == "strip":
            return strip_boxes(tokens if side is None else side**2, self.settings.frame_side)
        before = math.isqrt(tokens)
        if before**2 != tokens:
            raise UserError(f"{tokens} picture tokens are not a square grid, so they have no boxes; set boxes: zeros")
        return grid_boxes(before, side)


class VlBartModel(BartModel):
    """BART's encoder-decoder with the joint encoder; the picture tokens' order rows are the token embedding's."""

    _tied_weights_keys = {**BartModel._tied_weights_keys, f"encoder.{ORDER_ROWS}": "shared.weight"}  # noqa: RUF012 (the library's own form)

    def __init__(self, config: VlBartConfig) -> None:
        # BartModel's own __init__ would resolve the tied rows before the encoder has them.
        BartPreTrainedModel.__init__(self, config)
        width = int(config.d_model or 0)
        scale = math.sqrt(width) if config.scale_embedding else 1.0
        self.shared = BartScaledWordEmbedding(
            int(config.vocab_size or 0), width, int(config.pad_token_id or 0), embed_scale=scale
        )
        self.encoder = VlBartEncoder(config)
        self.decoder = BartDecoder(config)
        self.post_init()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Moves the order rows along with a resized vocabulary: they are its last."""
        super().set_input_embeddings(value)
        assert isinstance(value, nn.Embedding)
        orders = nn.Embedding(value.num_embeddings, value.embedding_dim, _weight=value.weight)
        self.encoder.visual_embedding.obj_order_embedding = orders


class VlBartForConditionalGeneration(BartForConditionalGeneration):
    """VL-BART with its language-modelling head; `generate` takes `encoder_outputs` and the joint mask.

    `answer_heads` holds an `AnswerHead` for each list of `config.closed_answers`, by task.
    """

    config_class = VlBartConfig
    model: VlBartModel

    def __init__(self, config: VlBartConfig) -> None:
        BartPreTrainedModel.__init__(self, config)
        self.settings = config
        self.model = VlBartModel(config)
        self.final_logits_bias = nn.Buffer(torch.zeros((1, int(config.vocab_size or 0))))
        self.lm_head = nn.Linear(int(config.d_model or 0), int(config.vocab_size or 0), bias=False)
        self.answer_heads = nn.ModuleDict(
            {task: AnswerHead(int(config.d_model or 0), answers) for task, answers in config.closed_answers.items()}
        )
        self.post_init()


def joint_mask(attention_mask: Int[Tensor, "batch seq"], total: int) -> Int[Tensor, "batch total"]:
    """Appends ones for the picture tokens to the text's mask."""
    visual = attention_mask.new_ones(attention_mask.shape[0], total - attention_mask.shape[1])
    return torch.cat([attention_mask, visual], dim=1)
