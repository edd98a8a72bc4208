"""Streams samples without reading a whole file first: interleaved files, a shuffle buffer, the same on every rank.

A stream is the order of a loader whose items are examples instead of indices. The loader's own process reads them
and hands each to a worker, which makes the sample of it. So the number of workers changes nothing, ranks take their
micro-batches as from any other order, and a resumed run passes over what it has seen without decoding a picture.

`datasets` has a shuffle buffer and interleaving of its own, but divides shards among a loader's workers, so that their
number would change the order, and does not restore a buffer; its streams are used for sets of the hub only.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, count, islice, repeat
from pathlib import Path
from typing import Any

import torch

from dora_vl.data.check import NO_PICTURE, find_doubts
from dora_vl.data.columns import USUAL, Columns, TrainFile, column_lines
from dora_vl.data.containers import HUB, count_rows, hub_rows, hub_set
from dora_vl.data.data_files import DataFiles, find_files, split_of
from dora_vl.data.example import Example
from dora_vl.data.pictures import HeldPictures
from dora_vl.data.readers import RowReader, check_usable
from dora_vl.data.samples import ConversationDataset, Examples, Sample, Skipped
from dora_vl.data.table import characters_of
from dora_vl.errors import BadSample, UserError

FIRST_ROWS = 64  # read before training: they show the format, and how long rows are
UNKNOWN_ROWS = 1000
BUFFER_BYTES = 1 << 28  # of all rows of a shuffle buffer together, pictures included

RawRow = Mapping[str, object]
ExampleOrBad = Example | BadSample

logger = logging.getLogger(__name__)


def _generator(*key: object) -> random.Random:
    return random.Random("/".join(map(str, key)).encode("utf-8", "surrogateescape"))


class StreamSource:
    """One training file, read as it comes, with its weight.

    With a fractional weight some rows, chosen by the seed, are read once more, the same ones in every epoch.
    """

    def __init__(self, file: TrainFile, *, limit: int | None, seed: int, columns: Columns = USUAL) -> None:
        self.file = file
        self._limit = limit
        self._seed = seed
        self._reader = RowReader(file.path, columns)
        self._columns = columns
        self._hub: Any = hub_set(file.path.removeprefix(HUB), streaming=True) if file.path.startswith(HUB) else None
        self._files = DataFiles(file.path, ()) if self._hub is not None else find_files(Path(file.path))
        self.fraction = math.fmod(file.weight, 1)
        self._has_media, self._doubts = False, set[str]()
        self._splits = set[str | None]()

    @property
    def passes(self) -> list[float]:
        """Lists the share of the rows in each pass of an epoch over the file: 2.5 is 1, 1 and 0.5."""
        return [1.0] * int(self.file.weight) + [self.fraction] * (self.fraction > 0)

    def rows(self, *, share: float = 1.0, rng: random.Random | None = None) -> Iterator[ExampleOrBad]:
        """Yields the rows of one pass, or about this share of them, chosen by (seed, file, place)."""
        # A share of a set of the hub is drawn by the numbers of its rows, which shuffled shards would change.
        shard_rng = rng if self._limit is None and (share == 1 or self._hub is None) else None
        taken = 0
        for shard, records in self._shards(shard_rng):
            row_rng = _generator(self._seed, self.file.path, shard)
            for number, record in enumerate(islice(records, None if self._limit is None else self._limit - taken)):
                taken += 1
                self._refuse_several_splits(record)
                if share < 1 and row_rng.random() >= share:
                    continue
                if shard not in ("", Path(self.file.path).name) and not self._columns.id_of(record, ""):
                    record = {**record, "id": f"{shard}, row {number + 1}"}  # its number by itself would name several
                row = self._reader.read(record, number)
                if isinstance(row, Example):
                    self._warn(record, row)
                yield row

    def _refuse_several_splits(self, record: RawRow) -> None:
        self._splits.update({split_of(record)} - {None})
        if len(self._splits) > 1:
            names = " and ".join(sorted(map(str, self._splits)))
            message = f"{self.file.path}: its rows are of {names}, and a stream takes all; write one file a split"
            raise UserError(message)

    def _warn(self, record: RawRow, row: Example) -> None:
        """Names the first row of each kind that is probably not meant; a stream is not counted before it is read."""
        self._has_media |= bool(row.images or row.videos)
        for doubt in find_doubts(record, row, self._reader.format, self._columns):
            if doubt not in self._doubts and (doubt != NO_PICTURE or self._has_media):
                self._doubts.add(doubt)
                logger.warning("%s: %s: %s and perhaps others, which check-data counts", self.file.path, doubt, row.id)

    def _shards(self, rng: random.Random | None) -> Iterator[tuple[str, Iterator[RawRow]]]:
        if self._hub is not None:
            # A buffer of one: only the order of its files is shuffled here.
            stream = self._hub if rng is None else self._hub.shuffle(seed=rng.getrandbits(32), buffer_size=1)
            yield "", hub_rows(self.file.path.removeprefix(HUB), stream)
            return
        files = list(self._files.files)
        if rng is not None:
            rng.shuffle(files)
        yield from ((file.name, replace(self._files, files=(file,)).rows()) for file in files)

    @cached_property
    def first_rows(self) -> list[ExampleOrBad]:
        """Reads the first rows; refuses a file of which none is usable."""
        rows = list(islice(self.rows(), FIRST_ROWS))
        problems = [row.reason for row in rows if isinstance(row, BadSample)]
        check_usable(self.file.path, len(rows), len(rows) - len(problems), next(iter(problems), None))
        return rows

    @cached_property
    def count(self) -> int | None:
        """Counts the rows of a pass over all of it, where that is known without reading them."""
        if self._hub is not None:
            return None  # what a set's card says may be of another day
        counts = list(map(count_rows, self._files.files))
        if None in counts:
            return None
        rows = sum(filter(None, counts))
        return rows if self._limit is None else min(rows, self._limit)

    @property
    def samples(self) -> int | None:
        """Samples of an epoch, where they are known without reading: the rows as often as a whole weight says."""
        return None if self.count is None or self.fraction else self.count * int(self.file.weight)

    @cached_property
    def estimate(self) -> float:
        """Estimates its rows, from the length of the first ones where the number is not known."""
        if self.count is not None:
            return float(self.count)
        if self._hub is not None:
            split = (self._hub.info.splits or {}).get(str(self._hub.split))
            rows = float(UNKNOWN_ROWS if split is None else split.num_examples or UNKNOWN_ROWS)
        else:
            # As a line of JSON, bytes as a member of an archive (with its header).
            first = [
                len(json.dumps(record, ensure_ascii=False, default=lambda value: "x" * (len(value) + 1024)))
                for record in islice(self._files.rows(), FIRST_ROWS)
            ]
            rows = sum(file.stat().st_size for file in self._files.files) * len(first) / max(1, sum(first))
        return max(1.0, rows if self._limit is None else min(rows, float(self._limit)))

    def described(self) -> list[str]:
        """Describes the file in lines: name, format, rows if they are known, weight, and its first rows' columns."""
        _ = self.first_rows
        rows = "" if self.count is None else f", {self.count:,} rows"
        weight = "" if self.file.weight == 1 else f", weight {self.file.weight:g}"
        form = self._reader.format or "no known format"
        return [f"{Path(self.file.path).name}: {form}{rows}, streamed{weight}", *column_lines(self._reader.uses)]


