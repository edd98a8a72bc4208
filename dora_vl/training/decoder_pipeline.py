"""Decoders trained on conversations, as a pipeline: a LLaVA, any other vision-language model, or a language model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

from PIL import Image
from transformers import PreTrainedModel, TrainingArguments

from dora_vl.adapters.adapter import content_hash, local_folder, versions
from dora_vl.backbones.base import Backbone
from dora_vl.backbones.compose import compose_llava, write_language_model
from dora_vl.backbones.encoder import GREY, Encoder, open_encoder
from dora_vl.backbones.families import LLAVA, check_trained, model_type_of, sees_pictures
from dora_vl.backbones.frozen_outputs import OutputStore, PictureReader, hollowed
from dora_vl.backbones.model import (
    DecoderBackbone,
    language_targets,
    open_backbone,
    projector_patterns,
    skeleton_of,
)
from dora_vl.backbones.video_inputs import LEAST_PIXELS, within_pixels
from dora_vl.core import DoRAConfig
from dora_vl.data.batches import Collator
from dora_vl.data.example import Example
from dora_vl.data.pictures import HeldPictures, MediaFolder, StoredPictures, open_image
from dora_vl.data.samples import ConversationDataset, Encoded, Examples, Labelled
from dora_vl.errors import BadSample, SettingError
from dora_vl.evaluation.ask import Assistant, MediaReader, media_reader
from dora_vl.evaluation.open_model import with_adapter
from dora_vl.evaluation.prompt_inputs import EncoderPrompts
from dora_vl.evaluation.questions import Question
from dora_vl.evaluation.test import (
    check_test,
    evaluate_commonsense,
    media_of_run,
    read_sets,
    read_test,
    run_test,
)
from dora_vl.evaluation.watch import questions_of_rows, watch_assistant
from dora_vl.files import check_model_folder
from dora_vl.run.base import DECODER, check_quantisation, load_base, make_base
from dora_vl.run.folder import ADAPTER, run_folder_of
from dora_vl.run.media import (
    VideoReading,
    check_videos,
    image_folder,
    video_folder,
    video_sampling,
)
from dora_vl.run.settings import CommonsenseRunConfig, RunConfig
from dora_vl.run.watched import Watch, evenly
from dora_vl.training.adapting import core_config
from dora_vl.training.memory import Activations, decoder_activations
from dora_vl.training.pipeline import NextTokenLoss, Pipeline, Reading, TrainingData
from dora_vl.training.run_samples import MakeDataset, RunSamples, stored_outputs

logger = logging.getLogger(__name__)

PLACES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
"""Names in a model's config of the ids that its pictures and videos are put in place of."""
PAPER_TARGETS = tuple(
    f"model.layers.*.{name}"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
)
"""The five of the paper's commonsense runs (table 8), in the names of LLaMA 1, 2, 3 and everything built like it."""


