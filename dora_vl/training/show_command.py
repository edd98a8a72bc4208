"""`dora-vl show batch`: the first micro-batch of a run, its tokens coloured by what training does to them."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_vl.errors import UserError
from dora_vl.training.train_command import TASKS, pipeline_of, settings_and_task

if TYPE_CHECKING:
    from dora_vl.report.batch import BatchView
    from dora_vl.training.pipeline import Pipeline

DESCRIPTION = """\
Shows the first micro-batch that training would see: every token, whether it is trained on, read only, the place of a
picture, or padding. The base's weights are not read (a base that a recipe composes is composed first, once).

  dora-vl show batch llava/llava15 --variant 7b_dora --data.train my.json --data.image_folder pictures

CONFIG is a file or a recipe's name; behind it any setting of the run, --section.key value. Which script the run is of
is seen by its settings; --task names it (llava_instruct, vlbart_image, vlbart_video, commonsense).
"""


ELSEWHERE = ("deepspeed", "bf16", "fp16", "report_to", "load_best_model_at_end", "eval_strategy", "optim")
"""Of `training:`, what changes no batch and asks for devices, packages or weights."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options; what stands behind CONFIG is read by `run`."""
    parser.add_argument("what", choices=("batch",), help="what to show")
    parser.add_argument("config", metavar="CONFIG", help="YAML file with the run's settings, or a recipe's name")
    parser.add_argument(
        "settings", nargs=argparse.REMAINDER, metavar="...", help="--task NAME, --variant, --section.key value"
    )


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Makes the batch and shows it; yields the lines to print."""
    options, settings = own_options(arguments.settings)
    words = [f"--config={arguments.config}", *settings]
    from dora_vl.report.batch import terminal_lines

    config, task = settings_and_task(words, options.task, program="dora-vl show batch")
    with tempfile.TemporaryDirectory() as folder:
        view = first_batch(pipeline_of(task)(shown_settings(config, Path(folder))))
        yield from terminal_lines(view, colours=sys.stdout.isatty() and "NO_COLOR" not in os.environ)


def own_options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The verb's own options among a run's settings, and the settings."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--task", choices=TASKS)
    try:
        return parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None


def shown_settings(config: Any, folder: Path) -> Any:
    """A run's settings as they serve to look at its data: nothing is cached, and what is written goes to `folder`."""
    from dora_vl.run.settings import DataConfig, LoadedModelConfig

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
    from torch import nn

    from dora_vl.data.samples import Skipped
    from dora_vl.report.batch import batch_view
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
    return batch_view(batch, names, pipeline.reading(backbone), shifted=pipeline.labels_shift)
