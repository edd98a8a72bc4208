"""The pipeline of decoders that learn conversations: a LLaVA, any other vision-language model, or a language model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.backbones.base import Backbone, sees_pictures
from dora_vl.backbones.families.targets import language_targets, names_projector, projector_patterns
from dora_vl.backbones.model import DecoderBackbone, check_packing, open_backbone, skeleton_of
from dora_vl.backbones.tower_sources import compose_llava, write_language_model
from dora_vl.core import DoRAConfig
from dora_vl.core.strength import checked_strength
from dora_vl.data.samples import Labelled
from dora_vl.errors import SettingError
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.test import check_test, read_sets, test_adapter, watch_run
from dora_vl.run.base import (
    DECODER,
    check_base,
    check_base_takes_videos,
    check_pixels,
    check_quantisation,
    check_videos,
    check_window,
    image_folder,
    load_base,
    make_base,
    video_folder,
)
from dora_vl.run.folder import REPLAY, Watch, run_folder_of
from dora_vl.run.settings import RunConfig, foreign_fields
from dora_vl.training.extras.closed_form import form_of, start_in
from dora_vl.training.extras.replay import Replay, check_base_writes, check_replay, copy_chats
from dora_vl.training.opened import Opened, encoder_of, encoder_of_saved, stored_outputs
from dora_vl.training.parts import core_config
from dora_vl.training.pipeline import LossModel, Pipeline
from dora_vl.training.run_samples import RunSamples, check_count, check_media, describe, warn_of_overlap
from dora_vl.training.training_data import TrainingData, labelled, training_data
from dora_vl.training.ways.rollouts import Rollouts
from dora_vl.training.ways.table import WAYS

logger = logging.getLogger(__name__)

PAPER_TARGETS = tuple(
    f"model.layers.*.{name}"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
)
"""They are the five of the paper's commonsense runs (table 8), as LLaMA 1, 2, 3 and their like name them."""


