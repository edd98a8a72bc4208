"""Putting a finished folder where another may be: only one that this package could have written is replaced."""

from __future__ import annotations

import shutil
from collections.abc import Collection
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
