"""A records file read one example at a time, by place; only the lines' places are kept in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from dora_vl.data.examples import Example, from_record
from dora_vl.errors import UserError


class ExampleFile:
    """The examples of `records/<task>/<split>.jsonl`, or one for each of their answers. Worker processes may have it.

    Args:
        path: the file.
        each_answer: an example with several answers counts as several, as captions are trained on.
        limit: only the first so many.

    Raises:
        UserError: the file is missing or empty, or a line is no record.
    """

    def __init__(self, path: Path, *, each_answer: bool = False, limit: int | None = None) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"{path} does not exist; `dora-vl prepare` writes records from a publisher's files")
        places, answers = [], []
        with path.open("rb") as stream:
            for place, line in _lines(stream):
                count = self._answers(line, len(places) + 1) if each_answer else 1
                places += [place] * count
                answers += range(count)
                if limit is not None and len(places) >= limit:
                    break
        if not places:
            raise UserError(f"{path} holds no example")
        self._places = np.array(places[:limit], dtype=np.int64)
        self._answer = np.array(answers[:limit], dtype=np.int32) if each_answer else None
        self._stream: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        """The example at this place; with `each_answer` see `answer_of` for which of its answers is meant.

        Raises:
            BadSample: the record's fields are wrong.
        """
        if self._stream is None:
            self._stream = self.path.open("rb")
        self._stream.seek(int(self._places[index]))
        return from_record(json.loads(self._stream.readline()))

    def answer_of(self, index: int) -> int | None:
        """The answer that this item is about; None where it is about all of them."""
        return None if self._answer is None else int(self._answer[index])

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def _answers(self, line: bytes, number: int) -> int:
        try:
            return max(1, len(json.loads(line).get("answers", ())))
        except (ValueError, AttributeError) as error:
            raise UserError(f"{self.path}: record {number} is not a JSON object ({error})") from error

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_stream": None}  # an open file does not travel; a worker opens its own


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    place = 0
    for line in stream:
        if line.strip():
            yield place, line
        place += len(line)
