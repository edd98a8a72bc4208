"""Opens a file that a person names, if it is one: no pipe, socket or device, which would hang or never end."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class NoRegularFile(OSError):
    """What is at a path is something else; the message says what."""


def open_regular(path: Path) -> BinaryIO:
    """The file's bytes; never waits for another program to open the other end.

    Raises:
        FileNotFoundError: nothing is there.
        NoRegularFile: something is, and it is no file.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        refuse_no_file(os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


HASHED_BYTES = 1 << 16
"""Of a file's beginning and end: with its size enough to tell another picture or video."""


def content_key(path: Path) -> str:
    """A hash that tells a picture or a video from others, without reading all of a large one.

    Raises:
        OSError: as `open_regular`.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        beginning = file.read(HASHED_BYTES)
        file.seek(max(0, size - HASHED_BYTES))
        return hashlib.sha256(b"%d " % size + beginning + file.read(HASHED_BYTES)).hexdigest()


def refuse_no_file(mode: int) -> None:
    """Raises `NoRegularFile` for the mode of anything but a file."""
    if not stat.S_ISREG(mode):
        raise NoRegularFile(f"it is {KINDS.get(stat.S_IFMT(mode), 'something else')}, no file")
