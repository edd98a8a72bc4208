"""Visual instructions for a LLaVA, as a task that training can run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainingArguments

from dora_vl.adapters.folder import load_adapter
from dora_vl.backbones.compose import compose_llava
from dora_vl.backbones.encode import LlavaEncoder
from dora_vl.backbones.llava import LlavaBackbone
from dora_vl.backbones.module import Backbone
from dora_vl.core import DoRAConfig
from dora_vl.data.collate import Collator
from dora_vl.data.dataset import LlavaDataset
from dora_vl.data.overlap import overlap, overlap_warning
from dora_vl.data.sampler import sampling_lengths
from dora_vl.data.train_files import train_files, train_name
from dora_vl.data.training_rows import SampleRows, described, load_rows
from dora_vl.evaluation.questions import Question, read_questions
from dora_vl.evaluation.run import evaluate_run
from dora_vl.run.arguments import order_seed
from dora_vl.run.assembly import (
    build_encoder,
    build_sampler,
    dora_config,
    load_backbone,
    pad_token_id,
    read_samples,
    recipe_record,
)
from dora_vl.run.base_loading import check_quantisation, make_base
from dora_vl.run.picture_reading import picture_reader
from dora_vl.run.recipe import RunConfig
from dora_vl.run.run_folder import ADAPTER, run_folder_of
from dora_vl.training.memory_estimate import Activations
from dora_vl.training.task import Task, TrainingData
from dora_vl.training.task_model import GenerationTask

_log = logging.getLogger(__name__)


class LlavaTask(Task):
    """Conversations about pictures, in LLaVA's own format."""

    def __init__(self, config: RunConfig, *, name: str = "llava_instruct") -> None:
        self._config = config
        self._name = name

    @property
    def name(self) -> str:
        """As `recipe.json` says it."""
        return self._name

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        return self._config

    def prepare(self, arguments: TrainingArguments) -> None:
        """Composes the base where it is not there yet.

        All data is read first, and the test's questions: what is wrong with them shows now, not after hours.
        """
        check_quantisation(self.config.model)
        seed = order_seed(arguments)
        train, held_out = read_samples(self.config, seed=seed)
        for file in train_files(self.config.data.train):
            _log.info(described(file, load_rows(file.path, self.config.data.limit).rows))
        if held_out is not None and self.config.data.validation_share:
            counts = len(held_out.rows), len(held_out.pictures), seed
            _log.info("%d samples of %d pictures held out for validation, chosen by seed %d", *counts)
        if self.config.evaluation.file is not None:
            questions, _ = read_questions(Path(self.config.evaluation.file), self.config.evaluation.limit)
            self._warn_of_overlap(train, questions)
        make_base(compose_llava, self.config.model.compose, self.config.model.base, arguments)

    def _warn_of_overlap(self, train: SampleRows, questions: Sequence[Question]) -> None:
        data, evaluation = self.config.data, self.config.evaluation
        if Path(evaluation.image_folder or data.image_folder).resolve() != Path(data.image_folder).resolve():
            return  # one name there is another picture
        found = overlap(train.rows, questions)
        if found:
            _log.warning(overlap_warning(found, train_name(data.train), str(evaluation.file)))

    def load(self) -> Backbone[Any]:
        """The LLaVA."""
        return load_backbone(self.config.model, cached_features=self.config.data.cache_features)

    def dora_config(self, backbone: Backbone[Any]) -> DoRAConfig:
        """The language model's linears and the projector, unless the settings say otherwise."""
        return dora_config(self.config.adapter, backbone.model)

    def data(self, backbone: Backbone[Any], arguments: TrainingArguments) -> TrainingData:
        """The training file's conversations, grouped by modality and length."""
        llava, data = cast(LlavaBackbone, backbone), self.config.data
        encoder = build_encoder(self.config.model, llava, max_tokens=data.max_tokens)
        train, held_out = read_samples(self.config, seed=order_seed(arguments))
        samples = partial(_samples, config=self.config, encoder=encoder, backbone=llava, arguments=arguments)
        train_samples = samples(train)
        lengths = sampling_lengths(train.rows, tokens_per_image=llava.tokens_per_image)
        grouped = data.group_by_modality_length or data.share_pictures
        sampler = build_sampler(lengths, arguments, share_pictures=data.share_pictures) if grouped else None
        return TrainingData(
            train=train_samples,
            validation=None if held_out is None else samples(held_out),
            collate=Collator(
                pad_token_id(encoder), share_pictures_by=encoder.image_token_id if data.share_pictures else None
            ),
            sampler=sampler,
            set_epoch=(train_samples.set_epoch, *(() if sampler is None else (sampler.set_epoch,))),
            samples=len(train.rows),
            source=train_name(data.train),
            longest_tokens=min(data.max_tokens, int(lengths.lengths.max())),
        )

    def loss(self, backbone: Backbone[Any]) -> GenerationTask:
        """Next-token loss."""
        return GenerationTask(backbone, step_tokens=self.config.optim.loss_normalisation == "step_tokens")

    def activations(self, backbone: Backbone[Any], arguments: TrainingArguments, *, longest_tokens: int) -> Activations:
        """The language model's."""
        text: Any = cast(LlavaBackbone, backbone).config.text_config
        return Activations(
            tokens=arguments.per_device_train_batch_size * longest_tokens,
            layers=text.num_hidden_layers,
            hidden_width=text.hidden_size,
            element_bytes=backbone.model.dtype.itemsize,
            recomputed=bool(arguments.gradient_checkpointing),
        )

    def recipe(self) -> dict[str, Any]:
        """Base, template and picture settings."""
        return recipe_record(self.config, self.name)

    def test(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Answers `evaluation.file` with the saved adapter.

        The base is loaded again and the adapter folder put on it: what is tested is what was saved, whole, whatever
        ZeRO stage it was trained under.
        """
        config, run_folder = self.config, run_folder_of(self.config)
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


def _samples(
    samples: SampleRows,
    *,
    config: RunConfig,
    encoder: LlavaEncoder,
    backbone: LlavaBackbone,
    arguments: TrainingArguments,
) -> LlavaDataset:
    folder = Path(config.data.image_folder)
    pictures = picture_reader(
        config, backbone, samples.pictures, folder=folder, device=arguments.device, stored=samples.stored
    )
    return LlavaDataset(
        samples.rows, encode=encoder.encode, picture=pictures.pixels, features=pictures.features, seed=arguments.seed
    )
