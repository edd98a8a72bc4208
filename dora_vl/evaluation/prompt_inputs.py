"""What turns a conversation and what it shows into each kind of model's inputs, and its tokens into text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from dora_vl.backbones.families import ALIGNED
from dora_vl.backbones.generation import growing_text
from dora_vl.backbones.prompt_table import InstructionEncoder
from dora_vl.backbones.video_inputs import Video, as_pictures
from dora_vl.data.batches import Collator, ProcessorCollator
from dora_vl.data.samples import BOOKKEEPING, IGNORED_LABEL, Encoded, Sample
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Conversation, Turn
from dora_vl.errors import BadSample

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from dora_vl.backbones.encode import LlavaEncoder
    from dora_vl.backbones.image_text_encode import ImageTextEncoder
    from dora_vl.backbones.tower_pictures import ImagePreparation

Side = Literal["left", "right"]
PADDING_ID = 0  # fills shorter rows; masked, so that any id but a picture's does
NOT_ASKED = frozenset({"labels", *BOOKKEEPING})
"""What a collator adds that no model takes."""
_NO_PICTURES = "this is a language model, which sees no pictures and videos"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What one prompt shows.

    Attributes:
        pictures: RGB, in the order of the prompt's `<image>`.
        features: `[tokens, width]` of each picture instead, as a frozen vision tower's output was stored.
        videos: frames with their times, in the order of the prompt's `<video>`.
    """

    pictures: tuple[Image.Image, ...] = ()
    features: tuple[Tensor, ...] = ()
    videos: tuple[Video, ...] = ()

    @property
    def frames(self) -> tuple[Image.Image, ...]:
        """Every video's frames."""
        return tuple(frame for video in self.videos for frame in video.pictures)


@dataclass(frozen=True)
class Prompts(ABC):
    """A kind of model's encoder as asking needs it; holds no model, and may be sent to data workers.

    By itself of token ids, with pictures of one size beside them, and of no videos.
    """

    encoder: Any

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What makes a prompt's text into tokens, and an answer's tokens into text."""
        return self.encoder.tokenizer

    @property
    def videos_of_one_length(self) -> bool:
        """Whether the videos of a batch must have equally many frames."""
        return False

    @property
    def frames_are_pictures(self) -> bool:
        """Whether the model takes no videos, and is asked about their frames as so many pictures."""
        return True

    @abstractmethod
    def sample(self, turns: Sequence[Turn], seen: Shown) -> Sample:
        """Turns that end with a question, up to where the answer begins, without labels; never cut.

        Raises: BadSample where they cannot be put to the model.
        """

    @abstractmethod
    def with_answer(self, turns: Sequence[Turn], seen: Shown, answer: str) -> Sample:
        """The same with an answer behind it, which is labelled, with what closes it; never cut.

        Raises: BadSample likewise.
        """

    def collate(self, samples: Sequence[Sample], side: Side) -> Mapping[str, Any]:
        """One batch, padded on this side: the model's inputs and `labels`."""
        return {**Collator(PADDING_ID, pad_side=side)(samples)}

    def decode(self, ids: Int[Tensor, " new"] | Sequence[int]) -> str:
        """The text of new ids, without what ends or fills up an answer."""
        return self.encoder.decode(ids)

    def growing_text(self) -> Callable[[Sequence[int]], str]:
        """`decode` for the ids of one answer as they grow."""
        return growing_text(self.tokenizer, self.encoder.answer_in)


