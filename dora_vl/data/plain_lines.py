"""LLaVA records in their plainest form, JSON lines without a surprise, read by Arrow's own parser: six times as fast.

Plain is what `dora-vl prepare` writes and most published files hold: each id is text, each record has at most one
picture by its path, no video, and turns that hold text. A file with anything else is read by `record_table` record by
record, so what a row means is decided there alone, and this module must give the same columns (a test holds it to
that).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from dora_vl.data.media import AS_URL, BARE_BASE64, IN_PLACE, WEB
from dora_vl.data.readers.columns import MEDIA_ENDINGS, USUAL, Columns, named_like
from dora_vl.data.readers.messages import MARKS

BLOCK_BYTES = 8 << 20
"""Read at once; a record longer than that makes a file not plain."""

PLAIN_FORMAT = "conversations"
NAMED_VIDEO = pa.struct([("path", pa.string()), ("start_seconds", pa.float64()), ("end_seconds", pa.float64())])
HELD_PICTURE = pa.struct([("name", pa.string()), ("content", pa.large_binary())])
_TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
_NO_PATH = pc.MatchSubstringOptions("^(" + "|".join((IN_PLACE, AS_URL, *BARE_BASE64, *WEB)) + r")|\\")
_MEDIA = pc.MatchSubstringOptions(rf"\.({'|'.join(MEDIA_ENDINGS)})$", ignore_case=True)
_TAGS = pc.MatchSubstringOptions("<(img|bbox|ref-object|audio)>")
_USED = {"id": "id", "image": "images", "conversations": "conversations"}
_FORM = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.string()),
        ("conversations", pa.list_(pa.struct([*_TURN, *((mark, pa.float64()) for mark in MARKS)]))),
    ]
)


class NotPlainError(Exception):
    """The file holds something that has to be looked at record by record."""


def plain_batches(path: Path, schema: pa.Schema, columns: Columns = USUAL) -> Iterator[pa.RecordBatch]:
    """Yields a plain file's rows in the columns of `record_table`.

    Raises:
        NotPlainError: at the first block that is not plain; what was yielded before must be thrown away.
    """
    with path.open("rb") as file:
        if not file.read(3).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            raise NotPlainError
    reading = pj.ReadOptions(block_size=BLOCK_BYTES)
    parsing = pj.ParseOptions(explicit_schema=_FORM, unexpected_field_behavior="infer")
    try:
        for block in pj.open_json(path, read_options=reading, parse_options=parsing):
            yield _columns(block, schema, _uses(block, columns))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowKeyError) as error:
        raise NotPlainError from error


def written_uses(uses: Mapping[str, str]) -> str:
    """The role of each column as a table holds it."""
    return json.dumps(uses, ensure_ascii=False)


def _uses(block: pa.RecordBatch, columns: Columns) -> dict[str, str]:
    """The role of each column that is not empty, where those left out are notes in any row."""
    named = {
        name: True for name, column in zip(block.schema.names, block, strict=True) if column.null_count < len(column)
    }
    shape = columns.shape_of(named)
    if shape is None or shape.format.name != PLAIN_FORMAT:
        raise NotPlainError
    uses, left = shape.uses((0,) * len(shape.candidates))
    if {name: role for name, role in uses.items() if role} != {name: _USED[name] for name in _USED if name in uses}:
        raise NotPlainError
    for name in left:
        column = block.column(name)
        if (
            named_like(name)
            or pa.types.is_nested(column.type)
            or (pa.types.is_string(column.type) and _any(column, _MEDIA))
        ):
            raise NotPlainError
    return dict(uses)


def _any(texts: pa.Array, matching: pc.MatchSubstringOptions) -> bool:
    return bool(pc.call_function("any", [pc.call_function("match_substring_regex", [texts], matching)]).as_py())


def _columns(block: pa.RecordBatch, schema: pa.Schema, uses: Mapping[str, str]) -> pa.RecordBatch:
    ids, images, conversations = (block.column(name) for name in ("id", "image", "conversations"))
    turns = conversations.flatten()
    texts, speakers = turns.field("value"), turns.field("from")
    offsets = _offsets(conversations)
    others = (turns.field(part.name) for part in turns.type if part.name not in ("from", "value"))
    marked = any(field.null_count != len(turns) for field in others)
    if (
        marked
        or _any(images, _NO_PATH)
        or _any(texts, _TAGS)
        or ids.null_count
        or conversations.null_count
        or turns.null_count
        or texts.null_count
        or speakers.null_count
        or (np.diff(offsets) == 0).any()
    ):
        raise NotPlainError
    given = np.array(pc.call_function("binary_length", [images]).fill_null(0)) > 0
    listed = pa.ListArray.from_arrays(_lengths_to_offsets(given), images.filter(pa.array(given)))
    none = pa.ListArray.from_arrays(_lengths_to_offsets(np.zeros(len(block), bool)), pa.array([], NAMED_VIDEO))
    columns = [
        ids,
        listed,
        none,
        pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays([speakers, texts], fields=list(_TURN))),
        pa.array(np.zeros(len(block), np.int32)),
        pa.array(np.add.reduceat(word_counts(texts), offsets[:-1]), pa.int32()),
        pa.array(given),
        pa.nulls(len(block), pa.string()),
        pa.repeat(PLAIN_FORMAT, len(block)),
        pa.ListArray.from_arrays(_lengths_to_offsets(np.zeros(len(block), bool)), pa.array([], HELD_PICTURE)),
        pa.array([written_uses(uses), *[None] * (len(block) - 1)], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _offsets(lists: pa.ListArray) -> np.ndarray:
    found = np.array(lists.offsets)
    return found - found[0]


def _lengths_to_offsets(lengths: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())


def word_counts(texts: pa.StringArray) -> np.ndarray:
    """How many words `str.split` finds in each text, counted in the bytes where they are ASCII."""
    _, ends_buffer, data_buffer = texts.buffers()
    if not len(texts) or data_buffer is None:
        return np.zeros(len(texts), np.int64)
    ends = np.frombuffer(ends_buffer, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(data_buffer, np.uint8)[ends[0] : ends[-1]]
    ends = ends - ends[0]
    space = _is_space(data)
    begins_word = ~space
    begins_word[1:] &= space[:-1]
    first = ends[:-1][ends[:-1] < len(data)]
    begins_word[first] = ~space[first]  # a text's first byte has nothing before it
    counts = _inside(begins_word, ends)
    for place in np.flatnonzero(_inside(data >= 128, ends)):
        counts[place] = len(texts[place].as_py().split())
    return counts


def _is_space(data: np.ndarray) -> np.ndarray:
    """The ASCII characters that `str.split` parts words at, 9 to 13 and 28 to 32, in three passes over the bytes."""
    return ((data - np.uint8(9)) < 5) | ((data - np.uint8(28)) < 5)  # what is below wraps round


def _inside(marked: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Marked bytes of each text; by their places, since running sums over all bytes took seven times as long."""
    return np.diff(np.searchsorted(np.flatnonzero(marked), ends))
