"""A records file read one example at a time, by place; only the lines' places are kept in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from dora_vl.data.examples import Example, from_record
from dora_vl.errors import UserError


class ExampleFile:
    """The examples of `records/<task>/<split>.jsonl`, or one for each of their answers. Worker processes may have it.

    Args:
        paths: the file, or several that are read as one.
        each_answer: an example with several answers counts as several, as captions are trained on.
        limit: only the first so many.

    Raises:
        UserError: the file is missing or empty, or a line is no record.
    """

    def __init__(self, paths: Path | Sequence[Path], *, each_answer: bool = False, limit: int | None = None) -> None:
        self.paths = (paths,) if isinstance(paths, Path) else tuple(paths)
        found: list[tuple[int, int, int]] = []
        for number, path in enumerate(self.paths):
            found += _items(path, number, each_answer=each_answer)
        items = np.array(found[:limit], dtype=np.int64)
        self._file, self._places = items[:, 0].astype(np.int16), items[:, 1]
        self._answer = items[:, 2].astype(np.int32) if each_answer else None
        self._streams: dict[int, IO[bytes]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        """The example at this place; with `each_answer` see `answer_of` for which of its answers is meant.

        Raises:
            BadSample: the record's fields are wrong.
        """
        number = int(self._file[index])
        if number not in self._streams:
            self._streams[number] = self.paths[number].open("rb")
        stream = self._streams[number]
        stream.seek(int(self._places[index]))
        return from_record(json.loads(stream.readline()))

    def answer_of(self, index: int) -> int | None:
        """The answer that this item is about; None where it is about all of them."""
        return None if self._answer is None else int(self._answer[index])

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_streams": {}}  # an open file does not travel; a worker opens its own


def _items(path: Path, number: int, *, each_answer: bool) -> Iterator[tuple[int, int, int]]:
    """File, place and answer of each item."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; `dora-vl prepare` writes records from a publisher's files")
    empty = True
    with path.open("rb") as stream:
        for row, (place, line) in enumerate(_lines(stream), start=1):
            empty = False
            for answer in range(_answers(path, line, row) if each_answer else 1):
                yield number, place, answer
    if empty:
        raise UserError(f"{path} holds no example")


def _answers(path: Path, line: bytes, row: int) -> int:
    try:
        return max(1, len(json.loads(line).get("answers", ())))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: record {row} is not a JSON object ({error})") from error


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    place = 0
    for line in stream:
        if line.strip():
            yield place, line
        place += len(line)
