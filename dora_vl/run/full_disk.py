"""A disk that is full while something is written: one line that says so, and what is whole."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from dora_vl.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
TOO_LITTLE_BYTES = 1 << 20
"""With less room than this a failed write is the disk's fault, whatever the library that wrote says of it."""


@contextlib.contextmanager
def full_disk_reported(folder: Path, what: str, kept: Callable[[], str | None]) -> Iterator[None]:
    """Turns whatever a writing library raises on a full disk into one line.

    torch.save raises a RuntimeError without the word, safetensors an error of its own class with it.

    Args:
        folder: that is written to, or its nearest parent that is there.
        what: is being written.
        kept: names the last whole checkpoint; asked when it is needed.

    Raises:
        UserError: the disk is full.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        place = next(one for one in (folder, *folder.resolve().parents) if one.exists())
        free = shutil.disk_usage(place).free
        if not (_says_so(error) or free < TOO_LITTLE_BYTES):
            raise
        last = kept()
        whole = (
            f"{last} is the last whole checkpoint: make room, then --resume last" if last else "make room, start again"
        )
        raise UserError(
            f"{folder}: the disk is full ({free:,} bytes are free), {what} could not be written; {whole}"
        ) from error


def _says_so(error: Exception) -> bool:
    return (isinstance(error, OSError) and error.errno in NO_ROOM) or "No space left on device" in str(error)
