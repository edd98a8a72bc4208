"""Samples in the order in which they come: files interleaved, a shuffle buffer, epochs; the same on every rank.

A stream is the order of a loader whose items are rows instead of their places. The loader's own process reads them and
hands each to a worker, which makes the sample of it. So the number of workers changes nothing, ranks take their
micro-batches as from any other order, and a resumed run passes over what it has seen without decoding a picture.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, count, islice

import torch

from dora_vl.data.dataset import ConversationDataset, Rows, Sample, Skipped
from dora_vl.data.media import HeldPictures, RowPictureBytes
from dora_vl.data.sample_rows import SampleRow
from dora_vl.data.stream_sources import FIRST_ROWS, StreamSource, generator
from dora_vl.errors import UserError

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
