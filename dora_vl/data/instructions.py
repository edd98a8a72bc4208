"""Instructions with one output each, in the form of LLM-Adapters and Alpaca: the file, and its rows as samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch

from dora_vl.data.dataset import IGNORED_LABEL, Encoded, Rows, Sample, Skipped
from dora_vl.data.records import stream_records
from dora_vl.errors import BadSample, UserError

if TYPE_CHECKING:
    import datasets


COLUMNS = ("id", "instruction", "input", "output", "answer", "problem")
TABLE_VERSION = 1
"""Part of the cache's key: raise it when columns or their meaning change."""
ROWS_A_BATCH = 4096


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """What is asked, what should be written, and the part of it that is scored ("" where the set names none)."""

    id: str
    instruction: str
    input: str = ""
    output: str
    answer: str = ""


def read_instruction(record: Mapping[str, object]) -> Instruction:
    """One record, checked.

    Raises:
        BadSample: a field is missing, no text, or empty where it must not be; or the text is not encodable.
    """
    sample_id = str(record.get("id"))
    if record.get("problem"):
        raise BadSample(sample_id, str(record["problem"]))
    fields = {name: record.get(name) for name in ("instruction", "input", "output", "answer")}
    texts = {name: "" if value is None else value for name, value in fields.items()}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise BadSample(sample_id, f"{name!r} must be text, got {type(value).__name__}")
        if name in ("instruction", "output") and not value.strip():
            missing = "is empty" if name in record else f"is missing; it has {', '.join(map(str, record)) or 'nothing'}"
            raise BadSample(sample_id, f"{name!r} {missing}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadSample(sample_id, f"{name!r} holds half of a surrogate pair, which is no character") from None
    return Instruction(id=sample_id, **{name: str(value) for name, value in texts.items()})


def load_instructions(path: Path, *, cache_folder: Path | None = None) -> datasets.Dataset:
    """The file's records as memory-mapped rows (`COLUMNS`), converted once and kept in a cache.

    `problem` says why a record is unusable, else it is null; every row goes into `read_instruction`.

    Raises:
        UserError: no such file, malformed JSON (with its line), no record in it, or no record of this form.
    """
    from dora_vl.data.record_table import cached_table  # needs pyarrow and datasets

    check_file(path)
    return cached_table(path, kind=f"instructions {TABLE_VERSION}", write=_write, cache_folder=cache_folder)


def iterate_instructions(path: Path, limit: int | None = None) -> list[Instruction | BadSample]:
    """The first `limit` records in order; what cannot be used stands in its place as the reason.

    Raises:
        UserError: the file is missing, malformed or empty, or two records share an id.
    """
    check_file(path)
    found: list[Instruction | BadSample] = []
    seen: set[str] = set()
    for number, record in enumerate(islice(stream_records(path), limit)):
        row = _row(record, number)
        if row["id"] in seen:
            raise UserError(f"{path}: two records have the id {row['id']}; ids keep their answers apart")
        seen.add(str(row["id"]))
        found.append(BadSample(str(row["id"]), row["problem"]) if row["problem"] else read_instruction(row))
    if not found:
        raise UserError(f"{path}: holds no records")
    return found


def check_file(path: Path) -> None:
    """Raises UserError where there is no such file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a JSON or JSONL file of instruction, input, output and answer")


def _row(record: Mapping[str, object], number: int) -> dict[str, str | None]:
    """A record in the columns' shape; unusable text is left out, and said in `problem`."""
    sample_id = str(record["id"]) if record.get("id") is not None else str(number)
    try:
        read = read_instruction({**record, "id": sample_id})
    except BadSample as error:
        readable_id = sample_id.encode("utf-8", "backslashreplace").decode()
        return {**dict.fromkeys(COLUMNS, ""), "id": readable_id, "problem": error.reason}
    return {name: getattr(read, name, None) for name in COLUMNS}


def _write(path: Path, file: BinaryIO) -> int:
    import pyarrow as pa

    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    rows, usable, first_problem = 0, 0, ""
    records = (_row(record, number) for number, record in enumerate(stream_records(path)))
    with pa.ipc.new_stream(file, schema) as writer:
        for first in records:
            batch = [first, *islice(records, ROWS_A_BATCH - 1)]
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
            problems = [row["problem"] for row in batch if row["problem"]]
            rows += len(batch)
            usable += len(batch) - len(problems)
            first_problem = first_problem or next(chain(problems, [""])) or ""
    if not rows:
        raise UserError(f"{path}: holds no records")
    if not usable:
        raise UserError(f"{path}: none of its {rows} records is an instruction; the first one: {first_problem}")
    return rows


class InstructionDataset(torch.utils.data.Dataset["Sample | Skipped"]):
    """Reads and encodes one row at a time.

    Args:
        rows: the records, as `instructions.load_instructions` gives them.
        encode: tokens and labels of an instruction.
    """

    def __init__(self, rows: Rows, *, encode: Callable[[Instruction], Encoded]) -> None:
        self._rows = rows
        self._encode = encode

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample | Skipped:
        sample_id = str(index)
        try:
            row = self._rows[index]
            sample_id = str(row.get("id", index))
            encoded = self._encode(read_instruction(row))
        except BadSample as error:
            return Skipped(index, sample_id, error.reason)
        # The first position has nothing before it to be predicted from, so its label cannot train.
        if not bool((encoded.labels[1:] != IGNORED_LABEL).any()):
            return Skipped(index, sample_id, f"nothing is left to train on in its {len(encoded.labels)} tokens")
        return Sample(
            index=index,
            id=sample_id,
            input_ids=encoded.input_ids,
            labels=encoded.labels,
            cut_tokens=encoded.cut_tokens,
        )
