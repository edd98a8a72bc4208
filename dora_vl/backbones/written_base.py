"""A base that is written from settings: whole or not there, and it says which settings those were."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dora_vl.errors import UserError

SETTINGS_FILE = "made_from.json"


@contextlib.contextmanager
def written_base(folder: Path, spec: Any) -> Iterator[Path]:
    """Yields a folder to write to, which gets its name, with the settings in it, when the block ends well.

    Args:
        spec: the dataclass of settings.

    Raises:
        UserError: the folder exists.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it or write to another place")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    (unfinished / SETTINGS_FILE).write_text(json.dumps(_digests(spec), indent=2) + "\n", encoding="utf-8")
    unfinished.rename(folder)


def check_made_from(folder: Path, spec: Any) -> None:
    """Refuses a base that was written with other settings; one that does not say is taken as it is.

    Raises:
        UserError: a setting differs.
    """
    file = folder / SETTINGS_FILE
    made = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, digest in _digests(spec).items():
        if made.get(name, digest) != digest:
            raise UserError(
                f"{folder} was made with another {name} than the run says ({getattr(spec, name)!r}); remove the folder "
                "to have it made anew, or name another model.base"
            )


def _digests(spec: Any) -> dict[str, str]:
    """Each setting's digest: a base that is passed on says nothing of the paths on the machine that made it."""
    settings = dataclasses.asdict(spec).items()
    return {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in settings}
