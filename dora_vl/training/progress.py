"""Counts of what batches held, was skipped or cut, and the validation loss; kept in checkpoints for a resumed run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from dora_vl.data.samplers import SeededSampler
from dora_vl.data.samples import BOOKKEEPING, IGNORED_LABEL, BadSampleCounts, BadSampleLedger
from dora_vl.errors import SettingError, UserError, short_names
from dora_vl.files import read_json
from dora_vl.run.folder import ADAPTER
from dora_vl.run.launch import gather_from_ranks, on_first_rank, rank_and_ranks
from dora_vl.training.training_data import TrainingData

PROGRESS = "progress.json"
SAMPLES = "training_samples"


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
        return Counts(*map(operator.sub, astuple(self), astuple(earlier)))

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(operator.add, astuple(self), astuple(other)))

    @property
    def padding_share(self) -> float:
        """Returns the share of all positions that held padding."""
        return self.padding_tokens / max(1, self.tokens + self.padding_tokens)


@dataclass
class BatchStatistics:
    """Takes the bookkeeping out of batches, which leaves the model's inputs; the ledger hears of skipped samples."""

    ledger: BadSampleLedger | None = None
    counts: Counts = field(default_factory=Counts)
    """Holds this rank's counts since the start of the process."""
    earlier: Counts = field(default_factory=Counts)
    """Holds all ranks' counts in the run that is resumed."""
    waited: float = 0.0
    """Sums the seconds that steps of this rank waited for their batches."""
    _noted: dict[str, list[Tensor]] = field(default_factory=dict)

    def carry_over(self, skipped: Mapping[str, str], counts: Counts | None = None) -> None:
        """Continues from the resumed run's sums over all ranks."""
        self.earlier = counts or Counts()
        if self.ledger is not None:
            self.ledger.carry_over(skipped)

    def take(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the batch's tensors, and adds its counts to `counts`."""
        padding, skipped = int(batch.get("padding_tokens", 0)), batch.get("skipped", ())
        samples = int(batch.get("samples", len(batch["input_ids"])))
        if self.ledger is not None:
            self.ledger.record(samples=samples, skipped=skipped)
        self.counts += Counts(
            samples=samples,
            tokens=batch["input_ids"].numel() - padding,
            padding_tokens=padding,
            labelled_tokens=int((batch["labels"] != IGNORED_LABEL).sum()),
            skipped=len(skipped),
            cut_samples=len(batch.get("cut", ())),
            shrunk_samples=len(batch.get("shrunk", ())),
        )
        return {name: value for name, value in batch.items() if name not in BOOKKEEPING}

    def note(self, output: Mapping[str, Tensor]) -> None:
        """Keeps the numbers that a loss gives beside itself, until they are logged."""
        for name, value in output.items():
            if name not in ("loss", "labelled_tokens"):
                self._noted.setdefault(name, []).append(value.detach())

    def noted(self) -> dict[str, float]:
        """Returns their means over micro-batches and ranks since the last call; every rank must call it."""
        values = [(name, torch.stack(kept).tolist()) for name, kept in self._noted.items()]
        self._noted = {}
        together: dict[str, list[float]] = {}
        for of_rank in gather_from_ranks(values):
            for name, numbers in of_rank:
                together.setdefault(name, []).extend(number for number in numbers if number == number)
        return {name: sum(numbers) / len(numbers) for name, numbers in together.items() if numbers}

    def judge(self, counts: Counts) -> None:
        """Ends the run if too many samples were unusable; `counts` are of all ranks, so that all end together."""
        if self.ledger is not None:
            self.ledger.judge(BadSampleCounts(seen=counts.samples + counts.skipped, bad=counts.skipped))

    def over_ranks(self, device: torch.device) -> Counts:
        """Returns the sums over all ranks, with those before a resume; every rank must call it."""
        if rank_and_ranks()[1] == 1:
            return self.earlier + self.counts
        sums = torch.tensor(astuple(self.counts), device=device)
        torch.distributed.all_reduce(sums)
        return self.earlier + Counts(*sums.tolist())

    def skipped_on_all_ranks(self) -> dict[str, str]:
        """Returns by id the reason of every skipped sample; every rank must call it."""
        own_reasons = {} if self.ledger is None else dict(self.ledger.reasons)
        return {name: reason for reasons in gather_from_ranks(own_reasons) for name, reason in reasons.items()}


class Progress:
    """Counts, skipped samples and seconds of a run, those before a resume included, and an account of its samples.

    For a stream it also counts the length of the epochs, where the Trainer skips what a resumed run has seen
    (`skips_seen`).
    """

    def __init__(
        self,
        statistics: BatchStatistics,
        validation: BatchStatistics | None,
        data: TrainingData,
        *,
        skips_seen: bool = True,
    ) -> None:
        self._statistics, self._validation, self._data = statistics, validation, data
        self._stream = data.stream if skips_seen else None
        self._order = data.sampler if isinstance(data.sampler, SeededSampler) else None
        self._earlier_seconds, self._started = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Returns the seconds that the run has trained."""
        return self._earlier_seconds + time.monotonic() - self._started

    @cached_property
    def _samples(self) -> dict[str, Any] | None:
        """Counts the training samples, hashes their ids in order, and notes what some files hold; None for a stream."""
        if self._data.ids is None:
            return None
        digest, samples = hashlib.sha256(), 0
        for name in self._data.ids():
            digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
            samples += 1
        return {"samples": samples, "ids_sha256": digest.hexdigest(), "media": dict(self._data.media())}

    def check_samples(self, checkpoint: Path) -> None:
        """Compares the training samples with those of a checkpoint, if both are known; on one rank only."""
        written, now = read_json(checkpoint / PROGRESS), self._samples
        if (then := written[SAMPLES]) is None or now is None:
            return
        replaced = [name for name, key in now["media"].items() if then["media"].get(name, "") not in ("", key)]
        # A file that a skipped sample's reason names may have been mended, or come.
        changed = [name for name in replaced if not any(name in reason for reason in written["skipped"].values())]
        if now["samples"] != then["samples"]:
            differ = f"are {now['samples']:,}"
        elif now["ids_sha256"] != then["ids_sha256"]:
            differ = "are as many with other ids, or in other order"
        elif changed:
            differ = f"have other content in {len(changed):,} of {len(now['media']):,} files looked at, "
            differ += short_names(changed)
        else:
            return
        raise SettingError(
            "resume",
            f": {checkpoint} was written in training on {then['samples']:,} samples; those of "
            f"{self._data.source} {differ}. Put the data back as it was, or begin a new run from its weights with "
            f"--adapter.initial {checkpoint / ADAPTER}",
        )

    def go_on_from(self, checkpoint: Path) -> None:
        """Takes over the counts, the time and the order of a checkpoint."""
        written = read_json(checkpoint / PROGRESS)
        self._earlier_seconds = float(written["seconds"])
        self._statistics.carry_over(written["skipped"], Counts(**written["counts"]))
        if self._validation is not None:
            self._validation.carry_over(written["validation_skipped"])
        if self._order is not None and written.get("order_micro_batch"):
            self._order.micro_batch = written["order_micro_batch"]
        if self._stream is not None:
            counts = self._statistics.earlier
            self._stream.resume(taken=counts.samples + counts.skipped, epoch_samples=written["epoch_samples"])

    def write(self, checkpoint: Path, device: torch.device, *, writes: bool) -> None:
        """Adds the sums over all ranks to a checkpoint; every rank must call it, one `writes`."""
        held_out = {} if self._validation is None else self._validation.skipped_on_all_ranks()
        content: dict[str, Any] = {
            "seconds": self.seconds,
            "counts": asdict(self._statistics.over_ranks(device)),
            "skipped": self._statistics.skipped_on_all_ranks(),
            "validation_skipped": held_out,
            "epoch_samples": None if self._stream is None else self._stream.epoch_samples,
            "order_micro_batch": 0 if self._order is None else self._order.micro_batch,
        }
        if writes:
            content[SAMPLES] = self._samples
            (checkpoint / PROGRESS).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


# The loss on validation data: the mean over its usable samples; the others are counted and named.


class ValidationLoss:
    """Sums of one evaluation, and the bad samples of all of them; messages call the data by its `source`.

    `together` samples make one batch of all ranks.
    """

    def __init__(self, data: TrainingData, *, source: str, together: int) -> None:
        samples: Any = data.validation
        on_first_rank(partial(check_validation, samples, data.collate, source=source))
        # Collators leave None out; left to accelerate, the last batches would repeat samples, which count twice.
        self.dataset = ConcatDataset([samples, cast(Any, [None] * (-len(samples) % together))])
        self._source = source
        ledger = BadSampleLedger(max_bad_share=1.0, total_samples=len(self.dataset), source=source)
        self.statistics = BatchStatistics(ledger)
        self._begin()

    def _begin(self) -> None:
        self._loss, self._samples, self._skipped = 0.0, 0, 0

    def take(self, batch: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Returns the batch's tensors, and how many of its samples are usable."""
        before = self.statistics.counts
        inputs = self.statistics.take(batch)
        counts = self.statistics.counts - before
        self._skipped += counts.skipped
        return inputs, counts.samples

    def add(self, loss: Tensor, samples: int) -> None:
        """Adds a batch's mean loss over its usable samples; a batch without any has no loss."""
        if samples:
            self._loss += float(loss) * samples
            self._samples += samples

    def finish(self, device: torch.device) -> dict[str, float | int]:
        """Returns the numbers of this evaluation over all ranks, and starts the next; every rank must call it."""
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
    """Keeps the generators of Python, numpy and torch as they are, whatever is drawn inside the block."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


def validation_owed(state: TrainerState, arguments: TrainingArguments) -> bool:
    """Returns True where the state ends an epoch or the run and its log lacks the validation that follows there.

    A run that is stopped at an epoch's last step saves and ends without it: the launcher may not wait so long.
    """
    ends = float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps
    done = any("eval_loss" in line and line["step"] == state.global_step for line in state.log_history)
    return arguments.eval_strategy == IntervalStrategy.EPOCH and state.global_step > 0 and ends and not done


def check_validation(samples: Any, collate: Callable[[list[Any]], Mapping[str, Any]], *, source: str) -> None:
    """Reads validation items up to the first usable sample, so that none at all shows before training."""
    first: tuple[str, str] | None = None
    for index in range(len(samples)):
        batch = collate([samples[index]])
        if batch["samples"]:
            return
        first = first or next(iter(batch["skipped"]), None)
    raise UserError(nothing_usable(source, first))


def nothing_usable(source: str, example: tuple[str, str] | None) -> str:
    """Returns the error message for data without any usable sample."""
    because = "" if example is None else f"; for example {example[0]}: {example[1]}"
    return f"{source}: not one sample can be used{because}. Repair the data, or correct the folder that is named for it"
