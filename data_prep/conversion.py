"""Raw rows to lines of JSON, in order, in this process or in several; a row that cannot be used keeps its reason."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from typing import cast

from data_prep.fields import UNKNOWN_ID
from data_prep.published import Converted, Raw
from dora_vl.data.examples import JSON, Example, json_line, to_record
from dora_vl.errors import BadSample, UserError, shown_text

ROWS_A_CHUNK = 512
CHUNKS_AHEAD = 3
"""For each worker; what is read but not yet written stays bounded, however slow the disk."""

LONGEST_SHOWN_ID, LONGEST_REASON = 80, 200
"""Characters that the manifest and messages hold of a dropped row; with the file's name they stay on a short line."""


@dataclass(frozen=True)
class Line:
    """One record of the output: its JSON in UTF-8, with the newline, and whether it holds an answer."""

    id: str
    encoded: bytes
    answered: bool = True


@dataclass(frozen=True)
class ConvertedRow:
    """What one raw row became: lines, or the reason why there are none."""

    number: int
    lines: tuple[Line, ...] = ()
    id: str = ""
    problem: str | None = None


def converted_rows(
    rows: Iterable[Raw], convert: Callable[[Raw], Converted], *, first_number: int, workers: int
) -> Iterator[list[ConvertedRow]]:
    """Yields the converted rows chunk by chunk, in the order of `rows`.

    Args:
        first_number: the number of the first row, for messages.
        workers: processes besides this one; 0 converts in this one.

    Raises:
        UserError: reading failed, a row holds what JSON cannot, or a worker died.
    """
    chunks = _chunks(rows, first_number)
    if workers == 0:
        yield from (convert_chunk(convert, chunk) for chunk in chunks)
        return
    pending: deque[Future[list[ConvertedRow]]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for chunk in chunks:
            pending.append(pool.submit(convert_chunk, convert, chunk))
            if len(pending) > CHUNKS_AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps of too little memory; try again with --workers 0") from None
    except RecursionError:
        raise UserError("a row is nested too deeply for a worker process; try again with --workers 0") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def convert_chunk(convert: Callable[[Raw], Converted], chunk: list[tuple[int, Raw]]) -> list[ConvertedRow]:
    """Converts numbered rows."""
    return [_converted(convert, number, row) for number, row in chunk]


def _converted(convert: Callable[[Raw], Converted], number: int, row: Raw) -> ConvertedRow:
    try:
        return ConvertedRow(number, tuple(_line(result) for result in _each(convert(row))))
    except BadSample as error:
        return ConvertedRow(
            number, id=shown_text(error.sample_id, LONGEST_SHOWN_ID), problem=shown_text(error.reason, LONGEST_REASON)
        )
    except RecursionError:
        return ConvertedRow(number, id=UNKNOWN_ID, problem="its values are nested too deeply")


def _each(result: Converted) -> Iterable[Example | Mapping[str, JSON]]:
    if isinstance(result, Example):
        return (result,)
    return (cast("Mapping[str, JSON]", result),) if isinstance(result, Mapping) else result


def _line(result: Example | Mapping[str, JSON]) -> Line:
    record = to_record(result) if isinstance(result, Example) else result
    sample_id = str(record["id"])
    answered = bool(result.answers or result.turns) if isinstance(result, Example) else True
    try:
        return Line(sample_id, json_line(record, sample_id).encode(), answered)
    except UserError as error:
        raise BadSample(sample_id, str(error).removeprefix(f"{sample_id}: ")) from None


def _chunks(rows: Iterable[Raw], first_number: int) -> Iterator[list[tuple[int, Raw]]]:
    numbered = enumerate(rows, start=first_number)
    while chunk := list(islice(numbered, ROWS_A_CHUNK)):
        yield chunk
