"""How a run reads its pictures: prepared pixels, or the frozen tower's features, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dora_vl.backbones.llava import LlavaBackbone
from dora_vl.data.stored_pictures import HeldPictures, StoredPictures, open_picture
from dora_vl.errors import UserError
from dora_vl.run.launch import rank_and_ranks, wait_for_everyone
from dora_vl.run.recipe import ModelConfig, RunConfig
from dora_vl.run.run_folder import run_folder_of
from dora_vl.run.zero import gather_to_read
from dora_vl.vision.compute_features import compute_features, open_store
from dora_vl.vision.features import FeatureStore
from dora_vl.vision.images import ImagePreparation


@dataclass(frozen=True, kw_only=True)
class PictureReader:
    """How a picture's path becomes what the backbone takes: pixels or stored tower features, exactly one.

    `pixels` gives `[3, height, width]`, `features` `[tokens, width]`; both raise `BadSample` for a broken picture.
    """

    pixels: Callable[..., Tensor] | None = None
    features: Callable[[str], Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.pixels is None) == (self.features is None):
            raise ValueError("give pixels or features, exactly one")


def picture_reader(
    config: RunConfig,
    backbone: LlavaBackbone,
    pictures: Iterable[str],
    *,
    folder: Path,
    device: torch.device,
    stored: StoredPictures | None = None,
) -> PictureReader:
    """The reader of pictures below `folder`, and of those `stored` in the data file itself.

    With `data.cache_features` missing features are computed first.
    Every rank must call it: they share the computing.
    """
    if not folder.is_dir():
        raise UserError(f"picture folder {folder} does not exist; set data.image_folder (evaluation.image_folder)")
    preparation = image_preparation(config.model)
    if not config.data.cache_features:
        return PictureReader(pixels=partial(read_pixels, folder=folder, preparation=preparation, stored=stored))
    if backbone.tower_trains:
        raise UserError("data.cache_features needs a frozen vision tower, but adapter.targets trains it; set it false")
    cache = Path(config.data.feature_cache or run_folder_of(config) / "features")
    store = _filled_store(
        cache, backbone, pictures, folder=folder, preparation=preparation, device=device, stored=stored
    )
    return PictureReader(features=store.read)


def image_preparation(model: ModelConfig) -> ImagePreparation:
    """The base's picture size and colours, with the run's aspect."""
    return ImagePreparation.from_folder(model.base, aspect=model.image_aspect, revision=model.revision)


def read_pixels(
    path: str, *, folder: Path, preparation: ImagePreparation, stored: HeldPictures | None = None
) -> Tensor:
    """Pixels of one picture; a top-level function, so that worker processes can receive it."""
    return preparation.prepare(open_picture(folder, path, stored))


def _filled_store(
    cache: Path,
    backbone: LlavaBackbone,
    pictures: Iterable[str],
    *,
    folder: Path,
    preparation: ImagePreparation,
    device: torch.device,
    stored: StoredPictures | None,
) -> FeatureStore:
    rank, ranks = rank_and_ranks()
    # ZeRO-3 has sharded the tower already and its hooks come only with the engine: make it whole meanwhile.
    with gather_to_read(backbone.tower.parameters()):
        backbone.tower.to(device)
        store = open_store(cache, tower=backbone, preparation=preparation, root=folder, stored=stored)
        wait_for_everyone()  # each must see the same features missing, before one adds some
        compute_features(store, pictures, tower=backbone, preparation=preparation, part=(rank, ranks))
    wait_for_everyone()
    store.reload()
    return store
