"""One training run from settings to a tested adapter, to be read from top to bottom."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dora_vl.core import load_adapter
from dora_vl.data.bad_samples import write_skipped
from dora_vl.evaluation.questions import read_questions
from dora_vl.evaluation.run import evaluate_run
from dora_vl.training.arguments import training_arguments
from dora_vl.training.assembly import adapt, build_encoder, compose_if_missing, load_backbone
from dora_vl.training.build_trainer import build_trainer
from dora_vl.training.checkpoints import checkpoint_to_resume
from dora_vl.training.launch import is_first_rank, leave_process_group, on_first_rank, threads_of_this_rank
from dora_vl.training.picture_reading import picture_reader
from dora_vl.training.recipe import RunConfig
from dora_vl.training.run_folder import ADAPTER, METRICS, SKIPPED, add_metrics, prepare_run_folder, run_folder_of
from dora_vl.training.trainer import AdapterTrainer
from dora_vl.training.zero import load_whole_models_again

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    step: int
    stopped_by: int | None
    """The signal that stopped it before its end; None for a whole run."""
    numbers: dict[str, Any]
    """What training adds to `metrics.json`."""


def train(config: RunConfig, *, task: str) -> RunResult:
    """Trains as the settings say and leaves `adapter/`, checkpoints and `log.jsonl` in the run folder.

    Every rank of a launch calls it. Raises UserError for whatever in the settings or the data cannot be used.
    """
    threads = threads_of_this_rank()
    arguments = training_arguments(config)
    if threads is not None:
        torch.set_num_threads(threads)
    run_folder = run_folder_of(config)
    checkpoint = checkpoint_to_resume(config.resume, run_folder)
    on_first_rank(partial(prepare_run_folder, run_folder, resume=checkpoint is not None, overwrite=config.overwrite))
    on_first_rank(partial(compose_if_missing, config.model, arguments))

    backbone = load_backbone(config.model, cached_features=config.data.cache_features)
    torch.manual_seed(arguments.seed)  # A's initial values, the same on every rank
    adapt(backbone.model, config.adapter)
    trainer, stop = build_trainer(config, arguments, backbone, task=task)
    torch.manual_seed(arguments.seed + arguments.process_index)  # ranks drop different elements
    try:
        output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        stop.restore()

    numbers = training_numbers(trainer, float(output.metrics["train_runtime"]))
    skipped = trainer.statistics.skipped_on_all_ranks()
    if stop.received is None:
        trainer.save_model()
        if arguments.process_index == 0:
            write_skipped(run_folder / SKIPPED, skipped)
            add_metrics(run_folder / METRICS, numbers)
    return RunResult(output.global_step, stop.received, numbers)


def run(config: RunConfig, *, task: str) -> int | None:
    """Trains, then tests where `evaluation.file` is set; returns the signal that stopped the run, or None.

    The process group is gone afterwards: ZeRO-3 on a CPU aborts at interpreter exit while it is there.
    """
    try:
        result = train(config, task=task)
        first = is_first_rank()
    finally:
        leave_process_group()
        load_whole_models_again()
    if result.stopped_by is None and config.evaluation.file is not None and first:
        evaluate(config, result.numbers)
    return result.stopped_by


def training_numbers(trainer: AdapterTrainer, seconds: float) -> dict[str, Any]:
    """What training adds to `metrics.json`; every rank takes part in the sums."""
    counts = trainer.statistics.over_ranks(trainer.args.device)
    return {
        "train_seconds": round(seconds, 1),
        "samples_per_second": round(counts.samples / seconds, 3),
        "train_samples": counts.samples,
        "train_steps": trainer.state.global_step,
        "padding_share": round(counts.padding_share, 4),
        "skipped_samples": counts.skipped,
    }


def evaluate(config: RunConfig, numbers: dict[str, Any]) -> dict[str, Any]:
    """Answers `evaluation.file` with the saved adapter, in this process alone, and completes `metrics.json`.

    The base is loaded again and the adapter folder put on it: what is tested is what was saved, whole, whatever
    ZeRO stage it was trained under.
    """
    run_folder = run_folder_of(config)
    backbone = load_backbone(config.model, cached_features=config.data.cache_features)
    load_adapter(backbone.model, run_folder / ADAPTER)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone.to(device)
    encoder = build_encoder(config.model, backbone, max_tokens=config.data.max_tokens)
    questions, _ = read_questions(Path(str(config.evaluation.file)), config.evaluation.limit)
    names = dict.fromkeys(path for question in questions for path in question.images)
    image_folder = Path(config.evaluation.image_folder or config.data.image_folder)
    return evaluate_run(
        backbone,
        encoder,
        config.evaluation,
        run_folder=run_folder,
        pictures=picture_reader(config, backbone, names, folder=image_folder, device=device),
        image_folder=image_folder,
        numbers=numbers,
    )
