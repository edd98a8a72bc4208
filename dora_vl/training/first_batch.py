"""The first micro-batch of a run, made as training makes it, on a model without weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dora_vl.data.samples import Sample
from dora_vl.evaluation.subtask import MicroBatch, Seq2SeqSample
from dora_vl.report.batch import BatchView, TokenText, batch_view
from dora_vl.run.arguments import training_arguments
from dora_vl.run.folder import FAULTS
from dora_vl.training.faults import StepFaults
from dora_vl.training.optim import LearningRates
from dora_vl.training.pipeline import Pipeline
from dora_vl.training.progress import BatchStatistics
from dora_vl.training.trainer import AdapterTrainer, Monitors, Persistence

ELSEWHERE = ("deepspeed", "bf16", "fp16", "report_to", "load_best_model_at_end", "eval_strategy", "optim")
"""Of `training:`, what changes no batch and asks for devices, packages or weights."""


def shown_settings(config: Any, folder: Path) -> Any:
    """A run's settings as they serve to look at its data: nothing is written into its folder, nothing is cached.

    Args:
        config: a run's dataclass.
        folder: an empty one, for what preparing writes.
    """
    training = {name: value for name, value in config.training.items() if name not in ELSEWHERE}
    training |= {"output_dir": str(folder), "use_cpu": True, "eval_strategy": "no"}
    off = _without(config.data, cache_features=False)
    return dataclasses.replace(
        config,
        training=training,
        data=dataclasses.replace(config.data, workers=0, **off),
        model=dataclasses.replace(config.model, dtype="float32", **_without(config.model, quantisation=None)),
        resume=None,
    )


def _without(section: Any, **values: Any) -> dict[str, Any]:
    """Those of the values whose field a section has."""
    names = {one.name for one in dataclasses.fields(section)}
    return {name: value for name, value in values.items() if name in names}


def first_batch(pipeline: Pipeline) -> BatchView:
    """The batch that one process would see first.

    Raises:
        UserError: as training's preparation does.
    """
    arguments = training_arguments(pipeline.config)
    pipeline.prepare(arguments)
    backbone = pipeline.skeleton()
    data = pipeline.data(backbone, arguments)
    made: list[tuple[list[Any], dict[str, Any]]] = []

    def collate_and_keep(items: list[Any]) -> dict[str, Any]:
        batch = dict(data.collate(items))
        made.append((items, dict(batch)))
        return batch

    folder = Path(str(arguments.output_dir))
    nothing = Persistence(folder, save=_no_file, load=_no_file)
    trainer = AdapterTrainer(
        model=nn.Linear(1, 1),  # a loader asks nothing of it
        args=arguments,
        train_dataset=data.train,
        data_collator=collate_and_keep,
        rates=LearningRates(arguments.learning_rate, {}),
        sampler=data.sampler,
        parts=(),
        persistence=nothing,
        monitors=Monitors(BatchStatistics(), StepFaults(folder / FAULTS, "stop")),
    )
    for set_epoch in data.set_epoch:
        set_epoch(0)
    next(iter(trainer.get_train_dataloader()))
    items, batch = made[0]  # a loader reads a batch ahead
    opens = pipeline.pictures_of(backbone, arguments, data, items)
    names, usable = _usable(items)
    reading = pipeline.reading(backbone)
    pictures = [one for one, keep in zip(opens, usable, strict=True) if keep]
    return batch_view(
        batch, names, TokenText(reading.tokenizer, reading.places), pictures, shifted=pipeline.labels_shift
    )


def _usable(items: Sequence[Any]) -> tuple[list[str], list[bool]]:
    """The ids of the samples that are in the batch, and of each item whether it is."""
    samples = items[0].items if isinstance(items[0], MicroBatch) else items
    usable = [isinstance(one, Sample | Seq2SeqSample) for one in samples]
    return [one.id for one, keep in zip(samples, usable, strict=True) if keep], usable


def _no_file(folder: Path) -> None:
    raise RuntimeError(f"{folder}: nothing is saved or loaded here")
