"""Features that were computed before, by the name of their picture or video, whoever wrote them.

Four forms: sharded Parquet of ours (`feature_shards`), VL-Adapter's re-hosted Parquet shards, its tree of one HDF5 file
a picture, and VALUE's folder of one `.npz` a video. `open_features` tells them apart by what the folder holds.
"""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dora_vl.data.feature_input import Part
from dora_vl.errors import BadSample, UserError

ID, FEATURES, SHAPE, INDICES = "id", "features", "shape", "frame_indices"
START, END = "start_seconds", "end_seconds"
CACHE_BYTES = 256 * 2**20
OPEN_SHARDS = 64  # each keeps its list of groups, about a megabyte


@runtime_checkable
class FeatureSource(Protocol):
    """Features by name; can be sent to worker processes."""

    def __contains__(self, name: str) -> bool:
        """Whether there are features of this picture or video."""
        ...

    def names(self) -> Iterator[str]:
        """All that there are."""
        ...

    def read(self, name: str) -> Float[Tensor, "tokens width"]:
        """One picture's or video's features, in the dtype they are stored in.

        Raises:
            BadSample: there are none, or they cannot be read.
        """
        ...

    def frames(self, name: str) -> int:
        """How many frames these features are of; where nothing says it, each token is one.

        Raises:
            BadSample: as in `read`.
        """
        ...

    def part(self, name: str) -> Part | None:
        """The part of a video that they are of; None where nothing says it, or there are none."""
        ...


def open_features(folder: Path) -> FeatureSource:
    """The features in a folder.

    Raises:
        UserError: no such folder, or nothing in it that is known; it says what was looked for.
    """
    forms: dict[str, Callable[[Path], FeatureSource]] = {
        ".parquet": ParquetFeatures,
        ".h5": hdf5_features,
        ".npz": npz_features,
    }
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of features; python -m data_prep.features makes one")
    for suffix, form in forms.items():
        if next(folder.glob(f"*{suffix}"), None) is not None:
            return form(folder)
    raise UserError(f"{folder} holds no features: no {', '.join(f'*{suffix}' for suffix in forms)} in it")


@dataclass(frozen=True)
class _Place:
    shard: int
    group: int
    row: int
    part: Part | None = None


class ParquetFeatures:
    """Parquet shards with the columns `id` and `features`.

    Ours hold each row's numbers in one list, with their `shape` beside; VL-Adapter's hold nested lists of fixed sizes.
    Groups of rows that were read last stay in memory, up to `cache_bytes`, and the shards used last stay open.
    """

    def __init__(self, folder: Path, *, cache_bytes: int = CACHE_BYTES) -> None:
        import pyarrow.parquet as parquet

        self._folder = folder
        self._shards = sorted(folder.glob("*.parquet"))
        self._cache_bytes = cache_bytes
        self._groups: OrderedDict[tuple[int, int], _Group] = OrderedDict()
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._places: dict[str, _Place] = {}
        for number, shard in enumerate(self._shards):
            with parquet.ParquetFile(shard) as opened:
                missing = {ID, FEATURES} - set(opened.schema_arrow.names)
                if missing:
                    raise UserError(f"{shard} has no column {sorted(missing)[0]!r}, so it holds no features")
                for group in range(opened.num_row_groups):
                    self._places.update(_places(opened, number, group))

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> Iterator[str]:
        """See `FeatureSource`."""
        return iter(self._places)

    def read(self, name: str) -> Float[Tensor, "tokens width"]:
        """See `FeatureSource`."""
        place = self._places.get(name)
        if place is None:
            raise _absent(name, self._folder)
        return self._group(place).row(place.row)

    def frames(self, name: str) -> int:
        """See `FeatureSource`; ours say which frames they are of, and none for a picture."""
        tokens = len(self.read(name))
        place = self._places[name]
        counts = self._group(place).frames
        return tokens if counts is None else max(1, counts[place.row])

    def part(self, name: str) -> Part | None:
        """See `FeatureSource`."""
        place = self._places.get(name)
        return None if place is None else place.part

    def _group(self, place: _Place) -> _Group:
        key = (place.shard, place.group)
        if key not in self._groups:
            self._groups[key] = _read_group(self._opened(place.shard), place.group, self._shards[place.shard])
            while len(self._groups) > 1 and sum(group.bytes for group in self._groups.values()) > self._cache_bytes:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _opened(self, shard: int) -> Any:
        import pyarrow.parquet as parquet

        if shard not in self._open:
            self._open[shard] = parquet.ParquetFile(self._shards[shard])
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": OrderedDict(), "_open": OrderedDict()}


