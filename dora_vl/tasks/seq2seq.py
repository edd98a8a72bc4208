"""Batches of tasks for an encoder-decoder that reads text and stored features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from dora_vl.backbones.seq2seq_prompt import Prompt
from dora_vl.data.dataset import IGNORED_LABEL, Skipped, sample_random
from dora_vl.data.example_file import ExampleFile
from dora_vl.data.examples import Example
from dora_vl.data.feature_input import FeatureReader, check_features, feature_paths, features_of
from dora_vl.data.mixture import MixturePlan
from dora_vl.errors import BadSample
from dora_vl.tasks.subtask import Subtask, Target

LOOKED_AT = 256
"""Of each task, samples among which the longest are looked for."""
SAMPLES, WEIGHTS = "samples", "sample_weights"
"""Names in a batch: how many usable samples it holds, and what each counts in a mean over them."""


@runtime_checkable
class TextEncoder(Protocol):
    """The backbone's tokens of prompts and labels."""

    pad_token_id: int

    def encode(self, prompt: Prompt, *, max_tokens: int | None) -> tuple[Int[Tensor, " seq"], int]:
        """Ids, and how many were cut."""
        ...

    def labels(self, text: str, *, max_tokens: int) -> Int[Tensor, " answer"]:
        """Ids of a label with what opens and closes it."""
        ...


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


def make_sample(
    example: Example,
    subtask: Subtask,
    *,
    encoder: TextEncoder,
    reader: FeatureReader,
    target: Target | None,
) -> Seq2SeqSample:
    """An example in tensors; without a target, as it is asked.

    Raises:
        BadSample: its features are missing, or it has another number of pictures than the task, or no choices where
            the task asks for one.
    """
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
    """Refuses what `make_sample` would, as far as it can be known without reading features.

    Raises:
        BadSample: as there.
    """
    _check_kind(example, subtask)
    check_features(example, reader)


def _check_kind(example: Example, subtask: Subtask) -> None:
    """Refuses an example of another kind than the task asks about."""
    if subtask.chooses and not example.choices:
        raise BadSample(example.id, f"it has no choices; {subtask.name} asks which one is right")
    inputs = len(feature_paths(example))
    if inputs != subtask.images:
        raise BadSample(example.id, f"it has {inputs} pictures; {subtask.name} takes {subtask.images}")


