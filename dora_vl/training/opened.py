"""What a decoder's run opens before its model: its data, and what makes samples and prompts of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from dora_vl.backbones.base import decoder_of, head_of
from dora_vl.backbones.encoder import Encoder, open_encoder
from dora_vl.backbones.frozen_outputs import (
    NotStorable,
    OutputStore,
    PictureReader,
    find_verified_parts,
    inputs_of,
    with_stored_outputs,
)
from dora_vl.backbones.model import DecoderBackbone
from dora_vl.data.samples import Sample
from dora_vl.errors import SettingError
from dora_vl.evaluation.open_model import adapter_recipe
from dora_vl.run.base import VideoReading, image_folder, video_folder, video_sampling
from dora_vl.run.folder import ADAPTER, run_folder_of
from dora_vl.run.launch import rank_and_ranks, wait_for_everyone
from dora_vl.run.settings import RunConfig
from dora_vl.run.sharding import gather_to_read
from dora_vl.training.run_samples import RunSamples


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Holds what a run has opened.

    Attributes:
        most_pixels: a sample's share of `data.max_pixels_per_step`; None: no limit.
    """

    config: RunConfig
    arguments: TrainingArguments
    samples: RunSamples
    encoder: Encoder
    most_pixels: int | None

    @property
    def reader(self) -> PictureReader:
        """Reads the pictures that the run's samples name, or that their files hold."""
        folder, stored = image_folder(self.config.data), self.samples.stored
        return PictureReader(encoder=self.encoder, folder=folder, stored=stored, most_pixels=self.most_pixels)

    def media(self, outputs: OutputStore | None = None) -> dict[str, Any]:
        """Returns what a `SampleEncoder` reads pictures and videos by; nothing where the model sees words alone."""
        data, encoder = self.config.data, self.encoder
        if not encoder.sees_pictures:
            return {}
        same = self.samples.has_videos and encoder.videos_of_one_length
        frames = data.video_frames if same else None
        videos = VideoReading(folder=video_folder(data), sampling=video_sampling(data), frames=frames)
        return {"folder": image_folder(data), "videos": videos, "most_pixels": self.most_pixels, "outputs": outputs}


def encoder_of(config: RunConfig, *, thinking: bool | None) -> Encoder:
    """Opens what makes a run's samples and prompts; `thinking` is the switch of a template that has one."""
    model, data = config.model, config.data
    return open_encoder(
        model.base,
        template=model.template,
        train_on=data.train_on,
        aspect=model.image_aspect,
        max_tokens=data.max_tokens,
        revision=model.revision,
        thinking=thinking,
    )


def encoder_of_saved(config: RunConfig) -> Encoder:
    """Opens what asks a run's saved adapter, with the switch that it was trained with."""
    return encoder_of(config, thinking=adapter_recipe(run_folder_of(config.training) / ADAPTER).get("thinking"))


def stored_outputs(
    opened: Opened, backbone: DecoderBackbone, pictures: Iterable[Sequence[str]]
) -> tuple[OutputStore, Sample]:
    """Returns the frozen vision parts' outputs for pictures, computing missing ones first, and for a dummy sample.

    Every rank must call it: they share the computing.
    """
    config, arguments, reader, model = opened.config, opened.arguments, opened.reader, backbone.model
    cache = Path(config.data.feature_cache or run_folder_of(config.training) / "features")
    language: list[Any] = [decoder_of(model), head_of(model)]
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
            parts = find_verified_parts(model, reader.encoder)
        except NotStorable as error:
            raise SettingError("data.cache_features", f": {config.model.base}: {error}; set it false") from error
        backbone.frozen_parts = parts
        store = OutputStore(cache, model, parts, {**reader.settings(), "autocast": str(half) if autocast else None})
        missing = store.missing(reader, pictures)
        wait_for_everyone()  # each must see the same missing, before one adds some
        # On a CPU one by one: it gains little, and the bits would depend on what a stopped run had left.
        together = 16 if device.type == "cuda" else 1
        store.fill(
            model, parts, reader, missing, part=rank_and_ranks(), workers=config.data.workers, batch_size=together
        )
        dummy = reader.encoder.dummy()
        dummy = with_stored_outputs(dummy, parts.outputs_of(model, inputs_of(model, dummy)))
    wait_for_everyone()
    store.refresh()
    return store, dummy
