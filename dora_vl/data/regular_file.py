"""Opens a file that a person names, if it is one: no pipe, socket or device, which would hang or never end."""

from __future__ import annotations

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


def refuse_no_file(mode: int) -> None:
    """Raises `NoRegularFile` for the mode of anything but a file."""
    if not stat.S_ISREG(mode):
        raise NoRegularFile(f"it is {KINDS.get(stat.S_IFMT(mode), 'something else')}, no file")
