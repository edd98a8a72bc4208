"""Vision networks that give one vector a picture: CLIP's projection, or what the network pools by itself."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModel

from dora_vl.errors import UserError
from dora_vl.model_files import check_model_folder
from dora_vl.vision.images import Preparation
from dora_vl.vision.tower_sources import (
    PRETRAINED,
    TowerSpec,
    load_from_file,
    load_open_clip,
    load_timm,
    transformers_preparation,
)


def load_pooled(spec: TowerSpec) -> tuple[nn.Module, Preparation]:
    """The network and the preparation it expects; pixels in, [pictures, width] out.

    open_clip and transformers give CLIP's projected picture embedding, not normalised; timm the pooled output before
    its classifier (which in timm's CLIP models is the projection, so it is left out).

    Raises:
        UserError: the network or its weights do not exist, or it has no pooled output of its own.
    """
    if spec.library == "transformers":
        return _transformers_pooled(spec)
    network, config = {"timm": load_timm, "open_clip": load_open_clip}[spec.library](spec)
    preparation = Preparation(
        image_size=config.image_size,
        mean=tuple(config.image_mean or ()),
        std=tuple(config.image_std or ()),
        interpolation=config.interpolation,
    )
    return network, preparation


class PictureEmbedding(nn.Module):
    """The picture side of a transformers two-tower model, its projection included."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Float[Tensor, "pictures 3 height width"]) -> Float[Tensor, "pictures channels"]:
        """Projected embeddings, not normalised."""
        made = self.model.get_image_features(pixel_values=pixels)
        return made if isinstance(made, Tensor) else made.pooler_output


def _transformers_pooled(spec: TowerSpec) -> tuple[nn.Module, Preparation]:
    try:
        config = AutoConfig.from_pretrained(spec.name)
        if "vision_config" not in config.sub_configs:
            raise UserError(f"{spec.name} is no two-tower model, so it has no picture embedding; keep its grid instead")
        own = spec.weights == PRETRAINED
        if own:
            check_model_folder(spec.name)
        model: Any = AutoModel.from_pretrained(spec.name) if own else AutoModel.from_config(config)
    except (OSError, ValueError) as error:
        raise UserError(f"transformers could not load {spec.name!r}: {error}") from error
    load_from_file(model, spec)
    return PictureEmbedding(model), transformers_preparation(spec, config.vision_config)
