"""Counts of what batches held, was skipped or cut; kept in checkpoints, so that a resumed run ends with all sums."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from dora_vl.data.bad_samples import BadSampleCounts, BadSampleLedger
from dora_vl.data.dataset import BOOKKEEPING
from dora_vl.training.sample_account import SampleAccount, account_of, refuse_other_samples


@dataclass
class Counts:
    """Sums over batches of one rank, or of all ranks."""

    samples: int = 0
    tokens: int = 0
    padding_tokens: int = 0
    labelled_tokens: int = 0
    skipped: int = 0
    cut_samples: int = 0
    shrunk_samples: int = 0

    def __sub__(self, earlier: Counts) -> Counts:
        return Counts(*(getattr(self, one.name) - getattr(earlier, one.name) for one in fields(self)))

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    @property
    def padding_share(self) -> float:
        """Share of all positions that held padding."""
        return self.padding_tokens / max(1, self.tokens + self.padding_tokens)


@dataclass
class BatchStatistics:
    """Takes the bookkeeping out of batches, so that what is left are the model's inputs.

    The ledger, if there is one, hears of every skipped sample by id and reason.
    """

    ledger: BadSampleLedger | None = None
    counts: Counts = field(default_factory=Counts)
    """This rank's, since the start of the process."""
    earlier: Counts = field(default_factory=Counts)
    """All ranks', before the process: of the run that is resumed."""

    def carry_over(self, skipped: Mapping[str, str], counts: Counts | None = None) -> None:
        """Goes on from the sums over all ranks of the run that is resumed."""
        self.earlier = counts or Counts()
        if self.ledger is not None:
            self.ledger.carry_over(skipped)

    def take(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch's tensors; its counts are added to `counts`."""
        held = {name: batch[name] for name in BOOKKEEPING if name in batch}
        padding = int(held.get("padding_tokens", 0))
        samples, skipped = int(held.get("samples", len(batch["input_ids"]))), held.get("skipped", ())
        if self.ledger is not None:
            self.ledger.record(samples=samples, skipped=skipped)
        self.counts.samples += samples
        self.counts.padding_tokens += padding
        self.counts.tokens += batch["input_ids"].numel() - padding
        self.counts.labelled_tokens += int((batch["labels"] != -100).sum())
        self.counts.skipped += len(skipped)
        self.counts.cut_samples += len(held.get("cut", ()))
        self.counts.shrunk_samples += len(held.get("shrunk", ()))
        return {name: value for name, value in batch.items() if name not in BOOKKEEPING}

    def judge(self, counts: Counts) -> None:
        """Ends the run where too many samples were unusable; `counts` are of all ranks, so that all end together.

        Raises:
            UserError: more than `data.max_bad_share`.
        """
        if self.ledger is not None:
            self.ledger.judge(BadSampleCounts(seen=counts.samples + counts.skipped, bad=counts.skipped))

    def over_ranks(self, device: torch.device) -> Counts:
        """The sums over all ranks, with those before a resume; every rank must call it."""
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return self.earlier + self.counts
        mine = torch.tensor([getattr(self.counts, one.name) for one in fields(Counts)], device=device)
        torch.distributed.all_reduce(mine)
        return self.earlier + Counts(*mine.tolist())

    def skipped_here(self) -> dict[str, str]:
        """Reason of every sample that this rank skipped, by id."""
        return {} if self.ledger is None else dict(self.ledger.reasons)

    def skipped_on_all_ranks(self) -> dict[str, str]:
        """Reason of every skipped sample, by id; every rank must call it."""
        mine = self.skipped_here()
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return mine
        everyone: list[dict[str, str]] = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(everyone, mine)
        return {name: reason for one in everyone for name, reason in one.items()}


logger = logging.getLogger(__name__)

PROGRESS = "progress.json"
SAMPLES = "training_samples"


@runtime_checkable
class EndlessOrder(Protocol):
    """A stream of samples whose epochs the Trainer does not see (`data.stream.StreamOrder`)."""

    epoch_samples: int | None

    def resume(self, *, taken: int, epoch_samples: int | None) -> None:
        """Leaves whole epochs unread that `taken` samples have gone through."""
        ...


class Progress:
    """Counts, skipped samples and seconds of a run, those before a resume included.

    Args:
        statistics: of training batches.
        validation: of validation batches, where there are any.
    """

    def __init__(self, statistics: BatchStatistics, validation: BatchStatistics | None) -> None:
        self._statistics = statistics
        self._validation = validation
        self._stream: EndlessOrder | None = None
        self._ids: Callable[[], Iterable[str]] | None = None
        self._media: Callable[[], Mapping[str, str]] = dict
        self._source = ""
        self._earlier_seconds = 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the run has trained."""
        return self._earlier_seconds + time.monotonic() - self._started

    def follow(self, stream: EndlessOrder) -> None:
        """Keeps the length of a stream's epochs too; the Trainer must skip what a resumed run has seen of it."""
        self._stream = stream

    def trains_on(
        self, ids: Callable[[], Iterable[str]] | None, source: str, media: Callable[[], Mapping[str, str]] = dict
    ) -> None:
        """Keeps an account of the training samples too.

        Args:
            ids: theirs, in order; None: they are not known beforehand, as of a stream.
            source: the training file, for messages.
            media: what the files of some of them hold.
        """
        self._ids, self._source, self._media = ids, source, media

    @cached_property
    def _samples(self) -> SampleAccount | None:
        return None if self._ids is None else account_of(self._ids(), self._media())

    def check_samples(self, checkpoint: Path) -> None:
        """Compares the training samples with those of a checkpoint, where both are known; for one rank alone.

        Raises:
            UserError: they are others, or in another order.
        """
        path = checkpoint / PROGRESS
        written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if (then := written.get(SAMPLES)) is not None and self._samples is not None:
            skipped = written["skipped"].values()
            refuse_other_samples(checkpoint, then, self._samples, source=self._source, skipped=skipped)

    def go_on_from(self, checkpoint: Path) -> None:
        """Takes over what stands in a checkpoint."""
        path = checkpoint / PROGRESS
        if not path.is_file():
            logger.warning("%s is missing: metrics.json and skipped.jsonl will cover the steps from here on", path)
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        self._earlier_seconds = float(found["seconds"])
        self._statistics.carry_over(found["skipped"], Counts(**found["counts"]))
        if self._validation is not None:
            self._validation.carry_over(found["validation_skipped"])
        if self._stream is not None:
            counts = self._statistics.earlier
            self._stream.resume(taken=counts.samples + counts.skipped, epoch_samples=found.get("epoch_samples"))

    def write(self, checkpoint: Path, device: torch.device, *, writes: bool) -> None:
        """Adds the sums over all ranks to a checkpoint; every rank must call it, one `writes`."""
        held_out = {} if self._validation is None else self._validation.skipped_on_all_ranks()
        content: dict[str, Any] = {
            "seconds": self.seconds,
            "counts": asdict(self._statistics.over_ranks(device)),
            "skipped": self._statistics.skipped_on_all_ranks(),
            "validation_skipped": held_out,
            "epoch_samples": None if self._stream is None else self._stream.epoch_samples,
        }
        if writes:
            content[SAMPLES] = None if self._samples is None else asdict(self._samples)
            (checkpoint / PROGRESS).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
