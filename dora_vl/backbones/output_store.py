"""Keeps on disk what frozen vision parts output for samples' pictures (`backbones.frozen_outputs`)."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.frozen_outputs import FrozenParts, Outputs, ShapeOnly
from dora_vl.backbones.shards import HASH, ShardStore, keep_settings, store_key
from dora_vl.backbones.video_inputs import within_pixels
from dora_vl.data.pictures import AS_PUBLISHED, READING, HeldPictures, MediaFolder, open_image
from dora_vl.data.samples import Sample
from dora_vl.errors import BadSample, UserError

log = logging.getLogger(__name__)


class StoredPictures(NamedTuple):
    """Holds what is stored for a sample's pictures."""

    sizes: Sequence[tuple[int, int]]
    outputs: Outputs


class OutputStore:
    """Stores outputs by `PictureReader.key`; several processes may fill it, workers read it.

    Its folder in `cache` is named after the parts' weights and `settings`, what else decides the outputs.
    """

    def __init__(self, cache: Path, model: Any, parts: FrozenParts, settings: Mapping[str, Any]) -> None:
        read = {name: [sorted(call.read) for call in calls] for name, calls in parts.calls.items()}
        fields = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
        config = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
        decided = {**settings, "parts": read, "config": config, "transformers": transformers.__version__}
        name = store_key(nn.ModuleList([model.get_submodule(part) for part in parts.calls]), decided)
        self.folder = cache / name
        self.folder.mkdir(parents=True, exist_ok=True)
        keep_settings(self.folder, {**decided, HASH: name})
        self._shards = ShardStore(self.folder)
        self._has_room = False

    def missing(self, reader: PictureReader, pictures: Iterable[Sequence[str]]) -> list[Sequence[str]]:
        """Lists the samples' pictures that the store lacks or whose files have changed since, each once."""
        keys = {reader.key(names): names for names in pictures}
        return [names for key, names in keys.items() if key not in self._shards.entries]

    def fill(
        self,
        model: Any,
        parts: FrozenParts,
        reader: PictureReader,
        missing: Sequence[Sequence[str]],
        *,
        part: tuple[int, int] = (0, 1),
        workers: int = 0,
        batch_size: int = 1,
    ) -> None:
        """Computes one process's part of what is missing; interrupted, it goes on from what is on the disk.

        Up to `batch_size` samples whose pictures have the same shapes go through the parts at once. Pictures that
        cannot be read are left out, and tried again by every later run: a file may be mended.
        """
        todo = missing[part[0] :: part[1]]
        if not todo:
            return
        log.info("computing the outputs of frozen vision parts for %d samples' pictures, in %s", len(todo), self.folder)
        loader: Any = DataLoader(_ReadPictures(reader, todo), batch_size=None, num_workers=workers)
        waiting: dict[object, list[tuple[str, Any, Sample]]] = {}
        for read in tqdm(loader, unit="sample", desc="stored outputs", disable=part[0] > 0):
            if isinstance(read, BadSample):
                continue
            shapes = tuple((name, getattr(value, "shape", None)) for name, value in read[2].inputs.items())
            waiting.setdefault(shapes, []).append(read)
            if len(waiting[shapes]) == batch_size:
                self._compute(model, parts, reader, waiting.pop(shapes), len(missing))
        for rest in waiting.values():
            self._compute(model, parts, reader, rest, len(missing))
        self._shards.flush()

    def _compute(
        self,
        model: Any,
        parts: FrozenParts,
        reader: PictureReader,
        several: Sequence[tuple[str, Any, Sample]],
        total: int,
    ) -> None:
        """Stores the outputs of some samples' pictures; the first call checks that all of them have room."""
        outputs = parts.outputs_of_each(model, [sample for _, _, sample in several], reader.encoder.collate)
        for (key, sizes, _), of_sample in zip(several, outputs, strict=True):
            described, tensors = _described(of_sample)
            if not self._has_room:
                needed, free = sum(tensor.nbytes for tensor in tensors) * total, shutil.disk_usage(self.folder).free
                if needed > free:
                    raise UserError(
                        f"stored outputs need {needed / 2**30:.1f} GiB, but {self.folder} has {free / 2**30:.1f} GiB "
                        "free; set data.feature_cache to a larger disk, or data.cache_features to false"
                    )
                self._has_room = True
            self._shards.add(key, [sizes, described], tensors)

    def refresh(self) -> None:
        """Reads what other processes have written since."""
        self._shards.refresh()

    def read(self, reader: PictureReader, names: Sequence[str]) -> StoredPictures:
        """Reads what is stored for a sample's pictures. Raises BadSample: nothing; they are unreadable or changed."""
        key = reader.key(names)
        if key not in self._shards.entries:
            reader.read(names)  # says what is wrong with them
            raise BadSample(names[0], f"picture {names[0]} changed after the run began; start again")
        sizes, described = self._shards.entries[key].facts
        return StoredPictures(
            [(width, height) for width, height in sizes], _rebuilt_outputs(described, self._shards.tensors(key))
        )