class DecoderPipeline(Pipeline):
    """Trains on conversations about pictures and videos, or on text alone, in one of `WAYS`."""

    kind = DECODER

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.way = WAYS[config.objective.kind](config)
        self._opened: Opened | None = None

    def prepare(self, arguments: TrainingArguments) -> None:
        """Composes the base, or writes it from its source, where it is not there yet.

        All data and the test's questions are read first, so that what is wrong with them shows now, not after hours.
        """
        config, model = self.config, self.config.model
        if model.compose is None and model.source is None:
            check_base(config)
        check_quantisation(model)
        if config.data.replay:
            check_replay(config)
        samples = RunSamples.read(config.data, arguments)
        describe(samples, config.data)
        check_count(samples, arguments)
        self.way.check(samples, arguments)
        if config.evaluation.file is not None:
            warn_of_overlap(samples, check_test(config), config)
        elif config.evaluation.files:
            read_sets(config.evaluation)
        sees = model.compose is not None or (model.source is None and sees_pictures(model.base, model.revision))
        has_videos = samples.has_videos and sees
        if has_videos and config.data.cache_features:
            raise SettingError("data.cache_features", " is for pictures, and there are videos; set it false")
        if has_videos:
            check_videos(config.data)
        pictures, videos = (image_folder(config.data), video_folder(config.data)) if sees else (None, None)
        check_media(samples, config.data, pictures=pictures, videos=videos)
        make_base(compose_llava, model.compose, model.base, arguments)
        make_base(write_language_model, model.source, model.base, arguments)
        if config.adapter.projector_start is not None:
            form_of(config)
        self._opened = opened = self._open(samples, arguments)
        check_window(model.base, opened.encoder, model.revision)
        check_pixels(model.base, opened.encoder, opened.most_pixels)
        if config.data.replay:
            check_base_writes(config, opened.encoder)
        if has_videos:
            check_base_takes_videos(model.base, opened.encoder, config.data, pictures=samples.has_pictures)

    def opened(self, arguments: TrainingArguments) -> Opened:
        """Returns the run's data and encoder, opened once: by `prepare`, or on other ranks by the first call."""
        if self._opened is None:
            self._opened = self._open(RunSamples.read(self.config.data, arguments), arguments)
        return self._opened

    def _open(self, samples: RunSamples, arguments: TrainingArguments) -> Opened:
        config, most = self.config, self.config.data.max_pixels_per_step
        together = arguments.per_device_train_batch_size * self.way.picture_lists(samples)
        return Opened(
            config=config,
            arguments=arguments,
            samples=samples,
            encoder=encoder_of(config, thinking=samples.has_thoughts),
            most_pixels=None if most is None else most // together,
        )

    def labelled(self, arguments: TrainingArguments) -> Iterator[Labelled]:
        """Yields the labels that the run's encoder makes."""
        opened = self.opened(arguments)
        return labelled(opened.samples, self.way.sample_encoder(opened))

    def skeleton(self) -> DecoderBackbone:
        """Builds the model without its weights."""
        return skeleton_of(self.config.model.base, revision=self.config.model.revision)

    def load(self) -> DecoderBackbone:
        """Loads the model; one of instructions will search its answers with `evaluation.beams`."""
        config = self.config
        search = {"num_beams": config.evaluation.beams} if config.task == "commonsense" else None
        return load_base(open_backbone, config.model, generation=search)

    def write_replay(self, backbone: Backbone[Any], arguments: TrainingArguments) -> None:
        """Puts the chats of `data.replay` into the run's folder; a base that has none yet writes them."""
        if self.config.data.replay:
            assistant = Assistant(backbone, self.opened(arguments).encoder)
            copy_chats(self.config, assistant, arguments.device)

    def dora_config(self, backbone: Backbone[Any]) -> DoRAConfig:
        """Adapts every linear of the decoder and trains the projector, unless the settings say otherwise."""
        adapter, model = self.config.adapter, backbone.model
        if adapter.method == "full" and adapter.targets is None:
            raise SettingError(
                "adapter.targets", " must name the modules whose weights train with adapter.method: full"
            )
        targets, also_train = self._places(model)
        return core_config(adapter, model, targets=targets, also_train=also_train)

    def _places(self, model: PreTrainedModel) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
        """Returns the default targets, none where `adapter.targets` names some, and what trains beside them."""
        adapter, base = self.config.adapter, self.config.model
        if self.config.task == "commonsense":
            return PAPER_TARGETS, {}
        targets = language_targets(model) if adapter.targets is None else ()
        if not adapter.train_projector or {"projector"} & {*adapter.parts, *adapter.also_train}:
            return targets, {}
        if patterns := projector_patterns(model):
            in_targets = adapter.method == "full" and names_projector(model, adapter.targets or ())
            return targets, {} if in_targets else {"projector": patterns}
        if sees_pictures(base.base, base.revision):
            logger.warning(
                "no projector is known in a %s, so none trains; adapter.train_projector: false says that it is meant",
                type(model).__name__,
            )
        return targets, {}

    def data(self, backbone: Backbone[Any], arguments: TrainingArguments) -> TrainingData:
        """Returns the training file's conversations, grouped by modality and length."""
        opened, decoder, data = self.opened(arguments), cast(DecoderBackbone, backbone), self.config.data
        encoder, samples = opened.encoder, opened.samples
        packing, reason = check_packing(decoder, encoder, data.packing)
        if reason is not None:
            logger.warning("data.packing: %s instead of %s: %s", packing, data.packing, reason)
        # Samples that take a batch through the vision part, as other ranks' may be: a picture's, and a video's.
        videos = encoder.sees_pictures and samples.has_videos and encoder.no_videos_reason is None
        pictures = encoder.sees_pictures and (samples.has_pictures or (samples.has_videos and not videos))
        dummy, outputs = encoder.dummy() if pictures else None, None
        if data.cache_features and samples.has_pictures:
            form = form_of(self.config, decoder)
            outputs, dummy = stored_outputs(opened, decoder, samples.pictures)
            start_in(form, opened, decoder, outputs)
        replay = None
        if data.replay:
            assert samples.train is not None, "prepare has refused a stream"
            replay = Replay.of(run_folder_of(self.config.training) / REPLAY, samples.train, encoder, data.replay)
        collate = replace(
            encoder.collate,
            dummy=dummy,
            dummy_video=encoder.dummy_video() if videos else None,
            packing=packing,
            chats_from=None if replay is None else replay.first_index,
            **self.way.collation(),
        )
        made = training_data(opened, self.way.sample_encoder(opened, outputs), collate, replay)
        return self.way.with_room(made, arguments)

    def loss(self, backbone: Backbone[Any]) -> LossModel:
        """Makes the loss of the run's way."""
        return self.way.loss(backbone)

    def rollouts(self, backbone: Backbone[Any], arguments: TrainingArguments, data: TrainingData) -> Rollouts | None:
        """Draws answers where the way learns from its own."""
        never = self.reading(backbone, arguments)[1]
        return self.way.rollouts(self.opened(arguments), backbone, data, never)

    def watch(self, backbone: Backbone[Any], arguments: TrainingArguments) -> Watch | None:
        """Watches questions of the validation samples, or else of the test."""
        opened = self.opened(arguments)
        if opened.samples.held_out is None and self.config.evaluation.tested is None:
            return None
        assistant = Assistant(backbone, opened.encoder, while_training=True)
        return watch_run(assistant, self.config, opened.samples.held_out)

    def reading(
        self, backbone: Backbone[Any], arguments: TrainingArguments
    ) -> tuple[PreTrainedTokenizerBase, frozenset[int]]:
        """Takes both from the encoder and the base's configuration."""
        config, encoder = backbone.model.config.to_dict(), self.opened(arguments).encoder
        names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        placeholder_ids = [config[name] for name in names if isinstance(config.get(name), int)]
        token = vars(encoder.processor).get("image_token")
        if not placeholder_ids and isinstance(token, str):
            placeholder_ids = [encoder.tokenizer.convert_tokens_to_ids(token)]
        return encoder.tokenizer, frozenset(placeholder_ids)

    def recipe(self, arguments: TrainingArguments) -> dict[str, Any]:
        """Adds the wording, and how pictures and videos are read."""
        model, data, foreign = self.config.model, vars(self.config.data), foreign_fields(self.config.task)
        prompts = self.opened(arguments).encoder.prompts
        of_the_data = ("as_published", "video_frames", "video_fps", "train_on")
        return {
            **super().recipe(arguments),
            "revision": model.revision,
            "template": prompts.name,
            "thinking": prompts.thinking,
            "quantisation": model.quantisation,
            "image_aspect": model.image_aspect,
            "max_tokens": data["max_tokens"],
            **{name: data[name] for name in of_the_data if f"data.{name}" not in foreign},
        }

    def test(self, metrics: Mapping[str, Any]) -> None:
        """Answers the test's file, or every set of `evaluation.files`, with the saved adapter."""
        strength = checked_strength(self.config.evaluation.strength)
        base = self.load()
        base.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval().requires_grad_(False)
        assistant = Assistant(base, encoder_of_saved(self.config))
        test_adapter(assistant, partial(self.with_saved_adapter, base, strength), self.config, metrics=metrics)
