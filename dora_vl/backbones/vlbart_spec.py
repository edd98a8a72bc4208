"""What a VL-BART is made of, as settings; imports nothing that takes time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Boxes = Literal["zeros", "grid", "strip"]


@dataclass(frozen=True, kw_only=True)
class SmallBart:
    """A BART to be pretrained here, for data too small or too special for a published one."""

    texts: tuple[str, ...]
    """Records files whose texts its vocabulary is made from."""
    words: tuple[str, ...] = ()
    """More texts for the vocabulary: what the task writes around a question, which is spelled letter by letter
    otherwise."""
    vocabulary: int = 1000
    """Tokens before the added ones, at most."""
    width: int = 256
    layers: int = 3
    """Of the encoder, and of the decoder."""
    heads: int = 4
    feedforward: int = 1024
    max_positions: int = 256
    """Longest text."""
    init_std: float = 0.02
    """Spread of the random weights. BART's 0.02 suits widths near 1000: with it, a width of 128 had learned to count
    and nothing else after 600 steps on moving shapes; with 0.1, near 1/sqrt(width), it found colors after 200."""


@dataclass(frozen=True, kw_only=True)
class VlBartSpec:
    """What a VL-BART is made of."""

    bart: str = "facebook/bart-base"
    """Folder or hub id of a BART; its tokenizer and weights are taken."""
    small: SmallBart | None = None
    """Makes a small BART with random weights instead, and its vocabulary from texts."""
    checkpoint: str | None = None
    """A file of VL-T5 or VL-Adapter (`Epoch30.pth`, `LAST.pth`) whose weights the model starts from."""
    feature_width: int = 2048
    """Numbers of a picture token: 2048 for CLIP's RN101 grid, 512 for video frames of CLIP's ViT-B/32."""
    pooled_side: int | None = 6
    """Max-pools each picture's grid to so many rows and columns; null keeps its tokens (video)."""
    boxes: Boxes = "zeros"
    """A picture token's place: zeros as published for grids and videos; its cell's real box; or its box on a strip of
    a video's frames, which says when."""
    frame_side: int = 1
    """Rows and columns of one frame's tokens, for boxes: strip."""
    max_images: int = 2
    """Pictures that one input may have."""
    dropout: float = 0.1
    """All of BART's dropouts; the published runs set all three to this."""
    standardise: str | None = None
    """Folder of features: the fresh visual embedding begins as if each of their numbers had mean 0 and spread 1.
    Deep features of simple pictures have much in common, which a randomly initialised model has
    to learn to look past."""
    seed: int = 9595
    """Draws the visual embedding and the new tokens' rows."""
