"""Folders that appear whole or not at all: what may be replaced, and checkpoints to resume from, found again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from os import getpid
from os.path import lexists
from pathlib import Path

from dora_vl.errors import UserError


def refuse_to_replace(target: Path, written: Collection[str]) -> None:
    """Raises a `UserError` unless nothing is there, or a folder that holds no file but those named in `written`."""
    if not lexists(target):
        return
    if not target.is_dir():
        raise UserError(f"{target} is there already and is no folder; name another one, or move it away")
    foreign = sorted(path.name for path in target.iterdir() if path.name not in written or path.is_dir())
    if foreign:
        raise UserError(
            f"{target} is there already and holds {foreign[0]} ({len(foreign)} files or folders that were not written "
            "by this), which replacing it would delete; name another folder, or move it away"
        )


def replace_folder(staging: Path, target: Path) -> None:
    """Renames a finished folder into place; an older one steps aside first and is removed last, whatever it holds.

    Ask `refuse_to_replace` before, where a person named the folder.
    """
    if not target.exists():
        staging.rename(target)
        return
    previous = target.with_name(f".{target.name}.previous-{getpid()}")
    target.rename(previous)
    staging.rename(target)
    if previous.is_symlink():  # the link was the folder's name; what it points to is not ours to remove
        previous.unlink()
    else:
        shutil.rmtree(previous)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`, which takes its name when the block ends well, and goes otherwise.

    Ask `refuse_to_replace` before.
    """
    staging = target.with_name(f".{target.name}.writing-{getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


_NAME = re.compile(r"checkpoint-(\d+)")
WRITING = ".checkpoints-being-written"
REMOVING = ".removing"
SUPERSEDED = "superseded-"
STATE_FILE = "trainer_state.json"
LAST = "last"
"""What `resume` calls the newest whole checkpoint."""


def step_of(checkpoint: Path) -> int:
    """The optimizer step a checkpoint folder is named by."""
    found = _NAME.fullmatch(checkpoint.name)
    if found is None:
        raise UserError(f"{checkpoint} is not a checkpoint folder (checkpoint-<step>)")
    return int(found[1])


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first. A folder gets its name only when everything is in it."""
    if not run_folder.is_dir():
        return []
    named = [path for path in run_folder.iterdir() if _NAME.fullmatch(path.name) and (path / STATE_FILE).is_file()]
    return sorted(named, key=step_of)


def checkpoint_to_resume(resume: str | None, run_folder: Path) -> Path | None:
    """The folder that `resume` means: null, `last`, or a path.

    Raises:
        UserError: there is none.
    """
    if resume is None:
        return None
    if resume != LAST:
        path = Path(resume)
        if not (path / STATE_FILE).is_file():
            raise UserError(f"resume: {path} is not a complete checkpoint (no {STATE_FILE} in it)")
        step_of(path)
        return path
    found = complete_checkpoints(run_folder)
    if not found:
        raise UserError(f"resume: no complete checkpoint in {run_folder}; start without resume")
    return found[-1]


def set_later_aside(run_folder: Path, checkpoint: Path) -> list[tuple[Path, Path]]:
    """Renames the whole checkpoints that a run from `checkpoint` leaves behind, so that they no longer count as its.

    Those of later steps; all, where `checkpoint` is in another folder. Returns each old name with the new one.
    """
    found = complete_checkpoints(run_folder)
    since = next((step_of(one) for one in found if one.samefile(checkpoint)), -1)
    renamed = []
    for later in [one for one in found if step_of(one) > since]:
        renamed.append((later, later.rename(_free_name(later.with_name(f"{SUPERSEDED}{later.name}")))))
    return renamed


def _free_name(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(name for name in chain([path], numbered) if not lexists(name))


def drop_old_checkpoints(run_folder: Path, *, keep: int | None, also_keep: Iterable[Path] = ()) -> None:
    """Removes all but the `keep` newest checkpoints (None keeps all), and those named."""
    if keep is None or keep <= 0:
        return
    spared = {path.resolve() for path in also_keep}
    for old in complete_checkpoints(run_folder)[:-keep]:
        if old.resolve() not in spared:
            going = old.with_name(f".{old.name}{REMOVING}")  # a half of it shall not count as a checkpoint
            old.rename(going)
            shutil.rmtree(going)


def drop_leftovers(run_folder: Path) -> None:
    """Removes what a crash left of half-written and half-removed checkpoints and adapters."""
    patterns = (f".checkpoint-*{REMOVING}", ".checkpoint-*.previous-*", ".adapter.writing-*", ".adapter.previous-*")
    for path in [run_folder / WRITING, *(path for pattern in patterns for path in run_folder.glob(pattern))]:
        shutil.rmtree(path, ignore_errors=True)
