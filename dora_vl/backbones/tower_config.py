"""The config that a grid tower is saved with."""

from __future__ import annotations

from typing import Any, Literal, no_type_check

from transformers.configuration_utils import PreTrainedConfig

from dora_vl.backbones.specs import VisionLibrary

Layout = Literal["NCHW", "NHWC", "NLC"]


# transformers' generated __init__ takes more names than its signature says; a checker that reads it refuses them.
@no_type_check
class GridTowerConfig(PreTrainedConfig):
    """Rebuilds a vision tower of any library without its weights, and states the preparation it expects.

    `layout`, `prefix_tokens` and `grid_side` describe what the library's network returns. They are measured once, when
    the tower is composed (`tower_sources.load_tower`), so that nothing is guessed from a network's class later.
    """

    model_type = "dora_grid_tower"

    library: VisionLibrary = "timm"
    architecture: str = ""
    """Names the network as the library does, e.g. `tf_efficientnet_lite0` or `ViT-B-32`."""
    options: dict[str, Any] | None = None
    """Further arguments of the library: timm's keyword arguments, open_clip's `vision_cfg`..., a config."""
    layer: int = -1
    """Hidden state to take, counted from the end; -1 is the last one, after the network's final norm."""
    grid_pool: int | None = None
    layout: Layout = "NCHW"
    prefix_tokens: int = 0
    """Class and register tokens in front of the grid, which are dropped (`NLC` only)."""
    grid_side: int = 7
    hidden_size: int = 1280
    image_size: int = 224
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    interpolation: str = "bicubic"

    @property
    def tokens(self) -> int:
        """Returns the grid tokens of one picture."""
        return (self.grid_pool or self.grid_side) ** 2

    @property
    def patch_size(self) -> int:
        """Pixels per grid token along a side, rounded down; transformers' processor counts tokens with it."""
        return self.image_size // (self.grid_pool or self.grid_side)
