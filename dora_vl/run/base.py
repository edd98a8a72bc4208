"""Makes, checks and loads the base that a run adapts, as its settings say; and how pictures and videos are read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dora_vl.adapters.base_weights import check_runs_here
from dora_vl.backbones.base import check_trained, config_of, model_type_of, sees_pictures
from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.families.table import LLAVA
from dora_vl.backbones.loading import check_made_from
from dora_vl.backbones.video_inputs import LEAST_PIXELS, Video, repeated
from dora_vl.data.pictures import MediaFolder
from dora_vl.data.turns import Clip
from dora_vl.data.video import EverySeconds, FrameSampling, Uniform, VideoReader, none_reads
from dora_vl.data.video_backends import BACKENDS, BackendMissing, import_backend
from dora_vl.errors import BadSample, SettingError, UserError
from dora_vl.run.launch import loading_in, without_sharding
from dora_vl.run.settings import DataConfig, ModelConfig, RunConfig

logger = logging.getLogger(__name__)

DECODER, VLBART = "decoder", "vlbart"
"""`recipe.json` names the two kinds of backbone so: decoders, and encoder-decoders over visual features."""

Loaded = TypeVar("Loaded")


def make_base(make: Callable[[Any, Path], None], spec: Any, base: str, arguments: TrainingArguments) -> None:
    """Writes the base that `spec`, a run's `model.compose` or `model.source`, describes, where it is not there yet.

    On one rank only; `make` writes a folder by such settings.
    """
    if spec is None:
        return
    if Path(base).exists():
        check_made_from(Path(base), spec)
        return
    with without_sharding(arguments):
        make(spec, Path(base))


def check_quantisation(model: ModelConfig) -> None:
    """Refuses `model.quantisation` where it cannot work, before any weight is read."""
    if model.quantisation is None:
        return
    if is_deepspeed_zero3_enabled():
        raise SettingError(
            "model.quantisation",
            f": {model.quantisation} with ZeRO-3: packed weights cannot be split among ranks; set "
            "training.deepspeed: zero2, under which each GPU holds the quantised base whole",
        )
    check_runs_here(model.quantisation, getattr(torch, model.dtype))


def load_base(load: Callable[..., Loaded], model: ModelConfig, **more: Any) -> Loaded:
    """Loads the base by its backbone's loader, with weights in `model.dtype`, sharded while loading under ZeRO-3."""
    if model.attn_implementation == "flash_attention_2" and not torch.cuda.is_available():
        raise SettingError("model.attn_implementation", ": flash_attention_2 needs CUDA; sdpa runs everywhere")
    check_quantisation(model)
    dtype = getattr(torch, model.dtype)
    with loading_in(dtype):
        return load(
            model.base,
            dtype=dtype,
            attn_implementation=model.attn_implementation,
            revision=model.revision,
            quantisation=model.quantisation,
            **more,
        )


def check_base(config: RunConfig) -> None:
    """Refuses a base that cannot be trained, and settings that it does not follow; only its config is read."""
    model = config.model
    model_type = model_type_of(model.base, model.revision)
    check_trained(model.base, model_type)
    if config.data.cache_features and not sees_pictures(model.base, model.revision):
        raise SettingError("data.cache_features", f": {model.base} sees no pictures; set it false")
    if config.task == "llava" and model_type != LLAVA:
        raise SettingError(
            "task", f" is llava, and {model.base} is not a LLaVA-1.5 but a {model_type}; write image_text"
        )


def check_window(base: str, encoder: Encoder, revision: str | None = None) -> None:
    """Refuses samples of which a long one would change the positions of all that share its batch (longrope)."""
    parameters: Any = getattr(config_of(base, revision).get_text_config(), "rope_parameters", None) or {}
    for rope in (parameters, *parameters.values()):  # of each kind of layers where they differ
        is_long = isinstance(rope, Mapping) and rope.get("rope_type") == "longrope"
        if is_long and encoder.max_tokens > (window := rope["original_max_position_embeddings"]):
            why = f": above {window} tokens {base} turns the positions of a whole batch another way; set it to {window}"
            raise SettingError("data.max_tokens", f" is {encoder.max_tokens}{why}")


