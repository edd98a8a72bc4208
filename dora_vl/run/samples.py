"""What a run's `data:` section names: samples in memory-mapped tables, or a stream of them."""

from __future__ import annotations

import dataclasses

from transformers import TrainingArguments

from dora_vl.data.stream import SampleStream
from dora_vl.data.stream_sources import StreamSource
from dora_vl.data.train_files import train_files, train_name
from dora_vl.data.training_rows import SampleRows, check_weights, load_rows, load_training_rows
from dora_vl.errors import UserError
from dora_vl.run.recipe import DataConfig, RunConfig


def read_samples(config: RunConfig, *, seed: int) -> tuple[SampleRows, SampleRows | None]:
    """The training samples and those whose loss is measured meanwhile, memory-mapped.

    Raises:
        UserError: a file that cannot be read, or two ways of validation.
    """
    data = config.data
    if data.validation is not None and data.validation_share:
        raise UserError("set data.validation or data.validation_share, not both")
    train, held_out = load_training_rows(
        train_files(data.train), limit=data.limit, share=data.validation_share, seed=seed
    )
    if data.validation is not None:
        held_out = read_validation(data)
    elif held_out is not None and data.validation_limit is not None:
        held_out = dataclasses.replace(
            held_out, rows=held_out.rows.take(min(data.validation_limit, len(held_out.rows)))
        )
    return train, held_out


def read_validation(data: DataConfig) -> SampleRows | None:
    """The samples of `data.validation`, where it names a file; they are never streamed."""
    return None if data.validation is None else load_rows(data.validation, data.validation_limit)


def open_stream(data: DataConfig, *, seed: int) -> SampleStream:
    """The training samples as a stream; the first rows of each file have been read.

    Raises:
        UserError: a file that cannot be read, or none of whose first rows is a sample.
    """
    files = train_files(data.train)
    check_weights(files)
    sources = [StreamSource(file, limit=data.limit, seed=seed) for file in files]
    for source in sources:
        _ = source.first_rows
    return SampleStream(sources, buffer=data.shuffle_buffer, seed=seed)


def check_streaming(data: DataConfig) -> None:
    """Refuses what needs all samples before the first.

    Raises:
        UserError: it names the setting and what to do.
    """
    if data.shuffle_buffer < 1:
        raise UserError(f"data.shuffle_buffer is {data.shuffle_buffer}; it must be at least 1, which shuffles nothing")
    refused = {
        "group_by_modality_length": (
            data.group_by_modality_length,
            "sorts by the lengths of all samples; set it false",
        ),
        "share_pictures": (data.share_pictures, "looks for the samples of each picture; set it false"),
        "cache_features": (data.cache_features, "needs all pictures before the first step; set it false"),
        "validation_share": (data.validation_share, "chooses among all samples; name a data.validation file"),
    }
    for setting, (asked, reason) in refused.items():
        if asked:
            raise UserError(f"data.streaming reads samples as they come, and data.{setting} {reason}")


def samples_of_a_run(stream: SampleStream, data: DataConfig, arguments: TrainingArguments) -> int:
    """How many samples the optimizer steps of a whole run take; 0 where the number of epochs says it.

    Raises:
        UserError: neither the steps are set nor the number of samples known.
    """
    together = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if arguments.max_steps <= 0 and stream.samples is None:
        raise UserError(
            f"data.streaming: how many samples {train_name(data.train)} has is known only after reading it; set "
            f"training.max_steps (a step takes {together})"
        )
    return max(0, arguments.max_steps) * together
