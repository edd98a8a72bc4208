"""Samples in the order in which they come: files interleaved, a shuffle buffer, epochs; the same on every rank.

A stream is the order of a loader whose items are rows instead of their places. The loader's own process reads them and
hands each to a worker, which makes the sample of it. So the number of workers changes nothing, ranks take their
micro-batches as from any other order, and a resumed run passes over what it has seen without decoding a picture.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dora_vl.data.columns import USUAL, Columns, column_lines
from dora_vl.data.containers import HUB, DataFiles, count_rows, find_files, hub_rows, hub_stream
from dora_vl.data.order import TrainFile
from dora_vl.data.pictures import HeldPictures, RowPictureBytes
from dora_vl.data.readers import SampleRow, SampleRowReader, check_usable
from dora_vl.data.samples import ConversationDataset, Rows, Sample, Skipped
from dora_vl.errors import UserError

if TYPE_CHECKING:
    import datasets


# One training file read as it comes: in what order its shards are, which rows a weight takes, how many there are.
#
# `datasets` has a shuffle buffer and interleaving of its own, but divides shards among a loader's workers, so that
# their number would change the order, and does not restore a buffer; its streams are taken for sets of the hub alone.


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


BUFFER_BYTES = 1 << 28
"""Most that the rows of a shuffle buffer hold together, pictures included."""
PASSED_OVER = SampleRow(id="passed over")

logger = logging.getLogger(__name__)


class SampleStream:
    """The rows of several files, epoch by epoch.

    Args:
        sources: the files.
        buffer: rows among which the next one is drawn.
        seed: of every order.
    """

    def __init__(self, sources: Sequence[StreamSource], *, buffer: int, seed: int) -> None:
        self.sources = tuple(sources)
        self._buffer = buffer
        self._seed = seed

    @property
    def samples(self) -> int | None:
        """Samples of an epoch, where every file says how many rows it has."""
        total = 0
        for source in self.sources:
            if source.samples is None:
                return None
            total += source.samples
        return total

    @cached_property
    def has_videos(self) -> bool:
        """Whether a first row of any file names a video; if none does, later ones that do cannot be used.

        Ranks that did not expect videos would wait for each other under ZeRO-3.
        """
        return any(row.video for source in self.sources for row in source.first_rows)

    def rows(self, epoch: int) -> Iterator[SampleRow]:
        """Yields an epoch's rows, an order that is a function of (seed, epoch) alone.

        Raises:
            UserError: a file that cannot be read on, or rows of two formats in one.
        """
        passes = [(source, share, number) for source in self.sources for number, share in enumerate(source.passes)]
        found = [
            source.rows(share=share, order=generator(self._seed, epoch, source.file.path, number))
            for source, share, number in passes
        ]
        mixed = interleaved(
            found,
            [source.estimate * share for source, share, _ in passes],
            generator(self._seed, epoch, "files"),
        )
        rows = shuffled(mixed, self._buffer, generator(self._seed, epoch, "buffer"))
        return rows if self.has_videos else map(_without_video, rows)


def _without_video(row: SampleRow) -> SampleRow:
    unexpected = f"it has a video, and none of a file's first {FIRST_ROWS} rows has; put one among them"
    return replace(row, problem=unexpected) if row.video and row.problem is None else row


def interleaved(
    found: Sequence[Iterator[SampleRow]], weights: Sequence[float], draws: random.Random
) -> Iterator[SampleRow]:
    """Yields all rows of all, each time of one that is drawn by its weight, and of the others when one has ended."""
    left = dict(enumerate(found))
    while len(left) > 1:
        (drawn,) = draws.choices([*left], [weights[number] for number in left])
        row = next(left[drawn], None)
        if row is None:
            del left[drawn]
        else:
            yield row
    yield from chain.from_iterable(left.values())


def shuffled(
    rows: Iterable[SampleRow], size: int, draws: random.Random, *, most_bytes: int = BUFFER_BYTES
) -> Iterator[SampleRow]:
    """Yields each row once, drawn from a buffer of `size` rows, of fewer where they hold more than `most_bytes`."""
    buffer: list[SampleRow] = []
    held = 0
    for row in rows:
        buffer.append(row)
        held += row.size()
        while len(buffer) >= size or held > most_bytes:
            place = draws.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            taken = buffer.pop()
            held -= taken.size()
            yield taken
    draws.shuffle(buffer)
    yield from buffer


class StreamOrder(torch.utils.data.Sampler[SampleRow]):
    """What a loader takes rows from instead of places.

    Where the samples of an epoch are known, an epoch is one pass. Where they are not, one pass of `total` samples is
    the whole run, and the stream begins its next epoch by itself.

    Args:
        stream: the rows.
        total: samples of the whole run; used where the stream does not know its own number.

    Raises: UserError while it is read, as `SampleStream.rows`; or no row at all.
    """

    def __init__(self, stream: SampleStream, *, total: int) -> None:
        self._stream = stream
        self._known = stream.samples
        self._total = total
        self._epoch = 0
        self._passed, self._first_epoch = 0, 0
        self.epoch_samples: int | None = None
        """Samples of an epoch, once one has been read whole; None in a run of known epochs."""

    def __len__(self) -> int:
        return self._total if self._known is None else self._known

    def set_epoch(self, epoch: int) -> None:
        """Every epoch has its own order."""
        self._epoch = epoch

    def resume(self, *, taken: int, epoch_samples: int | None) -> None:
        """Leaves whole epochs unread that a resumed run is past; the loader then skips what it has seen of the next.

        Args:
            taken: samples that all ranks have taken.
            epoch_samples: as the run knew it.
        """
        if self._known is None and epoch_samples:
            self.epoch_samples = epoch_samples
            self._first_epoch = taken // epoch_samples
            self._passed = self._first_epoch * epoch_samples

    def __iter__(self) -> Iterator[SampleRow]:
        if self._known is not None:
            return self._stream.rows(self._epoch)
        passed = (PASSED_OVER for _ in range(self._passed))
        return islice(chain(passed, self._endless()), self._total)

    def _endless(self) -> Iterator[SampleRow]:
        for epoch in count(self._first_epoch):
            rows = 0
            for row in self._stream.rows(epoch):
                rows += 1
                yield row
            if not rows:
                raise UserError("data.train: its weights leave no sample")
            self.epoch_samples = rows
            logger.info("epoch %d has been read: %s samples", epoch + 1, f"{rows:,}")


class StreamedDataset(torch.utils.data.Dataset["Sample | Skipped"]):
    """Makes a sample of each row that a `StreamOrder` gives.

    Args:
        make: the data set of some rows and of the pictures that they hold, as for rows of a table.
        length: samples of an epoch.
    """

    def __init__(self, make: Callable[[Rows, HeldPictures], ConversationDataset], *, length: int) -> None:
        self._make = make
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: SampleRow) -> Sample | Skipped:
        return self._make([row.record()], RowPictureBytes(row.held))[0]
