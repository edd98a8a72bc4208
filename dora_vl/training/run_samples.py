"""The samples that a decoder is trained on: what `data:` names, read once, as tables or as a stream."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainingArguments

from dora_vl.backbones.encoder import Encoder
from dora_vl.data.batches import Collator
from dora_vl.data.columns import train_files, train_name
from dora_vl.data.example import Example
from dora_vl.data.pictures import MediaFolder, StoredPictures, any_is_there, path_inside
from dora_vl.data.samplers import (
    ModalityLengthSampler,
    ReplaySampler,
    SamplingLengths,
    SeededSampler,
    TreeSampler,
    longest_indices,
    places_of_largest_pictures,
    sampling_lengths,
)
from dora_vl.data.samples import CHECKED_SAMPLES, ConversationDataset, Labelled, Sample, Skipped, check_files_early
from dora_vl.data.stream import SampleStream, StreamedDataset, StreamOrder, StreamSource
from dora_vl.data.table import (
    VALIDATED,
    ExampleTable,
    characters_of,
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
from dora_vl.errors import BadSample, SettingError, UserError, one_line, short_repr
from dora_vl.evaluation.questions import all_asked, text_asked
from dora_vl.files import content_key
from dora_vl.run.arguments import order_seed
from dora_vl.run.base import image_folder, video_folder
from dora_vl.run.settings import DataConfig, RunConfig
from dora_vl.run.watched_questions import evenly
from dora_vl.training.extras.replay import Replay
from dora_vl.training.pipeline import TrainingData
from dora_vl.training.sample_encoder import SampleEncoder

logger = logging.getLogger(__name__)

HASHED_ROWS = 2_000
"""The turns and media of this many rows, evenly spread, are looked at: a second's work on a local disk."""
FIRST_ROWS = 1_000
"""At least one picture of this many first rows must be in the folder, or it is the wrong folder."""


