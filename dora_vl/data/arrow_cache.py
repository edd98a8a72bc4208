"""A data file as Arrow columns on disk: converted once, renamed when whole, memory-mapped by every process."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import datasets
import datasets.config
from filelock import FileLock

from dora_vl.errors import UserError

_log = logging.getLogger(__name__)


def cached_table(
    path: Path,
    *,
    kind: str,
    write: Callable[[Path, BinaryIO], int],
    cache_folder: Path | None,
    files: Sequence[Path] | None = None,
) -> datasets.Dataset:
    """The rows of a file, from the cache where it is there.

    Args:
        path: the data file, or what stands for several.
        kind: names the columns and their version; with each file's path, size and modification time it is the cache's
            key (a content hash would read a gigabyte at each start).
        files: the files themselves; None: `path`.
        write: writes an Arrow stream of the file's rows and returns their number.
        cache_folder: where tables stay; default `dora_vl` in the cache folder of `datasets`.
    """
    folder = cache_folder or Path(datasets.config.HF_DATASETS_CACHE) / "dora_vl"
    sources = (path,) if files is None else tuple(files)
    table = folder / f"{path.stem}-{_fingerprint(sources, kind)}.arrow"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{table}.lock"):  # the ranks of a machine: one converts, the others wait for it
            if not table.exists():
                _convert(path, sources, table, kind=kind, write=write)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot keep the converted {path.name} there ({error}); set HF_DATASETS_CACHE"
        ) from error
    return datasets.Dataset.from_file(str(table))


def _fingerprint(files: Sequence[Path], kind: str) -> str:
    key = kind
    for file in files:
        stat = file.stat()
        key += f"\0{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _convert(
    path: Path, files: Sequence[Path], table: Path, *, kind: str, write: Callable[[Path, BinaryIO], int]
) -> None:
    """Writes under another name first: what a killed process leaves is never taken for whole."""
    before, started = _fingerprint(files, kind), time.perf_counter()
    partial = table.with_suffix(".partial")  # the lock is held: a leftover of this name is nobody's, overwrite it
    try:
        with partial.open("wb") as file:
            rows = write(path, file)
            file.flush()
            os.fsync(file.fileno())
        if _fingerprint(files, kind) != before:
            raise UserError(f"{path}: changed while it was read; start again when it is complete")
        partial.replace(table)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    seconds = time.perf_counter() - started
    _log.info(
        "%s: %d records converted in %.1f s (%.0f a second), kept as %s", path, rows, seconds, rows / seconds, table
    )
