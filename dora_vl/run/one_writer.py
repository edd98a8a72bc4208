"""One process writes to a folder at a time; a second one ends with a line, a dead one's lock is taken over."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import SoftFileLock, Timeout

from dora_vl.errors import UserError

LOCK = ".writing.lock"
JOB = ".writing.job"
"""Beside the lock, of a process in a Slurm job: which job, its how manieth start, and whose lock that is."""


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Holds a lock file with this process's number and machine in a folder, which is made if it is not there.

    Unlike a lock of the operating system it holds on network folders too. The lock of a process that is gone is taken
    over on its own machine, and on any machine by a later start of its own Slurm job. A folder that was made for it
    and stays empty goes again.

    Raises:
        UserError: another process holds it, or the folder cannot be written to.
    """
    path, made = folder / LOCK, not folder.exists()
    lock = SoftFileLock(path, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _is_of_an_earlier_start(folder):
            path.unlink(missing_ok=True)
        lock.acquire()
        _note_job(folder)
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
        (folder / JOB).unlink(missing_ok=True)
        lock.release()
        if made:
            with contextlib.suppress(OSError):  # not empty: what it was made for is in it
                folder.rmdir()


def _start_of_job() -> tuple[str, int] | None:
    """The Slurm job that this process belongs to, and how often it was started again; None outside of any."""
    job, again = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "")
    return (job, int(again) if again.isdecimal() else 0) if job else None


def _note_job(folder: Path) -> None:
    """Says of the lock that is held now which job's it is."""
    found = _start_of_job()
    if found is None:
        (folder / JOB).unlink(missing_ok=True)  # of a process that was killed
        return
    noted = {"job": found[0], "start": found[1], "lock": (folder / LOCK).read_text(encoding="utf-8")}
    (folder / JOB).write_text(json.dumps(noted) + "\n", encoding="utf-8")


def _is_of_an_earlier_start(folder: Path) -> bool:
    """Whether the lock is of this job before it was requeued: Slurm has ended that start, on whatever machine."""
    found = _start_of_job()
    try:
        noted = json.loads((folder / JOB).read_text(encoding="utf-8"))
        same_lock = noted["lock"] == (folder / LOCK).read_text(encoding="utf-8")
        return found is not None and same_lock and noted["job"] == found[0] and noted["start"] < found[1]
    except (OSError, ValueError, KeyError, TypeError):  # none, or half a one
        return False


def _owner(path: Path) -> str:
    try:
        number, machine = path.read_text(encoding="utf-8").splitlines()[:2]
    except (OSError, ValueError):
        return "another process"
    return f"process {number} on {machine}"
