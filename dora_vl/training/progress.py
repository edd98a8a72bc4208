"""What a run has read and skipped so far, kept in its checkpoints: a resumed run ends with a whole run's sums."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from dora_vl.training.batch_statistics import BatchStatistics, Counts

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"


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
        self._earlier_seconds = 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the run has trained."""
        return self._earlier_seconds + time.monotonic() - self._started

    def follow(self, stream: EndlessOrder) -> None:
        """Keeps the length of a stream's epochs too; the Trainer must skip what a resumed run has seen of it."""
        self._stream = stream

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
        content = {
            "seconds": self.seconds,
            "counts": asdict(self._statistics.over_ranks(device)),
            "skipped": self._statistics.skipped_on_all_ranks(),
            "validation_skipped": held_out,
            "epoch_samples": None if self._stream is None else self._stream.epoch_samples,
        }
        if writes:
            (checkpoint / PROGRESS).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
