"""Visual instructions for any vision-language model of transformers, as a pipeline that training can run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from dora_vl.backbones.base import Backbone, max_positions
from dora_vl.backbones.families import ALIGNED, LLAVA, check_trained, model_type_of, sees_pictures
from dora_vl.backbones.image_text import (
    ImageTextBackbone,
    config_of,
    language_targets,
    load_image_text,
    projector_patterns,
    skeleton_of,
)
from dora_vl.backbones.image_text_encode import ImageTextEncoder
from dora_vl.backbones.prompts import FORMATS
from dora_vl.backbones.video_inputs import LEAST_PIXELS, within_pixels
from dora_vl.core import DoRAConfig
from dora_vl.data.batches import ProcessorCollator
from dora_vl.data.example import Example
from dora_vl.data.pictures import HeldPictures, MediaFolder, StoredPictures, open_picture
from dora_vl.data.samples import ConversationDataset, Encoded, Examples, Sample
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.asker import MediaReader
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.open_model import with_adapter
from dora_vl.evaluation.prompt_inputs import ImageTextPrompts
from dora_vl.evaluation.questions import Question
from dora_vl.evaluation.run import check_test, media_of_run, read_test, run_test
from dora_vl.training.adapting import IMAGE_TEXT, check_quantisation, core_config, load_base
from dora_vl.training.assembly import (
    VideoReading,
    check_videos,
    image_folder,
    processor_encoder,
    recipe_record,
    video_folder,
    video_sampling,
)
from dora_vl.training.instruct_data import InstructData, InstructPipeline, MakeDataset
from dora_vl.training.llava_pipeline import LlavaPipeline
from dora_vl.training.pipeline import Pipeline, TrainingData
from dora_vl.training.recipe import RunConfig
from dora_vl.training.run_folder import ADAPTER, run_folder_of

logger = logging.getLogger(__name__)

PLACES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
"""Names in a model's config of the ids that its pictures and videos are put in place of."""


def instruct_pipeline(config: RunConfig) -> Pipeline:
    """The pipeline of a run's base: LLaVA-1.5's own path, or the one of every other vision-language model.

    Raises: UserError for a model type that cannot be trained; nothing but the base's config is read.
    """
    model = config.model
    if model.compose is not None:
        return LlavaPipeline(config)
    model_type = model_type_of(model.base, model.revision)
    if model_type == LLAVA:
        return LlavaPipeline(config)
    check_trained(model.base, model_type)
    return ImageTextPipeline(config)


