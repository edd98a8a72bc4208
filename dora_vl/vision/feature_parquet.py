"""Features in sharded Parquet, ours or VL-Adapter's, by the name of their picture or video."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dora_vl.data.feature_input import Part, Stored
from dora_vl.errors import BadSample, UserError

ID, FEATURES, SHAPE, INDICES = "id", "features", "shape", "frame_indices"
START, END = "start_seconds", "end_seconds"
CACHE_BYTES = 256 * 2**20
OPEN_SHARDS = 64  # each keeps its list of groups, about a megabyte


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
        self._stored: dict[tuple[int, int], list[Stored]] = {}
        self._places: dict[str, _Place] = {}
        for number, shard in enumerate(self._shards):
            try:
                with parquet.ParquetFile(shard) as opened:
                    self._places.update(_places(opened, number, shard))
            except (OSError, ValueError) as error:  # pyarrow's own errors are these
                raise UserError(f"{shard} cannot be read ({_first_line(error)}); copy it again") from error

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> Iterator[str]:
        """See `FeatureSource`."""
        return iter(self._places)

    def read(self, name: str) -> Float[Tensor, "tokens width"]:
        """See `FeatureSource`."""
        place = self._places.get(name)
        if place is None:
            raise absent(name, self._folder)
        with _readable(name, self._shards[place.shard]):
            return self._group(place).row(place.row)

    def stored(self, name: str) -> Stored:
        """See `FeatureSource`; ours say which frames they are of, and none for a picture."""
        place = self._places.get(name)
        if place is None:
            raise absent(name, self._folder)
        key = (place.shard, place.group)
        if key not in self._stored:
            with _readable(name, self._shards[place.shard]):
                self._stored[key] = _stored_in(self._opened(place.shard), place.group, self._shards[place.shard])
        return self._stored[key][place.row]

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


def _places(opened: Any, number: int, shard: Path) -> Iterator[tuple[str, _Place]]:
    """Names in an open shard and where each is; shards made before parts were kept do not say them."""
    missing = {ID, FEATURES} - set(opened.schema_arrow.names)
    if missing:
        raise UserError(f"{shard} has no column {sorted(missing)[0]!r}, so it holds no features")
    columns = [name for name in (ID, START, END) if name in opened.schema_arrow.names]
    for group in range(opened.num_row_groups):
        for row, entry in enumerate(opened.read_row_group(group, columns=columns).to_pylist()):
            yield str(entry[ID]), _Place(number, group, row, (entry[START], entry[END]) if START in entry else None)


@contextmanager
def _readable(name: str, shard: Path) -> Iterator[None]:
    """Turns what pyarrow says of a damaged shard into a `BadSample`."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise BadSample(name, f"features of {name} in {shard} cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _stored_in(opened: Any, group: int, shard: Path) -> list[Stored]:
    """What a group's rows are, from its small columns or from its type; no features are read."""
    columns = [name for name in (SHAPE, INDICES) if name in opened.schema_arrow.names]
    if SHAPE not in columns:
        sizes = _fixed_sizes(opened.schema_arrow.field(FEATURES).type)
        if not sizes:
            raise UserError(f"{shard}: column {FEATURES!r} has rows of different lengths and no column {SHAPE!r}")
        tokens = math.prod(sizes[:-1])
        return [Stored(tokens, sizes[-1], tokens)] * opened.metadata.row_group(group).num_rows
    table = opened.read_row_group(group, columns=columns)
    shapes = table[SHAPE].to_pylist()
    frames = table[INDICES].to_pylist() if INDICES in columns else [None] * len(shapes)
    return [
        Stored(tokens, shape[-1], tokens if indices is None else max(1, len(indices)))
        for shape, indices in zip(shapes, frames, strict=True)
        for tokens in [math.prod(shape[:-1])]
    ]


def _fixed_sizes(kind: Any) -> list[int]:
    """Sizes of nested lists of fixed sizes, from the outside in."""
    import pyarrow as pa

    sizes = []
    while pa.types.is_nested(kind):
        if pa.types.is_fixed_size_list(kind):
            sizes.append(kind.list_size)
        kind = kind.value_type
    return sizes


@dataclass(frozen=True)
class _Group:
    """Rows of one group: all numbers in one array, where each row begins, and its shape."""

    numbers: np.ndarray
    starts: np.ndarray
    shapes: list[list[int]]

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

    columns = [name for name in (FEATURES, SHAPE) if name in opened.schema_arrow.names]
    table = opened.read_row_group(group, columns=columns)
    column = table[FEATURES].combine_chunks()
    rows, fixed = len(column), _fixed_sizes(column.type)
    starts = column.offsets.to_numpy() if pa.types.is_list(column.type) else None
    while pa.types.is_nested(column.type):
        column = column.flatten()
    numbers = column.to_numpy(zero_copy_only=False)
    if SHAPE in columns and starts is not None:
        return _Group(numbers, starts - starts[0], table[SHAPE].to_pylist())
    if not fixed or np.prod(fixed) * rows != len(numbers):
        raise UserError(f"{shard}: column {FEATURES!r} has rows of different lengths and no column {SHAPE!r}")
    return _Group(numbers, np.arange(rows) * int(np.prod(fixed)), [fixed] * rows)


def absent(name: str, folder: Path) -> BadSample:
    """What is said of a name that a folder has no features of."""
    return BadSample(name, f"{folder} holds no features of {name}; python -m data_prep.features computes them")
