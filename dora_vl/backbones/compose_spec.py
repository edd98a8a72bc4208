"""What a composed LLaVA is made of, as settings; imports nothing that takes time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dora_vl.vision.tower_spec import TowerSpec, VisionLibrary


@dataclass(frozen=True, kw_only=True)
class ComposeSpec:
    """What a composed LLaVA is made of; between the two stands LLaVA-1.5's projector, `mlp2x_gelu`."""

    vision_library: VisionLibrary
    """Where the vision tower comes from."""
    vision_name: str
    """timm's or open_clip's model name; for transformers a folder or hub id."""
    language_model: str
    """Folder or hub id of a causal language model; with `gguf_file`, the folder that file lies in."""
    gguf_file: str | None = None
    """A GGUF file in `language_model`; it is dequantised."""
    vision_weights: str = "pretrained"
    """`pretrained` (the library's own download), `random`, an open_clip tag, or a .pth / .safetensors file."""
    vision_weights_in_order: bool = False
    """Matches the weights file to the network by position instead of by name, every shape checked."""
    vision_layer: int | None = None
    """Hidden state counted from the end; None is -2 for transformers (as in LLaVA-1.5), -1 for the others."""
    grid_pool: int | None = None
    """Side of the picture's grid after average pooling in the tower; None keeps the tower's grid."""
    image_size: int | None = None
    """Pixels along a side; None takes the tower's published value."""
    image_mean: tuple[float, float, float] | None = None
    """Colour mean, 0 to 1; None takes the tower's published value."""
    image_std: tuple[float, float, float] | None = None
    """Colour deviation, 0 to 1; None takes the tower's published value."""
    projector_seed: int = 0
    """Seed of the projector's initial weights."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights in the folder; None keeps the language model's own (float32 for GGUF)."""

    def tower(self) -> TowerSpec:
        """The part of this that is about the vision tower."""
        return TowerSpec(
            library=self.vision_library,
            name=self.vision_name,
            weights=self.vision_weights,
            weights_in_order=self.vision_weights_in_order,
            layer=self.vision_layer,
            grid_pool=self.grid_pool,
            image_size=self.image_size,
            image_mean=self.image_mean,
            image_std=self.image_std,
        )
