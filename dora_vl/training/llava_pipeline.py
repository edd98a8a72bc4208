"""Visual instructions for a LLaVA, as a pipeline that training can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import Tensor
from transformers import TrainingArguments

from dora_vl.backbones.base import Backbone
from dora_vl.backbones.compose import compose_llava
from dora_vl.backbones.encode import LlavaEncoder
from dora_vl.backbones.llava import LlavaBackbone, llava_config, llava_skeleton
from dora_vl.backbones.loading import load_tokenizer
from dora_vl.backbones.prompts import get_template
from dora_vl.core import DoRAConfig
from dora_vl.data.batches import Collator
from dora_vl.data.pictures import HeldPictures, StoredPictures
from dora_vl.data.samples import ConversationDataset, Examples
from dora_vl.errors import UserError
from dora_vl.evaluation.asker import MediaReader
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.open_model import with_adapter
from dora_vl.evaluation.prompt_inputs import LlavaPrompts
from dora_vl.evaluation.questions import Question
from dora_vl.evaluation.run import check_test, media_of_run, pictures_of_test, read_test, run_test
from dora_vl.training.adapting import LLAVA, check_quantisation, make_base
from dora_vl.training.assembly import (
    PictureReader,
    build_encoder,
    dora_config,
    encoder_of,
    image_folder,
    image_preparation,
    load_backbone,
    pad_token_id,
    picture_reader,
    recipe_record,
)
from dora_vl.training.instruct_data import InstructPipeline, MakeDataset
from dora_vl.training.pipeline import TrainingData
from dora_vl.training.recipe import RunConfig
from dora_vl.training.run_folder import ADAPTER, run_folder_of


class LlavaPipeline(InstructPipeline[RunConfig]):
    """Conversations about pictures, in LLaVA's own format."""

    def prepare(self, arguments: TrainingArguments) -> None:
        """Composes the base where it is not there yet.

        All data is read first, and the test's questions: what is wrong with them shows now, not after hours.
        """
        check_quantisation(self.config.model)
        if self.config.data.max_pixels_per_step is not None:
            raise UserError(
                "data.max_pixels_per_step: a LLaVA-1.5 takes every picture at one size, so there is nothing to shrink; "
                "leave it out"
            )
        samples = self._samples(arguments)
        samples.describe()
        if self.config.evaluation.file is not None:
            samples.warn_of_overlap(check_test(self.config), self.config)
        samples.look_ahead(pictures=image_folder(self.config.data))
        make_base(compose_llava, self.config.model.compose, self.config.model.base, arguments)
        image_preparation(self.config.model)  # refused before the weights

    def _labelling(self, arguments: TrainingArguments) -> tuple[MakeDataset, LlavaEncoder]:
        model = self.config.model
        config = llava_config(model.base, revision=model.revision)
        encoder = encoder_of(model, config, max_tokens=self.config.data.max_tokens)
        return partial(_in_words, encoder=encoder), encoder

    def skeleton(self) -> Backbone[Any]:
        """The LLaVA without its weights."""
        return llava_skeleton(self.config.model.base, revision=self.config.model.revision)

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
        samples = self._samples(arguments)
        pictures = picture_reader(
            self.config,
            llava,
            samples.pictures if data.cache_features else (),
            folder=image_folder(data),
            device=arguments.device,
            stored=samples.stored if data.cache_features else None,
        )
        return samples.training_data(
            partial(_illustrated, encoder=encoder, pictures=pictures),
            collate=Collator(
                pad_token_id(encoder), share_pictures_by=encoder.image_token_id if data.share_pictures else None
            ),
            tokens_per_image=llava.tokens_per_image,
            share_pictures=data.share_pictures,
        )

    def _assistant(self, backbone: Backbone[Any]) -> Assistant:
        llava, data = cast(LlavaBackbone, backbone), self.config.data
        encoder = build_encoder(self.config.model, llava, max_tokens=data.max_tokens)
        return Assistant(llava, LlavaPrompts(encoder, image_preparation(self.config.model)), while_training=True)

    def _places(self, backbone: Backbone[Any]) -> frozenset[int]:
        return frozenset([cast(LlavaBackbone, backbone).config.image_token_id])

    def _test_questions(self) -> list[Question]:
        return read_test(self.config.evaluation, self.config.data.contract)[0]

    def _media(
        self,
        backbone: Backbone[Any],
        arguments: TrainingArguments,
        questions: Sequence[Question],
        stored: StoredPictures | None,
    ) -> MediaReader:
        media = media_of_run(self.config, self._assistant(backbone), of_test=stored is None)
        if not self.config.data.cache_features:
            return replace(media, stored=stored)
        names = dict.fromkeys(path for question in questions for path in question.images)
        llava, device = cast(LlavaBackbone, backbone), arguments.device
        folder = pictures_of_test(self.config) if stored is None else image_folder(self.config.data)
        kept = picture_reader(self.config, llava, names, folder=folder, device=device, stored=stored)
        return replace(media, stored=stored, features=kept.features)

    def recipe(self) -> dict[str, Any]:
        """Base, template and picture settings."""
        model = self.config.model
        template = get_template(model.template, load_tokenizer(model.base, revision=model.revision)).name
        return {**recipe_record(self.config, self.name), "backbone": LLAVA, "template": template}

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
        questions, _ = read_test(config.evaluation, config.data.contract)
        names = dict.fromkeys(path for question in questions for path in question.images)
        device = next(backbone.parameters()).device
        return picture_reader(config, backbone, names, folder=pictures_of_test(config), device=device).features


def _in_words(rows: Examples, stored: HeldPictures, *, encoder: LlavaEncoder) -> ConversationDataset:
    """Samples without their pictures."""
    return ConversationDataset(rows, encode=encoder.encode)


def _illustrated(
    rows: Examples, stored: HeldPictures, *, encoder: LlavaEncoder, pictures: PictureReader
) -> ConversationDataset:
    """Samples with pixels, or with features that are stored by the picture's name."""
    pixels = None if pictures.pixels is None else partial(pictures.pixels, stored=stored)
    return ConversationDataset(rows, encode=encoder.encode, picture=pixels, features=pictures.features)
