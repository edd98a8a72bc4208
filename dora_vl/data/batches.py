"""Collates samples into a batch: a sequence each, or several in one as trees; counts everything cut or skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from dora_vl.data.columns import Packing
from dora_vl.data.packing import build_trees, deal_trees, pack, tokens_of
from dora_vl.data.samples import ALIGNED, IGNORED_LABEL, Sample, Skipped

PACKED_TOKENS = 8_192
"""A packed sequence holds about this many tokens at most; a larger micro-batch becomes several sequences."""
Join: TypeAlias = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
"""Joins what each sample of a batch has beside its tokens, by the names of its inputs."""


def with_answer(sample: Sample, ids: Tensor, *, weight: float = 1.0) -> Sample:
    """Replaces a sample's answer, which is all that it labels, by other ids."""
    start = int((sample.labels != IGNORED_LABEL).int().argmax())

    def repeat_answer_entries(value: Tensor) -> Tensor:
        """Gives an entry for each token all new ids the value of the first old one."""
        repeated = value[:, start : start + 1].repeat(1, len(ids), *[1] * (value.dim() - 2))
        return torch.cat([value[:, :start], repeated], 1)

    inputs = {name: repeat_answer_entries(value) if name in ALIGNED else value for name, value in sample.inputs.items()}
    positions = sample.positions
    if positions is not None:
        before = positions[:, :start]
        positions = torch.cat([before, (before.amax() + torch.arange(1, len(ids) + 1)).expand(len(before), -1)], 1)
    return replace(
        sample,
        input_ids=torch.cat([sample.input_ids[:start], ids]),
        labels=torch.cat([torch.full_like(sample.input_ids[:start], IGNORED_LABEL), ids]),
        inputs=inputs,
        positions=positions,
        weight=weight,
        others=(),
    )


def with_mismatched_answer(groups: Sequence[Sequence[Sample]], number: int) -> list[Sample]:
    """Adds to a group the answer to the nearest earlier prompt of the batch that differs, if there is one.

    By such answers KTO measures how far the model is from the reference; its own answer would cancel its gain.
    """

    def prompt(sample: Sample) -> tuple[Sequence[Any], list[int]]:
        return sample.media, sample.input_ids[: int((sample.labels != IGNORED_LABEL).int().argmax())].tolist()

    first = groups[number][0]
    for other, *_ in (groups[number - before] for before in range(1, len(groups))):
        if prompt(other) != prompt(first):
            return [*groups[number], with_answer(first, other.labels[other.labels != IGNORED_LABEL], weight=0.0)]
    return list(groups[number])


