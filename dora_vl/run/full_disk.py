"""A disk that takes no more while something is written: one line that says why, and what is whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from dora_vl.errors import UNWRITABLE, UserError

TOO_LITTLE_BYTES = 1 << 20
"""With less room than this a failed write is the disk's fault, whatever the library that wrote says of it."""


@contextlib.contextmanager
def full_disk_reported(folder: Path, what: str, kept: Callable[[], str | None]) -> Iterator[None]:
    """Turns whatever a writing library raises there into one line: a disk that is full, read-only, or limits a file.

    torch.save raises a RuntimeError without the word, safetensors an error of its own class with it.

    Args:
        folder: that is written to, or its nearest parent that is there.
        what: is being written.
        kept: names the last whole checkpoint; asked when it is needed.

    Raises:
        UserError: the disk takes no more.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        place = next(one for one in (folder, *folder.resolve().parents) if one.exists())
        free = shutil.disk_usage(place).free
        number = _number_of(error) or (errno.ENOSPC if free < TOO_LITTLE_BYTES else None)
        if number is None:
            raise
        cause, remedy = UNWRITABLE[number]
        last = kept()
        whole = (
            f"{last} is the last whole checkpoint: {remedy}, then --resume last" if last else f"{remedy}, start again"
        )
        raise UserError(f"{folder}: {cause} ({free:,} bytes are free), {what} could not be written; {whole}") from error


def _number_of(error: Exception) -> int | None:
    """Which of the system's reasons it was, by its number or, from libraries with errors of their own, by its words."""
    stated = getattr(error, "errno", None)
    return next((number for number in UNWRITABLE if number == stated or os.strerror(number) in str(error)), None)
