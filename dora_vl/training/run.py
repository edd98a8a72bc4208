"""Runs a training, from its settings to a tested adapter."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from dora_vl.adapters.files import WEIGHTS_FILE
from dora_vl.data.samples import check_labels, write_skipped
from dora_vl.errors import Diverged, SettingError
from dora_vl.files import read_json
from dora_vl.run.arguments import launch_of
from dora_vl.run.folder import (
    ADAPTER,
    FAULTS,
    METRICS,
    SKIPPED,
    TRAINING_METRICS,
    add_metrics,
    check_run_folder,
    checkpoint_of,
    lock_run_folder,
    prepare_run_folder,
    run_folder_of,
    write_settings,
)
from dora_vl.run.launch import (
    is_first_launched,
    is_first_rank,
    keep_freed_memory,
    leave_process_group,
    load_whole_models_again,
    on_first_rank,
    threads_of_this_rank,
    wait_for_everyone,
)
from dora_vl.run.settings import RunConfig, settings_of
from dora_vl.training.checkpoint_files import check_manifest, check_same_base
from dora_vl.training.faults import check_base_weights, steps_left_out
from dora_vl.training.largest_batch import out_of_memory_reported, training_fits
from dora_vl.training.parts import adapt, check_initial, check_parts
from dora_vl.training.pipeline import Pipeline
from dora_vl.training.trainer import AdapterTrainer, build_trainer
from dora_vl.training.ways.rollouts import steps_alike

logger = logging.getLogger(__name__)


def run(pipeline: Pipeline) -> int | None:
    """Trains, then tests if the settings name a test; returns the signal that stopped the run, or None.

    With `test_only` it tests what an earlier run left, and nothing else. It destroys the process group: ZeRO-3 on a CPU
    aborts at interpreter exit while one exists.
    """
    config = pipeline.config
    with lock_run_folder(run_folder_of(config.training)) if is_first_launched() else nullcontext():
        if config.test_only:
            test_again(pipeline)
            return None
        try:
            stopped_by, metrics = train(pipeline)
            first = is_first_rank()
        finally:
            leave_process_group()
            load_whole_models_again()
        if stopped_by is None and config.evaluation.tested is not None and first:
            _test(pipeline, metrics)
        return stopped_by


def train(pipeline: Pipeline) -> tuple[int | None, dict[str, Any]]:
    """Trains as the pipeline's settings say and leaves `adapter/`, checkpoints and `log.jsonl` in the run folder.

    Every rank of a launch calls it. Returns the signal that stopped the run, or None, and the metrics that training
    adds to `metrics.json`. Raises UserError for whatever in the settings or the data cannot be used.
    """
    config, threads = pipeline.config, threads_of_this_rank()
    arguments = pipeline.arguments()
    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint = checkpoint_of(config)
    on_first_rank(partial(_check_and_prepare, pipeline, arguments, checkpoint))

    with out_of_memory_reported(lambda: "loading the model"):
        backbone = pipeline.load()
        check_base_weights(backbone.model, config.model.base)
        pipeline.write_replay(backbone, arguments)
        torch.manual_seed(arguments.seed)  # A's initial values, the same on every rank
        adapt(backbone.model, pipeline.dora_config(backbone), initial=config.adapter.initial)
        trainer = build_trainer(pipeline, arguments, backbone)
    if checkpoint is not None:  # base and samples, which are read by now, must be its own
        on_first_rank(partial(_prepare_resume, trainer, checkpoint, config))
        trainer.progress.go_on_from(checkpoint)
    keep_freed_memory()
    torch.manual_seed(arguments.seed + arguments.process_index)  # ranks drop different elements
    with trainer.closing, training_fits(trainer, config):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.faults.ended_by is not None:
        raise Diverged(trainer.faults.ended_by)
    stopped_by = trainer.stop.received
    metrics = _write_results(trainer, stopped=stopped_by is not None)
    wait_for_everyone()  # the ranks' store ends with the first of them
    return stopped_by, metrics


def _check_and_prepare(pipeline: Pipeline, arguments: TrainingArguments, checkpoint: Path | None) -> None:
    """Checks what can be wrong before weights are loaded, and makes a new run's folder; on the first rank only."""
    config, folder = pipeline.config, run_folder_of(pipeline.config.training)
    check_run_folder(folder, resume=checkpoint is not None, overwrite=config.overwrite)
    if checkpoint is not None:
        check_manifest(checkpoint, settings_of(config), launch_of(arguments))
    if config.model.dtype == "float16" and config.adapter.method != "full":  # else the Trainer scales the loss
        reason = "the loss is not scaled, so small gradients become 0, most in steps of many tokens; take bfloat16"
        logger.warning("model.dtype is float16: %s", reason)
    check_initial(config.adapter.initial)
    pipeline.prepare(arguments)
    check_labels(pipeline.labelled(arguments))
    check_parts(pipeline, arguments)
    # Only now, so that a run that cannot begin leaves no folder; a resume that is refused changes nothing.
    if checkpoint is None:
        prepare_run_folder(folder, checkpoint=None, overwrite=config.overwrite)
        write_settings(folder, config)


