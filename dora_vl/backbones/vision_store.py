"""Stored features of pictures and videos by name, resized to the tokens that a model takes.

Besides our own shards it reads VL-Adapter's re-hosted Parquet shards, its tree of one HDF5 file a picture, and VALUE's
folder of one `.npz` a video. `open_features` tells them apart by what the folder holds.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dora_vl.backbones.shards import SHARD_GLOB, ShardStore, keep_settings
from dora_vl.data.example import Clip, Example
from dora_vl.errors import BadSample, UserError
from dora_vl.shapes import Float

Part = tuple[float, float | None]
"""Gives the start and end of a video's part in seconds; None is the video's end."""
WHOLE: Part = (0.0, None)
Taken = TypeVar("Taken")
DAMAGE = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)
"""numpy, h5py and pyarrow raise these on files that are damaged or hold something else."""


@dataclass(frozen=True)
class Stored:
    """Size of a picture's or a video's stored features."""

    tokens: int
    width: int
    frames: int
    """Counts the frames, which all have equally many tokens; where nothing states it, each token is a frame."""


class FeatureStore:
    """Reads stored features by the name of their picture or video; it can be sent to worker processes.

    `places` maps each name to where its features are, in the format's own terms.
    """

    def __init__(self, folder: Path, places: Mapping[str, Any]) -> None:
        self.folder = folder
        self.places = places

    def stored(self, name: str) -> Stored:
        """Returns the size of features without reading them; raises `BadSample` if there are none, as `read`."""
        return self._taken(name, self._stored)

    def read(self, name: str) -> Float[Tensor, "tokens width"]:
        """Reads features in the dtype they are stored in; raises `BadSample` if they are missing or damaged."""
        return self._taken(name, self._read)

    def part(self, name: str) -> Part | None:
        """Returns the part of the video that the features cover; None if it is not recorded."""
        del name
        return None

    def _stored(self, name: str) -> Stored:
        raise NotImplementedError

    def _read(self, name: str) -> Tensor:
        raise NotImplementedError

    def _taken(self, name: str, take: Callable[[str], Taken]) -> Taken:
        if name not in self.places:
            reason = f"{self.folder} holds no features of {name}; in a checkout python -m data_prep.features makes them"
            raise BadSample(name, reason)
        try:
            return take(name)
        except DAMAGE as error:
            raise BadSample(name, f"features of {name} {_unreadable(self.folder, error)}") from None


def _unreadable(path: Path, error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return f"in {path} cannot be read: {line[:200]}"


def open_features(folder: Path) -> FeatureStore:
    """Opens a folder of features in any known format."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of features; in a checkout python -m data_prep.features makes one")
    forms = {SHARD_GLOB: OwnFeatures, "*.parquet": ParquetFeatures, "*.h5": FileFeatures, "*.npz": FileFeatures}
    patterns = [pattern for pattern in forms if next(folder.glob(pattern), None) is not None]
    if not patterns:
        raise UserError(f"{folder} holds no features: no {', '.join(forms)} in it")
    if len(patterns) > 1:
        raise UserError(f"{folder} holds features as {' and '.join(patterns)}; lay each form into a folder of its own")
    return forms[patterns[0]](folder)


class OwnFeatures(FeatureStore):
    """Reads what `FeatureWriter` wrote."""

    def __init__(self, folder: Path) -> None:
        self._shards = ShardStore(folder)
        super().__init__(folder, self._shards.entries)

    def part(self, name: str) -> Part | None:
        """Returns the part of the video that the features cover."""
        return self._taken(name, lambda name: tuple(self.places[name].facts["part"]))

    def _stored(self, name: str) -> Stored:
        facts = self.places[name].facts
        return Stored(facts["tokens"], facts["width"], max(1, len(facts["indices"])))

    def _read(self, name: str) -> Tensor:
        return self._shards.tensors(name)[0]


