"""What the Trainer takes of a run's samples: encoded samples, their order, their batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset, Sampler

from dora_vl.data.batches import Collator
from dora_vl.data.example import Example
from dora_vl.data.pictures import MediaFolder, path_inside
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
from dora_vl.data.samples import CHECKED_SAMPLES, ConversationDataset, Labelled, Sample, Skipped
from dora_vl.data.stream import StreamedDataset, StreamOrder, StreamSource
from dora_vl.data.table import ExampleTable, characters_of
from dora_vl.errors import BadSample, UserError
from dora_vl.files import content_key
from dora_vl.run.base import image_folder, video_folder
from dora_vl.run.settings import DataConfig
from dora_vl.training.extras.replay import Replay
from dora_vl.training.opened import Opened, SampleEncoder
from dora_vl.training.run_samples import FIRST_ROWS, HASHED_ROWS, RunSamples


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """A pipeline's data as the Trainer takes it.

    Attributes:
        train: its items are what `collate` makes a batch of: samples, or whole micro-batches of a mixture.
        validation: the same, for the loss while training.
        collate: a batch from items: the loss's inputs by name (`input_ids` and `labels` among them) and bookkeeping
            (`BatchStatistics`).
        sampler: order of `train`, what its items are asked for by; None leaves it to the Trainer.
        stream: `sampler` where it is a stream that begins its next epoch by itself.
        set_epoch: each gets the epoch before its first batch.
        samples: training samples in an epoch.
        read_in_a_pass: how many an epoch reads over all ranks; None: `samples`, and what accelerate repeats of them.
        source: the training file, for messages.
        ids: the training samples', in the data's order; None: they are not known beforehand, as of a stream.
        media: what the picture and video files of some of them hold, by name (`content_key`).
        batch_tokens: of the largest micro-batch, for the memory estimate.
        pools: of `train`'s items, the largest of each kind that a micro-batch is drawn from; read when it is asked.
    """

    train: Dataset[Any]
    validation: Dataset[Any] | None = None
    collate: Callable[[list[Any]], Mapping[str, Any]]
    sampler: Sampler[Any] | None = None
    stream: StreamOrder | None = None
    set_epoch: tuple[Callable[[int], None], ...] = ()
    samples: int
    source: str
    batch_tokens: int
    ids: Callable[[], Iterable[str]] | None = None
    media: Callable[[], Mapping[str, str]] = dict
    read_in_a_pass: int | None = None
    pools: Callable[[], Sequence[Sequence[Any]]] = tuple


def training_data(
    opened: Opened, encoder: SampleEncoder, collate: Collator, replay: Replay | None = None
) -> TrainingData:
    """Returns what the Trainer takes: samples that `encoder` makes, and batches of them."""
    own, data, arguments = opened.samples.train, opened.config.data, opened.arguments
    if own is None:
        return _streamed_data(opened, encoder, collate)
    train = (
        own
        if replay is None
        else ExampleTable(datasets.concatenate_datasets([own.rows, replay.chats.rows]), own.stored)
    )
    text_encoder, media = encoder.encoder, encoder.folder is not None  # else words alone
    shows_videos = media and opened.samples.has_videos and text_encoder.sees_pictures
    lengths = sampling_lengths(
        train.rows,
        tokens_per_image=text_encoder.tokens_per_image if media else 0,
        tokens_per_video=len(text_encoder.dummy_video(data.video_frames).input_ids) if shows_videos else 0,
    )
    if replay is not None:  # among pictures, so that every step may hold some
        lengths.is_multimodal[len(own) :] = lengths.is_multimodal[: len(own)].any()
    samples = encoder.dataset(train, train.stored)
    # A larger picture becomes more tokens.
    sized_pictures = encoder.folder if media and text_encoder.size_matters else None
    grouped = data.group_by_modality_length
    trees = grouped and collate.packing == "trees" and bool(lengths.shared.any())
    sampler = _sampler(opened, lengths, trees=trees, replay=replay)
    micro_batch = arguments.per_device_train_batch_size
    return TrainingData(
        train=samples,
        pools=partial(
            _largest_samples, samples, train, lengths, micro_batch, grouped=grouped and not trees, sized=sized_pictures
        ),
        sampler=sampler,
        set_epoch=() if sampler is None else (sampler.set_epoch,),
        samples=len(own) if sampler is None else len(sampler),
        ids=own.ids,
        media=partial(_media_keys, own if media else None, data, replay),
        batch_tokens=micro_batch * _sample_tokens(data, encoder, collate, int(lengths.lengths.max())),
        **_shared_data(opened.samples, encoder, collate),
    )


def _streamed_data(opened: Opened, encoder: SampleEncoder, collate: Collator) -> TrainingData:
    stream, micro_batch = opened.samples.stream, opened.arguments.per_device_train_batch_size
    assert stream is not None
    order = StreamOrder(stream, total=opened.samples.streamed)
    samples = StreamedDataset(encoder.dataset, length=len(order))
    return TrainingData(
        train=samples,
        pools=partial(_largest_first_rows, samples, stream.sources, micro_batch),
        sampler=order,
        stream=order,
        set_epoch=(order.set_epoch,),
        samples=len(order),
        batch_tokens=micro_batch * opened.config.data.max_tokens * encoder.answers,
        **_shared_data(opened.samples, encoder, collate),
    )


def _shared_data(samples: RunSamples, encoder: SampleEncoder, collate: Collator) -> dict[str, Any]:
    """Returns what the Trainer takes of a stream and of rows on disk alike."""
    held_out = None if samples.held_out is None else encoder.dataset(samples.held_out, samples.held_out.stored)
    return {"validation": held_out, "collate": collate, "source": samples.name}


def _sampler(opened: Opened, lengths: SamplingLengths, *, trees: bool, replay: Replay | None) -> SeededSampler | None:
    """Makes the sampler that orders an epoch; None leaves the order to the Trainer."""
    arguments, seed = opened.arguments, opened.samples.seed
    grouped, micro_batch = opened.config.data.group_by_modality_length, arguments.per_device_train_batch_size

    def ordered(lengths: SamplingLengths) -> SeededSampler:
        """Orders samples in trees, else by LLaVA's grouping by modality and length for the global batch."""
        if trees:
            return TreeSampler(lengths, batch_size=micro_batch, seed=seed)
        return ModalityLengthSampler(
            lengths.lengths if grouped else torch.zeros_like(lengths.lengths),
            lengths.is_multimodal if grouped else torch.zeros_like(lengths.is_multimodal),
            global_batch=micro_batch * arguments.world_size * arguments.gradient_accumulation_steps,
            seed=seed,
        )

    if replay is not None:
        return ReplaySampler(
            lengths,
            own=replay.first_index,
            drawn=replay.drawn,
            seed=seed,
            order=ordered,
            micro_batch=micro_batch if trees else 0,
        )
    return ordered(lengths) if grouped else None


