"""Stored features by the name of their picture or video, whoever wrote them.

Beside our own store these forms are read, and no longer written: Parquet shards, VL-Adapter's re-hosted ones and those
that earlier versions of ours wrote; VL-Adapter's tree of one HDF5 file a picture; VALUE's folder of one `.npz` a video.
`open_features` tells them apart by what the folder holds.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dora_vl.data.feature_input import FeatureStore, Part, Stored
from dora_vl.errors import BadSample, UserError
from dora_vl.vision.features import FEATURES, SHARD_SUFFIX, shard_rows

CACHE_BYTES = 256 * 2**20
OPEN_SHARDS = 64  # each keeps its list of groups, about a megabyte
_DAMAGE = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)
"""What numpy and h5py raise on files that are damaged or hold something else."""
Taken = TypeVar("Taken")


def open_features(folder: Path) -> FeatureStore:
    """The features in a folder.

    Raises:
        UserError: no such folder, or nothing in it that is known; it says what was looked for.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of features; python -m data_prep.features makes one")
    forms = {SHARD_SUFFIX: open_shards, PARQUET_SUFFIX: open_shards, ".h5": hdf5_features, ".npz": npz_features}
    for suffix, form in forms.items():
        if next(folder.glob(f"*{suffix}"), None) is not None:
            return form(folder)
    raise UserError(f"{folder} holds no features: no {', '.join(f'*{suffix}' for suffix in forms)} in it")


def open_shards(folder: Path) -> FeatureStore:
    """What is in our own shards, and in Parquet, which they may have been added to."""
    return FeatureStore(folder, {**ParquetShards(folder).rows(), **shard_rows(folder)})


PARQUET_SUFFIX = ".parquet"
ID, SHAPE, INDICES, START, END = "id", "shape", "frame_indices", "start_seconds", "end_seconds"


