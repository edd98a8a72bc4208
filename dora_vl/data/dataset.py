"""Rows of records as samples a backbone can batch; what cannot be used comes back named, not raised."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from dora_vl.data.turns import Conversation, read_conversation
from dora_vl.errors import BadSample

BOOKKEEPING = ("samples", "sample_ids", "padding_tokens", "skipped", "cut", "shrunk")
"""Names in a batch of what is counted and told; all else goes to the model."""
IGNORED_LABEL = -100
"""Label of a position that is not trained; what `torch.nn.functional.cross_entropy` ignores by default."""


class TrainedAnswer(NamedTuple):
    """What labels say of one answer: its text, what opens it and is trained too, and what closes it."""

    opening: str
    text: str
    closing: str


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens. `labels[t]` is the token at `t` where it is trained, else -100.

    `cut_tokens` counts what the length limit removed at the end, `lost_pixels` what the pixel budget took of its
    pictures; `inputs` are a processor's further tensors.
    """

    input_ids: Int[Tensor, " seq"]
    labels: Int[Tensor, " seq"]
    cut_tokens: int = 0
    inputs: Mapping[str, Any] = field(default_factory=dict)
    lost_pixels: int = 0


@dataclass(frozen=True)
class Sample:
    """One usable sample. Its pictures are pixels or a frozen tower's features, never both.

    `pictures` holds `[3, height, width]` each, `features` `[tokens, width]`; both are empty for text only. `images`
    says which pictures they are. `inputs` holds instead what a processor gives beside the ids, by its own names, each
    with this sample as its only row (or its pictures as rows).
    """

    index: int
    id: str
    input_ids: Int[Tensor, " seq"]
    labels: Int[Tensor, " seq"]
    pictures: tuple[Tensor, ...] = ()
    features: tuple[Tensor, ...] = ()
    cut_tokens: int = 0
    images: tuple[str, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    lost_pixels: int = 0


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used, and why."""

    index: int
    id: str
    reason: str


@runtime_checkable
class Rows(Protocol):
    """What the data set reads from: a `datasets.Dataset`, or a list of records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, object]: ...


def sample_random(seed: int, epoch: int, index: int) -> random.Random:
    """The generator of one sample in one epoch: the same on any rank, in any worker, after any resume."""
    return random.Random(f"{seed}/{epoch}/{index}")


class ConversationDataset(torch.utils.data.Dataset["Sample | Skipped"]):
    """Reads and encodes one row at a time, with its images.

    Args:
        rows: the records, as `record_table.load_table` gives them.
        encode: the backbone's tokens and labels of a conversation.
        picture: pixels of a picture by its relative path. Raises `BadSample` for a broken one.
        features: a frozen tower's features of a picture by its relative path; give this or `picture`.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        encode: Callable[[Conversation], Encoded],
        picture: Callable[[str], Tensor] | None = None,
        features: Callable[[str], Tensor] | None = None,
    ) -> None:
        if picture is not None and features is not None:
            raise ValueError("give 'picture' or 'features', not both")
        self._rows = rows
        self._encode = encode
        self._picture = picture
        self._features = features

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample | Skipped:
        conversation_id = str(index)
        try:
            row = self._rows[index]
            conversation_id = str(row.get("id", index))
            conversation = read_conversation(row)
            return self._sample(index, conversation)
        except BadSample as error:
            return Skipped(index, conversation_id, error.reason)

    def _sample(self, index: int, conversation: Conversation) -> Sample:
        encoded = self._encode(conversation)
        # The first position has nothing before it to be predicted from, so its label cannot train.
        if not bool((encoded.labels[1:] != IGNORED_LABEL).any()):
            reason = f"nothing is left to train on in its {len(encoded.labels)} tokens"
            raise BadSample(conversation.id, f"{reason} after {encoded.cut_tokens} were cut; raise data.max_tokens")
        return Sample(
            index=index,
            id=conversation.id,
            input_ids=encoded.input_ids,
            labels=encoded.labels,
            pictures=tuple(self._picture(path) for path in conversation.images) if self._picture else (),
            features=tuple(self._features(path) for path in conversation.images) if self._features else (),
            cut_tokens=encoded.cut_tokens,
            images=conversation.images,
            inputs=encoded.inputs,
            lost_pixels=encoded.lost_pixels,
        )