@dataclass(frozen=True)
class MediumFeatures:
    """Features of one picture or video, and what they were made from: the library, and the frames' places and seconds.

    `features` may have any shape, the last axis being the width; a picture has no frames, and its `part` is the whole.
    """

    name: str
    features: Tensor
    backend: str = ""
    indices: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    part: Part = WHOLE


class FeatureWriter(AbstractContextManager["FeatureWriter"]):
    """Writes features in float16, one shard at a time; leaving the `with` block writes the rest."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        keep_settings(folder, settings)
        self._shards = ShardStore(folder)

    def __exit__(self, *_: object) -> None:
        self._shards.flush()

    def add(self, made: MediumFeatures) -> None:
        """Takes what was made of one picture or video; it is on disk when its shard is full, or at the end."""
        tokens = made.features.detach().flatten(0, -2).to("cpu", torch.float16)
        if not bool(torch.isfinite(tokens).all()):
            largest = float(made.features.detach().abs().max())
            raise UserError(f"features of {made.name} do not fit into float16: the largest is {largest:.4g}")
        facts = {name: value for name, value in vars(made).items() if name not in ("name", "features")}
        self._shards.add(made.name, {**facts, "tokens": len(tokens), "width": tokens.shape[1]}, [tokens])


CACHE_BYTES = 256 * 2**20


class ParquetFeatures(FeatureStore):
    """Reads VL-Adapter's re-hosted shards: Parquet with columns `id` and `features`, nested lists of fixed sizes."""

    def __init__(self, folder: Path) -> None:
        self._groups: OrderedDict[tuple[Path, int], np.ndarray] = OrderedDict()
        places: dict[str, tuple[Path, int, int, Stored]] = {}
        for path in sorted(folder.glob("*.parquet")):
            try:
                with _parquet_file(path) as opened:
                    stored = _table_size(path, opened.schema_arrow)
                    for group in range(opened.num_row_groups):
                        names = opened.read_row_group(group, columns=["id"])["id"].to_pylist()
                        places |= {str(name): (path, group, number, stored) for number, name in enumerate(names)}
            except (OSError, ValueError) as error:  # pyarrow's own errors are these
                raise UserError(f"features {_unreadable(path, error)}; copy it again") from error
        super().__init__(folder, places)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_groups": OrderedDict()}

    def _stored(self, name: str) -> Stored:
        return self.places[name][-1]

    def _read(self, name: str) -> Tensor:
        path, group, row, stored = self.places[name]
        numbers = self._group(path, group)
        length = stored.tokens * stored.width
        return torch.from_numpy(numbers[row * length : (row + 1) * length].copy()).view(stored.tokens, stored.width)

    def _group(self, path: Path, number: int) -> np.ndarray:
        key = (path, number)
        if key not in self._groups:
            with _parquet_file(path) as opened:
                column = opened.read_row_group(number, columns=["features"])["features"].combine_chunks()
            for _ in _fixed_sizes(column.type):
                column = column.values  # also of empty rows, which `flatten` leaves out
            self._groups[key] = column.to_numpy(zero_copy_only=False)
            while len(self._groups) > 1 and sum(group.nbytes for group in self._groups.values()) > CACHE_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


def _parquet_file(path: Path) -> Any:
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(path)


def _table_size(path: Path, schema: Any) -> Stored:
    if missing := {"id", "features"} - set(schema.names):
        raise UserError(f"{path} has no column {min(missing)!r}, so it holds no features")
    sizes = _fixed_sizes(schema.field("features").type)
    if len(sizes) < 2:
        raise UserError(f"{path}: column 'features' holds no tables of one size")
    tokens = math.prod(sizes[:-1])
    return Stored(tokens, sizes[-1], tokens)