class SampleStream:
    """The rows of several files, epoch by epoch."""

    def __init__(self, sources: Sequence[StreamSource], *, buffer: int, seed: int) -> None:
        self.sources = tuple(sources)
        self._buffer = buffer
        self._seed = seed

    @property
    def samples(self) -> int | None:
        """Samples of an epoch, where every file says how many rows it has."""
        counts = [source.samples for source in self.sources]
        return None if None in counts else sum(filter(None, counts))

    @cached_property
    def has_videos(self) -> bool:
        """Tells whether a first row of any file names a video; if none does, later ones that do cannot be used.

        Ranks that did not expect videos would wait for each other under ZeRO-3.
        """
        rows = chain.from_iterable(source.first_rows for source in self.sources)
        return any(row.videos for row in rows if isinstance(row, Example))

    def rows(self, epoch: int) -> Iterator[ExampleOrBad]:
        """Yields an epoch's rows, in an order that depends only on (seed, epoch)."""
        passes = [(source, share, number) for source in self.sources for number, share in enumerate(source.passes)]
        streams = [
            source.rows(share=share, rng=_generator(self._seed, epoch, source.file.path, number))
            for source, share, number in passes
        ]
        weights = [source.estimate * share for source, share, _ in passes]
        mixed = interleaved(streams, weights, _generator(self._seed, epoch, "files"))
        rows = shuffled(mixed, self._buffer, _generator(self._seed, epoch, "buffer"))
        if self.has_videos:
            return rows
        reason = f"it has a video, and none of a file's first {FIRST_ROWS} rows has; put one among them"
        return (BadSample(row.id, reason) if isinstance(row, Example) and row.videos else row for row in rows)