class MixtureDataset(Dataset[MicroBatch]):
    """An epoch's micro-batches in their order, for a data loader with batches of one.

    Args:
        files: each source's examples, in the plan's order; `readers` likewise.
        seed: the run's; an item's random choices are a function of (seed, epoch, task, item).
    """

    def __init__(
        self,
        plan: MixturePlan,
        subtasks: Sequence[Subtask],
        files: Sequence[ExampleFile],
        *,
        encoder: TextEncoder,
        readers: Sequence[FeatureReader],
        seed: int,
    ) -> None:
        self.plan = plan
        self._subtasks = tuple(subtasks)
        self.files = tuple(files)
        self._encoder = encoder
        self._readers = tuple(readers)
        self._seed = seed
        # Shared memory: persistent workers keep a copy of this object and would not see a plain attribute.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.plan)

    def set_epoch(self, epoch: int) -> None:
        """Moves the order and the random choices of every worker to this epoch."""
        self._epoch.fill_(epoch)

    def examples(self, number: int) -> list[Example]:
        """What a micro-batch is made of.

        Raises:
            BadSample: a line is no record.
        """
        part = self.plan.part(number, epoch=int(self._epoch))
        return [self.files[part.source][index] for index in part.indices]

    def first(self, count: int) -> Iterator[tuple[Seq2SeqSample, Target, Subtask]]:
        """Yields each task's first samples whose label is a text, and what they are trained on."""
        epoch = int(self._epoch)
        for number, source in enumerate(self.plan.sources):
            for index in range(min(count, source.items)):
                sample = self._item(number, index, epoch)
                if isinstance(sample, Seq2SeqSample) and sample.soft_scores is None:
                    target = self._target(number, index, self.files[number][index], epoch)
                    yield sample, target, self._subtasks[number]

    def longest(self) -> list[MicroBatch]:
        """For each task the largest micro-batch that can be made of its samples, of those at even distances."""
        epoch = int(self._epoch)
        found = []
        for number, source in enumerate(self.plan.sources):
            count = -(-source.batch_size // self.plan.parts)
            looked_at = max(LOOKED_AT, 2 * count)
            places = range(0, source.items, max(1, source.items // looked_at))
            items = [self._item(number, index, epoch) for index in places]
            usable = [one for one in items if isinstance(one, Seq2SeqSample)]
            longest = sorted(usable, key=lambda one: -(len(one.input_ids) + len(one.labels)))[:count]
            found.append(MicroBatch(self._subtasks[number], [*longest]))
        return found

    def __getitem__(self, number: int) -> MicroBatch:
        epoch = int(self._epoch)
        part = self.plan.part(number, epoch=epoch)
        items = [self._item(part.source, index, epoch) for index in part.indices]
        return MicroBatch(self._subtasks[part.source], items)

    def _item(self, source: int, index: int, epoch: int) -> Seq2SeqSample | Skipped:
        subtask, file = self._subtasks[source], self.files[source]
        name = f"{subtask.name}:{index}"
        try:
            example = file[index]
            name = example.id
            target = self._target(source, index, example, epoch)
            reader = self._readers[source]
            return make_sample(example, subtask, encoder=self._encoder, reader=reader, target=target)
        except BadSample as error:
            return Skipped(index, name, error.reason)

    def _target(self, source: int, index: int, example: Example, epoch: int) -> Target:
        drawn = sample_random(self._seed, epoch, index)
        return self._subtasks[source].target(example, self.files[source].answer_of(index), drawn)


class ValidationBatches(Dataset[MicroBatch]):
    """Each task's samples in the file's order, with the first answer of each, in batches of one task.

    Args:
        ranks: how many share the work; batches without items follow until all have equally many.
    """

    def __init__(
        self,
        subtasks: Sequence[Subtask],
        files: Sequence[ExampleFile],
        *,
        encoder: TextEncoder,
        readers: Sequence[FeatureReader],
        batch_size: int,
        ranks: int,
    ) -> None:
        self._parts = [
            (source, range(start, min(start + batch_size, len(file))))
            for source, file in enumerate(files)
            for start in range(0, len(file), batch_size)
        ]
        self._parts += [(0, range(0))] * (-len(self._parts) % ranks)
        self._sources = tuple(zip(subtasks, files, readers, strict=True))
        self._encoder = encoder

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> MicroBatch:
        source, indices = self._parts[number]
        subtask, file, reader = self._sources[source]
        items: list[Seq2SeqSample | Skipped] = []
        for index in indices:
            name = f"{subtask.name}:{index}"
            try:
                example = file[index]
                name = example.id
                target = subtask.target(example, file.answer_of(index) or 0, Random(index))
                items.append(make_sample(example, subtask, encoder=self._encoder, reader=reader, target=target))
            except BadSample as error:
                items.append(Skipped(index, name, error.reason))
        return MicroBatch(subtask, items)


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
            closed["closed"] = ClosedBatch(batch.subtask.name, [one.soft_scores or {} for one in samples] or [{}])
        return {
            **closed,
            "input_ids": _pad(ids, self.pad_token_id),
            "attention_mask": mask,
            "labels": _pad(labels, IGNORED_LABEL),
            "features": torch.stack(features or [torch.zeros(batch.subtask.images, *self.feature_shape)]),
            WEIGHTS: torch.tensor([one.weight / len(samples) for one in samples] or [0.0]),
            "normalise_by": batch.subtask.normalise_by,
            SAMPLES: len(samples),
            "sample_ids": [sample.id for sample in samples],
            "padding_tokens": mask.numel() - (sum(len(row) for row in ids) if samples else 0),
            "skipped": skipped,
            "cut": [(sample.id, sample.cut_tokens) for sample in samples if sample.cut_tokens],
        }


def over_step(batches: Sequence[Mapping[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """A rank's micro-batches of one step with weights for a mean over the step's usable samples, of all ranks.

    How many those are is known only now that the data has been read: a mean over the samples that were asked for would
    count the missing ones as samples of loss 0. Every rank must call it; batches without weights stay as they are.
    """
    if not batches or WEIGHTS not in batches[0]:
        return [dict(batch) for batch in batches]
    total = torch.tensor(sum(batch[SAMPLES] for batch in batches), device=device)
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(total)
    samples = max(1, int(total))
    return [{**batch, WEIGHTS: batch[WEIGHTS] * (batch[SAMPLES] / samples)} for batch in batches]


def _pad(rows: Sequence[Tensor], value: int) -> Int[Tensor, "batch longest"]:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