class ImageTextPipeline(InstructPipeline[RunConfig]):
    """Conversations about pictures and videos, put to a model through its own processor and chat template."""

    def prepare(self, arguments: TrainingArguments) -> None:
        """Refuses what only LLaVA-1.5's path has, and a processor or chat template that cannot be trained on."""
        check_settings(self.config)
        check_quantisation(self.config.model)
        samples = self._samples(arguments)
        samples.describe()
        if self.config.evaluation.file is not None:
            samples.warn_of_overlap(check_test(self.config), self.config)
        encoder = self._encoder
        _check_pixels(self.config, encoder, arguments)
        if samples.has_videos:
            _check_videos(self.config, encoder, pictures=samples.has_pictures)
        samples.look_ahead(pictures=image_folder(self.config.data), videos=video_folder(self.config.data))

    @cached_property
    def _encoder(self) -> ImageTextEncoder:
        """What makes samples and prompts; what the model has no positions for is cut as by `max_tokens`."""
        model, most = self.config.model, self.config.data.max_tokens
        return processor_encoder(
            model, max_tokens=min(most, max_positions(config_of(model.base, model.revision)) or most)
        )

    def _labelling(self, arguments: TrainingArguments) -> tuple[MakeDataset, ImageTextEncoder]:
        return self._make(self._samples(arguments), self._encoder, arguments), self._encoder

    def skeleton(self) -> Backbone[Any]:
        """The model without its weights."""
        return ImageTextBackbone(skeleton_of(self.config.model.base, revision=self.config.model.revision))

    def load(self) -> Backbone[Any]:
        """The model."""
        return load_base(load_image_text, self.config.model)

    def dora_config(self, backbone: Backbone[Any]) -> DoRAConfig:
        """Every linear of the decoder and the projector, unless the settings say otherwise."""
        adapter, model = self.config.adapter, backbone.model
        if adapter.method == "full":
            return core_config(adapter, model, targets=())
        targets = () if adapter.targets is not None else language_targets(model)
        also_train = {}
        if adapter.train_projector and not {"projector"} & {*adapter.parts, *adapter.also_train}:
            also_train = self._projector(model)
        return core_config(adapter, model, targets=targets, also_train=also_train)

    def data(self, backbone: Backbone[Any], arguments: TrainingArguments) -> TrainingData:
        """The training file's conversations, grouped by modality and length."""
        data, encoder, samples = self.config.data, self._encoder, self._samples(arguments)
        dummy, dummy_video = _dummies(samples, encoder)
        seen_videos = samples.has_videos and encoder.sees_pictures
        return samples.training_data(
            self._make(samples, encoder, arguments),
            collate=ProcessorCollator(encoder.pad_token_id, aligned=ALIGNED, dummy=dummy, dummy_video=dummy_video),
            tokens_per_image=len(encoder.dummy().input_ids) if encoder.sees_pictures else 0,
            tokens_per_video=len(encoder.dummy_video(data.video_frames).input_ids) if seen_videos else 0,
            sized_pictures=image_folder(data) if encoder.pixels_count else None,
        )

    def _assistant(self, backbone: Backbone[Any]) -> Assistant:
        return Assistant(backbone, ImageTextPrompts(self._encoder), while_training=True)

    def _places(self, backbone: Backbone[Any]) -> frozenset[int]:
        config = backbone.model.config.to_dict()
        if found := [config[name] for name in PLACES if isinstance(config.get(name), int)]:
            return frozenset(found)
        token = vars(self._encoder.processor).get("image_token")
        return frozenset([self._encoder.tokenizer.convert_tokens_to_ids(token)] if isinstance(token, str) else [])

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
        return replace(media, stored=stored)

    def _make(self, samples: InstructData, encoder: ImageTextEncoder, arguments: TrainingArguments) -> MakeDataset:
        """What makes samples of rows, their pictures and videos read."""
        data = self.config.data
        exactly = data.video_frames if samples.has_videos and encoder.videos_of_one_length else None
        videos = VideoReading(folder=video_folder(data), sampling=video_sampling(data), frames=exactly)
        share = pixels_of_a_sample(self.config, arguments)
        return partial(_illustrated, encoder=encoder, folder=image_folder(data), videos=videos, most_pixels=share)

    def recipe(self) -> dict[str, Any]:
        """Base and backbone; prompts and pictures are the base's own processor's."""
        record = recipe_record(self.config, self.name)
        template = self.config.model.template
        own = {"backbone": IMAGE_TEXT, "template": template if template in FORMATS else None, "image_aspect": None}
        own |= {"video_frames": self.config.data.video_frames, "video_fps": self.config.data.video_fps}
        return {**record, **own}

    def test(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Answers `evaluation.file` with the saved adapter on the base loaded again, as `LlavaPipeline.test`."""
        config = self.config
        check_test(config)
        backbone, _ = with_adapter(load_base(load_image_text, config.model), run_folder_of(config) / ADAPTER)
        return run_test(Assistant(backbone, ImageTextPrompts(self._encoder)), config, numbers=numbers)

    def _projector(self, model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
        """What trains beside the adapters, where its name is known."""
        if patterns := projector_patterns(model):
            return {"projector": patterns}
        if sees_pictures(self.config.model.base, self.config.model.revision):
            logger.warning(
                "no projector is known in a %s, so none trains; adapter.train_projector: false says that it is meant",
                type(model).__name__,
            )
        return {}


def check_settings(config: RunConfig) -> None:
    """Refuses settings that this path does not follow.

    Raises: UserError; it names the setting and what to do.
    """
    refused = {
        "data.cache_features": (config.data.cache_features, "pictures go through the model whole"),
        "data.share_pictures": (config.data.share_pictures, "each sample brings its own pictures"),
        "model.image_aspect": (config.model.image_aspect != "pad", "the model's own processor prepares pictures"),
        "model.template": (
            config.model.template not in (None, "tokenizer", *FORMATS),
            f"prompts come from the processor's own chat template, or are {' or '.join(FORMATS)}",
        ),
    }
    for setting, (asked, reason) in refused.items():
        if asked:
            raise UserError(
                f"{setting} is for a LLaVA-1.5 alone, and {config.model.base} is none: {reason}; leave it out"
            )
    if config.adapter.method == "full" and config.adapter.targets is None:
        raise UserError("adapter.method: full needs adapter.targets, the modules whose weights train")
    if not Path(config.data.image_folder).is_dir():
        raise UserError(f"picture folder {config.data.image_folder} does not exist; set data.image_folder")


def pixels_of_a_sample(config: RunConfig, arguments: TrainingArguments) -> int | None:
    """A sample's share of `data.max_pixels_per_step`, whatever stands beside it; None: as many as there are."""
    most = config.data.max_pixels_per_step
    return None if most is None else most // arguments.per_device_train_batch_size


def _check_pixels(config: RunConfig, encoder: ImageTextEncoder, arguments: TrainingArguments) -> None:
    """Refuses a pixel budget that changes nothing, or leaves too little to see.

    Raises: UserError; one line, before weights are read.
    """
    share = pixels_of_a_sample(config, arguments)
    if share is None:
        return
    if not encoder.pixels_count:
        raise UserError(
            f"data.max_pixels_per_step: {config.model.base} makes the same of a small picture and of a large one, so "
            "there is nothing to save; leave it out"
        )
    if share < LEAST_PIXELS:
        raise UserError(
            f"data.max_pixels_per_step: {config.data.max_pixels_per_step} leaves {share} pixels for each of "
            f"{arguments.per_device_train_batch_size} samples, and at least {LEAST_PIXELS} are needed; raise it, or "
            "lower training.per_device_train_batch_size"
        )


def encode_from_folder(
    conversation: Example,
    *,
    encoder: ImageTextEncoder,
    folder: MediaFolder,
    stored: HeldPictures,
    videos: VideoReading,
    most_pixels: int | None = None,
) -> Encoded:
    """A conversation, pictures and videos read; a top-level function, so that worker processes can receive it."""
    pictures = [open_picture(folder, name, stored) for name in conversation.images]
    clips = videos.read(conversation.videos)
    if most_pixels is None:
        return encoder.encode(conversation, pictures, clips)
    pictures, clips, lost = within_pixels(pictures, clips, most_pixels)
    return replace(encoder.encode(conversation, pictures, clips), lost_pixels=lost)


def _illustrated(
    rows: Examples,
    stored: HeldPictures,
    *,
    encoder: ImageTextEncoder,
    folder: MediaFolder,
    videos: VideoReading,
    most_pixels: int | None,
) -> ConversationDataset:
    encode = partial(
        encode_from_folder, encoder=encoder, folder=folder, stored=stored, videos=videos, most_pixels=most_pixels
    )
    return ConversationDataset(rows, encode=encode)


def _dummies(samples: InstructData, encoder: ImageTextEncoder) -> tuple[Sample | None, Sample | None]:
    """Rows that take a batch through the vision part as other ranks' batches may be taken: a picture's, a video's."""
    if not encoder.sees_pictures:
        return None, None
    videos = samples.has_videos and encoder.why_no_videos is None
    pictures = samples.has_pictures or (samples.has_videos and not videos)
    return encoder.dummy() if pictures else None, encoder.dummy_video() if videos else None


def _check_videos(config: RunConfig, encoder: ImageTextEncoder, *, pictures: bool) -> None:
    """Refuses videos that the base does not take in any way, and says in which it takes them.

    Raises: UserError; one line, before weights are read.
    """
    check_videos(config.data)
    base = config.model.base
    if encoder.why_no_videos:
        logger.warning("frames of videos go into %s as pictures: %s", base, encoder.why_no_videos)
    elif encoder.videos_of_one_length and config.data.video_fps is not None:
        raise UserError(
            f"data.video_fps: {base} takes videos of equally many frames in a batch; leave it out, data.video_frames "
            "says how many"
        )
    elif encoder.one_kind_in_a_batch and pictures:
        raise UserError(
            f"{base} cannot tell pictures from videos of one batch, and data.train (or data.validation) holds both; "
            "train on one kind"
        )
    try:
        encoder.dummy_video(config.data.video_frames)
    except BadSample as error:
        raise UserError(
            f"{base} takes no video of {config.data.video_frames} frames (data.video_frames): {error.reason}"
        ) from error