def interleaved(
    streams: Sequence[Iterator[ExampleOrBad]], weights: Sequence[float], rng: random.Random
) -> Iterator[ExampleOrBad]:
    """Yields all rows of all streams, each from a stream drawn by its weight among those that have not ended."""
    left = dict(enumerate(streams))
    while len(left) > 1:
        (drawn,) = rng.choices([*left], [weights[number] for number in left])
        row = next(left[drawn], None)
        if row is None:
            del left[drawn]
        else:
            yield row
    yield from chain.from_iterable(left.values())


def shuffled(rows: Iterable[ExampleOrBad], size: int, rng: random.Random) -> Iterator[ExampleOrBad]:
    """Yields each row once, drawn from a buffer of `size` rows, of fewer where they hold more than `BUFFER_BYTES`."""
    buffer: list[ExampleOrBad] = []
    buffer_size = 0
    for row in rows:
        buffer.append(row)
        buffer_size += characters_of(row)
        while len(buffer) >= size or buffer_size > BUFFER_BYTES:
            index = rng.randrange(len(buffer))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            taken = buffer.pop()
            buffer_size -= characters_of(taken)
            yield taken
    rng.shuffle(buffer)
    yield from buffer


class StreamOrder(torch.utils.data.Sampler[ExampleOrBad]):
    """Gives a loader rows instead of indices.

    Where the samples of an epoch are known, an epoch is one pass. Where they are not, one pass of `total` samples is
    the whole run, and the stream begins its next epoch by itself.
    """

    def __init__(self, stream: SampleStream, *, total: int) -> None:
        self._stream = stream
        self._known = stream.samples
        self._total = total
        self._epoch = 0
        self._passed, self._first_epoch = 0, 0
        self.epoch_samples: int | None = None
        """Counts the samples of an epoch once one was read whole; None in a run of known epochs."""

    def __len__(self) -> int:
        return self._total if self._known is None else self._known

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, each of which has its own order."""
        self._epoch = epoch

    def resume(self, *, taken: int, epoch_samples: int | None) -> None:
        """Leaves whole epochs unread that a resumed run is past; the loader then skips what it has seen of the next."""
        if self._known is None and epoch_samples:
            self.epoch_samples = epoch_samples
            self._first_epoch = taken // epoch_samples
            self._passed = self._first_epoch * epoch_samples

    def __iter__(self) -> Iterator[ExampleOrBad]:
        if self._known is not None:
            return self._stream.rows(self._epoch)
        passed = repeat(Example("passed over"), self._passed)
        return islice(chain(passed, self._endless()), self._total)

    def _endless(self) -> Iterator[ExampleOrBad]:
        for epoch in count(self._first_epoch):
            rows = 0
            for row in self._stream.rows(epoch):
                rows += 1
                yield row
            if not rows:
                raise UserError("data.train: its weights leave no sample")
            self.epoch_samples = rows
            logger.info("epoch %d has been read: %s samples", epoch + 1, f"{rows:,}")


@dataclass(frozen=True)
class StreamedDataset(torch.utils.data.Dataset["Sample | Skipped"]):
    """Makes a sample of each row that a `StreamOrder` yields, through a one-row data set with the row's pictures."""

    make: Callable[[Examples, HeldPictures], ConversationDataset]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: ExampleOrBad) -> Sample | Skipped:
        return self.make([row], row.image_bytes if isinstance(row, Example) else {})[0]
