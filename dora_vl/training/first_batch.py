"""The first micro-batch of a run, made as training makes it, on a model without weights."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dora_vl.data.samples import Sample
from dora_vl.errors import UserError
from dora_vl.report.batch import BatchView, TokenText, batch_view
from dora_vl.training.arguments import training_arguments
from dora_vl.training.faults import StepFaults
from dora_vl.training.optim import LearningRates
from dora_vl.training.pipeline import Pipeline
from dora_vl.training.progress import BatchStatistics
from dora_vl.training.run_folder import FAULTS
from dora_vl.training.run_settings import TASKS, pipeline_of, settings_and_task
from dora_vl.training.seq2seq_tasks import MicroBatch, Seq2SeqSample
from dora_vl.training.trainer import AdapterTrainer, Persistence, Watched

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
    kept = _Kept(data.collate)
    folder = Path(str(arguments.output_dir))
    nothing = Persistence(folder, save=_no_file, load=_no_file)
    trainer = AdapterTrainer(
        model=nn.Linear(1, 1),  # a loader asks nothing of it
        args=arguments,
        train_dataset=data.train,
        data_collator=kept,
        rates=LearningRates(arguments.learning_rate, {}),
        sampler=data.sampler,
        parts=(),
        persistence=nothing,
        watched=Watched(BatchStatistics(), StepFaults(folder / FAULTS, "stop")),
    )
    for set_epoch in data.set_epoch:
        set_epoch(0)
    next(iter(trainer.get_train_dataloader()))
    items, batch = kept.first()
    opens = pipeline.pictures_of(backbone, arguments, data, items)
    names, usable = _usable(items)
    reading = pipeline.reading(backbone)
    pictures = [one for one, keep in zip(opens, usable, strict=True) if keep]
    return batch_view(
        batch, names, TokenText(reading.tokenizer, reading.places), pictures, shifted=pipeline.labels_shift
    )


class _Kept:
    """A collator that remembers what it was given and made."""

    def __init__(self, collate: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self._collate = collate
        self._made: list[tuple[list[Any], Mapping[str, Any]]] = []

    def __call__(self, items: list[Any]) -> Mapping[str, Any]:
        batch = self._collate(items)
        self._made.append((items, dict(batch)))
        return batch

    def first(self) -> tuple[list[Any], Mapping[str, Any]]:
        """The first batch and its items: a loader reads a batch ahead."""
        return self._made[0]


def _usable(items: Sequence[Any]) -> tuple[list[str], list[bool]]:
    """The ids of the samples that are in the batch, and of each item whether it is."""
    samples = items[0].items if isinstance(items[0], MicroBatch) else items
    usable = [isinstance(one, Sample | Seq2SeqSample) for one in samples]
    return [one.id for one, keep in zip(samples, usable, strict=True) if keep], usable


def _no_file(folder: Path) -> None:
    raise RuntimeError(f"{folder}: nothing is saved or loaded here")


# `dora-vl show batch`: the first micro-batch of a run, its tokens coloured by what training does to them.


DESCRIPTION = """\
Shows the first micro-batch that training would see: every token, whether it is trained on, read only, the place of a
picture, or padding. The base's weights are not read (a base that a recipe composes is composed first, once).

  dora-vl show batch llava/llava15 --variant 7b_dora --data.train my.json --data.image_folder pictures
  dora-vl show batch my_run.yaml --to batch.html            pictures beside the samples; or batch.png

CONFIG is a file or a recipe's name; behind it any setting of the run, --section.key value. Which script the run is of
is seen by its settings; --task names it (llava_instruct, vlbart_image, vlbart_video, commonsense).
"""
KINDS = (".html", ".png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options; what stands behind CONFIG is read by `run`."""
    parser.add_argument("what", choices=("batch",), help="what to show")
    parser.add_argument("config", metavar="CONFIG", help="YAML file with the run's settings, or a recipe's name")
    parser.add_argument(
        "settings",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="--to FILE.html or FILE.png, --task NAME, --variant, --section.key value",
    )


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Makes the batch and shows it; yields the lines to print.

    Raises:
        UserError: a setting, the data or the base is wrong, as training would say it.
    """
    options, settings = _own_options(arguments.settings)
    if options.to is not None and options.to.suffix not in KINDS:
        raise UserError(f"--to {options.to}: give the name of an .html or a .png file")
    words = [f"--config={arguments.config}", *settings]
    from dora_vl.report.batch import batch_page, batch_picture, terminal_lines
    from dora_vl.report.page import write_page

    config, task = settings_and_task(words, options.task, program="dora-vl show batch")
    with tempfile.TemporaryDirectory() as folder:
        view = first_batch(pipeline_of(shown_settings(config, Path(folder)), task))
        yield from terminal_lines(view, colours=_colours())
        if options.to is not None and options.to.suffix == ".png":
            _write_bytes(options.to, batch_picture(view))
        elif options.to is not None:
            write_page(options.to, batch_page(view, title=Path(arguments.config).stem))
    if options.to is not None:
        yield f"{options.to}"


def _own_options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--task", choices=TASKS)
    try:
        return parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None


def _colours() -> bool:
    """Whether a terminal that has not asked for plain text reads this."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _write_bytes(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
