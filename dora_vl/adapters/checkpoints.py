"""Checkpoints to resume from: written beside, renamed when whole, found again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from dora_vl.errors import UserError

_NAME = re.compile(r"checkpoint-(\d+)")
WRITING = ".checkpoints-being-written"
STATE_FILE = "trainer_state.json"


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
    if resume != "last":
        path = Path(resume)
        if not (path / STATE_FILE).is_file():
            raise UserError(f"resume: {path} is not a complete checkpoint (no {STATE_FILE} in it)")
        step_of(path)
        return path
    found = complete_checkpoints(run_folder)
    if not found:
        raise UserError(f"resume: no complete checkpoint in {run_folder}; start without resume")
    return found[-1]


def drop_old_checkpoints(run_folder: Path, *, keep: int | None, also_keep: Iterable[Path] = ()) -> None:
    """Removes all but the `keep` newest checkpoints (None keeps all), and those named."""
    if keep is None or keep <= 0:
        return
    spared = {path.resolve() for path in also_keep}
    for old in complete_checkpoints(run_folder)[:-keep]:
        if old.resolve() not in spared:
            shutil.rmtree(old)
