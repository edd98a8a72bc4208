"""VL-BART as a transformers model: BART whose encoder reads picture tokens after the text.

Only what differs from transformers' BART stands here; its layers, decoder, generation and files are the library's.
State-dict names are those of VL-T5 and VL-Adapter, so that their files load as they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart.modeling_bart import (
    BartDecoder,
    BartEncoder,
    BartForConditionalGeneration,
    BartModel,
    BartPreTrainedModel,
    BartScaledWordEmbedding,
)

from dora_vl.backbones.visual_embedding import VisualEmbedding, grid_boxes, pool_grid, strip_boxes
from dora_vl.backbones.vlbart_config import VlBartConfig
from dora_vl.errors import UserError

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
        boxes: Float[Tensor, "batch images pooled 4"] | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """Hidden states of the text, then of each picture's tokens."""
        words = self.embed_tokens(input_ids)
        text = self.layernorm_embedding(words + self.embed_positions(input_ids))
        hidden = torch.cat([text, self.visual_tokens(features, boxes).to(text.dtype)], dim=1)
        hidden = nn.functional.dropout(hidden, p=float(self.dropout or 0), training=self.training)
        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=joint_mask(attention_mask, hidden.shape[1]),
        )
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return BaseModelOutput(last_hidden_state=hidden)

    def visual_tokens(
        self,
        features: Float[Tensor, "batch images tokens channels"],
        boxes: Float[Tensor, "batch images pooled 4"] | None = None,
    ) -> Float[Tensor, "batch visual width"]:
        """Each picture pooled on its own, then all embedded; orders start anew with every picture.

        Boxes are those of the pooled tokens.
        """
        batch, images, tokens, _ = features.shape
        if images > self.settings.max_images:
            raise UserError(f"{images} pictures in one input; this model has embeddings for {self.settings.max_images}")
        side = self.settings.pooled_side
        if side is not None:
            features = pool_grid(features.flatten(0, 1), side).unflatten(0, (batch, images))
        if boxes is None:
            boxes = self._boxes(tokens).to(features).expand(batch, images, -1, -1)
        features, boxes, count = features.to(self.dtype), boxes.to(self.dtype), features.shape[2]
        image_ids = torch.arange(images, device=features.device).repeat_interleave(count)
        order_ids = torch.arange(count, device=features.device).repeat(images)
        return self.visual_embedding(features.flatten(1, 2), boxes.flatten(1, 2), image_ids, order_ids)

    def _boxes(self, tokens: int) -> Tensor:
        """What stands for places where nobody gives them."""
        side = self.settings.pooled_side
        if self.settings.boxes == "zeros":
            return torch.zeros(tokens if side is None else side**2, 4)
        if self.settings.boxes == "strip":
            return strip_boxes(tokens if side is None else side**2, self.settings.frame_side)
        before = math.isqrt(tokens)
        if before**2 != tokens:
            raise UserError(f"{tokens} picture tokens are no square grid, so they have no grid boxes; set boxes: zeros")
        return grid_boxes(before, side)


class VlBartModel(BartModel):
    """BART's encoder-decoder with the joint encoder; the picture tokens' order rows are the token embedding's."""

    _tied_weights_keys = {**BartModel._tied_weights_keys, f"encoder.{ORDER_ROWS}": "shared.weight"}  # noqa: RUF012 (the library's own form)

    def __init__(self, config: VlBartConfig) -> None:
        # Not BartModel's: its post_init would resolve the tied rows before the encoder has them.
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
        """A resized vocabulary moves the order rows along: they are its last."""
        super().set_input_embeddings(value)
        assert isinstance(value, nn.Embedding)
        orders = nn.Embedding(value.num_embeddings, value.embedding_dim, _weight=value.weight)
        self.encoder.visual_embedding.obj_order_embedding = orders


class VlBartForConditionalGeneration(BartForConditionalGeneration):
    """VL-BART with its language-modelling head; `generate` takes `encoder_outputs` and the joint mask."""

    config_class = VlBartConfig
    model: VlBartModel

    def __init__(self, config: VlBartConfig) -> None:
        BartPreTrainedModel.__init__(self, config)
        self.settings = config
        self.model = VlBartModel(config)
        self.final_logits_bias = nn.Buffer(torch.zeros((1, int(config.vocab_size or 0))))
        self.lm_head = nn.Linear(int(config.d_model or 0), int(config.vocab_size or 0), bias=False)
        self.post_init()


def joint_mask(attention_mask: Int[Tensor, "batch seq"], total: int) -> Int[Tensor, "batch total"]:
    """The text's mask with ones for the picture tokens behind it."""
    visual = attention_mask.new_ones(attention_mask.shape[0], total - attention_mask.shape[1])
    return torch.cat([attention_mask, visual], dim=1)
