"""The Trainer of one run: what it saves, and what happens beside the steps."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_config
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dora_vl.adapters.adapter import versions
from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.backbones.base import Backbone, attention_of
from dora_vl.core import trained_parts
from dora_vl.data.samples import BadSampleLedger
from dora_vl.run.folder import FAULTS, LOSS_LOG, PLAN, run_folder_of, settings_of
from dora_vl.run.launch import gather_to_read, gather_to_write, is_first_rank, on_first_rank
from dora_vl.run.watched import Watch
from dora_vl.training.callbacks import (
    EpochCallback,
    LossLog,
    PlanFile,
    SaveAfterValidation,
    StopOnSignal,
    ValidateFirst,
)
from dora_vl.training.faults import StepFaults, steps_left_out
from dora_vl.training.largest_batch import LargestBatch, cost_of
from dora_vl.training.live_view import LiveView, can_show
from dora_vl.training.memory import Activations, Table, engine_of, held_by, rough_table
from dora_vl.training.optim import (
    LearningRates,
    frozen_table,
    rates_of,
    refuse_unknown_parts,
    trained_table,
    with_decay,
)
from dora_vl.training.pipeline import Pipeline
from dora_vl.training.progress import BatchStatistics
from dora_vl.training.ranks import NoteSteps
from dora_vl.training.trainer import AdapterTrainer, Monitors, Persistence
from dora_vl.training.validation import ValidationLoss, WholeSteps, check_validation
from dora_vl.training.watching import WatchQuestions

logger = logging.getLogger(__name__)


def build_trainer(
    pipeline: Pipeline, arguments: TrainingArguments, backbone: Backbone[Any]
) -> tuple[AdapterTrainer, StopOnSignal]:
    """The Trainer of an adapted backbone, with its data; and what tells whether a signal stopped it."""
    config, run_folder = pipeline.config, run_folder_of(pipeline.config.training)
    data = pipeline.data(backbone, arguments)
    ledger = BadSampleLedger(
        max_bad_share=config.data.max_bad_share,
        total_samples=data.samples,
        source=data.source,
        read_in_a_pass=data.read_in_a_pass or _read_in_a_pass(data.samples, arguments),
    )
    statistics = BatchStatistics(ledger)
    held_out = validation = None
    if data.validation is not None:
        source = str(config.data.held_out)
        on_first_rank(partial(check_validation, data.validation, data.collate, source=source))
        step_samples = arguments.per_device_eval_batch_size * arguments.world_size
        held_out = WholeSteps(data.validation, step_samples=step_samples)
        validation = ValidationLoss(source=source, samples=len(held_out))
    watch = pipeline.watch(backbone, arguments) if config.watch else None
    stop, faults = StopOnSignal(), StepFaults(run_folder / FAULTS, config.optim.not_finite, scaled=arguments.fp16)
    rates = rates_of(config.optim, arguments.learning_rate)
    refuse_unknown_parts(trained_parts(backbone.model), rates)
    activations = pipeline.activations(backbone, arguments, longest_tokens=data.longest_tokens)
    plan = plan_of(backbone, rates, activations, arguments)
    logger.info("what trains, and what it takes:\n%s", "\n".join(map(str, plan.values())))
    device = torch.cuda.get_device_name(arguments.device) if arguments.device.type == "cuda" else "cpu"
    machine = {"versions": versions(), "device": device, "ranks": arguments.world_size}
    trainer = AdapterTrainer(
        model=pipeline.loss(backbone),
        args=arguments,
        train_dataset=data.train,
        eval_dataset=held_out,
        data_collator=data.collate,
        callbacks=[
            EpochCallback(*data.set_epoch),
            LossLog(run_folder / LOSS_LOG, statistics),
            stop,
            SaveAfterValidation(),
            NoteSteps(),
            PlanFile(run_folder / PLAN, {name: asdict(table) for name, table in plan.items()} | machine),
        ],
        rates=rates,
        parts=with_decay(trained_parts(backbone.model), config.optim.weight_decay_on),
        sampler=data.sampler,
        persistence=_persistence(pipeline, backbone.model, run_folder, writes=arguments.process_index == 0),
        monitors=Monitors(statistics, faults, validation),
        labels_shift=pipeline.labels_shift,
    )
    if data.stream is not None and not arguments.ignore_data_skip:
        trainer.progress.follow(data.stream)
    trainer.progress.trains_on(data.ids, data.source, data.media)
    callbacks = trainer.callback_handler.callbacks
    # Our log line first, since transformers puts its trackers there, and in a file alone.
    callbacks.insert(0, trainer.pop_callback(LossLog))
    trainer.remove_callback(PrinterCallback)
    _watch_and_show(trainer, watch, run_folder)
    trainer.add_callback(ValidateFirst(trainer.validate_at_once))  # shown, asked and logged by those before
    if arguments.device.type == "cuda" if config.try_largest_batch is None else config.try_largest_batch:
        model_config: Any = backbone.model.config
        cost = cost_of(activations, int(model_config.get_text_config().vocab_size))
        # Before a clock runs or a question is asked.
        callbacks.insert(0, LargestBatch(trainer, config, pools=data.pools, cost=cost, collate=data.collate))
    return trainer, stop


def _watch_and_show(trainer: AdapterTrainer, watch: Watch | None, run_folder: Path) -> None:
    """The watched questions, before what shows their answers."""
    callbacks = trainer.callback_handler.callbacks
    watching = None if watch is None else WatchQuestions(watch, run_folder, lambda: callbacks)
    if watching is not None:
        trainer.add_callback(watching)
    if not trainer.args.disable_tqdm and is_first_rank() and can_show(sys.stderr):
        trainer.remove_callback(ProgressCallback)  # without a terminal transformers' bar stays
        trainer.add_callback(
            LiveView(
                Console(file=sys.stderr),
                str(run_folder),
                asked=lambda: () if watching is None else watching.newest,
                steps_left_out=lambda: steps_left_out(run_folder / FAULTS),
            )
        )


def plan_of(
    backbone: Backbone[Any], rates: LearningRates, activations: Activations, arguments: TrainingArguments
) -> dict[str, Table]:
    """What trains, what does not, and the memory that it will take, before the first step."""
    engine = engine_of(
        deepspeed_config() if arguments.deepspeed is not None else None,
        ranks=arguments.world_size,
        hidden_width=activations.hidden_width,
    )
    held = held_by(backbone, engine, half_precision=arguments.bf16 or arguments.fp16)
    return {
        "trained": trained_table(backbone.model, trained_parts(backbone.model), rates),
        "not_adapted": frozen_table(backbone.model),
        "memory": rough_table(held, engine, activations),
    }


def _read_in_a_pass(samples: int, arguments: TrainingArguments) -> int:
    """Samples that the ranks read in an epoch: accelerate repeats some until all have equally many whole batches."""
    if arguments.world_size == 1:
        return samples
    together = arguments.per_device_train_batch_size * arguments.world_size
    whole = samples - samples % together
    return whole if arguments.dataloader_drop_last or whole == samples else whole + together


def _persistence(pipeline: Pipeline, model: PreTrainedModel, run_folder: Path, *, writes: bool) -> Persistence:
    base, attention = pipeline.config.model.base, {"attn_implementation": attention_of(model)}
    recipe = {**pipeline.recipe(), **attention} if writes else None

    def save(folder: Path) -> None:
        save_adapter(model, folder, base_model=base, recipe=recipe, gather=gather_to_read, write=writes)

    return Persistence(
        run_folder,
        save=save,
        load=partial(load_adapter, model, gather=gather_to_write),
        settings=settings_of(pipeline.config),
        base_sha256=(recipe or {}).get("base_sha256"),
    )
