"""One process writes to a folder at a time; a second one ends with a line, a dead one's lock is taken over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import SoftFileLock, Timeout

from dora_vl.errors import UserError

LOCK = ".writing.lock"


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Holds a lock file with this process's number and machine in a folder, which is made if it is not there.

    Unlike a lock of the operating system it holds on network folders too. The lock of a process that is gone is taken
    over on its own machine. A folder that was made for it and stays empty goes again.

    Raises:
        UserError: another process holds it, or the folder cannot be written to.
    """
    path, made = folder / LOCK, not folder.exists()
    lock = SoftFileLock(path, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{folder}: {_owner(path)} writes to it; wait for its end, stop it, or name another folder (if it runs no "
            f"more, remove {path})"
        ) from error
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror or error}; name another folder") from error
    try:
        yield
    finally:
        lock.release()
        if made:
            with contextlib.suppress(OSError):  # not empty: what it was made for is in it
                folder.rmdir()


def _owner(path: Path) -> str:
    try:
        number, machine = path.read_text(encoding="utf-8").splitlines()[:2]
    except (OSError, ValueError):
        return "another process"
    return f"process {number} on {machine}"
