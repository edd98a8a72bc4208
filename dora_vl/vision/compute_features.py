"""Fills a feature store: reads the pictures it lacks, runs the frozen tower over them in batches, shard by shard."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dora_vl.data.media import StoredPictures, open_picture
from dora_vl.errors import BadSample, UserError
from dora_vl.vision.features import SHARD_BYTES, FeatureStore, PictureEntry, file_state, store_key
from dora_vl.vision.images import ImagePreparation

log = logging.getLogger(__name__)


@runtime_checkable
class FrozenTower(Protocol):
    """The part of a backbone that this needs."""

    @property
    def tower(self) -> nn.Module:
        """The network whose weights name the store."""
        ...

    @property
    def tower_settings(self) -> dict[str, object]:
        """What else decides its features."""
        ...

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Tokens and width of one picture's features."""
        ...

    @property
    def feature_dtype(self) -> torch.dtype:
        """The dtype of its features."""
        ...

    def picture_features(
        self, pixel_values: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images tokens channels"]:
        """The tower's output, without gradients."""
        ...


@dataclass(frozen=True)
class _ReadPicture:
    """One picture's pixels, or why there are none, with the state of its file before it was read."""

    picture: str
    size: int
    changed: int
    pixels: Tensor | None
    broken: str


class _Pictures(Dataset[_ReadPicture]):
    """Reads and prepares pictures; what cannot be read comes back named."""

    def __init__(self, pictures: Sequence[str], store: FeatureStore, preparation: ImagePreparation) -> None:
        self._pictures = pictures
        self._root, self._stored = store.root, store.stored
        self._preparation = preparation

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> _ReadPicture:
        picture = self._pictures[index]
        size, changed = file_state(self._root, picture)
        try:
            pixels = self._preparation.prepare(open_picture(self._root, picture, self._stored))
        except BadSample as error:
            return _ReadPicture(picture, size, changed, None, error.reason)
        return _ReadPicture(picture, size, changed, pixels, "")


def open_store(
    folder: Path,
    *,
    tower: FrozenTower,
    preparation: ImagePreparation,
    root: Path,
    stored: StoredPictures | None = None,
) -> FeatureStore:
    """The store of this tower and preparation under `folder`, empty where nothing has been computed yet.

    Pictures are files below `root`, or `stored` in the data file itself.
    """
    key = store_key(tower.tower, {**tower.tower_settings, "preparation": preparation.fingerprint()})
    (folder / key).mkdir(parents=True, exist_ok=True)
    return FeatureStore(folder / key, root=root, stored=stored)


def compute_features(
    store: FeatureStore,
    pictures: Iterable[str],
    *,
    tower: FrozenTower,
    preparation: ImagePreparation,
    batch_size: int = 32,
    workers: int = 0,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Computes what the store lacks of these pictures, with a progress bar; may be stopped and started again.

    Args:
        store: from `open_store` with the same tower and preparation.
        pictures: paths relative to the store's root.
        tower: the frozen tower, on the device that is to compute.
        preparation: how pictures become pixels.
        batch_size: pictures a forward pass.
        workers: processes that read pictures; 0 reads them here.
        part: this process's number and how many share the work; each then has to `reload` the store.

    Raises: UserError before anything is computed, if the features would not fit on the disk.
    """
    missing = store.missing(pictures)
    row_bytes = tower.feature_shape[0] * tower.feature_shape[1] * tower.feature_dtype.itemsize
    check_disk(store.folder, needed=len(missing) * row_bytes)
    own = missing[part[0] :: part[1]]
    if not own:
        return
    log.info("computing features of %d pictures, %.1f MiB, in %s", len(own), len(own) * row_bytes / 2**20, store.folder)
    loader = DataLoader(_Pictures(own, store, preparation), batch_size=batch_size, num_workers=workers, collate_fn=list)
    shard_pictures = max(1, SHARD_BYTES // row_bytes)
    with tqdm(total=len(own), unit="picture", desc="tower features", disable=part[0] != 0) as progress:
        batches = _described(iter(loader), tower, progress)
        while shard := list(islice(batches, shard_pictures)):
            _write(store, shard, tower)


def check_disk(folder: Path, *, needed: int) -> None:
    """Refuses what would fill the disk; `needed` in bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"cached features need {needed / 2**30:.1f} GiB, but {folder} has {free / 2**30:.1f} GiB free; set "
            "data.feature_cache to a larger disk, pool the grid, or set data.cache_features to false"
        )


def _described(
    batches: Iterator[list[_ReadPicture]], tower: FrozenTower, progress: Any
) -> Iterator[tuple[_ReadPicture, Tensor | None]]:
    """Pictures one by one with their features, None for one that could not be read."""
    for batch in batches:
        pixels = [read.pixels for read in batch if read.pixels is not None]
        features = iter(tower.picture_features(torch.stack(pixels)).cpu() if pixels else ())
        for read in batch:
            yield read, None if read.pixels is None else next(features)
        progress.update(len(batch))


def _write(store: FeatureStore, shard: Sequence[tuple[_ReadPicture, Tensor | None]], tower: FrozenTower) -> None:
    features: list[Tensor] = []
    entries: list[PictureEntry] = []
    for read, feature in shard:
        entries.append(PictureEntry(read.picture, read.size, read.changed, len(features), broken=read.broken))
        if feature is not None:
            features.append(feature)
    rows = torch.stack(features) if features else torch.zeros(0, *tower.feature_shape, dtype=tower.feature_dtype)
    store.add_shard(rows, entries)
