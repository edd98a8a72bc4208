"""One training file read as it comes: in what order its shards are, which rows a weight takes, how many there are.

`datasets` has a shuffle buffer and interleaving of its own, but divides shards among a loader's workers, so that their
number would change the order, and does not restore a buffer; its streams are taken for sets of the hub alone.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from dora_vl.data.readers.columns import USUAL, Columns, column_lines
from dora_vl.data.readers.containers import HUB, DataFiles, count_rows, find_files, hub_rows, hub_stream
from dora_vl.data.sample_rows import SampleRow, SampleRowReader, check_usable
from dora_vl.data.train_files import TrainFile

if TYPE_CHECKING:
    import datasets

FIRST_ROWS = 64
"""Read before training: they show the format, and how long rows are."""
UNKNOWN_ROWS = 1000
Record = Mapping[str, object]


def generator(*key: object) -> random.Random:
    """A generator that is a function of the key alone."""
    return random.Random("/".join(map(str, key)).encode("utf-8", "surrogateescape"))


@dataclass(frozen=True)
class _Files:
    """Files of this machine, each a shard."""

    found: DataFiles

    def shards(self, order: random.Random | None) -> Iterator[tuple[str, Iterator[Record]]]:
        files = list(self.found.files)
        if order is not None:
            order.shuffle(files)
        yield from ((file.name, DataFiles(self.found.name, (file,)).rows()) for file in files)

    def count(self) -> int | None:
        total = 0
        for file in self.found.files:
            rows = count_rows(file)
            if rows is None:
                return None
            total += rows
        return total

    def estimate(self) -> float:
        first = [_written_bytes(record) for record in islice(self.found.rows(), FIRST_ROWS)]
        return sum(file.stat().st_size for file in self.found.files) * len(first) / max(1, sum(first))


@dataclass(frozen=True)
class _Hub:
    """A set of the hub, fetched while it is read."""

    name: str
    stream: datasets.IterableDataset

    def shards(self, order: random.Random | None) -> Iterator[tuple[str, Iterator[Record]]]:
        # A buffer of one: it is the order of its files alone that is shuffled here.
        stream = self.stream if order is None else self.stream.shuffle(seed=order.getrandbits(32), buffer_size=1)
        yield "", hub_rows(self.name, stream)

    def count(self) -> int | None:
        return None  # what a set's card says may be of another day

    def estimate(self) -> float:
        split = (self.stream.info.splits or {}).get(str(self.stream.split))
        return float(UNKNOWN_ROWS if split is None else split.num_examples or UNKNOWN_ROWS)


class StreamSource:
    """One training file with its weight.

    Args:
        file: what `data.train` says of it.
        limit: only the first so many rows.
        columns: what its columns are.
        seed: which rows a weight that is no whole number takes once more; they are the same in every epoch.
    """

    def __init__(self, file: TrainFile, *, limit: int | None, seed: int, columns: Columns = USUAL) -> None:
        self.file = file
        self._limit = limit
        self._seed = seed
        self._columns = columns
        self._container = _container(file.path)
        self.fraction = math.fmod(file.weight, 1)

    @property
    def passes(self) -> list[float]:
        """The share of the rows in each pass of an epoch over the file: 2.5 is 1, 1 and 0.5."""
        return [1.0] * int(self.file.weight) + [self.fraction] * (self.fraction > 0)

    def rows(self, *, share: float = 1.0, order: random.Random | None = None) -> Iterator[SampleRow]:
        """Yields the rows of one pass.

        Args:
            share: of the rows; about as many, chosen by (seed, file, place).
            order: of the shards; None, or a limit, leaves them as they are.

        Raises:
            UserError: a row of another format than the first, or a file that cannot be read on.
        """
        reader, name = SampleRowReader(self.file.path, self._columns), Path(self.file.path).name
        mixed = order if self._limit is None and (share == 1 or isinstance(self._container, _Files)) else None
        found = (
            (record, number, shard)
            for shard, records in self._container.shards(mixed)
            for number, record in enumerate(records)
        )
        drawn: dict[str, random.Random] = {}
        for record, number, shard in islice(found, self._limit):
            if share < 1 and self._draws(shard, drawn).random() >= share:
                continue
            yield reader.read(self._with_shard(record, number, shard, name), number).encodable()

    def _draws(self, shard: str, drawn: dict[str, random.Random]) -> random.Random:
        """What says of each row of a shard in turn whether it is taken."""
        if shard not in drawn:
            drawn[shard] = generator(self._seed, self.file.path, shard)
        return drawn[shard]

    @cached_property
    def first_rows(self) -> list[SampleRow]:
        """Its first rows.

        Raises:
            UserError: it cannot be read, holds no rows, or none of these can be a sample.
        """
        found = list(islice(self.rows(), FIRST_ROWS))
        usable = [row for row in found if row.problem is None]
        check_usable(self.file.path, len(found), len(usable), next((row.problem for row in found if row.problem), None))
        return found

    @cached_property
    def count(self) -> int | None:
        """Rows of a pass over all of it, where they are known without reading them."""
        rows = self._container.count()
        return rows if rows is None or self._limit is None else min(rows, self._limit)

    @property
    def samples(self) -> int | None:
        """Samples of an epoch, where they are known without reading: the rows as often as a whole weight says."""
        return None if self.count is None or self.fraction else self.count * int(self.file.weight)

    @cached_property
    def estimate(self) -> float:
        """About how many rows it has, from the length of the first ones where it is not known."""
        if self.count is not None:
            return float(self.count)
        rows = max(1.0, self._container.estimate())
        return rows if self._limit is None else min(rows, float(self._limit))

    def described(self) -> list[str]:
        """Lines about it: name, format, rows where they are known, the weight, and what its first rows' columns are."""
        form = next((row.format for row in self.first_rows if row.format), "no known format")
        rows = "" if self.count is None else f", {self.count:,} rows"
        weight = "" if self.file.weight == 1 else f", weight {self.file.weight:g}"
        first = f"{Path(self.file.path).name}: {form}{rows}, streamed{weight}"
        return [first, *column_lines(row.columns for row in self.first_rows)]

    def _with_shard(self, record: Record, number: int, shard: str, name: str) -> Record:
        """With the shard in the name of a row that has none: its place alone would name several."""
        if shard in ("", name) or self._columns.id_of(record) is not None:
            return record
        return {**record, "id": f"{shard}, record {number}"}


def _container(path: str) -> _Files | _Hub:
    if path.startswith(HUB):
        name = path.removeprefix(HUB)
        return _Hub(name, hub_stream(name))
    return _Files(find_files(Path(path)))


def _written_bytes(record: Record) -> int:
    """About how long a row is in a file: as a line of JSON, bytes as a member of an archive (with its header)."""
    return len(json.dumps(record, ensure_ascii=False, default=lambda value: "x" * (len(value) + 1024)))