def answers_of(groups: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """Returns which answers of a batch are compared; each group holds those to one prompt.

    `pairs` are the numbers of a preferred and a rejected answer, `of_pictures` of a preferred one and the same under
    other pictures; `keys` name each answer by its sample's place in the data and its number there.
    """
    numbers: dict[str, list[tuple[int, int]]] = {"pairs": [], "of_pictures": []}
    keys: list[tuple[int, int]] = []
    for answers in groups:
        first = len(keys)
        keys += [(answer.index, number) for number, answer in enumerate(answers)]
        for chosen, other in product(range(len(answers)), repeat=2):
            if answers[chosen].weight > 0 > answers[other].weight:
                kind = "of_pictures" if answers[other].exchanged else "pairs"
                numbers[kind].append((first + chosen, first + other))
    tensors = {kind: torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T for kind, pairs in numbers.items()}
    return {**tensors, "keys": keys}


def values_by_name(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns what those samples that have an input have there."""
    names = dict.fromkeys(name for inputs in samples for name in inputs)
    return {name: [inputs[name] for inputs in samples if name in inputs] for name in names}


def joined_values(values: Sequence[Any]) -> Any:
    """Joins tensors along their first dimension, filled with zeros where others differ; lists one after another.

    Other dimensions are tiles of a picture, or pictures of a sample; processors do so in a batch of their own.
    """
    if all(isinstance(value, Tensor) for value in values):
        return stacked(values, 0)
    return [entry for value in values for entry in value]


def concatenated(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Joins each input that samples have beside their tokens, which suits almost every family; a `Join`."""
    return {name: joined_values(values) for name, values in values_by_name(samples).items()}


@dataclass(frozen=True)
class Collator:
    """Joins samples' inputs by name: tokens are padded, pictures are joined by `join`.

    A batch without pictures gets a further sequence, `dummy`: under ZeRO-3 every rank must run the vision part, and
    what trains in it gets gradients of zero instead of none. A batch without videos gets `dummy_video`, since ranks
    must run it equally often, and in many families pictures and videos are a pass each; where they have the same
    inputs, either will do.

    Args:
        pad_token_id: fills short sequences.
        join: joins what samples have beside their tokens; `Encoder.collate` has its family's.
        dummy: a sequence with a picture and without labels; None where no rank ever sees a picture, and in decoding.
        dummy_video: a sequence with a video and without labels; None where no rank ever sees a video.
        pad_side: training pads on the right; decoding needs the left.
        packing: `plain`: a sample each. `packed`: several share a sequence, each by itself: the same loss, hardly any
            padding. `trees`: and those that share something, such as their pictures, share what they begin with.
        compares: a batch says which answers belong together, and by their weights which are good.
        unmatched: each prompt also gets the answer to the next one, with weight 0, which `kto` measures by.
        keeps_samples: a batch holds the samples that it was made of, so that other answers can take their places.
        chats_from: samples of this index and above are also a batch of their own inside the batch, `chats`, whose
            `samples` are their numbers; None where there are none.
    """

    pad_token_id: int
    join: Join = concatenated
    dummy: Sample | None = None
    dummy_video: Sample | None = None
    pad_side: Literal["right", "left"] = "right"
    packing: Packing = "plain"
    compares: bool = False
    unmatched: bool = False
    keeps_samples: bool = False
    chats_from: int | None = None

    def __call__(self, items: Sequence[Sample | Skipped | None]) -> dict[str, Any]:
        """Returns one batch and its bookkeeping; None is left out."""
        usable = [item for item in items if isinstance(item, Sample)]
        groups = [[*sample.texts()] for sample in usable]
        if self.unmatched:
            groups = [with_mismatched_answer(groups, number) for number in range(len(groups))]
        samples = [answer for answers in groups for answer in answers]
        batch = self._inputs(samples)
        if self.packing == "plain":
            tokens = sum(len(sample.input_ids) for sample in samples)
        else:
            tokens = int((batch["layout"]["segment"] >= 0).sum())
        if self.chats_from is not None:
            numbers = [number for number, sample in enumerate(samples) if sample.index >= self.chats_from]
            chats = self._inputs([samples[number] for number in numbers])
            batch["chats"] = {"samples": torch.tensor(numbers, dtype=torch.long), "inputs": chats}
        shrunk = [(sample.id, sample.lost_pixels) for sample in usable if sample.lost_pixels]
        if self.compares:
            batch["weights"] = torch.tensor([sample.weight for sample in samples])
            batch["answers"] = answers_of(groups)
        return {
            **batch,
            "samples": len(usable),
            "sample_ids": [sample.id for sample in samples],
            "padding_tokens": batch["input_ids"].numel() - tokens,
            "skipped": [(item.id, item.reason) for item in items if isinstance(item, Skipped)],
            "cut": [(sample.id, sample.cut_tokens) for sample in usable if sample.cut_tokens],
            **({"shrunk": shrunk} if shrunk else {}),
            **({"made_of": usable} if self.keeps_samples else {}),
        }

    def _inputs(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Returns the model's inputs for samples, with the dummies that they need."""
        shown = list(samples)
        for dummy in (self.dummy, self.dummy_video):
            if dummy is not None and not any(_media(dummy) <= _media(sample) for sample in samples):
                shown.append(dummy)
        if not shown:
            shown = [Sample(torch.tensor([self.pad_token_id]), labels=torch.tensor([IGNORED_LABEL]))]
        return self._joined(shown) if self.packing == "plain" else self._forest(shown)

    def _forest(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Returns sequences that hold several samples, and who sees whom in them."""
        index = {id(sample): number for number, sample in enumerate(samples)}

        def numbers_of(some: Sequence[Sample]) -> Tensor:
            return torch.tensor([index[id(sample)] for sample in some])

        trees = build_trees(samples, budget=PACKED_TOKENS, shared=self.packing == "trees")
        lengths = [tokens_of(tree) for tree in trees]
        dealt = deal_trees(lengths, -(-sum(lengths) // PACKED_TOKENS))
        sequences = [pack([trees[tree] for tree in numbers]) for numbers in dealt]
        of_tokens: dict[str, tuple[int, list[Tensor]]] = {
            "input_ids": (self.pad_token_id, [packed.input_ids for packed in sequences]),
            "labels": (IGNORED_LABEL, [packed.labels for packed in sequences]),
            "attention_mask": (0, [torch.ones_like(packed.input_ids) for packed in sequences]),
            "segment": (-1, [packed.segment for packed in sequences]),
            "steps": (0, [packed.steps for packed in sequences]),
            "sources": (-1, [packed.sources for packed in sequences]),
            "samples": (-1, [numbers_of(packed.samples)[packed.segment] for packed in sequences]),
        }
        for name in dict.fromkeys(name for packed in sequences for name in packed.inputs if name != "attention_mask"):
            of_tokens[name] = 0, [packed.inputs.get(name, torch.zeros_like(packed.input_ids)) for packed in sequences]
        batch: dict[str, Any] = {
            name: self._tokens([value[None] for value in values], fill) for name, (fill, values) in of_tokens.items()
        }
        positions = self._tokens([packed.positions[None].mT for packed in sequences], 0).permute(2, 0, 1)
        batch["position_ids"] = positions[0] if len(positions) == 1 else positions
        sees = [packed.sees for packed in sequences]
        most = max(map(len, sees))
        batch["layout"] = {name: batch.pop(name) for name in ("segment", "steps", "sources", "samples")} | {
            "sees": torch.stack([torch.nn.functional.pad(table, (0, most - len(table)) * 2) for table in sees])
        }
        return batch | self._joined_media([root for packed in sequences for root in packed.roots])

    def _joined(self, samples: Sequence[Sample]) -> dict[str, Any]:
        joined: dict[str, Any] = {
            "input_ids": self._tokens([sample.input_ids[None] for sample in samples], self.pad_token_id),
            "labels": self._tokens([sample.labels[None] for sample in samples], IGNORED_LABEL),
        }
        # By length, not by ids: an unknown word may share the padding's id.
        masks = [sample.inputs.get("attention_mask", torch.ones_like(sample.input_ids)[None]) for sample in samples]
        joined["attention_mask"] = self._tokens(masks, 0)
        for name in dict.fromkeys(name for sample in samples for name in sample.inputs if name in ALIGNED[1:]):
            like = next(sample.inputs[name] for sample in samples if name in sample.inputs)
            # Zeros where a sample has none (text only beside pictures).
            values = [
                sample.inputs.get(name, like.new_zeros(1, len(sample.input_ids), *like.shape[2:])) for sample in samples
            ]
            joined[name] = self._tokens(values, 0)
        return joined | self._joined_media(samples)

    def _joined_media(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Returns what the samples have beside their tokens, joined."""
        media = [{name: value for name, value in sample.inputs.items() if name not in ALIGNED} for sample in samples]
        stored = [outputs for sample in samples for outputs in sample.stored]
        return self.join(media) | ({"stored": stored} if stored else {})

    def _tokens(self, sequences: Sequence[Tensor], value: int) -> Tensor:
        if self.pad_side == "left":
            return stacked([sequence.flip(1) for sequence in sequences], value).flip(1)
        return stacked(sequences, value)


def _media(sample: Sample) -> frozenset[str]:
    """Returns names of a sample's inputs for pictures and videos."""
    return frozenset(sample.inputs).difference(ALIGNED)


def stacked(tensors: Sequence[Tensor], value: int) -> Tensor:
    """Returns tensors one after another, each filled up at its ends to the largest size of every other dimension."""
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(list(tensors))
    sizes = [max(tensor.shape[axis] for tensor in tensors) for axis in range(1, tensors[0].dim())]
    filled = tensors[0].new_full((sum(len(tensor) for tensor in tensors), *sizes), value)
    start = 0
    for tensor in tensors:
        filled[(slice(start, start + len(tensor)), *(slice(size) for size in tensor.shape[1:]))] = tensor
        start += len(tensor)
    return filled


SAMPLES, WEIGHTS = "samples", "sample_weights"
"""A batch holds under these names how many usable samples it has, and what each counts in a mean over them."""


def weigh_over_step(batches: Sequence[Mapping[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Returns a rank's micro-batches of one step with weights for a mean over the step's usable samples, of all ranks.

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
