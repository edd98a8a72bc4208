"""JSON lines of LLaVA's form, a block at a time by Arrow's own parser: several times as fast as row by row.

Plain is a row with an id, at most one picture by its path, and alternating turns of text. A row that is not is read by
itself; a file that is not of this form, or cannot be read, is left to `table`, which says what is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from dora_vl.data.columns import Columns
from dora_vl.data.pictures import AS_URL, BARE_BASE64, IN_PLACE, PICTURE_ENDINGS, VIDEO_ENDINGS, WEB
from dora_vl.data.turns import IMAGE_PLACEHOLDER
from dora_vl.errors import UserError

BLOCK_BYTES = 8 << 20
"""Read at once; a longer row makes a file not plain."""
_CONVERSATIONS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
_ROW = pa.schema([("id", pa.string()), ("image", pa.string()), ("conversations", _CONVERSATIONS)])
_ROLES = {"id": "id", "image": "images", "conversations": "conversations"}
_NO_PATH = "^(" + "|".join(map(re.escape, (IN_PLACE, AS_URL, *BARE_BASE64, *WEB))) + r")|\\"
_MEDIA = rf"(?i)\.({'|'.join((*PICTURE_ENDINGS, *VIDEO_ENDINGS))})$"
_call = pc.call_function
_TAGS = r"<(img|bbox|ref-object|audio)>|<\|?image[ _]?\d"


class NotPlain(Exception):
    """The file has to be read row by row."""


def plain_batches(
    path: Path,
    schema: pa.Schema,
    columns: Columns,
    read_rows: Callable[[Sequence[tuple[int, Mapping[str, object]]]], pa.RecordBatch],
) -> Iterator[pa.Table]:
    """Yields the file's rows in the table's columns; `NotPlain` may come at any of them.

    Args:
        read_rows: makes the table's rows of numbered records, for those that are not plain.
    """
    with path.open("rb") as file:
        if file.read(1) != b"{":
            raise NotPlain
    parse = pj.ParseOptions(explicit_schema=_ROW, unexpected_field_behavior="infer")
    number = 0
    try:
        for block in pj.open_json(path, read_options=pj.ReadOptions(block_size=BLOCK_BYTES), parse_options=parse):
            block.validate(full=True)  # the parser takes bytes that are not UTF-8
            uses = _uses(block, columns)
            is_plain = _is_plain(block)
            table = pa.Table.from_batches([_plain_columns(block.filter(pa.array(is_plain)), schema, uses)])
            if others := np.flatnonzero(~is_plain).tolist():
                rows = block.take(pa.array(others)).to_pylist()
                read = read_rows([(number + at, _without_nulls(row)) for at, row in zip(others, rows, strict=True)])
                order = np.argsort(np.concatenate([np.flatnonzero(is_plain), others]))
                table = pa.concat_tables([table, pa.Table.from_batches([read])]).take(pa.array(order))
            yield table
            number += len(block)
    except (pa.ArrowException, UserError) as error:
        raise NotPlain from error


def _uses(block: pa.RecordBatch, columns: Columns) -> Mapping[str, str]:
    """The role of each column that holds something, where those left out are notes in any row."""
    held = {name: block[name] for name in block.schema.names if block[name].null_count < len(block)}
    uses = columns.resolve(dict.fromkeys(held, True)).uses
    notes = [column for name, column in held.items() if not uses.get(name)]
    if (
        {name: role for name, role in uses.items() if role} != {name: _ROLES[name] for name in held if name in _ROLES}
        or block["conversations"].type != _CONVERSATIONS
        or block["conversations"].null_count
        or any(pa.types.is_nested(column.type) for column in notes)
        or any(pa.types.is_string(column.type) and _count(column, _MEDIA).any() for column in notes)
    ):
        raise NotPlain
    return uses


def _is_plain(block: pa.RecordBatch) -> np.ndarray:
    """Of each row, whether `readers` and `turns.arrange` would take it as it is, but for its picture's place."""
    turns, counts, has_image = _parts(block)
    texts = turns.field("value").fill_null("")
    is_answer = (np.arange(len(turns)) - np.repeat(np.cumsum(counts) - counts, counts)) % 2 == 1
    speakers = pa.array(np.where(is_answer, "gpt", "human"))
    is_odd = ~np.asarray(_call("equal", [turns.field("from").fill_null(""), speakers]))
    is_odd |= (_count(texts, _TAGS) > 0) | np.asarray(turns.field("value").is_null())
    is_odd |= is_answer & (_lengths(_without_placeholder(texts)) == 0)
    row = np.repeat(np.arange(len(block)), counts)
    odd, placed = (np.bincount(row, of, len(block)) for of in (is_odd, _count(texts, IMAGE_PLACEHOLDER)))
    fits = (counts > 0) & (counts % 2 == 0) & (odd == 0) & (placed == has_image)
    return fits & (_count(block["image"], _NO_PATH) == 0) & np.asarray(block["id"].is_valid())


