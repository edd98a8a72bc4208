"""A frozen vision tower that computes features of pictures and videos, beforehand or on demand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModel

from dora_vl.backbones.loading import load_pretrained
from dora_vl.backbones.shards import HASH, store_key
from dora_vl.backbones.specs import PRETRAINED, TowerSpec
from dora_vl.backbones.tower_sources import (
    load_from_file,
    load_open_clip,
    load_timm,
    load_tower,
    preparation_of,
    transformers_preparation,
)
from dora_vl.backbones.towers import Aspect, ImagePreparation, Preparation
from dora_vl.backbones.vision_store import WHOLE, MediumFeatures, Part, part_of
from dora_vl.data.example import Clip
from dora_vl.data.pictures import MediaFolder, open_image
from dora_vl.data.video import EverySeconds, FrameSampling, Uniform, VideoReader
from dora_vl.errors import BadSample, UserError
from dora_vl.files import NO_OWN_CODE, check_model_folder, opening
from dora_vl.shapes import Float


def load_pooled(spec: TowerSpec) -> tuple[nn.Module, Preparation]:
    """Loads a network that maps pixels to [pictures, width], and the preparation it expects.

    open_clip and transformers give CLIP's projected picture embedding, not normalised; timm the pooled output before
    its classifier (which in timm's CLIP models is the projection, so it is left out).
    """
    if spec.library == "transformers":
        with opening(f"transformers could not load {spec.name!r}"):
            check_model_folder(spec.name)
            config = AutoConfig.from_pretrained(spec.name, **NO_OWN_CODE)
            if "vision_config" not in config.sub_configs:
                raise UserError(f"{spec.name} is not a two-tower model, so it has no picture embedding; keep its grid")
            own = spec.weights == PRETRAINED
            model: Any = load_pretrained(AutoModel, spec.name) if own else AutoModel.from_config(config)
        load_from_file(model, spec)
        return PictureEmbedding(model), transformers_preparation(spec, config.vision_config)
    network, config = {"timm": load_timm, "open_clip": load_open_clip}[spec.library](spec)
    return network, preparation_of(config)


class PictureEmbedding(nn.Module):
    """The picture side of a two-tower model of transformers, with its projection."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Float[Tensor, "pictures 3 height width"]) -> Float[Tensor, "pictures channels"]:
        """Returns projected embeddings, not normalised."""
        output = self.model.get_image_features(pixel_values=pixels)
        return output if isinstance(output, Tensor) else output.pooler_output


FeatureKind = Literal["grid", "pooled"]


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """All settings that decide the features of a picture or a video.

    Attributes:
        kept: what stays of a picture or frame: its `grid`, one token a cell; or the network's own `pooled` output
            (CLIP's projection), not normalised.
        merge: cells along a side of a block that becomes one token; their numbers are concatenated, none is averaged.
        changes: each token also holds its difference to the frame before (0 in the first, and in pictures), so that one
            token says which way something moves.
        aspect: how a picture becomes a square.
        every_seconds: time between two frames of a video; VALUE's features have 1.5.
        frames: the number of frames taken of a video instead, evenly.
    """

    tower: TowerSpec
    kept: FeatureKind = "grid"
    merge: int = 1
    changes: bool = False
    aspect: Aspect = "squash"
    every_seconds: float | None = None
    frames: int | None = None

    @property
    def sampling(self) -> FrameSampling:
        """Returns how frames of a video are chosen."""
        if self.frames is not None and self.every_seconds is not None:
            raise UserError(f"every {self.every_seconds} s and {self.frames} frames: give one of the two")
        if self.frames is not None:
            return Uniform(self.frames)
        return EverySeconds() if self.every_seconds is None else EverySeconds(self.every_seconds)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> FeatureSettings:
        """Reads what `asdict` returned, from JSON."""
        try:
            tower = dict(record["tower"])
            for name in ("image_mean", "image_std"):
                tower[name] = None if tower[name] is None else tuple(tower[name])
            return cls(**{**record, "tower": TowerSpec(**tower)})
        except (KeyError, TypeError) as error:
            raise UserError(f"these are not the settings of features: {error}") from None


class FeatureEncoder:
    """Computes features of pictures and frames with a frozen tower."""

    def __init__(self, settings: FeatureSettings, *, device: torch.device | None = None) -> None:
        self.settings = settings
        if settings.kept == "pooled":
            network, preparation = load_pooled(settings.tower)
        else:
            tower = load_tower(settings.tower)
            network = GridNetwork(tower.model, layer=tower.layer, prefix=tower.prefix_tokens)
            preparation = tower.preparation
        self.device = device or torch.device("cpu")
        self.network: nn.Module = network.eval().requires_grad_(False).to(self.device)
        self.preparation = ImagePreparation(preparation, aspect=settings.aspect)

    def fingerprint(self) -> str:
        """Hashes the weights and everything that changes the pixels."""
        return store_key(self.network, {"preparation": self.preparation.fingerprint()})

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "pictures 3 height width"]) -> Float[Tensor, "pictures tokens channels"]:
        """Encodes prepared pictures, without `changes`; `pooled` gives one token each."""
        features = self.network(pixels.to(self.device)).float()
        return features.unsqueeze(1) if self.settings.kept == "pooled" else merge_cells(features, self.settings.merge)

    def pictures(self, pictures: Sequence[Image]) -> Float[Tensor, "pictures tokens channels"]:
        """Encodes pictures, each by itself."""
        return torch.stack([self.frames([picture]) for picture in pictures])

    def frames(self, pictures: Sequence[Image]) -> Float[Tensor, "tokens channels"]:
        """Encodes one clip's frames, in order."""
        return self.sequence(self.encode(torch.stack([self.preparation.prepare(picture) for picture in pictures])))

    def sequence(self, frames: Float[Tensor, "frames tokens channels"]) -> Float[Tensor, "all_tokens all_channels"]:
        """Joins the outputs of `encode` for a clip's frames, in order, and with `changes` their differences."""
        if self.settings.changes:
            before = torch.cat([frames[:1], frames[:-1]])
            frames = torch.cat([frames, frames - before], dim=-1)
        return frames.flatten(0, 1)


