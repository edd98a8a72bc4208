"""The order of an epoch: global batches of one modality and of similar length, the same on every rank.

A text-only sample is far shorter than one with a picture; in one batch they pad each other. Grouping is LLaVA's
(arXiv 2310.03744; `llava_trainer.py`, about a quarter faster), without its dependence on the global random state.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from dora_vl.data.columns import Mixing
from dora_vl.data.pictures import NOT_DECODED, HeldPictures, MediaFolder, opened_picture, path_inside
from dora_vl.errors import BadSample
from dora_vl.shapes import Bool, Int


class SamplingLengths(NamedTuple):
    """Holds what the samplers know of each sample."""

    lengths: Int[Tensor, " samples"]
    is_multimodal: Bool[Tensor, " samples"]
    media: Int[Tensor, " samples"]
    """Numbers each different list of pictures and videos; samples of one number can share their tokens."""
    shared: Int[Tensor, " samples"]
    """Counts the tokens of its pictures and videos."""


def sampling_lengths(rows: datasets.Dataset, *, tokens_per_image: int, tokens_per_video: int = 0) -> SamplingLengths:
    """Returns the lengths of `table.load_table`'s rows: words of the text plus tokens of pictures and videos.

    Words are counted instead of tokens, as in LLaVA: near enough to sort by, and known without a tokenizer.
    """
    columns = rows.select_columns(["length", "images", "videos"]).with_format("arrow")[:]
    pictures, videos = (
        torch.tensor(columns[name].combine_chunks().value_lengths().to_numpy(), dtype=torch.int64)
        for name in ("images", "videos")
    )
    lengths = torch.tensor(columns["length"].to_numpy(), dtype=torch.int64)
    shared = tokens_per_image * pictures + tokens_per_video * videos
    clips = columns["videos"].combine_chunks()
    of_clips = [part.cast(pa.string()).fill_null("") for part in clips.values.flatten()]
    clips = pa.ListArray.from_arrays(clips.offsets, pc.call_function("binary_join_element_wise", [*of_clips, "\1"]))
    names = [pc.call_function("binary_join", [lists, "\0"]) for lists in (columns["images"].combine_chunks(), clips)]
    media = pc.call_function("binary_join_element_wise", [*names, "\2"])
    numbers = torch.tensor(media.dictionary_encode().indices.to_numpy(), dtype=torch.int64)
    return SamplingLengths(lengths + shared, (pictures + videos) > 0, numbers, shared)


class SeededSampler(torch.utils.data.Sampler[int]):
    """The indices of one epoch's samples, whose order depends only on (seed, epoch)."""

    micro_batch: int = 0
    """Samples of the micro-batches that the order is made for; 0 where it does not depend on them. A resumed run keeps
    the number that it was begun with, or the rest of an epoch would hold samples that were seen, and lack others."""

    def __init__(self, samples: int, seed: int) -> None:
        self._samples, self._seed, self._epoch = samples, seed, 0

    def __len__(self) -> int:
        return self._samples

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, each of which has its own order; a resumed run sets it and skips what it has seen."""
        self._epoch = epoch


class ModalityLengthSampler(SeededSampler):
    """Orders samples by modality and length.

    A global batch, a micro-batch times ranks times accumulation, is consecutive indices. Micro-batch k of an epoch goes
    to rank `k % ranks` (accelerate's `BatchSamplerShard`), so inside a global batch, sorted from long to short, the
    ranks of one micro-step get neighbours in length: little padding, little waiting. Samples are drawn into global
    batches at random, the batches are shuffled, and what fills no global batch of its modality comes last, pictures
    before text: only there can modalities meet, in at most one micro-batch.
    """

    def __init__(
        self, lengths: Int[Tensor, " samples"], is_multimodal: Bool[Tensor, " samples"], *, global_batch: int, seed: int
    ) -> None:
        super().__init__(len(lengths), seed)
        self._lengths, self._is_multimodal, self._global_batch = lengths, is_multimodal, global_batch

    def __iter__(self) -> Iterator[int]:
        # A hash, not a sum: seed 0 in epoch 1 is not seed 1 in epoch 0.
        digest = hashlib.sha256(f"{self._seed}/{self._epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        full, rest = [], []
        for modality in (self._is_multimodal, ~self._is_multimodal):
            members = modality.nonzero().flatten()
            drawn = members[torch.randperm(len(members), generator=generator)]
            cut = len(drawn) - len(drawn) % self._global_batch
            full.append(self._long_to_short(drawn[:cut].view(-1, self._global_batch)))
            rest.append(self._long_to_short(drawn[cut:].unsqueeze(0)).flatten())
        batches = torch.cat(full)
        batches = batches[torch.randperm(len(batches), generator=generator)]
        return iter(torch.cat([batches.flatten(), *rest]).tolist())

    def _long_to_short(self, batches: Int[Tensor, "batches batch"]) -> Int[Tensor, "batches batch"]:
        order = self._lengths[batches].argsort(dim=1, descending=True, stable=True)
        return batches.gather(1, order)


class ReplaySampler(SeededSampler):
    """Takes all `own` samples and `drawn` of the chats that follow them; each epoch draws anew.

    Within an epoch no chat repeats before all were drawn. `order` makes the sampler that orders an epoch's samples by
    their lengths; it gets this sampler's `micro_batch`.
    """

    def __init__(
        self,
        lengths: SamplingLengths,
        *,
        own: int,
        drawn: int,
        seed: int,
        order: Callable[[SamplingLengths], SeededSampler],
        micro_batch: int = 0,
    ) -> None:
        super().__init__(own + drawn, seed)
        self.micro_batch = micro_batch
        self._lengths, self._own, self._drawn, self._order = lengths, own, drawn, order

    def __iter__(self) -> Iterator[int]:
        chats = len(self._lengths.lengths) - self._own
        rounds = range(-(-self._drawn // chats))
        orders = [_permutation(f"{self._seed}/{self._epoch}/replay/{number}", chats) for number in rounds]
        drawn = self._own + np.concatenate(orders)[: self._drawn]
        chosen = torch.from_numpy(np.concatenate([np.arange(self._own), drawn]))
        sampler = self._order(SamplingLengths(*(values[chosen] for values in self._lengths)))
        sampler.micro_batch = self.micro_batch
        sampler.set_epoch(self._epoch)
        return (int(chosen[index]) for index in sampler)


WINDOW = 1_024
"""Micro-batches are made equally long among this many samples; more would hardly help."""
NEIGHBOURS = 8
"""This many micro-batches of almost one length follow each other, so that as many ranks need not wait."""
TOGETHER = 4
"""A micro-batch has at most this many samples of one picture or video: with more, a step would see few pictures."""


class TreeSampler(SeededSampler):
    """Orders samples into micro-batches of equally many tokens, pictures together.

    Up to `TOGETHER` samples of the same pictures or videos are drawn as one; a micro-batch's border parts them only
    where no micro-batch has room for all.
    """

    def __init__(self, lengths: SamplingLengths, *, batch_size: int, seed: int) -> None:
        super().__init__(len(lengths.lengths), seed)
        self._lengths = lengths.lengths.tolist()
        self._shared = lengths.shared.tolist()
        self._media = lengths.media.tolist()
        self.micro_batch = batch_size
        groups: dict[int, list[int]] = {}
        for sample, (media, shared) in enumerate(zip(self._media, self._shared, strict=True)):
            # Where a picture takes few tokens, more pictures in a step teach more than sharing saves.
            is_worth_it = 2 * shared > self._lengths[sample]
            groups.setdefault(media if is_worth_it else -1 - sample, []).append(sample)
        self._groups = list(groups.values())

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self._seed}/{self._epoch}/trees")
        groups: list[list[int]] = []
        together = min(TOGETHER, self.micro_batch)
        for group in self._groups:
            drawn = rng.sample(group, len(group))
            groups += [drawn[start : start + together] for start in range(0, len(drawn), together)]
        rng.shuffle(groups)
        limit = max(1, WINDOW // self.micro_batch) * self.micro_batch
        window: list[list[int]] = []
        for number, group in enumerate(groups, start=1):
            window.append(group)
            samples = sum(map(len, window))
            if samples < limit and number < len(groups):
                continue
            last = number == len(groups)
            kept = len(window[-1]) - (0 if last else samples - limit)  # exactly `limit` samples before the last group
            full, window = [*window[:-1], window[-1][:kept]], list(filter(None, [window[-1][kept:]]))
            batches = self._fill_batches(full)
            # Neighbours go to the ranks of one micro-step; what fills no micro-batch comes last.
            complete = sorted((batch for batch in batches if len(batch) == self.micro_batch), key=self._tokens)
            blocks = [complete[start : start + NEIGHBOURS] for start in range(0, len(complete), NEIGHBOURS)]
            rng.shuffle(blocks)
            rest = [batch for batch in batches if len(batch) < self.micro_batch]
            for batch in (*(batch for block in blocks for batch in block), *rest):
                yield from batch

    def _tokens(self, samples: list[int]) -> int:
        """Estimates how many of a row's tokens they take, with every picture and video once."""
        shared = {self._media[sample]: self._shared[sample] for sample in samples}
        return sum(shared.values()) + sum(self._lengths[sample] - self._shared[sample] for sample in samples)

    def _fill_batches(self, groups: list[list[int]]) -> list[list[int]]:
        """Deals groups to micro-batches: the longest group goes to the shortest one that has room for it."""
        count = sum(map(len, groups))
        full, rest = divmod(count, self.micro_batch)
        room = [self.micro_batch] * full + ([rest] if rest else [])
        tokens, batches = [0] * len(room), [list[int]() for _ in room]
        left = sorted(groups, key=self._tokens)
        while left:
            group = left.pop()
            with_room = [batch for batch, slots in enumerate(room) if slots >= len(group)]
            if with_room:
                chosen = min(with_room, key=tokens.__getitem__)
            else:  # a part of it where most have room; the rest waits for its turn
                chosen = max(range(len(room)), key=room.__getitem__)
                left.append(group[room[chosen] :])
                group = group[: room[chosen]]
            batches[chosen] += group
            room[chosen] -= len(group)
            tokens[chosen] += self._tokens(group)
        return batches


@dataclass(frozen=True, kw_only=True)
class MixtureTask:
    """One task of a mixture; an optimizer step takes `batch_size` of its items, over all ranks and micro-batches."""

    name: str
    items: int
    batch_size: int

    @property
    def steps(self) -> int:
        """Counts the steps that see each item once; the last may be smaller."""
        return -(-self.items // self.batch_size)


@dataclass(frozen=True)
class MicroBatchPart:
    """Says what one rank does in one micro-batch; `indices` may be empty where a small last batch does not reach."""

    source: int
    indices: tuple[int, ...]


class MixturePlan:
    """Every micro-batch of an epoch of several tasks, by its number, the same on every rank.

    A step is about one task, whose batch is as large as the task asks for; its samples are dealt out to the ranks and
    to the micro-batches that are accumulated, so a run with more ranks does the same steps. Micro-batch k belongs to
    step k // parts; accelerate gives it to rank k % ranks. The order depends only on (seed, epoch). VL-Adapter's
    `roundrobin` is `proportional` here: each task's samples once per epoch, the tasks' steps shuffled.

    Args:
        parts: micro-batches of one step over all ranks (ranks times accumulation).
        mixing: `proportional`: each task's items once per epoch; `balanced`: as many steps in all, the same number for
            every task, a small task's items several times.
    """

    def __init__(self, sources: Sequence[MixtureTask], *, parts: int, mixing: Mixing, seed: int) -> None:
        self.sources = tuple(sources)
        self.parts = parts
        self.seed = seed
        proportional = [source.steps for source in sources]
        equal = -(-sum(proportional) // len(sources))
        self._steps_of = tuple(proportional if mixing == "proportional" else [equal] * len(sources))

    def __len__(self) -> int:
        return sum(self._steps_of) * self.parts

    @property
    def items(self) -> int:
        """Counts the items that an epoch reads, each as often as it comes."""
        items = 0
        for source, steps in zip(self.sources, self._steps_of, strict=True):
            rounds, rest = divmod(steps, source.steps)
            items += rounds * source.items + min(rest * source.batch_size, source.items)
        return items

    def part(self, number: int, *, epoch: int) -> MicroBatchPart:
        """Returns a rank's part of an epoch's micro-batch `number`."""
        step, part = divmod(number, self.parts)
        task, turn = _steps(self.seed, epoch, self._steps_of)[step]
        source = self.sources[task]
        round_, position = divmod(turn, source.steps)
        order = _permutation(f"{self.seed}/{epoch}/{source.name}/{round_}", source.items)
        items = order[position * source.batch_size : (position + 1) * source.batch_size]
        first, last = (len(items) * edge // self.parts for edge in (part, part + 1))
        return MicroBatchPart(task, tuple(items[first:last].tolist()))


@lru_cache(maxsize=4)
def _steps(seed: int, epoch: int, steps_of: tuple[int, ...]) -> list[tuple[int, int]]:
    """Returns the task of each step of an epoch, and how many of the task's steps come before it."""
    tasks = [task for task, steps in enumerate(steps_of) for _ in range(steps)]
    random.Random(f"{seed}/{epoch}/tasks").shuffle(tasks)
    before = Counter[int]()
    steps: list[tuple[int, int]] = []
    for task in tasks:
        steps.append((task, before[task]))
        before[task] += 1
    return steps


@lru_cache(maxsize=8)
def _permutation(key: str, items: int) -> np.ndarray:
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little")).permutation(items)


HEADERS = 1_000
"""The pictures of this many rows, evenly spread, are measured: less than a second's work."""


def longest_indices(sizes: SamplingLengths, count: int, among: Bool[Tensor, " samples"] | None = None) -> list[int]:
    """Returns the indices of the `count` longest samples, of all or of those in `among`."""
    order = sizes.lengths.argsort(descending=True, stable=True)
    return (order if among is None else order[among[order]])[:count].tolist()


def places_of_largest_pictures(
    rows: datasets.Dataset, stored: HeldPictures, folder: MediaFolder, count: int
) -> list[int]:
    """Returns the indices of `count` rows whose pictures have the most pixels; nothing is decoded."""

    def pixels(name: str) -> int:
        """Returns the pixels that a picture's header states; 0 where it cannot be read."""
        try:
            source = io.BytesIO(stored[name]) if name in stored else path_inside(folder, name)
            with opened_picture(source) as picture:
                return picture.width * picture.height
        except (BadSample, *NOT_DECODED):
            return 0

    indices = np.linspace(0, len(rows) - 1, min(len(rows), HEADERS)).astype(np.int64)
    sizes = [sum(map(pixels, names)) for names in rows.select(indices)["images"]]
    order = np.argsort(sizes, kind="stable")[::-1][:count]
    return [int(indices[number]) for number in order if sizes[number]]
