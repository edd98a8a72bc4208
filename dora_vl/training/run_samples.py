"""The samples that a decoder is trained on: what `data:` names, read once, as tables or as a stream."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments

from dora_vl.data.columns import train_files, train_name
from dora_vl.data.example import Example
from dora_vl.data.pictures import MediaFolder, StoredPictures, any_is_there
from dora_vl.data.samples import check_files_early
from dora_vl.data.stream import SampleStream, StreamSource
from dora_vl.data.table import (
    VALIDATED,
    ExampleTable,
    check_weights,
    described,
    doubtful_samples,
    load_rows,
    load_training_rows,
    samples_in_test,
    split_validation,
    uses_of,
)
from dora_vl.data.turns import THINK
from dora_vl.errors import BadSample, SettingError, one_line, short_repr
from dora_vl.evaluation.questions import all_asked, text_asked
from dora_vl.run.arguments import order_seed
from dora_vl.run.folder import evenly
from dora_vl.run.settings import DataConfig, RunConfig

logger = logging.getLogger(__name__)

HASHED_ROWS = 2_000
"""The turns and media of this many rows, evenly spread, are looked at: a second's work on a local disk."""
FIRST_ROWS = 1_000
"""At least one picture of this many first rows must be in the folder, or it is the wrong folder."""


