"""`dora-vl show batch`: the first micro-batch of a run, its tokens coloured by what training does to them."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dora_vl.training.train_command import pipeline_of

if TYPE_CHECKING:
    from dora_vl.report.batch import BatchView, TokenText
    from dora_vl.run.settings import RunConfig
    from dora_vl.training.pipeline import Pipeline

DESCRIPTION = """\
Shows the first micro-batch that training would see: every token, whether it is trained on, read only, the place of a
picture, or padding. The base's weights are not read (a base that a recipe composes is composed first, once).

  dora-vl show batch llava/llava15 --variant 7b_dora --data.train my.json --data.image_folder pictures

CONFIG is a file or a recipe's name; after it any setting of the run, --section.key value.
"""
ELSEWHERE = ("deepspeed", "bf16", "fp16", "report_to", "load_best_model_at_end", "eval_strategy", "optim")
"""These fields of `training:` change no batch and ask for devices, packages or weights."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options; a run's own settings may come between them."""
    parser.description = DESCRIPTION
    parser.set_defaults(work=run, takes_settings=True)
    parser.add_argument("what", choices=("batch",), help="what to show")
    parser.add_argument("config", metavar="CONFIG", help="YAML file with the run's settings, or a recipe's name")


def run(options: argparse.Namespace) -> Iterator[str]:
    """Makes the batch and shows it; yields the lines to print."""
    from dora_vl.report.batch import terminal_lines
    from dora_vl.run.settings_parser import read_run

    config = read_run([f"--config={options.config}", *options.settings], program="dora-vl show batch")
    with tempfile.TemporaryDirectory() as folder:
        view = first_batch(pipeline_of(shown_settings(config, Path(folder))))
        # https://force-color.org, https://no-color.org
        on_a_screen = sys.stdout.isatty() or "FORCE_COLOR" in os.environ
        yield from terminal_lines(view, colours=on_a_screen and "NO_COLOR" not in os.environ)


def shown_settings(config: RunConfig, folder: Path) -> RunConfig:
    """Returns a run's settings for looking at its data: nothing is cached, and files go to `folder`."""
    training = {name: value for name, value in config.training.items() if name not in ELSEWHERE}
    training |= {"output_dir": str(folder), "use_cpu": True, "eval_strategy": "no"}
    data = dataclasses.replace(config.data, workers=0, cache_features=False, replay=0.0)
    model = dataclasses.replace(config.model, dtype="float32", quantisation=None)
    adapter = dataclasses.replace(config.adapter, projector_start=None)
    return dataclasses.replace(config, adapter=adapter, training=training, data=data, model=model, resume=None)


class FirstBatch(NamedTuple):
    """The micro-batch that a process sees first, its samples' ids, an epoch's samples, and what reads its tokens."""

    batch: dict[str, Any]
    names: list[str]
    epoch_samples: int
    reading: TokenText


def first_batch(pipeline: Pipeline) -> BatchView:
    """Returns the batch that one process would see first."""
    from dora_vl.report.batch import batch_view

    first = read_first_batch(pipeline)
    return batch_view(first.batch, first.names, first.reading, shifted=pipeline.labels_shift)


def read_first_batch(pipeline: Pipeline) -> FirstBatch:
    """Makes the first micro-batch as training would."""
    from torch import nn

    from dora_vl.data.samples import Skipped
    from dora_vl.training.trainer import OrderedTrainer

    arguments = pipeline.arguments()
    pipeline.prepare(arguments)
    backbone = pipeline.skeleton()
    data = pipeline.data(backbone, arguments)
    batches: list[tuple[list[Any], dict[str, Any]]] = []

    def collate_and_keep(items: list[Any]) -> dict[str, Any]:
        batch = dict(data.collate(items))
        batches.append((items, dict(batch)))
        return batch

    # A loader asks nothing of the model.
    trainer = OrderedTrainer(dataclasses.replace(data, collate=collate_and_keep), model=nn.Linear(1, 1), args=arguments)
    for set_epoch in data.set_epoch:
        set_epoch(0)
    next(iter(trainer.get_train_dataloader()))
    items, batch = batches[0]  # a loader reads a batch ahead
    samples = getattr(items[0], "items", items)  # a mixture's item is a whole micro-batch
    names = [sample.id for sample in samples if not isinstance(sample, Skipped)]
    return FirstBatch(batch, names, data.samples, pipeline.reading(backbone, arguments))