def _fixed_sizes(kind: Any) -> list[int]:
    """Returns the sizes of nested fixed-size lists, from the outside in; empty if one has no fixed size."""
    import pyarrow as pa

    sizes = []
    while pa.types.is_nested(kind):
        if not pa.types.is_fixed_size_list(kind):
            return []
        sizes.append(kind.list_size)
        kind = kind.value_type
    return sizes


class FileFeatures(FeatureStore):
    """Reads one file per picture or video: VL-Adapter's tree of HDF5 (needs h5py), VALUE's folder of `.npz`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, {path.stem: path for suffix in _READERS for path in folder.glob(f"*{suffix}")})

    def _stored(self, name: str) -> Stored:
        shape = self._looked_into(name, values=False)
        tokens = math.prod(shape[:-1])
        return Stored(tokens, shape[-1], tokens)

    def _read(self, name: str) -> Tensor:
        return torch.from_numpy(self._looked_into(name, values=True)).flatten(0, -2)

    def _looked_into(self, name: str, *, values: bool) -> Any:
        """Reads a file's numbers, or only their shape."""
        path = self.places[name]
        shape, dtype, numbers = _READERS[path.suffix](path, values)
        if len(shape) < 2 or not np.issubdtype(dtype, np.floating):
            raise BadSample(name, f"features of {name} are {dtype} of shape {tuple(shape)}, not a table of numbers")
        return numbers if values else shape


def _hdf5(path: Path, values: bool) -> tuple[tuple[int, ...], np.dtype, np.ndarray | None]:
    import h5py

    with h5py.File(path, "r") as opened:
        stored: Any = opened[f"{path.stem}/features"]
        return tuple(stored.shape), stored.dtype, np.asarray(stored) if values else None


def _npz(path: Path, values: bool) -> tuple[tuple[int, ...], np.dtype, np.ndarray | None]:
    with zipfile.ZipFile(path) as archive, archive.open("features.npy") as member:
        if values:
            numbers = np.lib.format.read_array(member, allow_pickle=False)
            return numbers.shape, numbers.dtype, numbers
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(member)
        return shape, dtype, None


_READERS = {".h5": _hdf5, ".npz": _npz}


@dataclass(frozen=True)
class FeatureReader:
    """Reads features by an example's path, ignoring its folder and suffix."""

    source: FeatureStore
    tokens: int
    width: int

    def read(self, path: str) -> Float[Tensor, "tokens channels"]:
        """Reads the features of one file, in float32."""
        features = self.source.read(Path(path).stem).float()
        self._refuse_other_width(path, features.shape[1])
        if not bool(torch.isfinite(features).all()):
            raise BadSample(path, f"its features in {self.source.folder} hold NaN or infinity; compute them again")
        return features

    def stored(self, path: str) -> Stored:
        """Returns the size of features without reading them."""
        stored = self.source.stored(Path(path).stem)
        self._refuse_other_width(path, stored.width)
        return stored

    def _refuse_other_width(self, path: str, width: int) -> None:
        if width != self.width:
            reason = f"its features in {self.source.folder} have {width} numbers per token"
            raise BadSample(path, f"{reason}; the model takes {self.width}")


def features_of(example: Example, reader: FeatureReader) -> Float[Tensor, "images tokens channels"]:
    """Reads the features of an example's pictures, or of its video."""
    paths = feature_paths(example)
    features = [reader.read(path) for path in paths]
    frames = _frames(example, reader, [len(tokens) for tokens in features])
    return torch.stack(
        [fixed_length(tokens, reader.tokens, frames=count) for tokens, count in zip(features, frames, strict=True)]
    )


def check_features(example: Example, reader: FeatureReader) -> None:
    """Refuses what `features_of` would refuse, as far as that is known without reading features."""
    _frames(example, reader, [reader.stored(path).tokens for path in feature_paths(example)])


def feature_paths(example: Example) -> tuple[str, ...]:
    """Returns the paths by which a reader knows an example's features: its pictures', or its video's."""
    clip = clip_of_features(example)
    paths = example.images or (() if clip is None else (clip[0],))
    if not paths:
        raise BadSample(example.id, "it has neither pictures nor a video")
    return tuple(paths)


