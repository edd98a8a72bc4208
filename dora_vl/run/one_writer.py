"""One process writes to a folder at a time: a lock of the operating system, which ends with its process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from dora_vl.errors import UserError

logger = logging.getLogger(__name__)

LOCK = ".writing.lock"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What file systems say that have no locks, such as a Lustre that is mounted without `flock`."""


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Holds a lock in a folder, which is made if it is not there, and goes again if it stays empty.

    The lock is fcntl's, not a file that is there: the kernel lets it go with the process, forked data workers do not
    inherit it, and network file systems keep it on the server.

    Raises:
        UserError: another process holds it, or the folder cannot be written to.
    """
    path, made = folder / LOCK, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())  # for whom it keeps out
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror or error}; name another folder") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):  # not empty: what it was made for is in it
                folder.rmdir()


def _locked(path: Path) -> int:
    """A descriptor of the file of this name, with its lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                raise UserError(
                    f"{path.parent}: {owner} writes to it; wait for its end, stop it, or name another folder"
                ) from error
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("%s: no locks on this file system; see that nothing else writes there", path.parent)
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
        os.close(descriptor)  # the one before has just removed it, so the next has made, or will make, another
