"""The Trainer of one run: its data, what it saves, and what happens beside the steps."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import deepspeed_config
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dora_vl.backbones.encode import LlavaEncoder
from dora_vl.backbones.llava import LlavaBackbone
from dora_vl.core import load_adapter, save_adapter, trained_parts
from dora_vl.data.bad_samples import BadSampleLedger
from dora_vl.data.collate import Collator
from dora_vl.data.dataset import LlavaDataset
from dora_vl.data.sampler import sampling_lengths
from dora_vl.training.assembly import (
    build_encoder,
    build_sampler,
    pad_token_id,
    read_rows,
    recipe_record,
)
from dora_vl.training.batch_statistics import BatchStatistics
from dora_vl.training.callbacks import EpochCallback, LossLog, ProgressLine, StopOnSignal
from dora_vl.training.memory_estimate import Activations, describe_plan
from dora_vl.training.optim import LearningRates, learning_rates
from dora_vl.training.picture_reading import picture_reader
from dora_vl.training.recipe import OptimConfig, RunConfig
from dora_vl.training.run_folder import LOSS_LOG, run_folder_of
from dora_vl.training.task_model import GenerationTask
from dora_vl.training.trainer import AdapterTrainer, Persistence
from dora_vl.training.zero import gather_to_read

logger = logging.getLogger(__name__)


def build_trainer(
    config: RunConfig, arguments: TrainingArguments, backbone: LlavaBackbone, *, task: str
) -> tuple[AdapterTrainer, StopOnSignal]:
    """The Trainer of an adapted backbone, with its data; and what tells whether a signal stopped it."""
    data, run_folder = config.data, run_folder_of(config)
    encoder = build_encoder(config.model, backbone, max_tokens=data.max_tokens)
    rows = read_rows(data.train, data.limit)
    held_out = None if data.validation is None else read_rows(data.validation, data.validation_limit)
    samples = partial(_samples, config=config, encoder=encoder, backbone=backbone, arguments=arguments)
    train_samples = samples(rows)
    lengths = sampling_lengths(rows, tokens_per_image=backbone.tokens_per_image)
    grouped = data.group_by_modality_length or data.share_pictures
    sampler = build_sampler(lengths, arguments, share_pictures=data.share_pictures) if grouped else None
    ledger = BadSampleLedger(max_bad_share=data.max_bad_share, total_samples=len(rows), source=data.train)
    statistics = BatchStatistics(ledger)
    stop = StopOnSignal()
    epoch_listeners = [train_samples.set_epoch, *([] if sampler is None else [sampler.set_epoch])]
    log_plan(backbone, arguments, longest_tokens=min(data.max_tokens, int(lengths.lengths.max())))
    trainer = AdapterTrainer(
        model=GenerationTask(backbone, step_tokens=config.optim.loss_normalisation == "step_tokens"),
        args=arguments,
        train_dataset=train_samples,
        eval_dataset=None if held_out is None else samples(held_out),
        data_collator=Collator(
            pad_token_id(encoder), share_pictures_by=encoder.image_token_id if data.share_pictures else None
        ),
        callbacks=[
            EpochCallback(*epoch_listeners),
            LossLog(run_folder / LOSS_LOG, statistics),
            stop,
        ],
        rates=_rates(config.optim, arguments),
        parts=trained_parts(backbone.model),
        sampler=sampler,
        persistence=_persistence(config, backbone.model, run_folder, task=task, writes=arguments.process_index == 0),
        statistics=statistics,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not arguments.disable_tqdm:
        trainer.add_callback(ProgressLine())
    return trainer, stop


def log_plan(backbone: LlavaBackbone, arguments: TrainingArguments, *, longest_tokens: int) -> None:
    """Logs what trains and what it will take, before the first step."""
    text: Any = backbone.config.text_config
    activations = Activations(
        tokens=arguments.per_device_train_batch_size * longest_tokens,
        layers=text.num_hidden_layers,
        hidden_width=text.hidden_size,
        element_bytes=backbone.model.dtype.itemsize,
        recomputed=bool(arguments.gradient_checkpointing),
    )
    zero = (deepspeed_config() or {}).get("zero_optimization")
    plan = describe_plan(
        backbone, trained_parts(backbone.model), activations, zero=zero, world_size=arguments.world_size
    )
    logger.info("what trains, and what it takes:\n%s", plan)


def _samples(
    rows: datasets.Dataset,
    *,
    config: RunConfig,
    encoder: LlavaEncoder,
    backbone: LlavaBackbone,
    arguments: TrainingArguments,
) -> LlavaDataset:
    names = dict.fromkeys(path for paths in rows["images"] for path in paths)
    folder = Path(config.data.image_folder)
    pictures = picture_reader(config, backbone, names, folder=folder, device=arguments.device)
    return LlavaDataset(
        rows, encode=encoder.encode, picture=pictures.pixels, features=pictures.features, seed=arguments.seed
    )


def _rates(optim: OptimConfig, arguments: TrainingArguments) -> LearningRates:
    return learning_rates(
        arguments.learning_rate,
        projector=optim.projector_learning_rate,
        magnitude=optim.magnitude_learning_rate,
        b_ratio=optim.b_learning_rate_ratio,
    )


def _persistence(config: RunConfig, model: nn.Module, run_folder: Path, *, task: str, writes: bool) -> Persistence:
    recipe = recipe_record(config, task) if writes else None

    def save(folder: Path) -> None:
        save_adapter(model, folder, base_model=config.model.base, recipe=recipe, gather=gather_to_read, write=writes)

    return Persistence(run_folder, save=save, load=partial(load_adapter, model))