def check_pixels(base: str, encoder: Encoder, share: int | None) -> None:
    """Refuses a sample's share of `data.max_pixels_per_step` that changes nothing, or leaves too little to see."""
    key = "data.max_pixels_per_step"
    if share is not None and not encoder.size_matters:
        raise SettingError(key, f": {base} makes the same of a small and of a large picture; leave it out")
    if share is not None and share < LEAST_PIXELS:
        raise SettingError(
            key, f" leaves a sample {share} pixels of at least {LEAST_PIXELS}; raise it, or lower the micro-batch"
        )


def check_base_takes_videos(base: str, encoder: Encoder, data: DataConfig, *, pictures: bool) -> None:
    """Refuses videos that the base does not take in any way, and says in which it takes them."""
    if encoder.no_videos_reason:
        logger.warning("frames of videos go into %s as pictures: %s", base, encoder.no_videos_reason)
    elif encoder.videos_of_one_length and data.video_fps is not None:
        raise SettingError("data.video_fps", f": {base} takes videos of one length; set only data.video_frames")
    elif encoder.cannot_mix_media and pictures:
        raise SettingError(
            "data.train", f" holds pictures and videos, which {base} cannot tell apart in a batch; train on one kind"
        )
    try:
        encoder.dummy_video(data.video_frames)
    except BadSample as error:
        reason = f": {base} takes no video of {data.video_frames} frames: {error.reason}"
        raise SettingError("data.video_frames", reason) from error


@dataclass(frozen=True, kw_only=True)
class VideoReading:
    """Reads clips as frames; worker processes may have it, each starts a decoder of its own at its first video.

    A video of fewer than `frames` shows some of them again, for families that take videos of one length only.
    """

    folder: Path | MediaFolder
    sampling: FrameSampling
    frames: int | None = None
    reader: VideoReader = field(default_factory=VideoReader, repr=False)

    def read(self, clips: Sequence[Clip]) -> list[Video]:
        """Returns the frames of each clip."""
        videos = [self.reader.read(self.folder, clip, self.sampling) for clip in clips]
        return videos if self.frames is None else [repeated(video, self.frames) for video in videos]


def image_folder(data: DataConfig, root: str | None = None) -> MediaFolder:
    """Returns the folder of the pictures, `data.image_folder` unless another `root` is given."""
    return MediaFolder(Path(root or data.image_folder), data.follow_links, data.as_published)


def video_folder(data: DataConfig) -> MediaFolder:
    """Returns the root of the videos' paths."""
    return image_folder(data, data.video_folder)


def video_sampling(data: DataConfig) -> FrameSampling:
    """Returns the frames that `data.video_frames` and `data.video_fps` mean."""
    if data.video_frames < 1:
        raise SettingError("data.video_frames", f" is {data.video_frames}; at least 1 frame of a video is needed")
    if data.video_fps is None:
        return Uniform(data.video_frames)
    if not 0 < data.video_fps < float("inf"):
        raise SettingError("data.video_fps", f" is {data.video_fps}; it must be above 0")
    least = min(2, data.video_frames)  # families that join frames in pairs take no less
    return EverySeconds(period=1 / data.video_fps, min_frames=least, max_frames=data.video_frames)


def check_videos(data: DataConfig) -> None:
    """Refuses what would make every video a bad sample."""
    video_sampling(data)
    if not video_folder(data).root.is_dir():
        raise SettingError("data.video_folder", f": video folder {video_folder(data)} does not exist")
    reasons: dict[str, Exception] = {}
    for backend in BACKENDS:
        try:
            import_backend(backend)
        except BackendMissing as error:
            reasons[backend] = error
        else:
            return
    raise UserError(str(none_reads(reasons)))
