"""What turns a conversation and what it shows into each kind of model's inputs, and its tokens into text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from dora_vl.backbones.families import ALIGNED
from dora_vl.backbones.generation import growing_text
from dora_vl.data.batches import Collator, ProcessorCollator
from dora_vl.data.example import Example
from dora_vl.data.samples import BOOKKEEPING, IGNORED_LABEL, Encoded, Sample
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn
from dora_vl.errors import BadSample
from dora_vl.evaluation.asker import Shown, frames_as_pictures, refuse_media

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from dora_vl.backbones.encode import LlavaEncoder
    from dora_vl.backbones.image_text_encode import ImageTextEncoder
    from dora_vl.backbones.prompt_table import InstructionEncoder
    from dora_vl.backbones.tower_pictures import ImagePreparation

Side = Literal["left", "right"]
PADDING_ID = 0  # fills shorter rows; masked, so that any id but a picture's does
NOT_ASKED = frozenset({"labels", *BOOKKEEPING})
"""What a collator adds that no model takes."""
_NO_PICTURES = "this is a language model, which sees no pictures and videos"


@runtime_checkable
class Prompts(Protocol):
    """A kind of model's encoder as asking needs it; holds no model, and may be sent to data workers."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What makes a prompt's text into tokens, and an answer's tokens into text."""
        ...

    @property
    def videos_of_one_length(self) -> bool:
        """Whether the videos of a batch must have equally many frames."""
        ...

    @property
    def frames_are_pictures(self) -> bool:
        """Whether the model takes no videos, and is asked about their frames as so many pictures."""
        ...

    def sample(self, turns: Sequence[Turn], seen: Shown) -> Sample:
        """Turns that end with a question, up to where the answer begins, without labels; never cut.

        Raises: BadSample where they cannot be put to the model.
        """
        ...

    def with_answer(self, turns: Sequence[Turn], seen: Shown, answer: str) -> Sample:
        """The same with an answer behind it, which is labelled, with what closes it; never cut.

        Raises: BadSample likewise.
        """
        ...

    def collate(self, samples: Sequence[Sample], side: Side) -> Mapping[str, Any]:
        """One batch, padded on this side: the model's inputs and `labels`."""
        ...

    def decode(self, ids: Int[Tensor, " new"] | Sequence[int]) -> str:
        """The text of new ids, without what ends or fills up an answer."""
        ...

    def growing_text(self) -> Callable[[Sequence[int]], str]:
        """`decode` for the ids of one answer as they grow."""
        ...


