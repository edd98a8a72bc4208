"""Visual instructions for a LLaVA, as a task that training can run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import TrainingArguments

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
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.open_asker import with_adapter
from dora_vl.evaluation.prompt_inputs import LlavaPrompts
from dora_vl.evaluation.questions import Question
from dora_vl.evaluation.run import check_test, pictures_of_test, read_test, run_test
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
from dora_vl.run.base_kinds import LLAVA
from dora_vl.run.base_loading import check_quantisation, make_base
from dora_vl.run.picture_reading import image_preparation, picture_reader
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
            questions = check_test(self.config)
            warn_of_overlap(self.config, train, questions)
        make_base(compose_llava, self.config.model.compose, self.config.model.base, arguments)

    def load(self) -> Backbone[Any]:
        """The LLaVA."""
        return load_backbone(self.config.model, cached_features=self.config.data.cache_features)

    def dora_config(self) -> DoRAConfig:
        """The language model's linears and the projector, unless the settings say otherwise."""
        return dora_config(self.config.adapter)

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
        return {**recipe_record(self.config, self.name), "backbone": LLAVA}

    def test(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Answers `evaluation.file` with the saved adapter.

        The base is loaded again and the adapter folder put on it: what is tested is what was saved, whole, whatever
        ZeRO stage it was trained under.
        """
        config = self.config
        check_test(config)
        backbone, _ = with_adapter(
            load_backbone(config.model, cached_features=config.data.cache_features), run_folder_of(config) / ADAPTER
        )
        encoder = build_encoder(config.model, backbone, max_tokens=config.data.max_tokens)
        return run_test(
            Assistant(backbone, LlavaPrompts(encoder, image_preparation(config.model))),
            config,
            numbers=numbers,
            features=self._stored(backbone),
        )

    def _stored(self, backbone: LlavaBackbone) -> Callable[[str], Tensor] | None:
        """The stored features of the test's pictures, where the run keeps some; missing ones are computed."""
        config = self.config
        if not config.data.cache_features:
            return None
        questions, _ = read_test(config.evaluation)
        names = dict.fromkeys(path for question in questions for path in question.images)
        device = next(backbone.parameters()).device
        return picture_reader(config, backbone, names, folder=pictures_of_test(config), device=device).features


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


def warn_of_overlap(config: RunConfig, train: SampleRows, questions: Sequence[Question]) -> None:
    """Reports training samples that the test asks again."""
    data = config.data
    if pictures_of_test(config).resolve() != Path(data.image_folder).resolve():
        return  # one name there is another picture
    found = overlap(train.rows, questions)
    if found:
        _log.warning(overlap_warning(found, train_name(data.train), str(config.evaluation.file)))