def _prepare_resume(trainer: AdapterTrainer, checkpoint: Path, config: RunConfig) -> None:
    """Checks the checkpoint to resume from, and prepares the folder; on the first rank only."""
    folder = run_folder_of(config.training)
    check_same_base(checkpoint, config.model.base, trainer.recipe.get("base_sha256"))
    trainer.progress.check_samples(checkpoint)
    prepare_run_folder(folder, checkpoint=checkpoint, overwrite=False)
    write_settings(folder, config)


def _write_results(trainer: AdapterTrainer, *, stopped: bool) -> dict[str, Any]:
    """Writes the results of a finished run, and returns its metrics; a stopped run gets no results."""
    folder, counts = trainer.run_folder, trainer.statistics.over_ranks(trainer.args.device)
    skipped = trainer.statistics.skipped_on_all_ranks()
    held_out = {} if trainer.validation is None else trainer.validation.statistics.skipped_on_all_ranks()
    step, seconds = trainer.state.global_step, trainer.progress.seconds
    metrics: dict[str, Any] = {}
    if counts == trainer.statistics.earlier:  # a whole run was resumed, which has written them unless it was stopped
        written = read_json(folder / METRICS) if (folder / METRICS).is_file() else {}
        if written.get("train_steps") == step:
            metrics = {name: written[name] for name in TRAINING_METRICS if name in written}
    is_new = not metrics
    if is_new:
        metrics = {
            "train_seconds": round(seconds, 1),
            "samples_per_second": round(counts.samples / seconds, 3),
            "train_samples": counts.samples,
            "train_steps": step,
            "padding_share": round(counts.padding_share, 4),
            "skipped_samples": counts.skipped,
            **({"shrunk_samples": counts.shrunk_samples} if counts.shrunk_samples else {}),
        }
        if left_out := steps_left_out(folder / FAULTS):
            metrics["steps_left_out"] = left_out
        if trainer.rollouts is not None and (alike := steps_alike(folder, step)):
            metrics["steps_alike"] = alike
    if metrics.get("shrunk_samples"):
        logger.info(
            "%s samples (%s of all) had their pictures shrunk to fit data.max_pixels_per_step",
            *(f"{counts.shrunk_samples:,}", f"{counts.shrunk_samples / counts.samples:.1%}"),
        )
    if not stopped:
        trainer.save_model()
        if trainer.args.process_index == 0 and is_new:
            write_skipped(folder / SKIPPED, skipped, validation=held_out)
            add_metrics(folder / METRICS, metrics)
    return metrics


def _test(pipeline: Pipeline, metrics: dict[str, Any]) -> None:
    with out_of_memory_reported(lambda: "the test"):
        pipeline.test(metrics)


def test_again(pipeline: Pipeline) -> None:
    """Tests the adapter in the run folder; keeps what `metrics.json` says of its training."""
    config, folder = pipeline.config, run_folder_of(pipeline.config.training)
    weights, path = folder / ADAPTER / WEIGHTS_FILE, folder / METRICS
    if config.resume is not None or config.overwrite:
        raise SettingError("test_only", " trains nothing; leave resume and overwrite out, which are about training")
    if config.evaluation.tested is None:
        raise SettingError("test_only", ": the settings' evaluation section names no file to test on")
    if not weights.is_file():
        raise SettingError(
            "test_only", f": {weights} does not exist; train first, or name the run's training.output_dir"
        )
    if is_first_launched():
        metrics = read_json(path) if path.is_file() else {}
        _test(pipeline, {name: metrics[name] for name in TRAINING_METRICS if name in metrics})
