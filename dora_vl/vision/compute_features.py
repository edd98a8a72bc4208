"""Runs a frozen tower over pictures and clips: workers read and prepare them, what it makes goes into a store."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dora_vl.data.examples import Clip
from dora_vl.data.feature_input import FeatureStore, Part, part_of
from dora_vl.data.media import HeldPictures, MediaFolder, open_picture
from dora_vl.data.picture_decoding import AS_PUBLISHED
from dora_vl.errors import BadSample, UserError
from dora_vl.vision.features import HASH, WHOLE, FeatureRow, FeatureWriter, file_state, shard_rows, store_key
from dora_vl.vision.frame_sampling import Sampling
from dora_vl.vision.images import ImagePreparation
from dora_vl.vision.video import VideoReader

log = logging.getLogger(__name__)

PICTURE_BACKEND = "pillow"


@dataclass(frozen=True)
class Medium:
    """A picture's path or a clip, and the name of its features."""

    name: str
    path: str
    clip: Clip | None = None

    @property
    def part(self) -> Part:
        """Of the video; a picture is whole."""
        return WHOLE if self.clip is None else part_of(self.clip)


@dataclass(frozen=True, kw_only=True)
class Media(Dataset[tuple[FeatureRow, Tensor | None]]):
    """Reads and prepares media: a row yet without features, and `[frames, 3, height, width]`; None where it is broken.

    Attributes:
        root: the folder of their paths.
        held: pictures that the data file itself holds.
        sampling: which frames of a clip; `reader` decodes it.
    """

    media: Sequence[Medium]
    root: MediaFolder
    preparation: ImagePreparation
    held: HeldPictures | None = None
    sampling: Sampling | None = None
    reader: VideoReader | None = None

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, index: int) -> tuple[FeatureRow, Tensor | None]:
        medium = self.media[index]
        row = FeatureRow(medium.name, None, part=medium.part, state=file_state(self.root.root, medium.path))
        try:
            return self._read(medium, row)
        except BadSample as error:
            return replace(row, broken=error.reason), None

    def _read(self, medium: Medium, row: FeatureRow) -> tuple[FeatureRow, Tensor]:
        prepare = self.preparation.prepare
        if medium.clip is None:
            return replace(row, backend=PICTURE_BACKEND), prepare(open_picture(self.root, medium.path, self.held))[None]
        if self.reader is None or self.sampling is None:
            raise ValueError("clips need a reader and a sampling")
        frames = self.reader.read_prepared(self.root, medium.clip, self.sampling, prepare)
        read = replace(row, backend=frames.backend, indices=frames.indices, seconds=frames.seconds)
        return read, torch.stack(frames.pictures)


def computed(
    media: Media, encode: Callable[[list[Tensor]], Iterable[Tensor]], *, at_once: int, workers: int, progress: bool
) -> Iterator[FeatureRow]:
    """The media's rows in their order, those that could not be read without features.

    Args:
        encode: pixels of several media, `[frames, 3, height, width]` each, as the features of each.
        at_once: how many media `encode` gets.
        workers: processes that read; 0 reads here.
        progress: shows a bar.
    """
    loader: Iterable[Any] = DataLoader(media, batch_size=at_once, num_workers=workers, collate_fn=list)
    with tqdm(total=len(media), unit="file", desc="features", disable=not progress) as bar:
        for batch in loader:
            pixels = [one for _, one in batch if one is not None]
            features = iter(encode(pixels) if pixels else ())
            for row, one in batch:
                yield row if one is None else replace(row, features=next(features))
            bar.update(len(batch))


@runtime_checkable
class FrozenTower(Protocol):
    """The part of a backbone that a cache of its pictures' features needs."""

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


class FeatureCache:
    """Features of a backbone's pictures in a folder of stores, one for each tower and preparation.

    Args:
        cache: the folder; the store in it is named after everything that decides the features.
        tower: the frozen tower, on the device that is to compute.
        root: of the pictures' paths; `held` are those of the data file itself.
    """

    def __init__(
        self,
        cache: Path,
        *,
        tower: FrozenTower,
        preparation: ImagePreparation,
        root: Path | MediaFolder,
        held: HeldPictures | None = None,
    ) -> None:
        folder = MediaFolder.of(root)
        settings = {
            **tower.tower_settings,
            "preparation": preparation.fingerprint(),
            "pictures": str(
                folder.root.resolve()
            ),  # another folder may have pictures of the same names, sizes and times
            **({"reading": AS_PUBLISHED} if folder.as_published else {}),
        }
        self._settings = {**settings, HASH: store_key(tower.tower, settings)}
        self._tower, self._preparation, self._folder, self._held = tower, preparation, folder, held
        self.folder = cache / self._settings[HASH]
        self._rows = shard_rows(self.folder)

    def open(self) -> FeatureStore:
        """What the folder holds by now, whichever process computed it."""
        self._rows = shard_rows(self.folder)
        return FeatureStore(self.folder, self._rows)

    def fill(
        self, pictures: Iterable[str], *, batch_size: int = 32, workers: int = 0, part: tuple[int, int] = (0, 1)
    ) -> None:
        """Computes what the store lacks of these pictures, and those whose file has changed since; may be resumed.

        Those that could not be read are tried again: a file may be mended, or a disk have come back.

        Args:
            pictures: their paths.
            batch_size: pictures a forward pass.
            workers: processes that read pictures; 0 reads them here.
            part: this process's number and how many share the work.

        Raises: UserError before anything is computed, if the features would not fit on the disk.
        """
        missing = [one for one in dict.fromkeys(pictures) if not self._is_current(one)]
        shape, dtype = self._tower.feature_shape, self._tower.feature_dtype
        picture_bytes = shape[0] * shape[1] * dtype.itemsize
        own = [Medium(one, one) for one in missing[part[0] :: part[1]]]
        with FeatureWriter(self.folder, self._settings, dtype=None) as writer:
            check_disk(self.folder, needed=len(missing) * picture_bytes)
            if not own:
                return
            megabytes = len(own) * picture_bytes / 2**20
            log.info("computing features of %d pictures, %.1f MiB, in %s", len(own), megabytes, self.folder)
            media = Media(media=own, root=self._folder, preparation=self._preparation, held=self._held)
            rows = computed(media, self._encode, at_once=batch_size, workers=workers, progress=part[0] == 0)
            for row in rows:
                writer.add(row)

    def _is_current(self, picture: str) -> bool:
        """Whether it need not be computed; what could not be read is tried again by every run that comes."""
        row = self._rows.get(picture)
        return row is not None and not row.broken and row.state == file_state(self._folder.root, picture)

    def _encode(self, pixels: list[Tensor]) -> Tensor:
        return self._tower.picture_features(torch.cat(pixels)).cpu()


def check_disk(folder: Path, *, needed: int) -> None:
    """Refuses what would fill the disk; `needed` in bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"cached features need {needed / 2**30:.1f} GiB, but {folder} has {free / 2**30:.1f} GiB free; set "
            "data.feature_cache to a larger disk, pool the grid, or set data.cache_features to false"
        )