def model_inputs(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """What the model itself takes of a batch, on its device."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name not in NOT_ASKED
    }


@dataclass(frozen=True)
class _TokenPrompts:
    """Batches of token ids, with pictures of one size beside them."""

    encoder: Any

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """See `Prompts`."""
        return self.encoder.tokenizer

    @property
    def videos_of_one_length(self) -> bool:
        """See `Prompts`."""
        return False

    @property
    def frames_are_pictures(self) -> bool:
        """See `Prompts`."""
        return True

    def collate(self, samples: Sequence[Sample], side: Side) -> Mapping[str, Any]:
        """See `Prompts.collate`."""
        return {**Collator(PADDING_ID, pad_side=side)(samples)}

    def decode(self, ids: Int[Tensor, " new"] | Sequence[int]) -> str:
        """See `Prompts.decode`."""
        return self.encoder.decode(ids)

    def growing_text(self) -> Callable[[Sequence[int]], str]:
        """See `Prompts.growing_text`."""
        return growing_text(self.tokenizer, self.encoder.answer_in)


@dataclass(frozen=True)
class LlavaPrompts(_TokenPrompts):
    """LLaVA-1.5's own tokens and pixels."""

    encoder: LlavaEncoder
    preparation: ImagePreparation

    def sample(self, turns: Sequence[Turn], seen: Shown) -> Sample:
        """See `Prompts.sample`."""
        turns, pictures = frames_as_pictures(turns, seen)
        return _unlabelled(self.encoder.encode_prompt(turns), **self._seen(pictures, seen))

    def with_answer(self, turns: Sequence[Turn], seen: Shown, answer: str) -> Sample:
        """See `Prompts.with_answer`."""
        turns, pictures = frames_as_pictures(turns, seen)
        return _labelled(self.encoder.encode(_answered(turns, answer)), **self._seen(pictures, seen))

    def _seen(self, pictures: Sequence[Any], seen: Shown) -> dict[str, Any]:
        if seen.features and seen.frames:
            raise BadSample("question", "it has a video, whose features are not stored; set data.cache_features: false")
        return {"pictures": tuple(map(self.preparation.prepare, pictures)), "features": seen.features}


@dataclass(frozen=True)
class ImageTextPrompts:
    """Whatever a model's own processor makes of text, pictures and videos; to one without videos, of their frames."""

    encoder: ImageTextEncoder

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """See `Prompts`."""
        return self.encoder.tokenizer

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

    def decode(self, ids: Int[Tensor, " new"] | Sequence[int]) -> str:
        """See `Prompts.decode`."""
        return self.encoder.decode(ids)

    def growing_text(self) -> Callable[[Sequence[int]], str]:
        """See `Prompts.growing_text`."""
        return growing_text(self.tokenizer, self.encoder.answer_in)


@dataclass(frozen=True)
class ChatPrompts(_TokenPrompts):
    """A plain language model's chat, by a named template or its own."""

    encoder: LlavaEncoder

    def sample(self, turns: Sequence[Turn], seen: Shown) -> Sample:
        """See `Prompts.sample`."""
        _refuse_pictures(turns, seen)
        return _unlabelled(self.encoder.encode_prompt(turns))

    def with_answer(self, turns: Sequence[Turn], seen: Shown, answer: str) -> Sample:
        """See `Prompts.with_answer`."""
        _refuse_pictures(turns, seen)
        return _labelled(self.encoder.encode(_answered(turns, answer)))


@dataclass(frozen=True)
class InstructionPrompts(_TokenPrompts):
    """A language model that was trained on instructions, and takes one."""

    encoder: InstructionEncoder

    def sample(self, turns: Sequence[Turn], seen: Shown) -> Sample:
        """See `Prompts.sample`."""
        _refuse_pictures(turns, seen)
        return _unlabelled(self.encoder.encode_prompt(turns))

    def with_answer(self, turns: Sequence[Turn], seen: Shown, answer: str) -> Sample:
        """See `Prompts.with_answer`."""
        _refuse_pictures(turns, seen)
        ids, first = self.encoder.encode_choice(turns, answer)
        labels = torch.where(torch.arange(len(ids)) >= first, ids, IGNORED_LABEL)
        return _labelled(Encoded(ids, labels))


def _refuse_pictures(turns: Sequence[Turn], seen: Shown) -> None:
    refuse_media(seen, _NO_PICTURES)
    if any(IMAGE_PLACEHOLDER in turn.text for turn in turns):
        raise BadSample("question", _NO_PICTURES)


def _answered(turns: Sequence[Turn], answer: str) -> Example:
    return Example("question", (), (*turns, Turn("assistant", answer)))


def _unlabelled(ids: Int[Tensor, " seq"], **seen: Any) -> Sample:
    return Sample(index=0, id="question", input_ids=ids, labels=torch.full_like(ids, IGNORED_LABEL), **seen)


def _labelled(encoded: Encoded, **seen: Any) -> Sample:
    """An encoded conversation as a sample, labelled on its last answer alone."""
    if encoded.cut_tokens:
        raise BadSample("question", f"with its answer it is {encoded.cut_tokens} tokens longer than data.max_tokens")
    found = {"inputs": encoded.inputs, **seen}
    return Sample(index=0, id="question", input_ids=encoded.input_ids, labels=_last_answer(encoded.labels), **found)


def _last_answer(labels: Int[Tensor, " seq"]) -> Int[Tensor, " seq"]:
    """Labels without those of earlier answers; the last answer's are one stretch."""
    unlabelled = (labels == IGNORED_LABEL).nonzero().flatten()
    trained = (labels != IGNORED_LABEL).nonzero().flatten()
    before = unlabelled[unlabelled < trained[-1]]
    start = int(before[-1]) + 1 if len(before) else 0
    return torch.where(torch.arange(len(labels)) >= start, labels, IGNORED_LABEL)