def _places(shard: Any, number: int, group: int) -> Iterator[tuple[str, _Place]]:
    """Names in a group of an open shard and where each is; shards made before parts were kept do not say them."""
    columns = [name for name in (ID, START, END) if name in shard.schema_arrow.names]
    for row, entry in enumerate(shard.read_row_group(group, columns=columns).to_pylist()):
        yield str(entry[ID]), _Place(number, group, row, (entry[START], entry[END]) if START in entry else None)


@dataclass(frozen=True)
class _Group:
    """Rows of one group: all numbers in one array, where each row begins, its shape, and its frames if that is said."""

    numbers: np.ndarray
    starts: np.ndarray
    shapes: list[list[int]]
    frames: list[int] | None = None

    @property
    def bytes(self) -> int:
        return self.numbers.nbytes

    def row(self, number: int) -> Tensor:
        shape = self.shapes[number]
        start = int(self.starts[number])
        values = self.numbers[start : start + int(np.prod(shape))]
        return torch.from_numpy(values.copy()).view(-1, shape[-1])


def _read_group(opened: Any, group: int, shard: Path) -> _Group:
    import pyarrow as pa

    columns = [name for name in (FEATURES, SHAPE, INDICES) if name in opened.schema_arrow.names]
    table = opened.read_row_group(group, columns=columns)
    column = table[FEATURES].combine_chunks()
    rows, fixed = len(column), []
    starts = column.offsets.to_numpy() if pa.types.is_list(column.type) else None
    while pa.types.is_nested(column.type):
        if pa.types.is_fixed_size_list(column.type):
            fixed.append(column.type.list_size)
        column = column.flatten()
    numbers = column.to_numpy(zero_copy_only=False)
    if SHAPE in columns and starts is not None:
        frames = [len(indices) for indices in table[INDICES].to_pylist()] if INDICES in columns else None
        return _Group(numbers, starts - starts[0], table[SHAPE].to_pylist(), frames)
    if not fixed or np.prod(fixed) * rows != len(numbers):
        raise UserError(f"{shard}: column {FEATURES!r} has rows of different lengths and no column {SHAPE!r}")
    return _Group(numbers, np.arange(rows) * int(np.prod(fixed)), [fixed] * rows)


@dataclass(frozen=True)
class FilePerName:
    """A folder with one file for each picture or video, under its name.

    Attributes:
        suffix: of those files.
        load: what a file holds for a name; it may raise OSError, KeyError, ValueError and BadZipFile.
    """

    folder: Path
    suffix: str
    load: Callable[[Path, str], np.ndarray]

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def names(self) -> Iterator[str]:
        """See `FeatureSource`."""
        return (path.stem for path in self.folder.glob(f"*{self.suffix}"))

    def read(self, name: str) -> Float[Tensor, "tokens width"]:
        """See `FeatureSource`."""
        path = self._path(name)
        if not path.is_file():
            raise _absent(name, self.folder)
        try:
            values = self.load(path, name)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise BadSample(name, f"features {path.name} in {self.folder} cannot be read: {error}") from None
        return _two_axes(torch.from_numpy(values), name)

    def frames(self, name: str) -> int:
        """See `FeatureSource`."""
        return len(self.read(name))

    def part(self, name: str) -> Part | None:
        """See `FeatureSource`."""
        return None

    def _path(self, name: str) -> Path:
        if not name or "/" in name or "\\" in name or "\0" in name:
            raise BadSample(name, f"{name!r} cannot be a file's name, so {self.folder} has no features of it")
        return self.folder / f"{name}{self.suffix}"


def hdf5_features(folder: Path) -> FilePerName:
    """VL-Adapter's tree: `<name>.h5` for each picture, in it a group of that name with `features`. Needs h5py."""
    return FilePerName(folder, ".h5", _load_hdf5)


def npz_features(folder: Path) -> FilePerName:
    """VALUE's folder: `<name>.npz` for each video, in it an array `features`."""
    return FilePerName(folder, ".npz", _load_npz)


def _load_hdf5(path: Path, name: str) -> np.ndarray:
    import h5py

    with h5py.File(path, "r") as opened:
        stored: Any = opened[f"{name}/{FEATURES}"]
        return np.asarray(stored)


def _load_npz(path: Path, name: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as opened:
        return opened[FEATURES]


def _absent(name: str, folder: Path) -> BadSample:
    return BadSample(name, f"{folder} holds no features of {name}; python -m data_prep.features computes them")


def _two_axes(values: Tensor, name: str) -> Tensor:
    if values.dim() < 2 or not values.dtype.is_floating_point:
        raise BadSample(name, f"features of {name} are {values.dtype} of shape {tuple(values.shape)}, not a table")
    return values.flatten(0, -2)