def _frames(example: Example, reader: FeatureReader, tokens: Sequence[int]) -> list[int]:
    """Returns the number of frames that each path's features come from, as far as their length depends on it.

    Raises: BadSample for another number of a picture's tokens, and for features of another part of a video than the
        example means.
    """
    clip = clip_of_features(example)
    if clip is None and any(count != reader.tokens for count in tokens):
        counts = " and ".join(str(count) for count in dict.fromkeys(tokens))
        raise BadSample(example.id, f"its pictures have {counts} tokens; data.feature_tokens is {reader.tokens}")
    if clip is not None and not example.images:
        part, meant = reader.source.part(Path(clip[0]).stem), part_of(clip[1])
        if part is not None and part != meant:  # they were found only by their name
            raise BadSample(
                example.id,
                f"it is about {describe_part(meant)} of {clip[1].path}, and its features are of "
                f"{describe_part(part)}; compute them with python -m data_prep.features --records of a checkout, in "
                "a folder of their own",
            )
    try:
        frames = []
        for path, count in zip(feature_paths(example), tokens, strict=True):
            # Only where frames count, since files of their own are opened again.
            frames.append(reader.stored(path).frames if count > reader.tokens else 1)
            pooled_frames(count, reader.tokens, frames=frames[-1])
    except UserError as error:
        raise BadSample(example.id, str(error)) from None
    return frames


def part_of(clip: Clip) -> Part:
    """Returns where a clip begins and ends."""
    return clip.start_seconds or 0.0, clip.end_seconds


def describe_part(part: Part) -> str:
    """Formats a part for messages."""
    start, end = part
    if end is None:
        return f"all from {start:g} s on" if start else "the whole"
    return f"{start:g} to {end:g} s"


def clip_of_features(example: Example) -> tuple[str, Clip] | None:
    """Returns the path of a video's features, whose stem is their name, and the part of the file that they cover.

    A span that the prompt states (`extra["ts"]`: TVQA, How2QA, TVC) leaves the features those of the whole file, as
    VALUE's are; any other span is all that the features see. `extra["vid_name"]` is the name of such a part, where
    one file has several (YouCook2's segments).
    """
    if len(example.videos) > 1:
        raise BadSample(example.id, f"it has {len(example.videos)} videos; this task reads one")
    video = example.video
    if video is None:
        return None
    path = PurePosixPath(video.path)
    name = str(path.with_stem(str(example.extra.get("vid_name", path.stem))))
    return name, Clip(path=video.path) if "ts" in example.extra else video


def fixed_length(
    features: Float[Tensor, "frame_tokens channels"], length: int, *, frames: int
) -> Float[Tensor, "length channels"]:
    """Resizes features to as many tokens as every input has: zeros fill them up, max-pooling over time shortens them.

    Each position in a frame is pooled by itself, so that a grid stays a grid. In float32, since pooling float16 fails
    on a CPU.
    """
    tokens = features.float()
    if len(tokens) <= length:
        return functional.pad(tokens, (0, 0, 0, length - len(tokens)))
    by_time = tokens.view(frames, -1).t()[None]  # [1, places x channels, frames]
    pooled = functional.adaptive_max_pool1d(by_time, pooled_frames(len(tokens), length, frames=frames))
    return pooled[0].t().reshape(length, -1)


def pooled_frames(tokens: int, length: int, *, frames: int) -> int:
    """Returns how many frames are left when the tokens of all frames have to become `length` in number."""
    per_frame = tokens // frames
    if tokens <= length:
        return frames
    if length % per_frame:
        raise UserError(
            f"{frames} frames of {per_frame} tokens have to become {length} tokens (data.feature_tokens), which is not "
            f"a multiple of {per_frame}"
        )
    return length // per_frame
