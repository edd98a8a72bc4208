"""The first micro-batch of a run, made as training makes it, on a model without weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from dora_vl.data.samples import Skipped
from dora_vl.report.batch import BatchView, TokenText, batch_view
from dora_vl.run.folder import FAULTS
from dora_vl.run.settings import DataConfig, LoadedModelConfig
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
    data = dataclasses.replace(config.data, workers=0)
    model = dataclasses.replace(config.model, dtype="float32")
    if isinstance(data, DataConfig):
        data = dataclasses.replace(data, cache_features=False)
    if isinstance(model, LoadedModelConfig):
        model = dataclasses.replace(model, quantisation=None)
    return dataclasses.replace(config, training=training, data=data, model=model, resume=None)


def first_batch(pipeline: Pipeline) -> BatchView:
    """The batch that one process would see first."""
    arguments = pipeline.arguments()
    pipeline.prepare(arguments)
    backbone = pipeline.skeleton()
    data = pipeline.data(backbone, arguments)
    batches: list[tuple[list[Any], dict[str, Any]]] = []

    def collate_and_keep(items: list[Any]) -> dict[str, Any]:
        batch = dict(data.collate(items))
        batches.append((items, dict(batch)))
        return batch

    folder = Path(str(arguments.output_dir))
    trainer = AdapterTrainer(
        model=nn.Linear(1, 1),  # a loader asks nothing of it
        args=arguments,
        train_dataset=data.train,
        data_collator=collate_and_keep,
        rates=LearningRates(arguments.learning_rate, {}),
        sampler=data.sampler,
        parts=(),
        persistence=Persistence(folder, save=_no_file, load=_no_file),
        monitors=Monitors(BatchStatistics(), StepFaults(folder / FAULTS, "stop")),
    )
    for set_epoch in data.set_epoch:
        set_epoch(0)
    next(iter(trainer.get_train_dataloader()))
    items, batch = batches[0]  # a loader reads a batch ahead
    opens, reading = pipeline.pictures_of(backbone, arguments, data, items), pipeline.reading(backbone)
    samples = getattr(items[0], "items", items)  # a mixture's item is a whole micro-batch
    shown = [
        (sample.id, opener) for sample, opener in zip(samples, opens, strict=True) if not isinstance(sample, Skipped)
    ]
    return batch_view(
        batch,
        [name for name, _ in shown],
        TokenText(reading.tokenizer, reading.places),
        [opener for _, opener in shown],
        shifted=pipeline.labels_shift,
    )


def _no_file(folder: Path) -> None:
    raise RuntimeError(f"{folder}: nothing is saved or loaded here")
