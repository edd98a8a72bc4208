"""Sets of the hub: fetched whole by `datasets` into its own cache and read there as Arrow files, or as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_vl.errors import UserError, one_line

if TYPE_CHECKING:
    import datasets


def hub_files(name: str) -> tuple[Path, ...]:
    """The Arrow files of a set's split, fetched where they are not there yet.

    Args:
        name: `OWNER/NAME` or `OWNER/NAME:SPLIT`; the split is `train` where none is named.

    Raises:
        UserError: whatever `datasets` says against it.
    """
    found: Any = _opened(name, streaming=False)
    return tuple(Path(one["filename"]) for one in found.cache_files)


def hub_stream(name: str) -> datasets.IterableDataset:
    """A set's split, to be fetched while it is read; pictures stay bytes or paths. See `hub_files`.

    Raises:
        UserError: whatever `datasets` says against it.
    """
    return _opened(name, streaming=True).decode(False)


def hub_rows(name: str, stream: datasets.IterableDataset) -> Iterator[dict[str, object]]:
    """Yields the rows of a stream.

    Raises:
        UserError: whatever `datasets` says against it, such as a connection that breaks.
    """
    try:
        yield from stream
    except Exception as error:
        raise _unreadable(name, error) from error


def _opened(name: str, *, streaming: bool) -> Any:
    import datasets

    repository, _, split = name.partition(":")
    try:
        return datasets.load_dataset(repository, split=split or "train", streaming=streaming)
    except Exception as error:  # its loaders raise of every kind
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> UserError:
    return UserError(f"hub:{name}: cannot be read by `datasets`: {one_line(str(error), 300)}")
