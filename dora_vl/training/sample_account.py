"""Which samples a run trains on, in which order: an epoch's order is one of places, so a resume needs the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_vl.errors import UserError
from dora_vl.run.run_folder import ADAPTER


@dataclass(frozen=True)
class SampleAccount:
    """How many samples, and a SHA-256 of their ids in order."""

    samples: int
    ids_sha256: str


def account_of(ids: Iterable[str]) -> SampleAccount:
    """The account of samples by their ids, which are read once."""
    digest, samples = hashlib.sha256(), 0
    for name in ids:
        digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
        samples += 1
    return SampleAccount(samples, digest.hexdigest())


def refuse_other_samples(checkpoint: Path, then: Mapping[str, Any], now: SampleAccount, source: str) -> None:
    """Compares the samples of a checkpoint's run with those of the run that would resume from it.

    Args:
        checkpoint: its folder.
        then: the fields of its account.
        now: of the run's samples.
        source: the training file, for the message.

    Raises:
        UserError: rows came or went, or stand in another order: samples would be lost and others come twice.
    """
    if then == vars(now):
        return
    found = (
        f"are {now.samples:,}" if now.samples != then["samples"] else "are as many with other ids, or in other order"
    )
    raise UserError(
        f"resume: {checkpoint} was written in training on {then['samples']:,} samples; those of {source} {found}. "
        "Put the data back as it was, or begin a new run from its weights with "
        f"--adapter.initial {checkpoint / ADAPTER}"
    )