class RunSamples:
    """Holds a run's training and validation samples; every order is drawn by the arguments' seed."""

    def __init__(self, data: DataConfig, arguments: TrainingArguments) -> None:
        self._data, self._arguments, self._seed = data, arguments, order_seed(arguments)
        self._train: ExampleTable | None = None
        self._stream: SampleStream | None = None
        self.name = train_name(data.files)
        self.held_out: ExampleTable | None = None
        """The loss of these samples is measured while training."""
        if data.streaming:
            self._stream = open_stream(data, seed=self._seed)
            self._total = samples_of_a_run(self._stream, data, arguments)
            if data.validation is not None:  # never streamed
                self.held_out = load_rows(
                    data.validation, data.validation_limit, columns=data.column_settings, splits=VALIDATED
                )
        else:
            self._train, self.held_out = read_samples(data, seed=self._seed)
        self._tables = [table for table in (self._train, self.held_out) if table is not None]

    @property
    def has_pictures(self) -> bool:
        """Returns True where a training sample has a picture, and for every stream, which may hold one."""
        return self._train is None or self._train.has_any("images")

    @property
    def has_videos(self) -> bool:
        """Returns True where a sample names a video; a stream's first rows tell (`SampleStream.has_videos`)."""
        in_tables = any(table.has_any("videos") for table in self._tables)
        return in_tables or (self._stream is not None and self._stream.has_videos)

    @property
    def has_thoughts(self) -> bool:
        """Returns True where a turn begins with thoughts, in evenly spread samples or the first of a stream."""
        rows: list[Example | BadSample] = [*self._streamed]
        for table in self._tables:
            rows += table.select(range(0, len(table), max(1, len(table) // HASHED_ROWS)))
        return any(turn.text.lstrip().startswith(THINK) for row in rows for turn in getattr(row, "turns", ()))

    @property
    def pictures(self) -> list[tuple[str, ...]]:
        """Lists the pictures of each sample of the tables, each combination once."""
        columns = [table.rows[name] for table in self._tables for name in ("images", "rejected_images")]
        return list(dict.fromkeys(tuple(names) for column in columns for names in column if names))

    @property
    def _streamed(self) -> list[Example]:
        """Lists the first rows of a stream, which stand for all of it."""
        sources = () if self._stream is None else self._stream.sources
        return [row for source in sources for row in source.first_rows if isinstance(row, Example)]

    @property
    def has_other_pictures(self) -> bool:
        """Tells whether a sample's rejected answers are about pictures of their own."""
        of_stream = any(example.rejected_images for example in self._streamed)
        return of_stream or any(table.has_any("rejected_images") for table in self._tables)

    @property
    def pictures_of_samples(self) -> Sequence[Sequence[str]] | None:
        """Lists each training sample's pictures; None for a stream, which does not look ahead."""
        return None if self._train is None else self._train.rows["images"]

    @property
    def most_rejected(self) -> int:
        """Returns the most rejected answers of a sample."""
        counts = [len(example.rejected) for example in self._streamed]
        return max([*counts, *(table.most_rejected for table in self._tables)])

    def evenly_spread(self, count: int) -> Iterator[Example]:
        """Yields the readable ones of at most `count` training samples at even distances."""
        assert self._train is not None, "a stream stores no outputs"
        examples = (self._train[index] for index in evenly(range(len(self._train)), count))
        return (example for example in examples if isinstance(example, Example))

    @property
    def stored(self) -> StoredPictures:
        """Returns the pictures that the tables' files hold themselves."""
        return StoredPictures.joined([table.stored for table in self._tables])

    def describe(self) -> None:
        """Says of each file what it holds, and what is held out."""
        data = self._data
        if self._stream is not None:
            lines = [line for source in self._stream.sources for line in source.described()]
        else:
            files = train_files(data.files)
            tables = [(file, load_rows(file.path, data.limit, columns=data.column_settings).rows) for file in files]
            lines = [line for file, rows in tables for line in described(file, rows)]
            if unmet := data.column_settings.missing_column(uses for _, rows in tables for uses in uses_of(rows)):
                logger.warning("%s: %s", self.name, unmet)  # the test's file may have it
            for file, rows in tables:
                for finding in doubtful_samples(rows):
                    logger.warning("%s: %s", file.path, one_line(str(finding)))
        for line in lines:
            logger.info(line)
        if self._train is not None and self.held_out is not None and data.validation_share:
            counts = len(self.held_out.rows), len(self.held_out.pictures), self._seed
            logger.info("%d samples of %d pictures held out for validation, chosen by seed %d", *counts)

    def check_count(self) -> None:
        """Refuses `training.dataloader_drop_last` where it leaves all samples out; a stream may not know its number."""
        samples = self._stream.samples if self._stream is not None else len(self._train or ())
        together = self._arguments.per_device_train_batch_size * self._arguments.world_size
        if self._arguments.dataloader_drop_last and samples is not None and samples < together:
            reason = f"a micro-batch on each rank takes {together:,}, and {self.name} has {samples:,} samples"
            raise SettingError("training.dataloader_drop_last", f" would leave all of them out: {reason}; set it false")

    def example_of(self, index: int) -> Example | BadSample:
        """Returns a training sample's example."""
        assert self._train is not None, "prepare has refused a stream"
        return self._train[index]

    def examples(self) -> Iterator[Example]:
        """Yields the training samples' examples that can be read, not those of a stream."""
        yield from (row for row in self._train or () if isinstance(row, Example))

    @property
    def judgements(self) -> tuple[bool, bool]:
        """Tells whether some samples are called good or bad, and whether some have rejected answers."""
        rows, tables = self._streamed, self._tables
        judged = any(row.is_good is not None for row in rows) or any(table.is_judged for table in tables)
        return judged, any(row.rejected for row in rows) or any(table.most_rejected for table in tables)

    def check_files_early(self, pictures: MediaFolder | None, videos: MediaFolder | None) -> None:
        """Refuses samples that would end the run later (see `data.samples.check_files_early`); a stream is not checked.

        `pictures` and `videos` are the roots of their paths; None: the model sees words alone.
        """
        if pictures is not None and not pictures.root.is_dir():
            raise SettingError("data.image_folder", f": picture folder {pictures} does not exist")
        if self._train is None:
            return
        rows, stored = self._train.rows[:FIRST_ROWS], self._train.stored
        named = list(dict.fromkeys(name for names in rows["images"] for name in names if name not in stored))
        if pictures is not None and named and not any_is_there(named, pictures.root):
            raise SettingError(
                "data.image_folder",
                f": not one of the first {len(named):,} pictures is in {pictures}, such as {short_repr(named[0])}",
            )
        share = self._data.max_bad_share
        check_files_early(self._train, pictures=pictures, videos=videos, max_bad_share=share, source=self.name)

    def labelled(self, encoder: SampleEncoder) -> Iterator[Labelled]:
        """Yields the labels of the first training samples, and of the first with pictures."""
        tokenizer, longest = encoder.encoder.tokenizer, encoder.encoder.max_tokens
        bad: list[Skipped] = []
        used = 0
        for example, sample in self._first(encoder):
            if isinstance(sample, Skipped):
                bad.append(sample)
            elif isinstance(example, Example):
                used += 1
                trained = encoder.trained(example, sample, [] if self._train is None else self._train)
                for text, answers in zip(sample.rows(), trained, strict=True):
                    cut = len(text.labels) == longest
                    yield Labelled(id=sample.id, labels=text.labels, answers=answers, tokenizer=tokenizer, cut=cut)
        if bad and not used:
            raise UserError(
                f"{self.name}: none of its first {len(bad)} samples can be used, {bad[0].id}: {bad[0].reason}"
            )

    def _first(self, encoder: SampleEncoder) -> Iterator[tuple[Example | BadSample, Sample | Skipped]]:
        """Yields the first samples, and the first with pictures."""
        if self._train is not None:
            samples = encoder.dataset(self._train, self._train.stored)
            for index in _first_indices(self._train.rows[:FIRST_ROWS]["images"]):
                yield self._train[index], samples[index]
        rows = self._streamed
        for index in _first_indices([row.images for row in rows]):
            yield rows[index], encoder.dataset([rows[index]], rows[index].image_bytes)[0]

    def warn_of_overlap(self, examples: Sequence[Example], config: RunConfig) -> None:
        """Counts and names training samples that the test asks again; `config` says where its pictures are."""
        data, evaluation = config.data, config.evaluation
        # In another folder a name means another picture.
        is_same = Path(evaluation.image_folder or data.image_folder).resolve() == Path(data.image_folder).resolve()
        comparable = [example for example in examples if (is_same if example.images else not example.videos)]
        if not comparable:
            return
        if self._train is None:
            logger.warning(
                "data.streaming does not look ahead: whether training samples are asked again in %s is not known; "
                "`dora-vl check-data` on both files tells it",
                evaluation.file,
            )
        elif pairs := samples_in_test(
            self._train.rows,
            ((each.id, each.images, text_asked(each) if each.images else all_asked(each)) for each in comparable),
        ):
            named = "; ".join(f"{sample} is {question} there" for sample, question in pairs[:3])
            where = f"{len(pairs):,} training samples of {self.name} are asked again in {evaluation.file}"
            logger.warning("%s", one_line(f"{where}: {named}"))

    def replay(self, path: Path, encoder: Encoder) -> Replay:
        """Returns the chats in a file, as many as make the share `data.replay` of what is learned."""
        assert self._train is not None, "prepare has refused a stream"
        return Replay.of(path, self._train, encoder, self._data.replay)

    def training_data(self, encoder: SampleEncoder, collate: Collator, replay: Replay | None = None) -> TrainingData:
        """Returns what the Trainer takes: samples that `encoder` makes, and batches of them."""
        if self._stream is not None:
            return self._streamed_data(self._stream, encoder, collate)
        assert self._train is not None
        train = own = self._train
        if replay is not None:
            train = ExampleTable(datasets.concatenate_datasets([own.rows, replay.chats.rows]), own.stored)
        text_encoder, media = encoder.encoder, encoder.folder is not None  # else words alone
        shows_videos = media and self.has_videos and text_encoder.sees_pictures
        lengths = sampling_lengths(
            train.rows,
            tokens_per_image=text_encoder.tokens_per_image if media else 0,
            tokens_per_video=len(text_encoder.dummy_video(self._data.video_frames).input_ids) if shows_videos else 0,
        )
        if replay is not None:  # among pictures, so that every step may hold some
            lengths.is_multimodal[len(own) :] = lengths.is_multimodal[: len(own)].any()
        samples = encoder.dataset(train, train.stored)
        sized_pictures = (
            encoder.folder if media and text_encoder.size_matters else None
        )  # a larger picture becomes more tokens
        grouped = self._data.group_by_modality_length
        trees = grouped and collate.packing == "trees" and bool(lengths.shared.any())
        sampler = self._sampler(lengths, trees=trees, replay=replay)
        micro_batch = self._arguments.per_device_train_batch_size
        return TrainingData(
            train=samples,
            pools=partial(
                _largest_samples,
                samples,
                train,
                lengths,
                micro_batch,
                grouped=grouped and not trees,
                sized=sized_pictures,
            ),
            sampler=sampler,
            set_epoch=() if sampler is None else (sampler.set_epoch,),
            samples=len(own) if sampler is None else len(sampler),
            ids=own.ids,
            media=partial(_media_keys, own if media else None, self._data, replay),
            batch_tokens=micro_batch * self._sample_tokens(encoder, collate, int(lengths.lengths.max())),
            **self._shared_data(encoder, collate),
        )

    def _streamed_data(self, stream: SampleStream, encoder: SampleEncoder, collate: Collator) -> TrainingData:
        micro_batch = self._arguments.per_device_train_batch_size
        order = StreamOrder(stream, total=self._total)
        samples = StreamedDataset(encoder.dataset, length=len(order))
        return TrainingData(
            train=samples,
            pools=partial(_largest_first_rows, samples, stream.sources, micro_batch),
            sampler=order,
            stream=order,
            set_epoch=(order.set_epoch,),
            samples=len(order),
            batch_tokens=micro_batch * self._data.max_tokens * encoder.answers,
            **self._shared_data(encoder, collate),
        )

    def _shared_data(self, encoder: SampleEncoder, collate: Collator) -> dict[str, Any]:
        """Returns what the Trainer takes of a stream and of rows on disk alike."""
        held_out = None if self.held_out is None else encoder.dataset(self.held_out, self.held_out.stored)
        return {"validation": held_out, "collate": collate, "source": self.name}

    def _sampler(self, lengths: SamplingLengths, *, trees: bool, replay: Replay | None) -> SeededSampler | None:
        """Makes the sampler that orders an epoch; None leaves the order to the Trainer."""
        grouped, micro_batch = self._data.group_by_modality_length, self._arguments.per_device_train_batch_size

        def ordered(lengths: SamplingLengths) -> SeededSampler:
            """Orders samples in trees, else by LLaVA's grouping by modality and length for the global batch."""
            if trees:
                return TreeSampler(lengths, batch_size=micro_batch, seed=self._seed)
            return ModalityLengthSampler(
                lengths.lengths if grouped else torch.zeros_like(lengths.lengths),
                lengths.is_multimodal if grouped else torch.zeros_like(lengths.is_multimodal),
                global_batch=micro_batch * self._arguments.world_size * self._arguments.gradient_accumulation_steps,
                seed=self._seed,
            )

        if replay is not None:
            return ReplaySampler(
                lengths,
                own=replay.first_index,
                drawn=replay.drawn,
                seed=self._seed,
                order=ordered,
                micro_batch=micro_batch if trees else 0,
            )
        return ordered(lengths) if grouped else None

    def _sample_tokens(self, encoder: SampleEncoder, collate: Collator, longest: int) -> int:
        """Returns the tokens of the longest sample, all its answers counted; `longest` holds each of them once."""
        most = self._data.max_tokens * encoder.answers
        prompts = encoder.prompts if collate.packing == "trees" else encoder.answers
        # Without media `longest` counts words, which miss a prompt's own tokens.
        return min(most, longest * prompts) if encoder.folder is not None else most


def _first_indices(images: Sequence[Sequence[str]]) -> list[int]:
    """Returns the indices of the first samples, and of the first with pictures."""
    with_pictures = [index for index, names in enumerate(images) if names]
    return list(dict.fromkeys([*range(min(CHECKED_SAMPLES, len(images))), *with_pictures[:CHECKED_SAMPLES]]))


def _media_keys(train: ExampleTable | None, data: DataConfig, replay: Replay | None) -> dict[str, str]:
    """Returns a key of what each file of some training samples holds, by name; "" for one inside the data file."""
    keys = {} if replay is None else replay.media()
    if train is None:
        return keys
    for example in train.select(range(0, len(train), math.ceil(len(train) / HASHED_ROWS))):
        if not isinstance(example, Example):
            continue
        files = [(image_folder(data), name) for name in example.images]
        files += [(video_folder(data), clip.path) for clip in example.videos]
        for folder, name in files:
            try:
                keys[name] = "" if name in train.stored else content_key(path_inside(folder, name))
            except (BadSample, OSError):  # told of when it is read
                keys[name] = ""
    return keys


def _largest_samples(
    samples: ConversationDataset,
    train: ExampleTable,
    lengths: SamplingLengths,
    count: int,
    *,
    grouped: bool,
    sized: MediaFolder | None,
) -> list[list[Sample | Skipped]]:
    """Returns the largest samples, twice a micro-batch; with and without pictures apart if no batch mixes them."""
    kinds = (lengths.is_multimodal, ~lengths.is_multimodal) if grouped else (None,)
    pools = [longest_indices(lengths, 2 * count, among) for among in kinds]
    if sized is not None:
        pools[0] += places_of_largest_pictures(train.rows, train.stored, sized, count)
    return [[samples[index] for index in dict.fromkeys(pool)] for pool in pools]


def _largest_first_rows(
    samples: StreamedDataset, sources: Sequence[StreamSource], count: int
) -> list[list[Sample | Skipped]]:
    """Returns the largest of a stream's first rows, twice as many as a micro-batch holds."""
    rows = [row for source in sources for row in source.first_rows]
    return [[samples[row] for row in sorted(rows, key=characters_of, reverse=True)[: 2 * count]]]


def read_samples(data: DataConfig, *, seed: int) -> tuple[ExampleTable, ExampleTable | None]:
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


def samples_of_a_run(stream: SampleStream, data: DataConfig, arguments: TrainingArguments) -> int:
    """Returns how many samples the steps of a whole run take; 0 where the number of epochs says it."""
    together = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if arguments.max_steps <= 0 and stream.samples is None:
        raise SettingError(
            "training.max_steps", f" is needed: data.streaming cannot count samples; a step takes {together}"
        )
    return max(0, arguments.max_steps) * together