def merge_cells(
    grid: Float[Tensor, "pictures cells channels"], side: int
) -> Float[Tensor, "pictures blocks block_channels"]:
    """Merges blocks of `side` by `side` cells to one token each, row by row; InternVL calls it pixel unshuffling."""
    before = math.isqrt(grid.shape[1])
    if before**2 != grid.shape[1] or before % side:
        raise UserError(
            f"a grid of {grid.shape[1]} cells cannot be cut into blocks of {side}x{side}; set merge or grid_pool"
        )
    after = before // side
    blocks = grid.unflatten(1, (after, side, after, side)).transpose(2, 3)
    return blocks.flatten(3, 5).flatten(1, 2)


class GridNetwork(nn.Module):
    """A tower of any class whose only output is its grid."""

    def __init__(self, model: nn.Module, *, layer: int, prefix: int) -> None:
        super().__init__()
        self.model = model
        self._layer = layer
        self._prefix = prefix

    def forward(self, pixels: Float[Tensor, "pictures 3 height width"]) -> Float[Tensor, "pictures tokens channels"]:
        """Returns grid tokens, row by row."""
        if self._layer == -1:
            return self.model(pixels).last_hidden_state[:, self._prefix :]
        return self.model(pixels, output_hidden_states=True).hidden_states[self._layer][:, self._prefix :]


def open_encoders(
    adapter: Path, recipe: Mapping[str, Any], *, device: torch.device, any_tower: bool = False
) -> dict[str, FeatureEncoder]:
    """Opens an encoder for each task of the recipe whose features say how they were made; equal settings share one."""
    records = {name: recipe["features"].get(name) for name in recipe["tasks"]}
    if not any(records.values()):
        raise UserError(
            f"{adapter} does not say how the features of {', '.join(records)} were computed (data_prep.features did "
            "not make them), so it cannot be asked about raw pictures"
        )
    opened: dict[str, FeatureEncoder] = {}
    encoders: dict[str, FeatureEncoder] = {}
    for name, record in records.items():
        if record is None:
            continue
        key = json.dumps(record, sort_keys=True)
        if key not in opened:
            settings = FeatureSettings.from_record({field: value for field, value in record.items() if field != HASH})
            opened[key], tower = FeatureEncoder(settings, device=device), settings.tower
            fingerprint = opened[key].fingerprint()
            if not any_tower and fingerprint != record[HASH]:
                raise UserError(
                    f"{adapter}: {name} was trained on features of a vision tower with sha256 {record[HASH][:12]}…, "
                    f"{tower.library}'s {tower.name} with weights {tower.weights!r} has {fingerprint[:12]}… here; put "
                    "the same weights there, or add --any-base to try it all the same"
                )
        encoders[name] = opened[key]
    return encoders


@dataclass(frozen=True)
class Medium:
    """The path of a picture or a clip, and the name of its features."""

    name: str
    path: str
    clip: Clip | None = None

    @property
    def part(self) -> Part:
        """Returns the part of the video; a picture is whole."""
        return WHOLE if self.clip is None else part_of(self.clip)


@dataclass(frozen=True, kw_only=True)
class MediaDataset(Dataset["Pixels | BadSample"]):
    """Reads and prepares media below `root`, of a clip the frames that `sampling` takes; bad ones become errors."""

    media: Sequence[Medium]
    root: MediaFolder
    preparation: ImagePreparation
    sampling: FrameSampling | None = None
    reader: VideoReader | None = None

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, index: int) -> Pixels | BadSample:
        medium = self.media[index]
        prepare = self.preparation.prepare
        try:
            if medium.clip is None:
                return Pixels(medium, prepare(open_image(self.root, medium.path))[None], {"backend": "pillow"})
            assert self.reader is not None
            assert self.sampling is not None
            frames = self.reader.read_prepared(self.root, medium.clip, self.sampling, prepare)
        except BadSample as error:
            return error
        source = {"backend": frames.backend, "indices": frames.indices, "seconds": frames.seconds}
        return Pixels(medium, torch.stack(frames.pictures), source)


@dataclass(frozen=True)
class Pixels:
    """A picture or a clip's frames as a tower takes them, and where they are from."""

    medium: Medium
    frames: Float[Tensor, "frames 3 height width"]
    source: Mapping[str, Any]


def computed(
    media: MediaDataset, encode: Callable[[Tensor], Tensor], *, workers: int, progress: bool
) -> Iterator[MediumFeatures | BadSample]:
    """Yields the media's features in order, and errors for those that could not be read."""
    loader: Iterable[Any] = DataLoader(media, batch_size=None, num_workers=workers)
    for item in tqdm(loader, total=len(media), unit="file", desc="features", disable=not progress):
        if isinstance(item, BadSample):
            yield item
        else:
            yield MediumFeatures(item.medium.name, encode(item.frames), part=item.medium.part, **item.source)
