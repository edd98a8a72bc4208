"""Builds the parts of a LLaVA run from its sections: model, adapter, encoder, data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.models.llava.configuration_llava import LlavaConfig

from dora_vl.adapters.adapter import content_hash, local_folder, versions
from dora_vl.backbones.base import max_positions
from dora_vl.backbones.encode import LlavaEncoder
from dora_vl.backbones.image_text_encode import ImageTextEncoder, load_processor
from dora_vl.backbones.llava import ALSO_TRAIN, DORA_TARGETS, LlavaBackbone, llava_config, load_llava, picture_side
from dora_vl.backbones.loading import load_tokenizer
from dora_vl.backbones.prompt_table import InstructionEncoder
from dora_vl.backbones.prompts import get_template
from dora_vl.backbones.tower_pictures import ImagePreparation
from dora_vl.backbones.video_inputs import Video, repeated
from dora_vl.backbones.vision_store import FeatureCache, FeatureStore
from dora_vl.core import DoRAConfig
from dora_vl.data.order import ModalityLengthSampler, SamplingLengths, train_files, train_name
from dora_vl.data.pictures import HeldPictures, MediaFolder, StoredPictures, open_picture
from dora_vl.data.stream import SampleStream, StreamSource
from dora_vl.data.table import ExampleTable, check_weights, drawn_out, load_rows, load_training_rows
from dora_vl.data.turns import Clip
from dora_vl.data.video import EverySeconds, Sampling, Uniform, VideoReader, no_backend_reads
from dora_vl.data.video_backends import BACKENDS, BackendMissing, import_backend
from dora_vl.errors import UserError
from dora_vl.training.adapting import core_config, load_base
from dora_vl.training.arguments import order_seed
from dora_vl.training.launch import gather_to_read, rank_and_ranks, wait_for_everyone
from dora_vl.training.recipe import AdapterConfig, DataConfig, LoadedModelConfig, ModelConfig, RunConfig, SamplesConfig
from dora_vl.training.run_folder import run_folder_of


def load_backbone(model: ModelConfig, *, cached_features: bool) -> LlavaBackbone:
    """The base, with pictures put in as pixels or as the tower's stored output."""
    return load_base(load_llava, model, picture_source="image_features" if cached_features else "pixel_values")


def dora_config(adapter: AdapterConfig, model: PreTrainedModel) -> DoRAConfig:
    """The core's config of a run's adapter section, with LLaVA's own targets and projector.

    Raises:
        UserError: full training without saying of what.
    """
    if adapter.method == "full" and adapter.targets is None:
        raise UserError(
            "adapter.method: full needs adapter.targets, the modules whose weights train, such as "
            '["model.language_model*", "lm_head", "model.multi_modal_projector*"]'
        )
    trains_projector = adapter.train_projector and adapter.method != "full"
    return core_config(adapter, model, targets=DORA_TARGETS, also_train=ALSO_TRAIN if trains_projector else {})


def build_encoder(model: ModelConfig, backbone: LlavaBackbone, *, max_tokens: int) -> LlavaEncoder:
    """Tokens and labels for this base and template; what the model has no positions for is cut as by `max_tokens`."""
    return encoder_of(model, backbone.config, max_tokens=max_tokens)


def encoder_of(model: ModelConfig, config: LlavaConfig, *, max_tokens: int) -> LlavaEncoder:
    """The same by the base's config alone, before its weights are read.

    Raises:
        UserError: the template does not fit the tokenizer.
    """
    tokenizer = load_tokenizer(model.base, revision=model.revision)
    return LlavaEncoder(
        tokenizer,
        get_template(model.template, tokenizer),
        tokens_per_image=config.image_seq_length,
        image_token_id=config.image_token_id,
        max_tokens=min(max_tokens, max_positions(config) or max_tokens),
    )


def pad_token_id(encoder: LlavaEncoder | InstructionEncoder) -> int:
    """What fills short rows; masked, so any id does where the tokenizer names none."""
    tokenizer: Any = encoder.tokenizer
    return int(next(one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if one is not None))


def build_sampler(
    lengths: SamplingLengths, arguments: TrainingArguments, *, share_pictures: bool
) -> ModalityLengthSampler:
    """LLaVA's grouping by modality and length for this run's global batch, or by modality and picture."""
    return ModalityLengthSampler(
        lengths.lengths,
        lengths.is_multimodal,
        pictures=lengths.pictures if share_pictures else None,
        batch_size=arguments.per_device_train_batch_size,
        world_size=arguments.world_size,
        accumulation=arguments.gradient_accumulation_steps,
        seed=order_seed(arguments),
    )


def recipe_record(config: RunConfig, task: str) -> dict[str, Any]:
    """What `adapter/recipe.json` says beside the adapter's own settings: enough to ask the model again."""
    model = config.model
    return {
        **base_record(model, task, max_tokens=config.data.max_tokens, training=config.training),
        "compose": None if model.compose is None else dataclasses.asdict(model.compose),
        "image_aspect": model.image_aspect,
        "as_published": config.data.as_published,
    }


