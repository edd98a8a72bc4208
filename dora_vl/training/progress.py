"""Counts of what batches held, was skipped or cut; kept in checkpoints, so that a resumed run ends with all sums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import operator
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TextIO, cast, runtime_checkable

import torch

from dora_vl.data.samples import BOOKKEEPING, IGNORED_LABEL, BadSampleCounts, BadSampleLedger
from dora_vl.errors import UserError, shown_names
from dora_vl.run.folder import ADAPTER
from dora_vl.run.launch import rank_and_ranks

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

    def judge(self, counts: Counts) -> None:
        """Ends the run where too many samples were unusable; `counts` are of all ranks, so that all end together.

        Raises:
            UserError: more than `data.max_bad_share`.
        """
        if self.ledger is not None:
            self.ledger.judge(BadSampleCounts(seen=counts.samples + counts.skipped, bad=counts.skipped))

    def over_ranks(self, device: torch.device) -> Counts:
        """The sums over all ranks, with those before a resume; every rank must call it."""
        if rank_and_ranks()[1] == 1:
            return self.earlier + self.counts
        sums = torch.tensor(astuple(self.counts), device=device)
        torch.distributed.all_reduce(sums)
        return self.earlier + Counts(*sums.tolist())

    def skipped_on_all_ranks(self) -> dict[str, str]:
        """Reason of every skipped sample, by id; every rank must call it."""
        mine = {} if self.ledger is None else dict(self.ledger.reasons)
        _, ranks = rank_and_ranks()
        if ranks == 1:
            return mine
        everyone: list[dict[str, str]] = [{} for _ in range(ranks)]
        torch.distributed.all_gather_object(everyone, mine)
        return {name: reason for of_rank in everyone for name, reason in of_rank.items()}


@runtime_checkable
class EndlessOrder(Protocol):
    """A stream of samples whose epochs the Trainer does not see (`data.stream.StreamOrder`)."""

    epoch_samples: int | None

    def resume(self, *, taken: int, epoch_samples: int | None) -> None:
        """Leaves whole epochs unread that `taken` samples have gone through."""
        ...


class Progress:
    """Counts, skipped samples and seconds of a run, those before a resume included."""

    def __init__(self, statistics: BatchStatistics, validation: BatchStatistics | None) -> None:
        self._statistics, self._validation = statistics, validation
        self._stream: EndlessOrder | None = None
        self._ids: Callable[[], Iterable[str]] | None = None
        self._media: Callable[[], Mapping[str, str]] = dict
        self._source = ""
        self._earlier_seconds, self._started = 0.0, time.monotonic()

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
        """Keeps an account of the training samples too: their ids in order, and what the files of some of them hold.

        `ids` is None where they are not known beforehand, as of a stream; `source` is the training file, for messages.
        """
        self._ids, self._source, self._media = ids, source, media

    @cached_property
    def _samples(self) -> dict[str, Any] | None:
        return None if self._ids is None else account_of(self._ids(), self._media())

    def check_samples(self, checkpoint: Path) -> None:
        """Compares the training samples with those of a checkpoint, where both are known; for one rank alone.

        Raises:
            UserError: rows came or went, or stand in another order: samples would be lost and others come twice. Or a
                picture or video has been replaced under its name.
        """
        written, now = _read(checkpoint), self._samples
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
            differ += shown_names(changed)
        else:
            return
        raise UserError(
            f"resume: {checkpoint} was written in training on {then['samples']:,} samples; those of {self._source} "
            f"{differ}. Put the data back as it was, or begin a new run from its weights with "
            f"--adapter.initial {checkpoint / ADAPTER}"
        )

    def go_on_from(self, checkpoint: Path) -> None:
        """Takes over what stands in a checkpoint."""
        written = _read(checkpoint)
        self._earlier_seconds = float(written["seconds"])
        self._statistics.carry_over(written["skipped"], Counts(**written["counts"]))
        if self._validation is not None:
            self._validation.carry_over(written["validation_skipped"])
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
        }
        if writes:
            content[SAMPLES] = self._samples
            (checkpoint / PROGRESS).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))


def account_of(ids: Iterable[str], media: Mapping[str, str] | None = None) -> dict[str, Any]:
    """How many samples, a hash of their ids in order, and what the files of some of them hold (`content_key`)."""
    digest, samples = hashlib.sha256(), 0
    for name in ids:
        digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
        samples += 1
    return {"samples": samples, "ids_sha256": digest.hexdigest(), "media": dict(media or {})}


class LinesAbove:
    """Stands for a terminal's stream above a live view: whole lines are handed on, all else is the stream's own.

    A process forked from this one, such as a data worker, has no view and writes to the stream itself. A line that was
    drawn over (`\\r`, as progress bars do) is handed on as it was last.
    """

    def __init__(self, stream: TextIO, show: Callable[[str], None]) -> None:
        self._stream, self._show = stream, show
        self._process = os.getpid()
        self._begun = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Shows each line that is whole now."""
        if os.getpid() != self._process:
            return self._stream.write(text)
        *whole, begun = (self._begun + text).split("\n")
        self._begun = begun[begun.rfind("\r") + 1 :]
        for line in whole:
            self._show(line.rstrip("\r").rpartition("\r")[2])
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Writes one after another."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """A line that has no end yet waits for it."""
        if os.getpid() != self._process:
            self._stream.flush()

    def finish(self) -> None:
        """Shows a line that never got its end."""
        if self._begun:
            self._show(self._begun)
            self._begun = ""


@contextlib.contextmanager
def lines_above(show: Callable[[str], None]) -> Iterator[None]:
    """What is written to stdout and stderr where they are terminals, by loggers too, goes to `show`, line by line."""
    out, err = sys.stdout, sys.stderr
    above = {id(stream): LinesAbove(stream, show) for stream in (out, err) if stream.isatty()}
    loggers = [logging.root, *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
    handlers = [
        (handler, handler.stream)
        for logger in loggers
        for handler in logger.handlers  # they keep the stream they were made with; some ask for sys.stderr each time
        if isinstance(handler, logging.StreamHandler) and "stream" in vars(handler) and id(handler.stream) in above
    ]
    for handler, stream in handlers:
        handler.setStream(above[id(stream)])
    sys.stdout, sys.stderr = (cast(TextIO, above.get(id(stream), stream)) for stream in (out, err))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
        for handler, stream in handlers:
            handler.setStream(stream)
        for stream in above.values():
            stream.finish()