def _described(outputs: Outputs) -> tuple[Any, list[Tensor]]:
    """Converts outputs to plain JSON values, and the tensors that these number."""
    tensors: list[Tensor] = []

    def described(leaf: Any) -> Any:
        if isinstance(leaf, ShapeOnly):
            return {"shape": leaf.shape, "dtype": str(leaf.dtype).removeprefix("torch.")}
        if not isinstance(leaf, Tensor):
            return {"value": leaf}
        tensors.append(leaf)
        return {"tensor": len(tensors) - 1}

    calls = {name: [[described(leaf) for leaf in call] for call in calls] for name, calls in outputs.items()}
    return calls, tensors


def _rebuilt_outputs(described: Mapping[str, Any], tensors: Sequence[Tensor]) -> Outputs:
    def leaf_of(leaf: Mapping[str, Any]) -> Any:
        if "tensor" in leaf:
            return tensors[leaf["tensor"]]
        if "shape" in leaf:
            return ShapeOnly(tuple(leaf["shape"]), getattr(torch, leaf["dtype"]))
        return leaf["value"]

    return {name: [[leaf_of(leaf) for leaf in call] for call in calls] for name, calls in described.items()}


@dataclass(frozen=True, kw_only=True)
class PictureReader:
    """Opens a sample's pictures and encodes them; it can be sent to worker processes.

    Attributes:
        stored: pictures inside the data file.
        most_pixels: pixels of a sample at most; larger ones are shrunk.
    """

    encoder: Encoder
    folder: MediaFolder
    stored: HeldPictures | None = None
    most_pixels: int | None = None

    def key(self, names: Sequence[str]) -> str:
        """Identifies a sample's pictures in order: names, sizes in bytes and times of change."""
        return json.dumps([[name, *_file_state(self.folder.root / name)] for name in names])

    def settings(self) -> dict[str, Any]:
        """Returns what decides the pixels; another folder may have pictures of the same names, sizes and times."""
        return {
            "processor": hashlib.sha256(self.encoder.processor.to_json_string().encode()).hexdigest(),
            "reading": AS_PUBLISHED if self.folder.as_published else READING,
            "most_pixels": self.most_pixels,
            "pictures": str(self.folder.root.resolve()),
        }

    def read(self, names: Sequence[str]) -> tuple[list[tuple[int, int]], Sample]:
        """Reads the pictures; returns their sizes, and a sample that shows them as in training. Raises BadSample."""
        sizes, pictures = self.pictures(names)
        return sizes, self.encoder.media_sample(pictures)

    def pictures(self, names: Sequence[str]) -> tuple[list[tuple[int, int]], list[Image.Image]]:
        """Opens the pictures; returns their sizes, and the pictures shrunk to `most_pixels`."""
        pictures = [open_image(self.folder, name, self.stored) for name in names]
        sizes = [picture.size for picture in pictures]
        if self.most_pixels is not None:
            pictures, _, _ = within_pixels(pictures, (), self.most_pixels)
        return sizes, pictures


def _file_state(path: Path) -> tuple[int, int]:
    """Returns a file's size in bytes and time of change in nanoseconds; -1 if there is none."""
    try:
        state = path.stat()
    except (OSError, ValueError):
        return -1, -1
    return state.st_size, state.st_mtime_ns


@dataclass(frozen=True)
class _ReadPictures(Dataset[Any]):
    reader: PictureReader
    pictures: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[str, list[tuple[int, int]], Sample] | BadSample:
        names = self.pictures[index]
        try:
            return self.reader.key(names), *self.reader.read(names)
        except BadSample as error:
            return error