def base_record(model: LoadedModelConfig, task: str, *, max_tokens: int, training: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `recipe_record` that every decoder's run has: the base, its length and number types, the training."""
    return {
        "task": task,
        "base": model.base,
        "revision": model.revision,
        "base_sha256": content_hash(local_folder(model.base, model.revision)),
        "dtype": model.dtype,
        "quantisation": model.quantisation,
        "max_tokens": max_tokens,
        "training": dict(training),
        "versions": versions(),
    }


def processor_encoder(model: ModelConfig, *, max_tokens: int) -> ImageTextEncoder:
    """The encoder over the base's own processor, or a language model's tokenizer."""
    processor = load_processor(model.base, model.revision)
    return ImageTextEncoder(processor, model.base, max_tokens=max_tokens, template=model.template)


# A run's samples: what `data:` names, in tables or a stream, and how their pictures and videos are read.


@dataclass(frozen=True, kw_only=True)
class PictureReader:
    """How a picture's path becomes what the backbone takes: pixels or stored tower features, exactly one.

    `pixels` gives `[3, height, width]`, `features` `[tokens, width]`; both raise `BadSample` for a broken picture.
    """

    pixels: Callable[..., Tensor] | None = None
    features: Callable[[str], Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.pixels is None) == (self.features is None):
            raise ValueError("give pixels or features, exactly one")


def picture_reader(
    config: RunConfig,
    backbone: LlavaBackbone,
    pictures: Iterable[str],
    *,
    folder: MediaFolder,
    device: torch.device,
    stored: StoredPictures | None = None,
) -> PictureReader:
    """The reader of pictures below `folder`, and of those `stored` in the data file itself.

    With `data.cache_features` missing features are computed first.
    Every rank must call it: they share the computing.
    """
    if not folder.root.is_dir():
        raise UserError(f"picture folder {folder} does not exist; set data.image_folder (evaluation.image_folder)")
    preparation = image_preparation(config.model)
    if not config.data.cache_features:
        return PictureReader(pixels=partial(read_pixels, folder=folder, preparation=preparation, stored=stored))
    if backbone.tower_trains:
        raise UserError("data.cache_features needs a frozen vision tower, but adapter.targets trains it; set it false")
    cache = Path(config.data.feature_cache or run_folder_of(config) / "features")
    store = _filled_store(
        cache, backbone, pictures, folder=folder, preparation=preparation, device=device, stored=stored
    )
    return PictureReader(features=store.read)


def image_preparation(model: ModelConfig) -> ImagePreparation:
    """The base's picture size and colours, with the run's aspect.

    Raises:
        UserError: the base states none, or another size than its tower takes.
    """
    prepared = ImagePreparation.from_folder(model.base, aspect=model.image_aspect, revision=model.revision)
    stated, taken = prepared.preparation.image_size, picture_side(llava_config(model.base, revision=model.revision))
    if stated != taken:
        raise UserError(
            f"{model.base}: its processor makes pictures of {stated} x {stated} pixels, "
            f"its tower takes {taken} x {taken}; put the processor's file there that belongs to the tower"
        )
    return prepared


def read_pixels(
    path: str, *, folder: MediaFolder, preparation: ImagePreparation, stored: HeldPictures | None = None
) -> Tensor:
    """Pixels of one picture; a top-level function, so that worker processes can receive it."""
    return preparation.prepare(open_picture(folder, path, stored))


def _filled_store(
    cache: Path,
    backbone: LlavaBackbone,
    pictures: Iterable[str],
    *,
    folder: MediaFolder,
    preparation: ImagePreparation,
    device: torch.device,
    stored: StoredPictures | None,
) -> FeatureStore:
    rank, ranks = rank_and_ranks()
    # ZeRO-3 has sharded the tower already and its hooks come only with the engine: make it whole meanwhile.
    with gather_to_read(backbone.tower.parameters()):
        backbone.tower.to(device)
        kept = FeatureCache(cache, tower=backbone, preparation=preparation, root=folder, held=stored)
        wait_for_everyone()  # each must see the same features missing, before one adds some
        kept.fill(pictures, part=(rank, ranks))
    wait_for_everyone()
    return kept.open()


LEAST_FRAMES = 2
"""With `data.video_fps`: what moves needs two, and families that join frames in pairs take no less."""


@dataclass(frozen=True, kw_only=True)
class VideoReading:
    """Reads clips as frames; worker processes may have it, each starts a decoder of its own at its first video.

    Attributes:
        folder: the root of the videos' paths.
        sampling: which frames.
        frames: a video that has fewer shows some of them again, for families that take videos of one length only.
    """

    folder: Path | MediaFolder
    sampling: Sampling
    frames: int | None = None
    reader: VideoReader = field(default_factory=VideoReader, repr=False)

    def read(self, clips: Sequence[Clip]) -> list[Video]:
        """The frames of each.

        Raises:
            BadSample: one is missing, cannot be decoded in time, or has no such part.
        """
        found = [self.reader.read(self.folder, clip, self.sampling) for clip in clips]
        return found if self.frames is None else [repeated(video, self.frames) for video in found]


def image_folder(data: DataConfig, root: str | None = None) -> MediaFolder:
    """Where the pictures' paths start, `data.image_folder` unless another `root` is given, and how they are read."""
    return MediaFolder(Path(root or data.image_folder), data.follow_links, data.as_published)


def video_folder(data: DataConfig) -> MediaFolder:
    """The root of the videos' paths."""
    return image_folder(data, data.video_folder)


def video_sampling(data: DataConfig) -> Sampling:
    """Which frames `data.video_frames` and `data.video_fps` mean.

    Raises:
        UserError: they mean none.
    """
    if data.video_frames < 1:
        raise UserError(f"data.video_frames is {data.video_frames}; at least 1 frame of a video is needed")
    if data.video_fps is None:
        return Uniform(data.video_frames)
    if not 0 < data.video_fps < float("inf"):
        raise UserError(f"data.video_fps is {data.video_fps}; it must be above 0")
    least = min(LEAST_FRAMES, data.video_frames)
    return EverySeconds(period=1 / data.video_fps, least=least, most=data.video_frames)


def check_videos(data: DataConfig) -> None:
    """Refuses what would make every video a bad sample.

    Raises:
        UserError: no library that decodes videos can be imported, or the folder is not there.
    """
    video_sampling(data)
    if not video_folder(data).root.is_dir():
        raise UserError(f"video folder {video_folder(data)} does not exist; set data.video_folder")
    reasons: dict[str, Exception] = {}
    for backend in BACKENDS:
        try:
            import_backend(backend)
        except BackendMissing as error:
            reasons[backend] = error
        else:
            return
    raise no_backend_reads(Clip(path=""), reasons)


def read_samples(data: SamplesConfig, *, seed: int) -> tuple[ExampleTable, ExampleTable | None]:
    """The training samples and those whose loss is measured meanwhile, memory-mapped.

    Raises:
        UserError: a file that cannot be read, or two ways of validation.
    """
    if sum(map(bool, (data.validation, data.validation_share, data.validation_size))) > 1:
        raise UserError("set one of data.validation, data.validation_share and data.validation_size")
    files = train_files(data.train)
    if data.validation_size and any(file.weight != 1 for file in files):
        raise UserError("data.validation_size takes no weights of data.train; set data.validation_share")
    train, held_out = load_training_rows(
        files, limit=data.limit, share=data.validation_share, seed=seed, columns=data.contract
    )
    if data.validation_size:
        train, held_out = drawn_out(train, data.validation_size)
    if data.validation is not None:
        held_out = read_validation(data)
    elif held_out is not None and data.validation_limit is not None:
        held_out = dataclasses.replace(
            held_out, rows=held_out.rows.take(min(data.validation_limit, len(held_out.rows)))
        )
    return train, held_out


def read_validation(data: SamplesConfig) -> ExampleTable | None:
    """The samples of `data.validation`, where it names a file; they are never streamed."""
    if data.validation is None:
        return None
    return load_rows(data.validation, data.validation_limit, columns=data.contract)


def open_stream(data: SamplesConfig, *, seed: int) -> SampleStream:
    """The training samples as a stream; the first rows of each file have been read.

    Raises:
        UserError: a file that cannot be read, or none of whose first rows is a sample.
    """
    files = train_files(data.train)
    check_weights(files)
    sources = [StreamSource(file, limit=data.limit, seed=seed, columns=data.contract) for file in files]
    for source in sources:
        _ = source.first_rows
    return SampleStream(sources, buffer=data.shuffle_buffer, seed=seed)


def check_streaming(data: SamplesConfig) -> None:
    """Refuses what needs all samples before the first.

    Raises:
        UserError: it names the setting and what to do.
    """
    if data.shuffle_buffer < 1:
        raise UserError(f"data.shuffle_buffer is {data.shuffle_buffer}; it must be at least 1, which shuffles nothing")
    refused = {
        "group_by_modality_length": (
            data.group_by_modality_length,
            "sorts by the lengths of all samples; set it false",
        ),
        "validation_share": (data.validation_share, "chooses among all samples; name a data.validation file"),
        "validation_size": (data.validation_size, "draws among all samples; name a data.validation file"),
    }
    if isinstance(data, DataConfig):
        refused |= {
            "share_pictures": (data.share_pictures, "looks for the samples of each picture; set it false"),
            "cache_features": (data.cache_features, "needs all pictures before the first step; set it false"),
        }
    for setting, (asked, reason) in refused.items():
        if asked:
            raise UserError(f"data.streaming reads samples as they come, and data.{setting} {reason}")


def samples_of_a_run(stream: SampleStream, data: SamplesConfig, arguments: TrainingArguments) -> int:
    """How many samples the optimizer steps of a whole run take; 0 where the number of epochs says it.

    Raises:
        UserError: neither the steps are set nor the number of samples known.
    """
    together = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if arguments.max_steps <= 0 and stream.samples is None:
        raise UserError(
            f"data.streaming: how many samples {train_name(data.train)} has is known only after reading it; set "
            f"training.max_steps (a step takes {together})"
        )
    return max(0, arguments.max_steps) * together
