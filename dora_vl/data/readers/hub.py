"""Sets of the hub, fetched whole by `datasets` into its own cache and read there as Arrow files."""

from __future__ import annotations

from pathlib import Path

from dora_vl.errors import UserError, one_line


def hub_files(name: str) -> tuple[Path, ...]:
    """The Arrow files of a set's split, fetched where they are not there yet.

    Args:
        name: `OWNER/NAME` or `OWNER/NAME:SPLIT`; the split is `train` where none is named.

    Raises:
        UserError: whatever `datasets` says against it.
    """
    import datasets

    repository, _, split = name.partition(":")
    try:
        found = datasets.load_dataset(repository, split=split or "train")
    except Exception as error:  # its loaders raise of every kind
        raise UserError(f"hub:{name}: cannot be read by `datasets`: {one_line(str(error), 300)}") from error
    return tuple(Path(one["filename"]) for one in found.cache_files)  # pyright: ignore[reportAttributeAccessIssue]
