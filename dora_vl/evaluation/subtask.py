"""One task of an encoder-decoder as data: what it asks, what it is taught to say, how it decodes and is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.backbones.templates import Prompt
from dora_vl.backbones.vision_store import FeatureReader, check_features, feature_paths, features_of
from dora_vl.data.batches import SAMPLES, WEIGHTS
from dora_vl.data.example import Example
from dora_vl.data.samples import IGNORED_LABEL, Skipped
from dora_vl.errors import BadSample
from dora_vl.evaluation.scores.scored import Scored

AnswerBy = Literal["text", "pair", "choice", "words", "closed"]
NormaliseBy = Literal["samples", "tokens"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the decoder is to say, and how much the sample counts; or the soft score of each right answer of a list."""

    text: str
    weight: float = 1.0
    soft_scores: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Search:
    """How an answer is decoded: greedy with one beam. `max_length` counts the start token."""

    beams: int = 1
    max_length: int = 20
    no_repeat_ngram: int = 0


@dataclass(frozen=True, kw_only=True)
class Subtask:
    """One task as data: everything that differs between tasks of one model.

    Attributes:
        batch_share: its batch as a multiple of the run's base batch, rounded down.
        prompt: the encoder's text of an example.
        target: what is trained on, given which answer the item is about (None: any of them may be drawn).
        each_answer: every answer is an item of its own.
        input_tokens: longest encoder text; None does not cut.
        target_tokens: longest label.
        normalise_by: `samples`: mean over a sample's tokens, then over the batch; `tokens`: mean over all tokens.
        answer_by: `text`: what is generated; `pair`: true or false by two logits; `choice`: the likeliest label;
            `words`: the likeliest of the example's choices, in their own words; `closed`: the best of a list.
        score: the benchmark's scorer.
        check_scoring: tells before training what `score` would miss; None tries `score` itself without answers.
        images: pictures of one input.
        reads_question: the prompt holds the example's question; not so where pictures are described.
        chooses: every example has choices, and which of them is right is what is scored.
        state_span: where the prompt states which part of the video it is about (and the features are of the whole),
            `extra["ts"]` for a part from so many seconds to so many; None where it states none.
    """

    name: str
    batch_share: float = 1.0
    prompt: Callable[[Example], Prompt]
    target: Callable[[Example, int | None, Random], Target]
    each_answer: bool = False
    input_tokens: int | None = None
    target_tokens: int = 20
    normalise_by: NormaliseBy = "samples"
    answer_by: AnswerBy = "text"
    search: Search = Search()
    score: Callable[[Sequence[Example], Mapping[str, str]], Scored]
    check_scoring: Callable[[Sequence[Example]], None] | None = None
    images: int = 1
    reads_question: bool = True
    chooses: bool = False
    state_span: Callable[[float, float], object] | None = None


def with_input_tokens(subtask: Subtask, tokens: int | None) -> Subtask:
    """The task with another longest encoder text; None keeps its own."""
    return subtask if tokens is None else replace(subtask, input_tokens=tokens)


@dataclass(frozen=True)
class Seq2SeqSample:
    """One item in tensors; `features` is `[images, tokens, channels]`; `soft_scores` as its `Target` has them."""

    id: str
    input_ids: Int[Tensor, " seq"]
    labels: Int[Tensor, " answer"]
    features: Float[Tensor, "images tokens channels"]
    weight: float
    cut_tokens: int
    soft_scores: Mapping[str, float] | None = None


def make_sample(
    example: Example,
    subtask: Subtask,
    *,
    encoder: Seq2SeqEncoder,
    reader: FeatureReader,
    target: Target | None,
) -> Seq2SeqSample:
    """An example in tensors; without a target, as it is asked."""
    _check_kind(example, subtask)
    ids, cut = encoder.encode(subtask.prompt(example), max_tokens=subtask.input_tokens)
    features = features_of(example, reader)
    if target is None:
        return Seq2SeqSample(example.id, ids, torch.full((1,), IGNORED_LABEL), features, 1.0, cut)
    if target.soft_scores is None:
        labels = encoder.labels(target.text, max_tokens=subtask.target_tokens)
    else:
        labels = torch.zeros(1, dtype=torch.long)  # one place is scored, which counts as one label
    return Seq2SeqSample(example.id, ids, labels, features, target.weight, cut, target.soft_scores)


def check_sample(example: Example, subtask: Subtask, reader: FeatureReader) -> None:
    """Refuses what `make_sample` would, as far as it can be known without reading features."""
    _check_kind(example, subtask)
    check_features(example, reader)


def _check_kind(example: Example, subtask: Subtask) -> None:
    """Refuses an example of another kind than the task asks about."""
    if subtask.chooses and not example.choices:
        raise BadSample(example.id, f"it has no choices; {subtask.name} asks which one is right")
    inputs = len(feature_paths(example))
    if inputs != subtask.images:
        raise BadSample(example.id, f"it has {inputs} pictures; {subtask.name} takes {subtask.images}")


@dataclass(frozen=True)
class ClosedBatch:
    """Whose closed list of answers a batch is scored on, and the soft scores of each row's right answers."""

    task: str
    soft_scores: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank does in one micro-batch."""

    subtask: Subtask
    items: list[Seq2SeqSample | Skipped]


@dataclass(frozen=True)
class Seq2SeqCollator:
    """The one micro-batch of a loader's batch, as the loss takes it.

    `sample_weights` add up to the mean weight of its usable samples; who has read all micro-batches of all ranks turns
    them into shares of the whole step (`over_step`). A micro-batch without any usable sample becomes one row of padding
    without labels, so that the ranks stay in step. `closed` is in it where a closed list is scored alone.
    """

    pad_token_id: int
    feature_shape: tuple[int, int]

    def __call__(self, batches: Sequence[MicroBatch]) -> dict[str, Any]:
        """Padded on the right; the features of all rows have the same number of pictures."""
        (batch,) = batches
        samples = [item for item in batch.items if isinstance(item, Seq2SeqSample)]
        skipped = [(item.id, item.reason) for item in batch.items if isinstance(item, Skipped)]
        ids = [sample.input_ids for sample in samples] or [torch.tensor([self.pad_token_id])]
        labels = [sample.labels for sample in samples] or [torch.tensor([IGNORED_LABEL])]
        features = [sample.features for sample in samples]
        mask = _pad([torch.ones_like(row) for row in ids], 0)
        closed = {}
        if batch.subtask.answer_by == "closed":
            closed["closed"] = ClosedBatch(batch.subtask.name, [sample.soft_scores or {} for sample in samples] or [{}])
        return {
            **closed,
            "input_ids": _pad(ids, self.pad_token_id),
            "attention_mask": mask,
            "labels": _pad(labels, IGNORED_LABEL),
            "features": torch.stack(features or [torch.zeros(batch.subtask.images, *self.feature_shape)]),
            WEIGHTS: torch.tensor([sample.weight / len(samples) for sample in samples] or [0.0]),
            "normalise_by": batch.subtask.normalise_by,
            SAMPLES: len(samples),
            "sample_ids": [sample.id for sample in samples],
            "padding_tokens": mask.numel() - (sum(len(row) for row in ids) if samples else 0),
            "skipped": skipped,
            "cut": [(sample.id, sample.cut_tokens) for sample in samples if sample.cut_tokens],
        }


def _pad(rows: Sequence[Tensor], value: int) -> Int[Tensor, "batch longest"]:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
