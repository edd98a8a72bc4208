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
from dora_vl.data.pictures import HeldPictures, MediaFolder, StoredPictures, open_picture
from dora_vl.data.samples import ConversationDataset, Encoded, Examples, Labelled, Sample
from dora_vl.errors import BadSample, UserError
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
from dora_vl.training.adapting import DECODER, check_quantisation, core_config, load_base, make_base
from dora_vl.training.memory import Activations, decoder_activations
from dora_vl.training.pipeline import NextTokenLoss, Pipeline, Reading, TrainingData
from dora_vl.training.recipe import CommonsenseRunConfig, RunConfig
from dora_vl.training.run_folder import ADAPTER, run_folder_of
from dora_vl.training.run_media import (
    VideoReading,
    check_videos,
    image_folder,
    stored_outputs,
    video_folder,
    video_sampling,
)
from dora_vl.training.run_samples import MakeDataset, RunSamples
from dora_vl.training.watching import Watch, evenly

logger = logging.getLogger(__name__)

PLACES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
"""Names in a model's config of the ids that its pictures and videos are put in place of."""
PAPER_TARGETS = tuple(
    f"model.layers.*.{name}"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
)
"""The five of the paper's commonsense runs (table 8), in the names of LLaMA 1, 2, 3 and everything built like it."""


