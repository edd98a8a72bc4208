"""Pictures and video frames as the features that a VL-BART reads: a frozen tower, its preparation, and what is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModel

from dora_vl.data.examples import Clip
from dora_vl.errors import UserError
from dora_vl.model_files import NO_OWN_CODE, check_model_folder, opening
from dora_vl.vision.features import HASH, store_key
from dora_vl.vision.frame_sampling import EverySeconds, Sampling, Uniform
from dora_vl.vision.images import Aspect, ImagePreparation, Preparation
from dora_vl.vision.tower_sources import (
    PRETRAINED,
    TowerSpec,
    load_from_file,
    load_open_clip,
    load_timm,
    load_tower,
    transformers_preparation,
)
from dora_vl.vision.video import Frames, VideoReader


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
    with opening(f"transformers could not load {spec.name!r}"):
        config = AutoConfig.from_pretrained(spec.name, **NO_OWN_CODE)
        if "vision_config" not in config.sub_configs:
            raise UserError(f"{spec.name} is no two-tower model, so it has no picture embedding; keep its grid instead")
        own = spec.weights == PRETRAINED
        if own:
            check_model_folder(spec.name)
        model: Any = AutoModel.from_pretrained(spec.name, **NO_OWN_CODE) if own else AutoModel.from_config(config)
    load_from_file(model, spec)
    return PictureEmbedding(model), transformers_preparation(spec, config.vision_config)


Kept = Literal["grid", "pooled"]


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Everything that decides the features of a picture or a video.

    Attributes:
        tower: the vision network.
        kept: of each picture or frame: its `grid`, one token a cell; or the network's own `pooled` output (CLIP's
            projection), not normalised.
        merge: cells along a side of a block that becomes one token, their numbers side by side: nothing is averaged
            away, and a frame is few tokens.
        changes: beside its numbers each token holds how they differ from the frame before (0 in the first, and in
            pictures), so that one token says which way something moves.
        aspect: how a picture becomes a square.
        every_seconds: a video's time between two frames; VALUE's features have 1.5.
        frames: so many frames of a video instead, evenly.
    """

    tower: TowerSpec
    kept: Kept = "grid"
    merge: int = 1
    changes: bool = False
    aspect: Aspect = "squash"
    every_seconds: float | None = None
    frames: int | None = None

    @property
    def sampling(self) -> Sampling:
        """Which frames of a video."""
        if self.frames is not None and self.every_seconds is not None:
            raise UserError(f"every {self.every_seconds} s and {self.frames} frames: give one of the two")
        if self.frames is not None:
            return Uniform(self.frames)
        return EverySeconds() if self.every_seconds is None else EverySeconds(self.every_seconds)

    def to_record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> FeatureSettings:
        """From what `to_record` gave.

        Raises:
            UserError: a setting is missing or unknown.
        """
        try:
            tower = dict(record["tower"])
            for name in ("image_mean", "image_std"):
                tower[name] = None if tower[name] is None else tuple(tower[name])
            return cls(**{**record, "tower": TowerSpec(**tower)})
        except (KeyError, TypeError) as error:
            raise UserError(f"these are not the settings of features: {error}") from None


class FeatureEncoder:
    """A frozen tower that turns pictures and frames into features.

    Args:
        settings: what it makes.
        device: where the tower runs.
    """

    def __init__(self, settings: FeatureSettings, *, device: torch.device | None = None) -> None:
        self.settings = settings
        if settings.kept == "pooled":
            network, preparation = load_pooled(settings.tower)
        else:
            loaded = load_tower(settings.tower)
            network, preparation = (
                GridNetwork(loaded.model, layer=loaded.layer, prefix=loaded.prefix_tokens),
                loaded.preparation,
            )
        self.device = device or torch.device("cpu")
        self.network: nn.Module = network.eval().requires_grad_(False).to(self.device)
        self.preparation = ImagePreparation(preparation, aspect=settings.aspect)

    def fingerprint(self) -> str:
        """A hash of the weights and of everything that changes the pixels."""
        return store_key(self.network, {"preparation": self.preparation.fingerprint()})

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "pictures 3 height width"]) -> Float[Tensor, "pictures tokens channels"]:
        """Prepared pictures as features, without changes; `pooled` is one token each."""
        made = self.network(pixels.to(self.device)).float()
        return made.unsqueeze(1) if self.settings.kept == "pooled" else merged(made, self.settings.merge)

    def pictures(self, pictures: Sequence[Image]) -> Float[Tensor, "pictures tokens channels"]:
        """Pictures as features, each by itself."""
        return torch.stack([self.frames([picture]) for picture in pictures])

    def frames(self, pictures: Sequence[Image]) -> Float[Tensor, "tokens channels"]:
        """Frames of one clip, in order, as its features."""
        return self.sequence(self.encode(torch.stack([self.preparation.prepare(picture) for picture in pictures])))

    def sequence(self, frames: Float[Tensor, "frames tokens channels"]) -> Float[Tensor, "all_tokens all_channels"]:
        """The features of a clip from what `encode` made of its frames in order: one frame after the other."""
        return (with_changes(frames) if self.settings.changes else frames).flatten(0, 1)

    def video(
        self, reader: VideoReader, root: Path, clip: Clip
    ) -> tuple[Float[Tensor, "tokens channels"], Frames[Tensor]]:
        """A clip's frames as features, one after the other, and which frames they are.

        Raises:
            BadSample: the clip cannot be read.
        """
        frames = reader.read_prepared(root, clip, self.settings.sampling, self.preparation.prepare)
        return self.sequence(self.encode(torch.stack(frames.pictures))), frames