@dataclass(frozen=True, kw_only=True)
class RunSamples:
    """Holds a run's training and validation samples.

    Attributes:
        name: the training file, for messages.
        train: the training samples; None for a `stream`.
        held_out: the loss of these samples is measured while training.
        seed: draws every order.
        streamed: how many samples the steps of a whole run take of a stream.
    """

    name: str
    train: ExampleTable | None = None
    stream: SampleStream | None = None
    held_out: ExampleTable | None = None
    seed: int
    streamed: int = 0

    @classmethod
    def read(cls, data: DataConfig, arguments: TrainingArguments) -> RunSamples:
        """Opens what the settings name, as tables or as a stream."""
        name, seed = train_name(data.files), order_seed(arguments)
        if not data.streaming:
            train, held_out = read_tables(data, seed=seed)
            return cls(name=name, seed=seed, train=train, held_out=held_out)
        stream = open_stream(data, seed=seed)
        streamed, held_out = samples_of_a_run(stream, arguments), None
        if data.validation is not None:  # never streamed
            held_out = load_rows(data.validation, data.validation_limit, columns=data.column_settings, splits=VALIDATED)
        return cls(name=name, seed=seed, stream=stream, held_out=held_out, streamed=streamed)

    @property
    def tables(self) -> list[ExampleTable]:
        """Lists the samples that lie on disk."""
        return [table for table in (self.train, self.held_out) if table is not None]

    @property
    def first_streamed(self) -> list[Example]:
        """Lists the first rows of a stream, which stand for all of it."""
        sources = () if self.stream is None else self.stream.sources
        return [row for source in sources for row in source.first_rows if isinstance(row, Example)]

    @property
    def has_pictures(self) -> bool:
        """Returns True where a training sample has a picture, and for every stream, which may hold one."""
        return self.train is None or self.train.has_any("images")

    @property
    def has_videos(self) -> bool:
        """Returns True where a sample names a video; a stream's first rows tell (`SampleStream.has_videos`)."""
        in_tables = any(table.has_any("videos") for table in self.tables)
        return in_tables or (self.stream is not None and self.stream.has_videos)

    @property
    def has_thoughts(self) -> bool:
        """Returns True where a turn begins with thoughts, in evenly spread samples or the first of a stream."""
        examples: list[Example | BadSample] = [*self.first_streamed]
        for table in self.tables:
            examples += table.select(range(0, len(table), max(1, len(table) // HASHED_ROWS)))
        return any(
            turn.text.lstrip().startswith(THINK) for example in examples for turn in getattr(example, "turns", ())
        )

    @property
    def pictures(self) -> list[tuple[str, ...]]:
        """Lists the pictures of each sample of the tables, each combination once."""
        columns = [table.rows[name] for table in self.tables for name in ("images", "rejected_images")]
        return list(dict.fromkeys(tuple(names) for column in columns for names in column if names))

    @property
    def has_other_pictures(self) -> bool:
        """Tells whether a sample's rejected answers are about pictures of their own."""
        of_stream = any(example.rejected_images for example in self.first_streamed)
        return of_stream or any(table.has_any("rejected_images") for table in self.tables)

    @property
    def most_rejected(self) -> int:
        """Returns the most rejected answers of a sample."""
        counts = [len(example.rejected) for example in self.first_streamed]
        return max([*counts, *(table.most_rejected for table in self.tables)])

    def evenly_spread(self, count: int) -> Iterator[Example]:
        """Yields the readable ones of at most `count` training samples at even distances."""
        assert self.train is not None, "a stream stores no outputs"
        examples = (self.train[index] for index in evenly(range(len(self.train)), count))
        return (example for example in examples if isinstance(example, Example))

    @property
    def stored(self) -> StoredPictures:
        """Returns the pictures that the tables' files hold themselves."""
        return StoredPictures.joined([table.stored for table in self.tables])

    def example_of(self, index: int) -> Example | BadSample:
        """Returns a training sample's example."""
        assert self.train is not None, "prepare has refused a stream"
        return self.train[index]

    def examples(self) -> Iterator[Example]:
        """Yields the training samples' examples that can be read, not those of a stream."""
        yield from (row for row in self.train or () if isinstance(row, Example))

    @property
    def judgements(self) -> tuple[bool, bool]:
        """Tells whether some samples are called good or bad, and whether some have rejected answers."""
        first, tables = self.first_streamed, self.tables
        judged = any(example.is_good is not None for example in first) or any(table.is_judged for table in tables)
        return judged, any(example.rejected for example in first) or any(table.most_rejected for table in tables)


def read_tables(data: DataConfig, *, seed: int) -> tuple[ExampleTable, ExampleTable | None]:
    """Reads the training samples and the validation samples, memory-mapped."""
    if sum(map(bool, (data.validation, data.validation_share, data.validation_size))) > 1:
        raise SettingError("data.validation", ": set one of it, data.validation_share and data.validation_size")
    files = train_files(data.files)
    if data.validation_size and any(file.weight != 1 for file in files):
        raise SettingError("data.validation_size", " takes no weights of data.train; set data.validation_share")
    train, held_out = load_training_rows(
        files, limit=data.limit, share=data.validation_share, seed=seed, columns=data.column_settings
    )
    if data.validation_size:
        train, held_out = split_validation(train, data.validation_size)
    if data.validation is not None:
        held_out = load_rows(data.validation, data.validation_limit, columns=data.column_settings, splits=VALIDATED)
    elif held_out is not None and data.validation_limit is not None:
        rows = held_out.rows.take(min(data.validation_limit, len(held_out.rows)))
        held_out = dataclasses.replace(held_out, rows=rows)
    return train, held_out


def open_stream(data: DataConfig, *, seed: int) -> SampleStream:
    """Opens the training samples as a stream; the first rows of each file have been read."""
    if data.shuffle_buffer < 1:
        raise SettingError(
            "data.shuffle_buffer", f" is {data.shuffle_buffer}; at least 1 is needed, which shuffles nothing"
        )
    refused = {
        "group_by_modality_length": "sorts by the lengths of all samples; set it false",
        "validation_share": "chooses among all samples; name a data.validation file",
        "validation_size": "draws among all samples; name a data.validation file",
        "cache_features": "needs all pictures before the first step; set it false",
    }
    for name, reason in refused.items():
        if getattr(data, name, False):
            raise SettingError(f"data.{name}", f" {reason}: data.streaming reads samples as they come")
    files = train_files(data.files)
    check_weights(files)
    sources = [StreamSource(file, limit=data.limit, seed=seed, columns=data.column_settings) for file in files]
    for source in sources:
        _ = source.first_rows
    return SampleStream(sources, buffer=data.shuffle_buffer, seed=seed)


def samples_of_a_run(stream: SampleStream, arguments: TrainingArguments) -> int:
    """Returns how many samples the steps of a whole run take; 0 where the number of epochs says it."""
    together = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if arguments.max_steps <= 0 and stream.samples is None:
        raise SettingError(
            "training.max_steps", f" is needed: data.streaming cannot count samples; a step takes {together}"
        )
    return max(0, arguments.max_steps) * together


def describe(samples: RunSamples, data: DataConfig) -> None:
    """Says of each file what it holds, and what is held out."""
    if samples.stream is not None:
        lines = [line for source in samples.stream.sources for line in source.described()]
    else:
        files = train_files(data.files)
        tables = [(file, load_rows(file.path, data.limit, columns=data.column_settings).rows) for file in files]
        lines = [line for file, rows in tables for line in described(file, rows)]
        if unmet := data.column_settings.missing_column(uses for _, rows in tables for uses in uses_of(rows)):
            logger.warning("%s: %s", samples.name, unmet)  # the test's file may have it
        for file, rows in tables:
            for finding in doubtful_samples(rows):
                logger.warning("%s: %s", file.path, one_line(str(finding)))
    for line in lines:
        logger.info(line)
    if samples.train is not None and samples.held_out is not None and data.validation_share:
        counts = len(samples.held_out.rows), len(samples.held_out.pictures), samples.seed
        logger.info("%d samples of %d pictures held out for validation, chosen by seed %d", *counts)


def check_count(samples: RunSamples, arguments: TrainingArguments) -> None:
    """Refuses `training.dataloader_drop_last` where it leaves all samples out; a stream may not know its number."""
    count = samples.stream.samples if samples.stream is not None else len(samples.train or ())
    together = arguments.per_device_train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and count is not None and count < together:
        reason = f"a micro-batch on each rank takes {together:,}, and {samples.name} has {count:,} samples"
        raise SettingError("training.dataloader_drop_last", f" would leave all of them out: {reason}; set it false")


def check_media(
    samples: RunSamples, data: DataConfig, *, pictures: MediaFolder | None, videos: MediaFolder | None
) -> None:
    """Refuses samples that would end the run later (see `data.samples.check_files_early`); a stream is not checked.

    `pictures` and `videos` are the roots of their paths; None: the model sees words alone.
    """
    if pictures is not None and not pictures.root.is_dir():
        raise SettingError("data.image_folder", f": picture folder {pictures} does not exist")
    if samples.train is None:
        return
    rows, stored = samples.train.rows[:FIRST_ROWS], samples.train.stored
    named = list(dict.fromkeys(name for names in rows["images"] for name in names if name not in stored))
    if pictures is not None and named and not any_is_there(named, pictures.root):
        raise SettingError(
            "data.image_folder",
            f": not one of the first {len(named):,} pictures is in {pictures}, such as {short_repr(named[0])}",
        )
    share = data.max_bad_share
    check_files_early(samples.train, pictures=pictures, videos=videos, max_bad_share=share, source=samples.name)


def warn_of_overlap(samples: RunSamples, examples: Sequence[Example], config: RunConfig) -> None:
    """Counts and names training samples that the test asks again; `config` says where its pictures are."""
    data, evaluation = config.data, config.evaluation
    # In another folder a name means another picture.
    is_same = Path(evaluation.image_folder or data.image_folder).resolve() == Path(data.image_folder).resolve()
    comparable = [example for example in examples if (is_same if example.images else not example.videos)]
    if not comparable:
        return
    if samples.train is None:
        logger.warning(
            "data.streaming does not look ahead: whether training samples are asked again in %s is not known; "
            "`dora-vl check-data` on both files tells it",
            evaluation.file,
        )
    elif pairs := samples_in_test(
        samples.train.rows,
        ((each.id, each.images, text_asked(each) if each.images else all_asked(each)) for each in comparable),
    ):
        named = "; ".join(f"{sample} is {question} there" for sample, question in pairs[:3])
        where = f"{len(pairs):,} training samples of {samples.name} are asked again in {evaluation.file}"
        logger.warning("%s", one_line(f"{where}: {named}"))