class DecoderPipeline(Pipeline):
    """Conversations about pictures and videos, or of words alone."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._samples: RunSamples | None = None

    @property
    def name(self) -> str:
        """As `recipe.json` says it."""
        return "llava_instruct"

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        return self._config

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
            self._check_settings()
        check_quantisation(config.model)
        samples = self.samples(arguments)
        samples.describe()
        if config.evaluation.file is not None:
            samples.warn_of_overlap(check_test(config), config)
        if samples.has_videos:
            if config.data.cache_features:
                raise UserError("data.cache_features stores outputs of pictures, and there are videos; set it false")
            check_videos(config.data)
        samples.look_ahead(pictures=image_folder(config.data), videos=video_folder(config.data))
        make_base(compose_llava, config.model.compose, config.model.base, arguments)
        _check_pixels(config, self.encoder, arguments)
        if samples.has_videos:
            _check_videos(config, self.encoder, pictures=samples.has_pictures)

    def _check_settings(self) -> None:
        """Refuses a base that cannot be trained, and settings that it does not follow; its config alone is read."""
        config = self.config
        model_type = model_type_of(config.model.base, config.model.revision)
        check_trained(config.model.base, model_type)
        if config.data.cache_features and not sees_pictures(config.model.base, config.model.revision):
            raise UserError(f"data.cache_features: {config.model.base} sees no pictures; set it false")
        if model_type == LLAVA:
            return
        refused = {
            "data.share_pictures": (config.data.share_pictures, "each sample brings its own pictures"),
            "model.image_aspect": (config.model.image_aspect != "pad", "the model's own processor prepares pictures"),
        }
        for setting, (is_set, reason) in refused.items():
            if is_set:
                raise UserError(
                    f"{setting} is for a LLaVA-1.5 alone, and {config.model.base} is none: {reason}; leave it out"
                )

    def samples(self, arguments: TrainingArguments) -> RunSamples:
        """The run's data, read at the first call."""
        if self._samples is None:
            self._samples = RunSamples(self.config, arguments)
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
        """Every linear of the decoder and the projector, unless the settings say otherwise.

        Raises: UserError for full training without saying of what.
        """
        adapter, model = self.config.adapter, backbone.model
        if adapter.method == "full":
            if adapter.targets is None:
                raise UserError("adapter.method: full needs adapter.targets, the modules whose weights train")
            return core_config(adapter, model, targets=())
        targets = () if adapter.targets is not None else self._targets(model)
        also_train = {}
        if adapter.train_projector and not {"projector"} & {*adapter.parts, *adapter.also_train}:
            also_train = self._projector(model)
        return core_config(adapter, model, targets=targets, also_train=also_train)

    def _targets(self, model: PreTrainedModel) -> tuple[str, ...]:
        return language_targets(model)

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

    def data(self, backbone: Backbone[Any], arguments: TrainingArguments) -> TrainingData:
        """The training file's conversations, grouped by modality and length."""
        data, encoder, samples = self.config.data, self.encoder, self.samples(arguments)
        outputs, dummy, dummy_video = None, *_dummies(samples, encoder)
        if data.cache_features and samples.has_pictures:
            decoder = cast(DecoderBackbone, backbone)
            reader = PictureReader(
                encoder=encoder,
                folder=image_folder(data),
                held=samples.stored,
                most_pixels=pixels_of_a_sample(self.config, arguments),
            )
            outputs, dummy = stored_outputs(self.config, decoder, reader, samples.pictures, arguments)
        seen_videos = samples.has_videos and encoder.sees_pictures
        return samples.training_data(
            self._make(arguments, outputs),
            collate=Collator(
                encoder.pad_token_id,
                dummy=dummy,
                dummy_video=dummy_video,
                share_pictures_by=encoder.processor.image_token_id if data.share_pictures else None,
            ),
            tokens_per_image=encoder.tokens_per_image,
            tokens_per_video=len(encoder.dummy_video(data.video_frames).input_ids) if seen_videos else 0,
            share_pictures=data.share_pictures,
            sized_pictures=image_folder(data) if encoder.pixels_count else None,
        )

    def _make(self, arguments: TrainingArguments, outputs: OutputStore | None = None) -> MakeDataset:
        """What makes samples of rows, their pictures and videos read."""
        data, samples = self.config.data, self.samples(arguments)
        exactly = data.video_frames if samples.has_videos and self.encoder.videos_of_one_length else None
        return partial(
            _illustrated,
            encoder=self.encoder,
            folder=image_folder(data),
            videos=VideoReading(folder=video_folder(data), sampling=video_sampling(data), frames=exactly),
            most_pixels=pixels_of_a_sample(self.config, arguments),
            outputs=outputs,
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
        if held_out is None and config.evaluation.file is None:
            return None
        if held_out is not None:
            questions = questions_of_rows(held_out, config.watch)
        else:
            questions = evenly(self._test_questions(), config.watch)
        media = self._media(backbone, None if held_out is None else held_out.stored)
        return watch_assistant(
            self._assistant(backbone),
            questions,
            media,
            max_new_tokens=config.evaluation.max_new_tokens,
            source=str(config.evaluation.file if held_out is None else config.data.held_out),
        )

    def _assistant(self, backbone: Backbone[Any]) -> Assistant:
        """The model that trains, ready to be asked."""
        return Assistant(backbone, EncoderPrompts(self.encoder), while_training=True)

    def _test_questions(self) -> list[Question]:
        return read_test(self.config.evaluation, self.config.data.contract)[0]

    def _media(self, backbone: Backbone[Any], stored: StoredPictures | None) -> MediaReader:
        """Reads what questions show.

        Args:
            stored: the pictures that the samples' own files hold; None: the questions are of the test.
        """
        return replace(media_of_run(self.config, self._assistant(backbone), of_test=stored is None), stored=stored)

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
        shown = [samples.shown_in(item) for item in items]
        media = self._media(backbone, samples.stored)
        return [partial(media.picture, one) if one.images or one.videos else None for one in shown]

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

    def __init__(self, config: CommonsenseRunConfig) -> None:
        self._run = config
        self._samples = None

    @property
    def name(self) -> str:
        """As `recipe.json` says it."""
        return "commonsense"

    @property
    def config(self) -> Any:
        """The run's settings."""
        return self._run

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

    def _targets(self, model: PreTrainedModel) -> tuple[str, ...]:
        return PAPER_TARGETS

    def _projector(self, model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
        return {}

    def data(self, backbone: Backbone[Any], arguments: TrainingArguments) -> TrainingData:
        """The training files' instructions, in the Trainer's random order unless the settings say otherwise."""
        data, encoder = self._run.data, self.encoder
        training = self.samples(arguments).training_data(
            self._make(arguments), collate=Collator(encoder.pad_token_id, pack=data.packing)
        )
        return replace(training, longest_tokens=data.max_tokens)  # words would not count the prompt's tokens

    def _make(self, arguments: TrainingArguments, outputs: OutputStore | None = None) -> MakeDataset:
        return partial(_spoken, encoder=self.encoder)

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


def pixels_of_a_sample(config: RunConfig, arguments: TrainingArguments) -> int | None:
    """A sample's share of `data.max_pixels_per_step`, whatever stands beside it; None: as many as there are."""
    most = config.data.max_pixels_per_step
    return None if most is None else most // arguments.per_device_train_batch_size


def _check_pixels(config: RunConfig, encoder: Encoder, arguments: TrainingArguments) -> None:
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
    encoder: Encoder,
    folder: MediaFolder,
    stored: HeldPictures,
    videos: VideoReading,
    most_pixels: int | None = None,
    outputs: OutputStore | None = None,
) -> Encoded:
    """A conversation, pictures and videos read; a top-level function, so that worker processes can receive it.

    Of pictures with stored outputs the size alone counts, so grey ones stand for them.
    """
    clips, row = videos.read(conversation.videos), None
    if outputs is not None and conversation.images:
        row = outputs.read(PictureReader(encoder=encoder, folder=folder, held=stored), conversation.images)
        pictures = [Image.new("RGB", size, GREY) for size in row.sizes]
    else:
        pictures = [open_picture(folder, name, stored) for name in conversation.images]
    lost = 0
    if most_pixels is not None:
        pictures, clips, lost = within_pixels(pictures, clips, most_pixels)
    encoded = replace(encoder.encode(conversation, pictures, clips), lost_pixels=lost)
    return encoded if row is None else hollowed(encoded, row.outputs)


def _illustrated(rows: Examples, stored: HeldPictures, **reading: Any) -> ConversationDataset:
    return ConversationDataset(rows, encode=partial(encode_from_folder, stored=stored, **reading))


def _spoken(rows: Examples, stored: HeldPictures, *, encoder: Encoder) -> ConversationDataset:
    """Samples of words, whose pictures are not read: a language model refuses them."""
    return ConversationDataset(rows, encode=partial(_encode_words, encoder=encoder))


def _encode_words(conversation: Example, *, encoder: Encoder) -> Encoded:
    if conversation.images or conversation.videos:
        raise BadSample(conversation.id, "it has pictures or videos, which a language model does not see")
    return encoder.encode(conversation)


def _dummies(samples: RunSamples, encoder: Encoder) -> tuple[Sample | None, Sample | None]:
    """Rows that take a batch through the vision part as other ranks' batches may be taken: a picture's, a video's."""
    if not encoder.sees_pictures:
        return None, None
    videos = samples.has_videos and encoder.why_no_videos is None
    pictures = samples.has_pictures or (samples.has_videos and not videos)
    return encoder.dummy() if pictures else None, encoder.dummy_video() if videos else None


def _check_videos(config: RunConfig, encoder: Encoder, *, pictures: bool) -> None:
    """Refuses videos that the base does not take in any way, and says in which it takes them.

    Raises: UserError; one line, before weights are read.
    """
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
