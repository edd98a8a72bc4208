"""Which files a run trains on, and how often each; only the standard library, since settings are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainFile:
    """One of several training files."""

    path: str
    """A file, a folder of shards, or hub:OWNER/NAME."""
    weight: float = 1.0
    """How often an epoch sees each of its samples; 0.5: half of them, chosen by the seed; 2: each twice."""


def train_files(given: str | Sequence[str | TrainFile]) -> tuple[TrainFile, ...]:
    """What `data.train` names, one path or several files, as a list."""
    listed = (given,) if isinstance(given, str) else given
    return tuple(TrainFile(path=one) if isinstance(one, str) else one for one in listed)


def train_name(given: str | Sequence[str | TrainFile]) -> str:
    """The files' names, for messages."""
    return ", ".join(file.path for file in train_files(given))
