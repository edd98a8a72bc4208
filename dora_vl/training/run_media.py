"""How a run's pictures and videos are read: their folders, the frames of a clip, stored outputs of frozen parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from dora_vl.backbones.frozen_outputs import (
    NotStorable,
    OutputStore,
    PictureReader,
    hollowed,
    inputs_of,
    proven_parts,
)
from dora_vl.backbones.model import DecoderBackbone
from dora_vl.backbones.video_inputs import Video, repeated
from dora_vl.data.pictures import MediaFolder
from dora_vl.data.samples import Sample
from dora_vl.data.turns import Clip
from dora_vl.data.video import EverySeconds, Sampling, Uniform, VideoReader, no_backend_reads
from dora_vl.data.video_backends import BACKENDS, BackendMissing, import_backend
from dora_vl.errors import UserError
from dora_vl.training.launch import gather_to_read, rank_and_ranks, wait_for_everyone
from dora_vl.training.recipe import DataConfig, RunConfig
from dora_vl.training.run_folder import run_folder_of

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


def stored_outputs(
    config: RunConfig,
    backbone: DecoderBackbone,
    reader: PictureReader,
    pictures: Iterable[Sequence[str]],
    arguments: TrainingArguments,
) -> tuple[OutputStore, Sample]:
    """Outputs of the model's frozen vision parts for samples' pictures, missing ones computed first; and a dummy row's.

    Every rank must call it: they share the computing.

    Raises: UserError if the family's outputs cannot be stored, or weights before the last of them train.
    """
    model = backbone.model
    cache = Path(config.data.feature_cache or run_folder_of(config) / "features")
    language: list[Any] = [model.get_decoder(), model.get_output_embeddings()]
    unused = {id(weight) for part in language for weight in part.parameters()}
    unused -= {id(weight) for weight in model.get_input_embeddings().parameters()}
    used = [weight for weight in model.parameters() if id(weight) not in unused]
    device, half = arguments.device, torch.bfloat16 if arguments.bf16 else torch.float16
    autocast = (arguments.bf16 or arguments.fp16) and not arguments.deepspeed  # as the Trainer's steps
    # ZeRO-3 has sharded the weights already and its hooks come only with the engine: make them whole meanwhile.
    with gather_to_read(used), torch.autocast(device.type, half, enabled=bool(autocast)):
        for tensor in (*used, *model.buffers()):
            tensor.data = tensor.data.to(device)
        try:
            parts = proven_parts(model, reader.encoder)
        except NotStorable as error:
            raise UserError(f"data.cache_features: {config.model.base}: {error}; set it false") from error
        backbone.frozen_parts = parts
        store = OutputStore(cache, model, parts, {**reader.settings(), "autocast": str(half) if autocast else None})
        missing = store.missing(reader, pictures)
        wait_for_everyone()  # each must see the same missing, before one adds some
        store.fill(model, parts, reader, missing, part=rank_and_ranks(), workers=config.data.workers)
        dummy = reader.encoder.dummy()
        dummy = hollowed(dummy, parts.outputs_of(model, inputs_of(model, dummy)))
    wait_for_everyone()
    store.refresh()
    return store, dummy