def merged(
    grid: Float[Tensor, "pictures cells channels"], side: int
) -> Float[Tensor, "pictures blocks block_channels"]:
    """Blocks of `side` by `side` cells as one token each, row by row; what InternVL calls pixel unshuffling.

    Raises:
        UserError: the blocks do not fill the grid.
    """
    before = math.isqrt(grid.shape[1])
    if before**2 != grid.shape[1] or before % side:
        raise UserError(
            f"a grid of {grid.shape[1]} cells cannot be cut into blocks of {side}x{side}; set merge or grid_pool"
        )
    after = before // side
    blocks = grid.unflatten(1, (after, side, after, side)).transpose(2, 3)
    return blocks.flatten(3, 5).flatten(1, 2)


def with_changes(
    frames: Float[Tensor, "frames tokens channels"],
) -> Float[Tensor, "frames tokens twice_the_channels"]:
    """Each token's numbers, then how they differ from the same place's in the frame before; 0 in the first frame."""
    before = torch.cat([frames[:1], frames[:-1]])
    return torch.cat([frames, frames - before], dim=-1)


class GridNetwork(nn.Module):
    """A tower whose output is its grid and nothing else, whichever class it is of."""

    def __init__(self, model: nn.Module, *, layer: int, prefix: int) -> None:
        super().__init__()
        self.model = model
        self._layer = layer
        self._prefix = prefix

    def forward(self, pixels: Float[Tensor, "pictures 3 height width"]) -> Float[Tensor, "pictures tokens channels"]:
        """Grid tokens, row by row."""
        if self._layer == -1:
            return self.model(pixels).last_hidden_state[:, self._prefix :]
        return self.model(pixels, output_hidden_states=True).hidden_states[self._layer][:, self._prefix :]


def open_encoders(
    adapter: Path, recipe: Mapping[str, Any], *, device: torch.device, any_tower: bool = False
) -> dict[str, FeatureEncoder]:
    """An encoder for each task of the recipe whose features say how they were made; equal settings share one.

    Args:
        any_tower: accepts a tower with other weights than those that made the features.

    Raises:
        UserError: no task's features say it, or a tower cannot be loaded, or has other weights or another preparation.
    """
    stated = {name: recipe["features"].get(name) for name in recipe["tasks"]}
    if not any(stated.values()):
        raise UserError(
            f"{adapter} does not say how the features of {', '.join(stated)} were computed (data_prep.features did "
            "not make them), so it cannot be asked about raw pictures"
        )
    opened: dict[str, FeatureEncoder] = {}
    encoders: dict[str, FeatureEncoder] = {}
    for name, record in stated.items():
        if record is None:
            continue
        key = json.dumps(record, sort_keys=True)
        if key not in opened:
            opened[key] = _open(record, device)
            if not any_tower:
                check_tower(opened[key], record, f"{adapter}: {name}")
        encoders[name] = opened[key]
    return encoders


def _open(record: Mapping[str, Any], device: torch.device) -> FeatureEncoder:
    settings = FeatureSettings.from_record({name: value for name, value in record.items() if name != HASH})
    return FeatureEncoder(settings, device=device)


def check_tower(encoder: FeatureEncoder, record: Mapping[str, Any], trained: str) -> None:
    """Refuses a tower that is not the one that the record of a folder's features names.

    Args:
        trained: what was trained on those features, for the message.

    Raises:
        UserError: its hash is another; both are named.
    """
    if HASH not in record:  # made before hashes were kept
        return
    found, tower = encoder.fingerprint(), encoder.settings.tower
    if found != record[HASH]:
        raise UserError(
            f"{trained} was trained on features of a vision tower with sha256 {record[HASH][:12]}…, {tower.library}'s "
            f"{tower.name} with weights {tower.weights!r} has {found[:12]}… here; put the same weights there, or add "
            "--any-base to try it all the same"
        )
