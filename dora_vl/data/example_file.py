"""A records file read one example at a time, by place; only the lines' places are kept in memory."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from dora_vl.data.examples import JSON, Example, from_record
from dora_vl.data.text_file import json_of, text_of
from dora_vl.errors import BadSample, UserError

THE_LINE = "the line"


class ExampleFile:
    """The examples of `records/<task>/<split>.jsonl`, or one for each of their answers. Worker processes may have it.

    Args:
        paths: the file, or several that are read as one.
        each_answer: an example with several answers counts as several, as captions are trained on.
        limit: only the first so many.

    A line that is no record is an item as well; asked for, it is a `BadSample` that names file and line.

    Raises:
        UserError: the file is missing or empty, or the limit leaves nothing.
    """

    def __init__(self, paths: Path | Sequence[Path], *, each_answer: bool = False, limit: int | None = None) -> None:
        self.paths = (paths,) if isinstance(paths, Path) else tuple(paths)
        if limit is not None and limit < 1:
            raise UserError(f"{self.paths[0]}: a limit of {limit} leaves no example; at least 1 is needed")
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
            BadSample: the line is no JSON object, or its fields are wrong; the reason begins with file and line.
        """
        number, place = int(self._file[index]), int(self._places[index])
        if number not in self._streams:
            self._streams[number] = self.paths[number].open("rb")
        stream = self._streams[number]
        stream.seek(place)
        try:
            return from_record(_json_object(stream.readline()))
        except BadSample as error:
            where = f"{self.paths[number]}, line {_line_number(stream, place)}"
            raise BadSample(error.sample_id, f"{where}: {error.reason}") from None

    def answer_of(self, index: int) -> int | None:
        """The answer that this item is about; None where it is about all of them."""
        return None if self._answer is None else int(self._answer[index])

    def ids(self) -> Iterator[str]:
        """Yields each item's id, in order; that of a line which is no record is nothing."""
        for number, path in enumerate(self.paths):
            places, times = np.unique(self._places[self._file == number], return_counts=True)
            with path.open("rb") as stream:
                for place, items in zip(places.tolist(), times.tolist(), strict=True):
                    stream.seek(place)
                    yield from [_id_of(stream.readline())] * items

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
        for place, line in _lines(stream):
            empty = False
            for answer in range(_answers(line) if each_answer else 1):
                yield number, place, answer
    if empty:
        raise UserError(f"{path} holds no example")


def _answers(line: bytes) -> int:
    """How many items the line is; a broken one is a single item, whose reading says what is wrong."""
    try:
        answers = _json_object(line).get("answers", ())
    except BadSample:
        return 1
    return max(1, len(answers)) if isinstance(answers, list) else 1


def _id_of(line: bytes) -> str:
    try:
        return str(_json_object(line).get("id"))
    except BadSample:
        return ""


def _json_object(line: bytes) -> Mapping[str, JSON]:
    try:
        text = text_of(line.removeprefix(codecs.BOM_UTF8), THE_LINE)
        record = json_of(text, THE_LINE)
    except UserError as error:
        raise BadSample("(no id)", f"{str(error).removeprefix(f'{THE_LINE}: ')}; write the file again") from None
    if not isinstance(record, dict):
        raise BadSample("(no id)", f"a line must hold an object, found {type(record).__name__}")
    return record


def _line_number(stream: IO[bytes], place: int) -> int:
    """The line that begins at this place, from 1; reads all before it, which only a broken line is worth."""
    stream.seek(0)
    return 1 + sum(part.count(b"\n") for part in _parts(stream, place))


def _parts(stream: IO[bytes], size: int) -> Iterator[bytes]:
    while size > 0 and (part := stream.read(min(size, 1 << 20))):
        size -= len(part)
        yield part


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    place = 0
    for line in stream:
        if line.strip():
            yield place, line
        place += len(line)
