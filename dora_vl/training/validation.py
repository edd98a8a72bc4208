"""The loss on validation data: the mean over its usable samples; the others are counted and named."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from dora_vl.data.samples import BadSampleLedger
from dora_vl.errors import UserError
from dora_vl.training.progress import BatchStatistics


class WholeSteps(Dataset[Any]):
    """A data set filled up with None, which collators leave out, until all ranks have equally many whole batches.

    Left to accelerate, the ranks' last batches would repeat the set's first samples, which would count twice.
    """

    def __init__(self, samples: Any, *, step_samples: int) -> None:
        self._samples = samples
        self._length = -(-len(samples) // step_samples) * step_samples

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._samples[index] if index < len(self._samples) else None


class ValidationLoss:
    """Sums of one evaluation, and the bad samples of all of them; messages call the data by its `source`."""

    def __init__(self, *, source: str, samples: int) -> None:
        self._source = source
        ledger = BadSampleLedger(max_bad_share=1.0, total_samples=samples, source=source)
        self.statistics = BatchStatistics(ledger)
        self._begin()

    def _begin(self) -> None:
        self._loss, self._samples, self._skipped = 0.0, 0, 0

    def take(self, batch: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The batch's tensors, and how many of its samples are usable."""
        before = self.statistics.counts
        inputs = self.statistics.take(batch)
        counts = self.statistics.counts - before
        self._skipped += counts.skipped
        return inputs, counts.samples

    def add(self, loss: Tensor, samples: int) -> None:
        """A batch's mean loss over so many samples; one without any has no loss to speak of."""
        if samples:
            self._loss += float(loss) * samples
            self._samples += samples

    def finish(self, device: torch.device) -> dict[str, float | int]:
        """The numbers of this evaluation over all ranks, and starts the next; every rank must call it.

        Raises:
            UserError: not one sample was usable.
        """
        sums = torch.tensor([self._loss, self._samples, self._skipped], dtype=torch.float64)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            sums = sums.to(device)
            torch.distributed.all_reduce(sums)
        self._begin()
        loss, samples, skips = sums.tolist()
        if not samples:
            skipped = self.statistics.skipped_on_all_ranks()
            raise UserError(nothing_usable(self._source, next(iter(skipped.items()), None)))
        return {"eval_loss": loss / samples, "eval_samples": int(samples), "eval_skipped": int(skips)}


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the generators of Python, numpy and torch go on as if it had not been."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


def validation_owed(state: TrainerState, arguments: TrainingArguments) -> bool:
    """Whether the state ends an epoch, or the run, and the validation that follows there is not in its log.

    A run that is stopped at an epoch's last step saves and ends without it: the launcher may not wait so long.
    """
    ends = float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps
    done = any("eval_loss" in line and line["step"] == state.global_step for line in state.log_history)
    return arguments.eval_strategy == IntervalStrategy.EPOCH and state.global_step > 0 and ends and not done


def check_validation(samples: Any, collate: Callable[[list[Any]], Mapping[str, Any]], *, source: str) -> None:
    """Reads validation items up to the first usable sample, so that none at all shows before training.

    Raises:
        UserError: there is none.
    """
    first: tuple[str, str] | None = None
    for index in range(len(samples)):
        batch = collate([samples[index]])
        if batch["samples"]:
            return
        first = first or next(iter(batch["skipped"]), None)
    raise UserError(nothing_usable(source, first))


def nothing_usable(source: str, example: tuple[str, str] | None) -> str:
    """What is said of data without any usable sample."""
    because = "" if example is None else f"; for example {example[0]}: {example[1]}"
    return f"{source}: not one sample can be used{because}. Repair the data, or correct the folder that is named for it"
