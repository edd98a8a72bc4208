"""The order of an epoch: global batches of one modality and of similar length, the same on every rank.

A text-only sample is far shorter than one with a picture; in one batch they pad each other. Grouping is LLaVA's
(arXiv 2310.03744; `llava_trainer.py`, about a quarter faster), without its dependence on the global random state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


class SamplingLengths(NamedTuple):
    """What the sampler knows of each sample."""

    lengths: Int[Tensor, " samples"]
    is_multimodal: Bool[Tensor, " samples"]
    pictures: Int[Tensor, " samples"]
    """A number for each different list of pictures; samples with the same number can share their tokens."""


def sampling_lengths(rows: datasets.Dataset, *, tokens_per_image: int, tokens_per_video: int = 0) -> SamplingLengths:
    """Lengths of `record_table.load_table`'s rows: words of the text plus the tokens of its pictures and videos.

    Words stand for tokens, as in LLaVA: near enough to sort by, and known without a tokenizer.
    """
    columns = rows.select_columns(["length", "is_multimodal", "images", "video"]).with_format("arrow")[:]
    words, is_multimodal = (columns[name].to_numpy() for name in ("length", "is_multimodal"))
    lengths = torch.tensor(words, dtype=torch.int64)
    for name, tokens in (("images", tokens_per_image), ("video", tokens_per_video)):
        named = columns[name].combine_chunks().value_lengths().to_numpy()
        lengths = lengths + tokens * torch.tensor(named, dtype=torch.int64)
    return SamplingLengths(lengths, torch.tensor(is_multimodal), _picture_numbers(columns["images"]))


def _picture_numbers(images: pa.ChunkedArray) -> Int[Tensor, " samples"]:
    from pyarrow import compute  # half a second, which readers of this module alone need not pay

    joined = compute.call_function("binary_join", [images.combine_chunks(), "\0"])
    return torch.tensor(joined.dictionary_encode().indices.to_numpy(), dtype=torch.int64)


class ModalityLengthSampler(torch.utils.data.Sampler[int]):
    """Indices of one epoch, a function of (seed, epoch) alone.

    A global batch is `batch_size * world_size * accumulation` consecutive indices. Micro-batch k of an epoch goes to
    rank `k % world_size` (accelerate's `BatchSamplerShard`), so inside a global batch, sorted from long to short,
    the ranks of one micro-step get neighbours in length: little padding, little waiting. Samples are drawn
    into global batches at random, the batches are shuffled, and what fills no global batch of its modality comes
    last, pictures before text: only there can modalities meet, in at most one micro-batch.

    With `pictures`, samples of the same pictures are drawn together instead of by length, for a collator that runs
    what they share once; a global batch's border may part them.
    """

    def __init__(
        self,
        lengths: Int[Tensor, " samples"],
        is_multimodal: Bool[Tensor, " samples"],
        *,
        pictures: Int[Tensor, " samples"] | None = None,
        batch_size: int,
        world_size: int,
        accumulation: int,
        seed: int,
    ) -> None:
        if min(batch_size, world_size, accumulation) < 1:
            raise ValueError("batch_size, world_size and accumulation must be at least 1")
        self._lengths = lengths
        self._is_multimodal = is_multimodal
        self._pictures = pictures
        self._global_batch = batch_size * world_size * accumulation
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Every epoch has its own order; a resumed run sets the epoch and skips what it has seen."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(_generator_seed(self._seed, self._epoch))
        full, rest = [], []
        for modality in (self._is_multimodal, ~self._is_multimodal):
            members = modality.nonzero().flatten()
            drawn = self._together(members[torch.randperm(len(members), generator=generator)], generator)
            cut = len(drawn) - len(drawn) % self._global_batch
            full.append(self._long_to_short(drawn[:cut].view(-1, self._global_batch)))
            rest.append(self._long_to_short(drawn[cut:].unsqueeze(0)).flatten())
        batches = torch.cat(full)
        batches = batches[torch.randperm(len(batches), generator=generator)]
        return iter(torch.cat([batches.flatten(), *rest]).tolist())

    def _together(self, drawn: Int[Tensor, " drawn"], generator: torch.Generator) -> Int[Tensor, " drawn"]:
        """Samples of the same pictures one after another, the pictures in random order."""
        if self._pictures is None:
            return drawn
        numbers, picture = self._pictures[drawn].unique(return_inverse=True)
        return drawn[torch.randperm(len(numbers), generator=generator)[picture].argsort(stable=True)]

    def _long_to_short(self, batches: Int[Tensor, "batches batch"]) -> Int[Tensor, "batches batch"]:
        if self._pictures is not None:
            return batches
        order = self._lengths[batches].argsort(dim=1, descending=True, stable=True)
        return batches.gather(1, order)


def _generator_seed(seed: int, epoch: int) -> int:
    """A hash, not a sum: seed 0 in epoch 1 is not seed 1 in epoch 0."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:8], "little", signed=True)
