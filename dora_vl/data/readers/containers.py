"""Rows of a data file or folder, one after another, whatever holds them; nothing but the current rows is in memory.

JSON and JSON lines (the first character decides), CSV, TSV, Parquet, Arrow (files, and folders that `datasets` saved),
WebDataset archives, and sets of the hub by `hub:OWNER/NAME`, or `hub:OWNER/NAME:SPLIT`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dora_vl.data.readers.delimited import delimited_rows
from dora_vl.data.readers.webdataset import webdataset_rows
from dora_vl.data.records import stream_records
from dora_vl.errors import UserError

HUB = "hub:"
Progress = Callable[[int], object]
Reader = Callable[[Path], Iterator[dict[str, object]]]


def _parquet_rows(path: Path) -> Iterator[dict[str, object]]:
    from dora_vl.data.readers.columns import parquet_rows  # needs pyarrow, which JSON alone does not

    return parquet_rows(path)


def _arrow_rows(path: Path) -> Iterator[dict[str, object]]:
    from dora_vl.data.readers.columns import arrow_rows

    return arrow_rows(path)


READERS: Mapping[str, Reader] = {
    ".csv": delimited_rows,
    ".tsv": delimited_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
    ".tar": webdataset_rows,
}
"""By a file's ending; any other is JSON."""
JSON_ENDINGS = (".json", ".jsonl")
BESIDE_ARROW = ("dataset_info.json", "state.json", "dataset_dict.json")
"""What `datasets` writes beside the Arrow files of a folder."""


@dataclass(frozen=True)
class DataFiles:
    """The files that one entry of `data.train` stands for."""

    name: str
    files: tuple[Path, ...]

    @property
    def is_json(self) -> bool:
        """Whether it is a single file of JSON."""
        return len(self.files) == 1 and self.files[0].suffix.lower() not in READERS

    def rows(self, progress: Progress | None = None) -> Iterator[dict[str, object]]:
        """Yields the rows of all files in order.

        Args:
            progress: called with the number of bytes read.

        Raises:
            UserError: a file cannot be read, or not to its end; it names file and place.
        """
        for file in self.files:
            reader = READERS.get(file.suffix.lower())
            if reader is None:
                yield from stream_records(file, progress=progress)
                continue
            yield from reader(file)
            if progress is not None:
                progress(file.stat().st_size)


def find_files(path: Path) -> DataFiles:
    """The files of a path: itself, the shards of one kind in a folder, or a set of the hub.

    Raises:
        UserError: nothing is there, or files of several kinds.
    """
    if str(path).startswith(HUB):
        from dora_vl.data.readers.hub import hub_files

        return DataFiles(str(path), hub_files(str(path).removeprefix(HUB)))
    if path.is_file():
        return DataFiles(str(path), (path,))
    if not path.is_dir():
        kinds = ", ".join([*JSON_ENDINGS, *READERS])
        raise UserError(
            f"{path}: no such file; give a file of samples ({kinds}), a folder of shards, or {HUB}OWNER/NAME"
        )
    return DataFiles(str(path), _shards(path))


def _shards(folder: Path) -> tuple[Path, ...]:
    endings = (*READERS, *JSON_ENDINGS)
    found = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in endings and file.is_file() and file.name not in (*BESIDE_ARROW, "manifest.json")
    )
    kinds = sorted({file.suffix.lower() for file in found})
    if len(kinds) > 1:
        raise UserError(
            f"{folder}: files of several kinds ({', '.join(kinds)}); give one file, or a folder of one kind"
        )
    if not found:
        below = sorted(each.name for each in folder.iterdir() if each.is_dir())[:5]
        hint = f"; give one of its folders ({', '.join(below)})" if below else ""
        raise UserError(f"{folder}: no file of samples in it ({', '.join(endings)}){hint}")
    return tuple(found)