def _sample_tokens(data: DataConfig, encoder: SampleEncoder, collate: Collator, longest: int) -> int:
    """Returns the tokens of the longest sample, all its answers counted; `longest` holds each of them once."""
    most = data.max_tokens * encoder.answers
    prompts = encoder.prompts if collate.packing == "trees" else encoder.answers
    # Without media `longest` counts words, which miss a prompt's own tokens.
    return min(most, longest * prompts) if encoder.folder is not None else most


def labelled(samples: RunSamples, encoder: SampleEncoder) -> Iterator[Labelled]:
    """Yields the labels of the first training samples, and of the first with pictures."""
    tokenizer, longest = encoder.encoder.tokenizer, encoder.encoder.max_tokens
    bad: list[Skipped] = []
    used = 0
    for example, sample in _first(samples, encoder):
        if isinstance(sample, Skipped):
            bad.append(sample)
        elif isinstance(example, Example):
            used += 1
            trained = encoder.trained(example, sample, samples.train or ())
            for text, answers in zip(sample.texts(), trained, strict=True):
                cut = len(text.labels) == longest
                yield Labelled(id=sample.id, labels=text.labels, answers=answers, tokenizer=tokenizer, cut=cut)
    if bad and not used:
        raise UserError(
            f"{samples.name}: none of its first {len(bad)} samples can be used, {bad[0].id}: {bad[0].reason}"
        )


def _first(samples: RunSamples, encoder: SampleEncoder) -> Iterator[tuple[Example | BadSample, Sample | Skipped]]:
    """Yields the first samples, and the first with pictures."""
    if (train := samples.train) is not None:
        dataset = encoder.dataset(train, train.stored)
        for index in _first_indices(train.rows[:FIRST_ROWS]["images"]):
            yield train[index], dataset[index]
    examples = samples.first_streamed
    for index in _first_indices([example.images for example in examples]):
        example = examples[index]
        yield example, encoder.dataset([example], example.image_bytes)[0]


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
