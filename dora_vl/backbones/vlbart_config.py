"""The settings of a VL-BART: BART's own, and how pictures or frames become tokens of its encoder."""

from __future__ import annotations

from typing import Any, Literal

from transformers.models.bart.configuration_bart import BartConfig

from dora_vl.backbones.vlbart_spec import Boxes as Boxes

VisualNorm = Literal["each", "sum", "none"]
PUBLISHED_DROPOUT = 0.1
FEATURE_WIDTHS = {"clip_rn101": 2048, "clip_rn50": 2048, "clip_rn50x4": 2560, "clip_vit_b32": 512, "faster_rcnn": 2048}


class VlBartConfig(BartConfig):
    """BART with a visual embedding; every dropout is 0.1, as in the published runs, unless it is given.

    Attributes:
        feature_width: numbers of one picture token.
        pooled_side: each picture's square grid is max-pooled to so many rows and columns; None keeps its tokens.
        visual_norm: layer norms of the feature and the position branch (`each`, the published runs), one after the
            sum (`sum`, VL-T5's pretrained files), or `none`.
        boxes: what stands for a token's place where none is given: `zeros` as in the published grid runs, or the
            `grid` cell's real box, or its box on a film `strip`, a video's frames side by side from left to right, so
            that it says when.
        frame_side: rows and columns of one frame's tokens on a strip.
        max_images: how many pictures an input may have; each has its own embedding.
    """

    model_type = "vlbart"

    def __init__(
        self,
        feature_width: int = 2048,
        pooled_side: int | None = 6,
        visual_norm: VisualNorm = "each",
        boxes: Boxes = "zeros",
        max_images: int = 2,
        frame_side: int = 1,
        **bart: Any,
    ) -> None:
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            bart.setdefault(name, PUBLISHED_DROPOUT)
        super().__init__(**bart)
        self.feature_width = feature_width
        self.pooled_side = pooled_side
        self.visual_norm: VisualNorm = visual_norm
        self.boxes: Boxes = boxes
        self.max_images = max_images
        self.frame_side = frame_side
