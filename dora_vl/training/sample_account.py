"""Which samples a run trains on, in which order: an epoch's order is one of places, so a resume needs the same."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dora_vl.errors import UserError, shown_names
from dora_vl.run.run_folder import ADAPTER


@dataclass(frozen=True)
class SampleAccount:
    """How many samples, a SHA-256 of their ids in order, and what the files of some of them hold (`content_key`)."""

    samples: int
    ids_sha256: str
    media: Mapping[str, str] = field(default_factory=dict)


def account_of(ids: Iterable[str], media: Mapping[str, str] | None = None) -> SampleAccount:
    """The account of samples by their ids, which are read once."""
    digest, samples = hashlib.sha256(), 0
    for name in ids:
        digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
        samples += 1
    return SampleAccount(samples, digest.hexdigest(), media or {})


def refuse_other_samples(
    checkpoint: Path, then: Mapping[str, Any], now: SampleAccount, source: str, skipped: Collection[str] = ()
) -> None:
    """Compares the samples of a checkpoint's run with those of the run that would resume from it.

    Args:
        checkpoint: its folder.
        then: the fields of its account.
        now: of the run's samples.
        source: the training file, for the message.
        skipped: why samples of that run could not be used; a file that they name may have been mended, or come.

    Raises:
        UserError: rows came or went, or stand in another order: samples would be lost and others come twice. Or a
            picture or video has been replaced under its name.
    """
    others = (name for name, key in now.media.items() if then["media"].get(name, "") not in ("", key))
    changed = [name for name in others if not any(name in reason for reason in skipped)]
    if now.samples != then["samples"]:
        found = f"are {now.samples:,}"
    elif now.ids_sha256 != then["ids_sha256"]:
        found = "are as many with other ids, or in other order"
    elif not changed:
        return
    else:
        found = f"have other content in {len(changed):,} of {len(now.media):,} files looked at, {shown_names(changed)}"
    raise UserError(
        f"resume: {checkpoint} was written in training on {then['samples']:,} samples; those of {source} {found}. "
        "Put the data back as it was, or begin a new run from its weights with "
        f"--adapter.initial {checkpoint / ADAPTER}"
    )
