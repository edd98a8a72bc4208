"""What turns a conversation and what it shows into a decoder's inputs, and its tokens into text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from dora_vl.backbones.generation import growing_text
from dora_vl.backbones.video_inputs import Video
from dora_vl.data.batches import Collator
from dora_vl.data.samples import BOOKKEEPING, IGNORED_LABEL, Sample
from dora_vl.data.turns import Turn

if TYPE_CHECKING:
    from dora_vl.backbones.encoder import Encoder


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What one prompt shows.

    Attributes:
        pictures: RGB, in the order of the prompt's `<image>`.
        videos: frames with their times, in the order of the prompt's `<video>`.
    """

    pictures: tuple[Image.Image, ...] = ()
    videos: tuple[Video, ...] = ()

    @property
    def frames(self) -> tuple[Image.Image, ...]:
        """Every video's frames."""
        return tuple(frame for video in self.videos for frame in video.pictures)


def model_inputs(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """What the model itself takes of a batch, on its device."""
    not_asked = {"labels", *BOOKKEEPING}  # what a collator adds
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name not in not_asked
    }


@dataclass(frozen=True)
class EncoderPrompts:
    """A decoder's encoder as asking needs it; holds no model, and may be sent to data workers."""

    encoder: Encoder

    @property
    def videos_of_one_length(self) -> bool:
        """Whether the videos of a batch must have equally many frames."""
        return self.encoder.videos_of_one_length

    @property
    def frames_are_pictures(self) -> bool:
        """Whether the model takes no videos, and is asked about their frames as so many pictures."""
        return self.encoder.why_no_videos is not None

    def sample(self, turns: Sequence[Turn], seen: Shown) -> Sample:
        """Turns that end with a question, up to where the answer begins, without labels; never cut."""
        inputs = self.encoder.encode_prompt(turns, seen.pictures, seen.videos)
        ids = inputs.pop("input_ids")[0]
        return Sample(index=0, id="question", input_ids=ids, labels=torch.full_like(ids, IGNORED_LABEL), inputs=inputs)

    def with_answer(self, turns: Sequence[Turn], seen: Shown, answer: str) -> Sample:
        """The same with an answer behind it, which is labelled, with what closes it; never cut."""
        encoded = self.encoder.encode_choice(turns, answer, seen.pictures, seen.videos)
        return Sample(index=0, id="question", input_ids=encoded.input_ids, labels=encoded.labels, inputs=encoded.inputs)

    def collate(self, samples: Sequence[Sample], side: Literal["left", "right"]) -> Mapping[str, Any]:
        """One batch, padded on this side: the model's inputs and `labels`."""
        return Collator(self.encoder.pad_token_id, pad_side=side)(samples)

    def decode(self, ids: Int[Tensor, " new"] | Sequence[int]) -> str:
        """The text of new ids, without what ends or fills up an answer."""
        return self.encoder.decode(ids)

    def growing_text(self) -> Callable[[Sequence[int]], str]:
        """`decode` for the ids of one answer as they grow."""
        return growing_text(self.encoder.tokenizer, self.encoder.prompts.answer_in)