def model_inputs(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """What the model itself takes of a batch, on its device."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name not in NOT_ASKED
    }


@dataclass(frozen=True)
class LlavaPrompts(Prompts):
    """LLaVA-1.5's own tokens and pixels; a video is so many pictures."""

    encoder: LlavaEncoder
    preparation: ImagePreparation

    def sample(self, turns: Sequence[Turn], seen: Shown) -> Sample:
        """See `Prompts.sample`."""
        turns, inputs = self._placed(turns, seen)
        return _unlabelled(self.encoder.encode_prompt(turns), **inputs)

    def with_answer(self, turns: Sequence[Turn], seen: Shown, answer: str) -> Sample:
        """See `Prompts.with_answer`."""
        turns, inputs = self._placed(turns, seen)
        return _labelled(self.encoder.encode(_answered(turns, answer)), **inputs)

    def _placed(self, turns: Sequence[Turn], seen: Shown) -> tuple[Sequence[Turn], dict[str, Any]]:
        if seen.features and seen.frames:
            raise BadSample("question", "it has a video, whose features are not stored; set data.cache_features: false")
        pictures: Sequence[Image.Image] = seen.pictures
        if seen.videos:
            try:
                turns, pictures = as_pictures(turns, seen.pictures, seen.videos)
            except ValueError as error:
                raise BadSample("question", str(error)) from error
        return turns, {"pictures": tuple(map(self.preparation.prepare, pictures)), "features": seen.features}


@dataclass(frozen=True)
class ImageTextPrompts(Prompts):
    """Whatever a model's own processor makes of text, pictures and videos; to one without videos, of their frames."""

    encoder: ImageTextEncoder

    @property
    def videos_of_one_length(self) -> bool:
        """See `Prompts`."""
        return self.encoder.videos_of_one_length

    @property
    def frames_are_pictures(self) -> bool:
        """See `Prompts`."""
        return self.encoder.why_no_videos is not None

    def sample(self, turns: Sequence[Turn], seen: Shown) -> Sample:
        """See `Prompts.sample`."""
        inputs = self.encoder.encode_prompt(turns, seen.pictures, seen.videos)
        ids = inputs.pop("input_ids")[0]
        return _unlabelled(ids, inputs=inputs)

    def with_answer(self, turns: Sequence[Turn], seen: Shown, answer: str) -> Sample:
        """See `Prompts.with_answer`."""
        return _labelled(self.encoder.encode(_answered(turns, answer), seen.pictures, seen.videos))

    def collate(self, samples: Sequence[Sample], side: Side) -> Mapping[str, Any]:
        """See `Prompts.collate`."""
        return ProcessorCollator(self.encoder.pad_token_id, aligned=ALIGNED, pad_side=side)(samples)


@dataclass(frozen=True)
class LanguagePrompts(Prompts):
    """A plain language model: a chat by a template, or an instruction by a published prompt."""

    encoder: LlavaEncoder | InstructionEncoder

    def sample(self, turns: Sequence[Turn], seen: Shown) -> Sample:
        """See `Prompts.sample`."""
        _refuse_pictures(turns, seen)
        return _unlabelled(self.encoder.encode_prompt(turns))

    def with_answer(self, turns: Sequence[Turn], seen: Shown, answer: str) -> Sample:
        """See `Prompts.with_answer`."""
        _refuse_pictures(turns, seen)
        if isinstance(self.encoder, InstructionEncoder):
            ids, first = self.encoder.encode_choice(turns, answer)
            return _labelled(Encoded(ids, torch.where(torch.arange(len(ids)) >= first, ids, IGNORED_LABEL)))
        return _labelled(self.encoder.encode(_answered(turns, answer)))


def _refuse_pictures(turns: Sequence[Turn], seen: Shown) -> None:
    if seen.pictures or seen.features or seen.videos or any(IMAGE_PLACEHOLDER in turn.text for turn in turns):
        raise BadSample("question", _NO_PICTURES)


def _answered(turns: Sequence[Turn], answer: str) -> Conversation:
    return Conversation("question", (), (*turns, Turn("assistant", answer)))


def _unlabelled(ids: Int[Tensor, " seq"], **seen: Any) -> Sample:
    return Sample(index=0, id="question", input_ids=ids, labels=torch.full_like(ids, IGNORED_LABEL), **seen)


def _labelled(encoded: Encoded, **seen: Any) -> Sample:
    """An encoded conversation as a sample, labelled on its last answer alone, which is one stretch."""
    if encoded.cut_tokens:
        raise BadSample("question", f"with its answer it is {encoded.cut_tokens} tokens longer than data.max_tokens")
    labels = encoded.labels
    unlabelled = (labels == IGNORED_LABEL).nonzero().flatten()
    before = unlabelled[unlabelled < (labels != IGNORED_LABEL).nonzero().flatten()[-1]]
    start = int(before[-1]) + 1 if len(before) else 0
    last_answer = torch.where(torch.arange(len(labels)) >= start, labels, IGNORED_LABEL)
    inputs = {"inputs": encoded.inputs, **seen}
    return Sample(index=0, id="question", input_ids=encoded.input_ids, labels=last_answer, **inputs)
