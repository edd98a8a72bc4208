"""Which vision network a run's settings name; imports nothing that takes time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VisionLibrary = Literal["timm", "open_clip", "transformers"]
PRETRAINED, RANDOM = "pretrained", "random"


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """Which vision network to take, from where, and which part of it."""

    library: VisionLibrary
    name: str
    """timm's or open_clip's model name; for transformers a folder or hub id (a whole CLIP or its vision part)."""
    weights: str = PRETRAINED
    """`pretrained` (the library's own download, transformers' folder), `random`, an open_clip tag, or a `.pth` /
    `.safetensors` file."""
    weights_in_order: bool = False
    """Matches a weights file to the network by position instead of by name; every shape must fit."""
    layer: int | None = None
    """Hidden state from the end; None is -2 for transformers (as LLaVA-1.5 does) and -1 for the others."""
    grid_pool: int | None = None
    """Side of the grid after average pooling; None keeps the network's own."""
    image_size: int | None = None
    """Pixels along a side; None takes the published value."""
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