class DecoderPipeline(Pipeline[RunConfig]):
    """Conversations about pictures and videos, or of words alone."""

    name = "llava_instruct"

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._samples: RunSamples | None = None

    @cached_property
    def encoder(self) -> Encoder:
        """What makes samples and prompts, once the base is there."""
        model = self.config.model
        return open_encoder(
            model.base,
            template=model.template,
            aspect=model.image_aspect,
            max_tokens=self.config.data.max_tokens,
            revision=model.revision,
        )

    def prepare(self, arguments: TrainingArguments) -> None:
        """Composes the base where it is not there yet.

        All data is read first, and the test's questions: what is wrong with them shows now, not after hours.
        """
        config = self.config
        if config.model.compose is None:
            _check_base(config)
        check_quantisation(config.model)
        samples = self.samples(arguments)
        samples.describe()
        if config.evaluation.file is not None:
            samples.warn_of_overlap(check_test(config), config)
        if samples.has_videos:
            if config.data.cache_features:
                raise SettingError(
                    "data.cache_features", " stores outputs of pictures, and there are videos; set false"
                )
            check_videos(config.data)
        samples.look_ahead(pictures=image_folder(config.data), videos=video_folder(config.data))
        make_base(compose_llava, config.model.compose, config.model.base, arguments)
        _check_pixels(config, self.encoder, arguments)
        if samples.has_videos:
            _check_videos(config, self.encoder, pictures=samples.has_pictures)

    def samples(self, arguments: TrainingArguments) -> RunSamples:
        """The run's data, read at the first call."""
        if self._samples is None:
            self._samples = RunSamples(self.config.data, arguments)
        return self._samples

    def labelled(self, arguments: TrainingArguments) -> Iterator[Labelled]:
        """Those of its encoder."""
        return self.samples(arguments).labelled(self._make(arguments), self.encoder)

    def skeleton(self) -> DecoderBackbone:
        """The model without its weights."""
        return skeleton_of(self.config.model.base, revision=self.config.model.revision)

    def load(self) -> DecoderBackbone:
        """The model."""
        return load_base(open_backbone, self.config.model)

    def dora_config(self, backbone: Backbone[Any]) -> DoRAConfig:
        """Every linear of the decoder and the projector, unless the settings say otherwise."""
        adapter, model = self.config.adapter, backbone.model
        if adapter.method == "full":
            if adapter.targets is None:
                raise SettingError(
                    "adapter.targets", " must name the modules whose weights train with adapter.method: full"
                )
            return core_config(adapter, model, targets=())
        targets, also_train = self._places(model)
        return core_config(adapter, model, targets=targets, also_train=also_train)

    def _places(self, model: PreTrainedModel) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
        """What is adapted where `adapter.targets` is silent, and what trains beside it."""
        adapter, base = self.config.adapter, self.config.model
        targets = language_targets(model) if adapter.targets is None else ()
        if not adapter.train_projector or {"projector"} & {*adapter.parts, *adapter.also_train}:
            return targets, {}
        if patterns := projector_patterns(model):
            return targets, {"projector": patterns}
        if sees_pictures(base.base, base.revision):
            logger.warning(
                "no projector is known in a %s, so none trains; adapter.train_projector: false says that it is meant",
                type(model).__name__,
            )
        return targets, {}

    def data(self, backbone: Backbone[Any], arguments: TrainingArguments) -> TrainingData:
        """The training file's conversations, grouped by modality and length."""
        data, encoder, samples = self.config.data, self.encoder, self.samples(arguments)
        # Rows that take a batch through the vision part as other ranks' batches may be taken: a picture's, a video's.
        videos = encoder.sees_pictures and samples.has_videos and encoder.why_no_videos is None
        pictures = encoder.sees_pictures and (samples.has_pictures or (samples.has_videos and not videos))
        dummy, outputs, folder = encoder.dummy() if pictures else None, None, image_folder(data)
        if data.cache_features and samples.has_pictures:
            reader = PictureReader(
                encoder=encoder,
                folder=folder,
                held=samples.stored,
                most_pixels=pixels_of_a_sample(self.config, arguments),
            )
            decoder = cast(DecoderBackbone, backbone)
            outputs, dummy = stored_outputs(self.config, decoder, reader, samples.pictures, arguments)
        shows_videos = samples.has_videos and encoder.sees_pictures
        return samples.training_data(
            self._make(arguments, outputs),
            collate=Collator(
                encoder.pad_token_id,
                dummy=dummy,
                dummy_video=encoder.dummy_video() if videos else None,
                share_pictures_by=encoder.processor.image_token_id if data.share_pictures else None,
            ),
            tokens_per_image=encoder.tokens_per_image,
            tokens_per_video=len(encoder.dummy_video(data.video_frames).input_ids) if shows_videos else 0,
            share_pictures=data.share_pictures,
            sized_pictures=folder if encoder.pixels_count else None,
        )

    def _make(self, arguments: TrainingArguments, outputs: OutputStore | None = None) -> MakeDataset:
        """What makes samples of rows, their pictures and videos read."""
        data = self.config.data
        same = self.samples(arguments).has_videos and self.encoder.videos_of_one_length
        videos = VideoReading(
            folder=video_folder(data), sampling=video_sampling(data), frames=data.video_frames if same else None
        )
        return partial(
            _dataset,
            encode=partial(
                encode_from_folder,
                encoder=self.encoder,
                folder=image_folder(data),
                videos=videos,
                most_pixels=pixels_of_a_sample(self.config, arguments),
                outputs=outputs,
            ),
        )

    def loss(self, backbone: Backbone[Any]) -> NextTokenLoss:
        """Next-token loss."""
        return NextTokenLoss(backbone, step_tokens=self.config.optim.loss_normalisation == "step_tokens")

    def activations(self, backbone: Backbone[Any], arguments: TrainingArguments, *, longest_tokens: int) -> Activations:
        """The language model's."""
        return decoder_activations(backbone.model, arguments, longest_tokens=longest_tokens)

    def watch(self, backbone: Backbone[Any], arguments: TrainingArguments) -> Watch | None:
        """Questions of the validation samples, or else of the test."""
        held_out, config = self.samples(arguments).held_out, self.config
        if held_out is not None:
            questions, source = questions_of_rows(held_out, config.watch), config.data.held_out
        elif config.evaluation.file is not None:
            questions, source = evenly(self._test_questions(), config.watch), config.evaluation.file
        else:
            return None
        media = self._media(backbone, None if held_out is None else held_out.stored)
        return watch_assistant(
            Assistant(backbone, EncoderPrompts(self.encoder), while_training=True),
            questions,
            media,
            max_new_tokens=config.evaluation.max_new_tokens,
            source=str(source),
        )

    def _test_questions(self) -> list[Question]:
        return read_test(self.config.evaluation, self.config.data.contract)[0]

    def _media(self, backbone: Backbone[Any], stored: StoredPictures | None) -> MediaReader:
        """Reads what questions show.

        Args:
            stored: the pictures that the samples' own files hold; None: the questions are of the test.
        """
        assistant = Assistant(backbone, EncoderPrompts(self.encoder), while_training=True)
        return replace(media_of_run(self.config, assistant, of_test=stored is None), stored=stored)

    def reading(self, backbone: Backbone[Any]) -> Reading:
        """Its encoder's tokenizer."""
        config, tokenizer = backbone.model.config.to_dict(), self.encoder.tokenizer
        places = [config[name] for name in PLACES if isinstance(config.get(name), int)]
        token = vars(self.encoder.processor).get("image_token")
        if not places and isinstance(token, str):
            places = [tokenizer.convert_tokens_to_ids(token)]
        return Reading(tokenizer, frozenset(places))

    def pictures_of(
        self, backbone: Backbone[Any], arguments: TrainingArguments, data: TrainingData, items: Sequence[Any]
    ) -> list[Callable[[], Image.Image] | None]:
        """The samples' own."""
        samples = self.samples(arguments)
        questions = [samples.shown_in(item) for item in items]
        media = self._media(backbone, samples.stored)
        return [
            partial(media.picture, question) if question.images or question.videos else None for question in questions
        ]

    def recipe(self) -> dict[str, Any]:
        """Base, wording and how pictures and videos are read."""
        model, data = self.config.model, self.config.data
        return {
            **self._base_record(),
            "compose": None if model.compose is None else dataclasses.asdict(model.compose),
            "image_aspect": model.image_aspect,
            "as_published": data.as_published,
            "video_frames": data.video_frames,
            "video_fps": data.video_fps,
        }

    def _base_record(self) -> dict[str, Any]:
        model = self.config.model
        return {
            "task": self.name,
            "backbone": DECODER,
            "base": model.base,
            "revision": model.revision,
            "base_sha256": content_hash(local_folder(model.base, model.revision)),
            "template": self.encoder.prompts.name,
            "dtype": model.dtype,
            "quantisation": model.quantisation,
            "max_tokens": self.config.data.max_tokens,
            "training": dict(self.config.training),
            "versions": versions(),
        }

    def test(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Answers `evaluation.file` with the saved adapter.

        The base is loaded again and the adapter folder put on it: what is tested is what was saved, whole, whatever
        ZeRO stage it was trained under.
        """
        backbone, _ = with_adapter(self.load(), run_folder_of(self.config) / ADAPTER)
        return run_test(Assistant(backbone, EncoderPrompts(self.encoder)), self.config, numbers=numbers)


class CommonsensePipeline(DecoderPipeline):
    """One question and its output each, by a published prompt: the paper's commonsense reasoning."""

    name = "commonsense"

    def __init__(self, config: CommonsenseRunConfig) -> None:
        super().__init__(cast(Any, config))  # what is inherited reads the fields that both have
        self._run = config

    @cached_property
    def encoder(self) -> Encoder:
        """What makes samples and prompts, once the base is there."""
        model, data = self._run.model, self._run.data
        return open_encoder(
            model.base,
            template=data.prompt,
            train_on=data.train_on,
            max_tokens=data.max_tokens,
            revision=model.revision,
        )

    def prepare(self, arguments: TrainingArguments) -> None:
        """Writes the base from its source where it is not there yet, once data and test sets have been read."""
        config = self._run
        check_quantisation(config.model)
        if config.evaluation.files:
            read_sets(config.evaluation)
        samples = self.samples(arguments)
        samples.describe()
        samples.look_ahead()
        make_base(write_language_model, config.model.source, config.model.base, arguments)
        check_model_folder(config.model.base)

    def load(self) -> DecoderBackbone:
        """The language model, which will search its answers with `evaluation.beams`."""
        return load_base(open_backbone, self._run.model, generation={"num_beams": self._run.evaluation.beams})

    def _places(self, model: PreTrainedModel) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
        return PAPER_TARGETS, {}

    def data(self, backbone: Backbone[Any], arguments: TrainingArguments) -> TrainingData:
        """The training files' instructions, in the Trainer's random order unless the settings say otherwise."""
        data, collate = self._run.data, Collator(self.encoder.pad_token_id, pack=self._run.data.packing)
        training = self.samples(arguments).training_data(self._make(arguments), collate=collate)
        return replace(training, longest_tokens=data.max_tokens)  # words would not count the prompt's tokens

    def _make(self, arguments: TrainingArguments, outputs: OutputStore | None = None) -> MakeDataset:
        return partial(_dataset, encode=partial(_encode_words, encoder=self.encoder))

    def _test_questions(self) -> list[Question]:
        return read_sets(self._run.evaluation)[0]

    def _media(self, backbone: Backbone[Any], stored: StoredPictures | None) -> MediaReader:
        return media_reader(Path(), frames=1)

    def recipe(self) -> dict[str, Any]:
        """Base, prompt and lengths."""
        source = self._run.model.source
        return {
            **self._base_record(),
            "source": None if source is None else dataclasses.asdict(source),
            "image_aspect": None,
            "train_on": self._run.data.train_on,
        }

    def test(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Asks every set of `evaluation.files` with the saved adapter, as `DecoderPipeline.test`."""
        run_folder = run_folder_of(self._run)
        backbone, _ = with_adapter(self.load(), run_folder / ADAPTER)
        return evaluate_commonsense(
            backbone, self.encoder, self._run.evaluation, run_folder=run_folder, numbers=numbers
        )


def _dataset(rows: Examples, stored: HeldPictures, *, encode: Callable[..., Encoded]) -> ConversationDataset:
    """Samples of rows; like what encodes them a top-level function, so that worker processes can receive it."""
    return ConversationDataset(rows, encode=partial(encode, stored=stored))


def encode_from_folder(
    conversation: Example,
    *,
    encoder: Encoder,
    folder: MediaFolder,
    stored: HeldPictures,
    videos: VideoReading,
    most_pixels: int | None = None,
    outputs: OutputStore | None = None,
) -> Encoded:
    """A conversation, pictures and videos read; of pictures with stored outputs the size alone counts."""
    clips, row = videos.read(conversation.videos), None
    if outputs is not None and conversation.images:
        row = outputs.read(PictureReader(encoder=encoder, folder=folder, held=stored), conversation.images)
        pictures = [Image.new("RGB", size, GREY) for size in row.sizes]
    else:
        pictures = [open_image(folder, name, stored) for name in conversation.images]
    lost = 0
    if most_pixels is not None:
        pictures, clips, lost = within_pixels(pictures, clips, most_pixels)
    encoded = replace(encoder.encode(conversation, pictures, clips), lost_pixels=lost)
    return encoded if row is None else hollowed(encoded, row.outputs)


def _encode_words(conversation: Example, *, encoder: Encoder, stored: HeldPictures) -> Encoded:
    if conversation.images or conversation.videos:
        raise BadSample(conversation.id, "it has pictures or videos, which a language model does not see")
    return encoder.encode(conversation)


def pixels_of_a_sample(config: RunConfig, arguments: TrainingArguments) -> int | None:
    """A sample's share of `data.max_pixels_per_step`, whatever stands beside it; None: as many as there are."""
    most = config.data.max_pixels_per_step
    return None if most is None else most // arguments.per_device_train_batch_size


def _check_base(config: RunConfig) -> None:
    """Refuses a base that cannot be trained, and settings that it does not follow; its config alone is read."""
    model_type = model_type_of(config.model.base, config.model.revision)
    check_trained(config.model.base, model_type)
    if config.data.cache_features and not sees_pictures(config.model.base, config.model.revision):
        raise SettingError("data.cache_features", f": {config.model.base} sees no pictures; set it false")
    refused = {
        "data.share_pictures": (config.data.share_pictures, "each sample brings its own pictures"),
        "model.image_aspect": (config.model.image_aspect != "pad", "the model's own processor prepares pictures"),
    }
    for setting, (is_set, reason) in refused.items():
        if is_set and model_type != LLAVA:
            raise SettingError(
                setting, f" is for a LLaVA-1.5 alone, and {config.model.base} is none: {reason}; leave it out"
            )


def _check_pixels(config: RunConfig, encoder: Encoder, arguments: TrainingArguments) -> None:
    """Refuses a pixel budget that changes nothing, or leaves too little to see."""
    share, key = pixels_of_a_sample(config, arguments), "data.max_pixels_per_step"
    if share is None:
        return
    if not encoder.pixels_count:
        raise SettingError(key, f": {config.model.base} makes the same of a small and of a large picture; leave it out")
    if share < LEAST_PIXELS:
        raise SettingError(
            key, f" leaves a sample {share} pixels of at least {LEAST_PIXELS}; raise it, or lower the micro-batch"
        )


def _check_videos(config: RunConfig, encoder: Encoder, *, pictures: bool) -> None:
    """Refuses videos that the base does not take in any way, and says in which it takes them."""
    base = config.model.base
    if encoder.why_no_videos:
        logger.warning("frames of videos go into %s as pictures: %s", base, encoder.why_no_videos)
    elif encoder.videos_of_one_length and config.data.video_fps is not None:
        raise SettingError("data.video_fps", f": {base} takes videos of one length; set data.video_frames alone")
    elif encoder.one_kind_in_a_batch and pictures:
        raise SettingError(
            "data.train", f" holds pictures and videos, which {base} cannot tell apart in a batch; train on one kind"
        )
    try:
        encoder.dummy_video(config.data.video_frames)
    except BadSample as error:
        raise SettingError(
            "data.video_frames", f": {base} takes no video of {config.data.video_frames} frames: {error.reason}"
        ) from error
