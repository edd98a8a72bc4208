"""Which vision network a run names, and the config that a grid tower is saved with.

Needs transformers' config class and nothing heavier: the registration imports this file while transformers'
`modeling_utils`, which `towers` needs, may itself be halfway through its import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, no_type_check

from transformers.configuration_utils import PreTrainedConfig

VisionLibrary = Literal["timm", "open_clip", "transformers"]
PRETRAINED, RANDOM = "pretrained", "random"
Layout = Literal["NCHW", "NHWC", "NLC"]


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


# transformers' generated __init__ takes more names than its signature says; a checker that reads it refuses them.
@no_type_check
class GridTowerConfig(PreTrainedConfig):
    """All that rebuilds a vision tower of any library without its weights, and the preparation it expects.

    `layout`, `prefix_tokens` and `grid_side` describe what the library's network returns; they are measured once, when
    the tower is composed (`tower_sources.load_tower`), so that nothing has to be guessed from a network's class later.
    """

    model_type = "dora_grid_tower"

    library: VisionLibrary = "timm"
    architecture: str = ""
    """The library's own name of the network, for example `tf_efficientnet_lite0` or `ViT-B-32`."""
    options: dict[str, Any] | None = None
    """What the library needs beside the name: timm's keyword arguments, open_clip's `vision_cfg`..., a config."""
    layer: int = -1
    """Which hidden state is taken, counted from the end; -1 is the last one, after the network's final norm."""
    grid_pool: int | None = None
    """Side of the grid after average pooling; None keeps the network's own grid."""
    layout: Layout = "NCHW"
    prefix_tokens: int = 0
    """Class and register tokens in front of the grid (`NLC` only); dropped."""
    grid_side: int = 7
    hidden_size: int = 1280
    image_size: int = 224
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    interpolation: str = "bicubic"

    @property
    def tokens(self) -> int:
        """Grid tokens that one picture becomes."""
        return (self.grid_pool or self.grid_side) ** 2

    @property
    def patch_size(self) -> int:
        """Pixels per grid token along a side, rounded down; transformers' processor counts tokens with it."""
        return self.image_size // (self.grid_pool or self.grid_side)


# Not at the top: importing the table runs the registration's hook, which imports this module.
from transformers.models.auto.configuration_auto import AutoConfig  # noqa: E402

AutoConfig.register(GridTowerConfig.model_type, GridTowerConfig, exist_ok=True)