def _plain_columns(block: pa.RecordBatch, schema: pa.Schema, uses: Mapping[str, str]) -> pa.RecordBatch:
    """Plain rows as the table has them, the picture's place in front of its turn (`turns.placeholder_first`)."""
    turns, counts, has_image = _parts(block)
    texts = turns.field("value")
    moved = [pa.scalar(IMAGE_PLACEHOLDER), _without_placeholder(texts), pa.scalar("\n")]
    moved = _call("utf8_trim_whitespace", [_call("binary_join_element_wise", moved)])
    texts = _call("if_else", [pa.array(_count(texts, IMAGE_PLACEHOLDER) > 0), moved, texts])
    trimmed = _call("utf8_trim_whitespace", [texts])
    words = np.asarray(_call("utf8_split_whitespace", [trimmed]).value_lengths()) * (_lengths(trimmed) > 0)
    ends = np.concatenate([[0], np.cumsum(counts)])
    roles = pa.array(["user", "assistant"]).take(pa.array(np.arange(len(turns)) % 2))
    parts = [roles, texts, pa.array(np.zeros(len(turns), np.int32))]
    values = {
        "id": block["id"],
        "images": _lists(has_image, block["image"].filter(pa.array(has_image))),
        "turns": _lists(counts, pa.StructArray.from_arrays(parts, ["role", "text", "input_characters"])),
        "length": pa.array(np.diff(np.concatenate([[0], np.cumsum(words)])[ends]), pa.int32()),
        "format": pa.repeat("conversations", len(block)),
        "columns": pa.array([json.dumps(uses), *[None] * len(block)][: len(block)], pa.string()),
        "problem": pa.nulls(len(block), pa.string()),
    }
    for field in schema:
        if field.name not in values:  # of videos and pictures that the file holds
            values[field.name] = _lists(np.zeros(len(block), bool), pa.array([], field.type.value_type))
    return pa.RecordBatch.from_arrays([values[name] for name in schema.names], schema=schema)


def _parts(block: pa.RecordBatch) -> tuple[pa.StructArray, np.ndarray, np.ndarray]:
    """All turns, how many each row has, and whether it has a picture."""
    lists = block["conversations"]
    return lists.flatten(), np.asarray(lists.value_lengths()), _lengths(block["image"]) > 0


def _without_placeholder(texts: pa.Array) -> pa.Array:
    rest = _call("replace_substring", [texts], pc.ReplaceSubstringOptions(IMAGE_PLACEHOLDER, ""))
    return _call("utf8_trim_whitespace", [rest])  # Arrow's white space is Python's


def _lengths(texts: pa.Array) -> np.ndarray:
    return np.asarray(_call("binary_length", [texts]).fill_null(0))


def _count(texts: pa.Array, pattern: str) -> np.ndarray:
    """How often it matches each text."""
    return np.asarray(_call("count_substring_regex", [texts], pc.MatchSubstringOptions(pattern)).fill_null(0))


def _lists(lengths: np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), values)


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arrow gives each row the columns of all: what this one does not have is null."""
    turns = [{name: text for name, text in (turn or {}).items() if text is not None} for turn in row["conversations"]]
    return {name: value for name, value in row.items() if value is not None} | {"conversations": turns}