class ParquetShards:
    """Parquet shards with the columns `id` and `features`.

    Earlier versions of ours hold each row's numbers in one list, with their `shape` beside; VL-Adapter's nested lists
    of fixed sizes. Groups of rows that were read last stay in memory, up to `cache_bytes`; so do the shards used last.
    """

    def __init__(self, folder: Path, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._paths = sorted(folder.glob(f"*{PARQUET_SUFFIX}"))
        self._cache_bytes = cache_bytes
        self._groups: OrderedDict[tuple[Path, int], _Group] = OrderedDict()
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def rows(self) -> dict[str, ParquetRow]:
        """What they hold, by name.

        Raises:
            UserError: a file cannot be read, or is no shard of features.
        """
        found: dict[str, ParquetRow] = {}
        for path in self._paths:
            try:
                with _parquet_file(path) as opened:
                    found |= self._rows_of(path, opened)
            except (OSError, ValueError) as error:  # pyarrow's own errors are these
                raise UserError(f"{path} cannot be read ({_first_line(error)}); copy it again") from error
        return found

    def _rows_of(self, path: Path, opened: Any) -> dict[str, ParquetRow]:
        """From its small columns, or the type of a large one, which is not read; the oldest shards say no parts."""
        columns = set(opened.schema_arrow.names)
        if missing := {ID, FEATURES} - columns:
            raise UserError(f"{path} has no column {sorted(missing)[0]!r}, so it holds no features")
        fixed = _fixed_sizes(opened.schema_arrow.field(FEATURES).type)
        if SHAPE not in columns and not fixed:
            raise UserError(f"{path}: column {FEATURES!r} has rows of different lengths and no column {SHAPE!r}")
        small = [name for name in (ID, SHAPE, INDICES, START, END) if name in columns]
        found: dict[str, ParquetRow] = {}
        for group in range(opened.num_row_groups):
            for row, entry in enumerate(opened.read_row_group(group, columns=small).to_pylist()):
                name, shape, frames = str(entry[ID]), entry.get(SHAPE, fixed), entry.get(INDICES)
                tokens = math.prod(shape[:-1])
                stored = Stored(tokens, shape[-1], tokens if frames is None else max(1, len(frames)))
                part = (entry[START], entry[END]) if START in entry else None
                found[name] = ParquetRow(name, self, path, group, row, stored, part)
        return found

    def group(self, path: Path, number: int) -> _Group:
        """A shard's group of rows, from memory or the file."""
        key = (path, number)
        if key not in self._groups:
            self._groups[key] = _read_group(self._opened(path), number)
            while len(self._groups) > 1 and self._group_bytes() > self._cache_bytes:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _group_bytes(self) -> int:
        return sum(group.numbers.nbytes for group in self._groups.values())

    def _opened(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = _parquet_file(path)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(path)
        return self._open[path]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": OrderedDict(), "_open": OrderedDict()}


@dataclass(frozen=True, slots=True)
class ParquetRow:
    """Where one name's features are, and what they are; a `Held`."""

    name: str
    shards: ParquetShards
    path: Path
    group: int
    row: int
    shape: Stored
    part: Part | None

    def stored(self) -> Stored:
        """See `Held`; ours say which frames they are of, and none for a picture."""
        return self.shape

    def read(self) -> Float[Tensor, "tokens width"]:
        """See `Held`."""
        try:
            return self.shards.group(self.path, self.group).row(self.row, self.shape)
        except (OSError, ValueError) as error:
            reason = f"features of {self.name} in {self.path} cannot be read: {_first_line(error)}"
            raise BadSample(self.name, reason) from None


def _parquet_file(path: Path) -> Any:
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(path)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _fixed_sizes(kind: Any) -> list[int]:
    """Sizes of nested lists of fixed sizes, from the outside in; nothing where one is of any length."""
    import pyarrow as pa

    sizes = []
    while pa.types.is_nested(kind):
        if not pa.types.is_fixed_size_list(kind):
            return []
        sizes.append(kind.list_size)
        kind = kind.value_type
    return sizes


@dataclass(frozen=True)
class _Group:
    """Rows of one group: all numbers in one array, and where each row begins; None where all are equally long."""

    numbers: np.ndarray
    starts: np.ndarray | None

    def row(self, number: int, stored: Stored) -> Tensor:
        length = stored.tokens * stored.width
        start = number * length if self.starts is None else int(self.starts[number])
        return torch.from_numpy(self.numbers[start : start + length].copy()).view(stored.tokens, stored.width)


def _read_group(opened: Any, group: int) -> _Group:
    import pyarrow as pa

    column = opened.read_row_group(group, columns=[FEATURES])[FEATURES].combine_chunks()
    starts = column.offsets.to_numpy() if pa.types.is_list(column.type) else None
    while pa.types.is_nested(column.type):
        column = column.flatten()
    return _Group(column.to_numpy(zero_copy_only=False), None if starts is None else starts - starts[0])


@dataclass(frozen=True, slots=True)
class FeatureFile:
    """One picture's or video's file, under its name; a `Held`.

    Attributes:
        load: what it holds; it may raise what `_DAMAGE` names.
        shape_of: shape and dtype of that, from the file's header alone; likewise.
    """

    path: Path
    load: Callable[[Path], np.ndarray]
    shape_of: Callable[[Path], tuple[tuple[int, ...], np.dtype]]
    part: Part | None = None

    def read(self) -> Float[Tensor, "tokens width"]:
        """See `Held`."""
        values = self._taken(self.load)
        self._refuse_no_table(values.shape, values.dtype)
        return torch.from_numpy(values).flatten(0, -2)

    def stored(self) -> Stored:
        """See `Held`."""
        shape, dtype = self._taken(self.shape_of)
        self._refuse_no_table(shape, dtype)
        tokens = math.prod(shape[:-1])
        return Stored(tokens, shape[-1], tokens)

    def _taken(self, take: Callable[[Path], Taken]) -> Taken:
        try:
            return take(self.path)
        except _DAMAGE as error:
            raise BadSample(
                self.path.stem, f"features {self.path.name} in {self.path.parent} cannot be read: {error}"
            ) from None

    def _refuse_no_table(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        name = self.path.stem
        if len(shape) < 2 or not np.issubdtype(dtype, np.floating):
            raise BadSample(name, f"features of {name} are {dtype} of shape {tuple(shape)}, not a table of numbers")


def hdf5_features(folder: Path) -> FeatureStore:
    """VL-Adapter's tree: `<name>.h5` for each picture, in it a group of that name with `features`. Needs h5py."""
    files = (FeatureFile(path, _load_hdf5, _shape_in_hdf5) for path in folder.glob("*.h5"))
    return FeatureStore(folder, {file.path.stem: file for file in files})


def npz_features(folder: Path) -> FeatureStore:
    """VALUE's folder: `<name>.npz` for each video, in it an array `features`."""
    files = (FeatureFile(path, _load_npz, _shape_in_npz) for path in folder.glob("*.npz"))
    return FeatureStore(folder, {file.path.stem: file for file in files})


def _load_hdf5(path: Path) -> np.ndarray:
    import h5py

    with h5py.File(path, "r") as opened:
        stored: Any = opened[f"{path.stem}/{FEATURES}"]
        return np.asarray(stored)


def _shape_in_hdf5(path: Path) -> tuple[tuple[int, ...], np.dtype]:
    import h5py

    with h5py.File(path, "r") as opened:
        stored: Any = opened[f"{path.stem}/{FEATURES}"]
        return tuple(stored.shape), stored.dtype


def _load_npz(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as opened:
        return opened[FEATURES]


def _shape_in_npz(path: Path) -> tuple[tuple[int, ...], np.dtype]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{FEATURES}.npy") as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(member)
        return shape, dtype
