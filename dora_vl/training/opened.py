"""What a decoder's run opens before its model: its data, and what makes samples and prompts of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from dora_vl.backbones.base import decoder_of, head_of
from dora_vl.backbones.encoder import Encoder, open_encoder, placeholder_picture
from dora_vl.backbones.frozen_outputs import NotStorable, find_verified_parts, inputs_of, with_stored_outputs
from dora_vl.backbones.model import DecoderBackbone
from dora_vl.backbones.output_store import OutputStore, PictureReader
from dora_vl.backbones.video_inputs import within_pixels
from dora_vl.data.example import Example
from dora_vl.data.pictures import HeldPictures, MediaFolder, open_image
from dora_vl.data.samples import ConversationDataset, Encoded, Examples, Sample, TrainedAnswer
from dora_vl.data.table import ExampleTable
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, SettingError
from dora_vl.evaluation.open_model import adapter_recipe
from dora_vl.run.base import VideoReading, image_folder, video_folder, video_sampling
from dora_vl.run.folder import ADAPTER, run_folder_of
from dora_vl.run.launch import gather_to_read, rank_and_ranks, wait_for_everyone
from dora_vl.run.settings import RunConfig
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


@dataclass(frozen=True, kw_only=True)
class SampleEncoder:
    """Makes samples of whole conversations; worker processes have it, too.

    Attributes:
        folder: root of the pictures' paths; None: the model sees words alone.
        most_pixels: a sample's pictures are shrunk to it.
        outputs: stored outputs of frozen vision parts.
        answers, prompts: the most that a sample holds of them.
    """

    encoder: Encoder
    folder: MediaFolder | None = None
    videos: VideoReading | None = None
    most_pixels: int | None = None
    outputs: OutputStore | None = None
    answers: int = 1
    prompts: int = 1

    def dataset(self, examples: Examples, stored: HeldPictures) -> ConversationDataset:
        """Makes the samples of some examples, and of the pictures that their files hold."""
        return ConversationDataset(examples, encode=partial(self.encode, stored=stored))

    def encode(self, example: Example, stored: HeldPictures, *, answers: bool = False) -> Encoded:
        """Encodes a conversation, or its last answer and the rejected `answers` alone. Raises BadSample.

        A picture with stored outputs only gives its size.
        """
        encode = self.encoder.encode_answers if answers else self.encoder.encode
        if self.folder is None or self.videos is None:
            if example.images or example.videos:
                raise BadSample(example.id, "it has pictures or videos, which a language model does not see")
            return encode(example)
        clips, outputs, lost = self.videos.read(example.videos) if example.videos else [], None, 0
        if self.outputs is not None and example.images:
            reader = PictureReader(encoder=self.encoder, folder=self.folder, stored=stored)
            outputs = self.outputs.read(reader, example.images)
            pictures = [placeholder_picture(size) for size in outputs.sizes]
        else:
            pictures = [open_image(self.folder, name, stored) for name in example.images]
        if self.most_pixels is not None:
            pictures, clips, lost = within_pixels(pictures, clips, self.most_pixels)
        encoded = dataclasses.replace(encode(example, pictures, clips), lost_pixels=lost)
        if outputs is None:
            return encoded
        texts = (encoded, *encoded.others)
        if any(0 < len(text.media) < len(example.images) for text in texts):
            reason = "its rounds are rows of their own, with fewer pictures than are stored together"
            raise BadSample(example.id, f"{reason}; set data.cache_features: false")
        first, *others = (with_stored_outputs(text, outputs.outputs) if text.media else text for text in texts)
        return dataclasses.replace(first, others=tuple(others))

    def trained(self, example: Example, sample: Sample, examples: Examples) -> list[list[TrainedAnswer]]:
        """Lists for each text of a sample what its labels must say; `examples` are those that it was made among."""
        answers = self.encoder.answers(dataclasses.replace(example, turns=sample.written or example.turns))
        return [[answers[number] for number in text.answers] for text in sample.texts()]


@dataclass(frozen=True, kw_only=True)
class AnswersEncoder(SampleEncoder):
    """Makes samples of a conversation's last answer, with the rejected ones beside it.

    Attributes:
        exchange: this seed draws another picture for the chosen answer (`objective.exchange_pictures`); or None.
    """

    exchange: int | None = None

    def dataset(self, examples: Examples, stored: HeldPictures) -> ConversationDataset:
        """Makes the samples of some examples, which also lend each other their pictures."""
        return ConversationDataset(examples, encode=partial(self.encode_answers, stored=stored, examples=examples))

    def encode_answers(self, example: Example, stored: HeldPictures, examples: Examples = ()) -> Encoded:
        """Encodes answers, and beside them those about other pictures, drawn among `examples`."""
        parts = self.by_pictures(example, examples)
        encoded = [self.encode(part, stored, answers=True) for part in parts]
        if self.exchange is not None and len(encoded) > 1 and not example.rejected_images:
            encoded[-1] = dataclasses.replace(encoded[-1], exchanged=True)
        first, *others = (answer for part in encoded for answer in (part, *part.others))
        return dataclasses.replace(first, others=tuple(others), lost_pixels=sum(part.lost_pixels for part in encoded))

    def by_pictures(self, example: Example, examples: Examples) -> list[Example]:
        """Splits an example by the pictures that its answers are about."""
        if not example.rejected:
            return [example]
        *prompt, chosen = example.turns
        if example.rejected_images:
            texts, images = example.rejected, example.rejected_images
            example = dataclasses.replace(example, rejected=())
        elif self.exchange is not None and isinstance(examples, ExampleTable):
            texts, images = (chosen.text,), examples.other_pictures(example, self.exchange)
        else:
            return [example]
        turns = (*prompt, Turn("assistant", texts[0]))
        other = dataclasses.replace(example, turns=turns, rejected=texts[1:], images=images, is_good=False)
        return [example, other] if images else [example]

    def trained(self, example: Example, sample: Sample, examples: Examples) -> list[list[TrainedAnswer]]:
        """Lists each answer by itself, as `SampleEncoder.trained` does."""
        parts = self.by_pictures(example, examples)
        turns = [(*example.turns[:-1], Turn("assistant", text)) for part in parts for text in _answers(part)]
        return [self.encoder.answers(dataclasses.replace(example, turns=each))[-1:] for each in turns]


def _answers(example: Example) -> tuple[str, ...]:
    return (example.turns[-1].text, *example.rejected)
