"""Ways in which a file goes wrong, drawn by a seed: bytes, JSON, table cells, settings; and how the cases are run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

LONGEST_LINE = 500
DEPTH = 100_000
"""Brackets of the deepest nesting: far beyond what Python reads."""
HUGE = 60_000
"""Characters of the longest value."""
MARK = "\x01"
"""Stands in a document for a value that is written as JSON text, such as a number that Python writes otherwise."""
VALUES = (
    *("null", "true", "0", "-1", "0.5", '""', '" \\t\\n"', '"a"', '"a\\r\\nb\\u2028c\\u0085d"', '"a\\u0000b"'),
    *(f'"{"x" * HUGE}"', '"../../../x"', f'"{"a" * 300}/{"b" * 300}"', '"\\ud83d"', '"٣"', '"²"', f'"{"1" * 5_000}"'),
    *("[]", '[1, "a", null]', '[[[1]], {"a": [2]}]', "{}", '{"text": "a", "answer": "b", "a": {"b": 1}}'),
    *(f"[{'0,' * 5_000}0]", "[" * 900 + "]" * 900, "[" * DEPTH + "]" * DEPTH),
    *("1e999", "NaN", "-Infinity", "9223372036854775808", "9" * 4_000, "9" * 5_000, "1e-999"),
)
"""What stands for a value in JSON."""
SETTINGS = (
    *("", "null", "true", "0", "-1", "1.5", "1e999", ".nan", "9" * 5_000, "x" * HUGE, "[" * 2_000),
    *("[1, [2]]", "{a: 1}", "2024-13-45", "&a [*a]", "!!python/object:os.system x", "!!binary x"),
    *("../../x", "/", '"\\ud83d"', '"a\\0b"'),
)
"""What stands for a setting in YAML."""
CELLS = ('"', "x" * HUGE, "ä", "\udcff\udcfe", "\0", "nan", "-1", "9" * 5_000, "\r", "a\nb")
FIELDS = {"csv": (",", CELLS), "tsv": ("\t", CELLS), "yaml": (":", SETTINGS)}
"""What stands between the fields of a line, and what stands for one."""
NAMES = ("", "id", "answer", "row", "x" * HUGE, "a\nb", "\ud83d")


def damage(content: bytes, name: str, draw: Random) -> tuple[bytes, str]:
    """One change of a file, and its description; of JSON, YAML and tables mostly one that leaves them so."""
    ending = name.rpartition(".")[2]
    if draw.random() < 0.65:
        changed = None
        if ending in ("json", "jsonl"):
            changed = _json(content, draw)
        elif ending in FIELDS:
            changed = _field(content, draw, *FIELDS[ending])
        if changed is not None:
            return changed
    kind = draw.choice(list(BYTE_CHANGES))
    return BYTE_CHANGES[kind](content, draw), kind


def _json(content: bytes, draw: Random) -> tuple[bytes, str] | None:
    """A value, a name or an entry is another one; None for a file that is no JSON."""
    try:
        text, lines = content.decode(), False
        try:
            document = json.loads(text)
        except ValueError:
            document, lines = [json.loads(line) for line in text.splitlines() if line.strip()], True
        inside, key = draw.choice(list(_places(document)))
        kind = draw.choice(["value", "value", "removed", "renamed", "twice", "neighbour"])
        value = draw.choice(VALUES)
        if kind == "value":
            inside[key] = MARK
        elif kind == "removed":
            del inside[key]
        elif kind == "renamed" and isinstance(inside, dict):
            inside[draw.choice([f"{key}_", str(key).upper(), *NAMES])] = inside.pop(key)
        elif kind == "twice" and isinstance(inside, list):
            inside.insert(draw.randrange(len(inside) + 1), inside[key])
        else:
            inside[key] = inside[draw.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))]
        parts = document if lines else [document]
        written = "\n".join(json.dumps(part).replace(json.dumps(MARK), value) for part in parts)
    except (ValueError, RecursionError, IndexError):  # no JSON, an empty one, or nested deeply by an earlier change
        return None
    return written.encode(), f"{kind} at {str(key)[:40]!r}: {value[:20] if kind == 'value' else ''}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Lists and objects, each with the index or name of one of its values."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in entries:
        yield value, key
        yield from _places(inside)


def _field(content: bytes, draw: Random, delimiter: str, values: Sequence[str]) -> tuple[bytes, str]:
    """One field of a line of a table or of YAML is another, lacks a half or is there twice."""
    lines = content.decode("utf-8", "surrogateescape").split("\n")
    row = draw.randrange(len(lines))
    fields = lines[row].split(delimiter)
    column = draw.randrange(len(fields))
    field = fields[column]
    changed = ("", field[: len(field) // 2], f'"{field}', f'{field}"', f"{field}_", field + delimiter + field)
    fields[column] = draw.choice((*values, *values, *changed))
    lines[row] = delimiter.join(fields)
    return "\n".join(lines).encode(
        "utf-8", "surrogateescape"
    ), f"field {column} of line {row + 1}: {fields[column][:20]!r}"


def flip(content: bytes, draw: Random) -> bytes:
    """One to eight bits are others."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8) if changed else 0):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _insert(content: bytes, draw: Random, piece: bytes) -> bytes:
    position = draw.randrange(len(content) + 1)
    return content[:position] + piece + content[position:]


def _leave_out(content: bytes, draw: Random) -> bytes:
    first, second = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return content[:first] + content[second:]


def _encoded(content: bytes, draw: Random, encoding: str) -> bytes:
    return content.decode("utf-8", "replace").encode(encoding, "replace")


BYTE_CHANGES: Mapping[str, Callable[[bytes, Random], bytes]] = {
    "bits flipped": flip,
    "cut": lambda content, draw: content[: draw.randrange(len(content) + 1)],
    "a part left out": _leave_out,
    "doubled": lambda content, draw: content + content,
    "doubled on a new line": lambda content, draw: content + b"\n" + content,
    "lines mixed": lambda content, draw: b"\n".join(draw.sample(lines := content.split(b"\n"), len(lines))),
    "empty": lambda content, draw: b"",
    "two byte order marks": lambda content, draw: b"\xef\xbb\xbf" * 2 + content,
    **{name: partial(_encoded, encoding=name) for name in ("utf-16", "latin-1")},
    "CR": lambda content, draw: content.replace(b"\n", b"\r"),
    **{
        f"{piece[:9]!r} inserted": partial(_insert, piece=piece)
        for piece in (b"\x00", b'"', b"]", b",", b"\n", b"\xff\xfe", b"y" * HUGE)
    },
    "nested deeply": lambda content, draw: b"[" * DEPTH + content,
    "objects nested deeply": lambda content, draw: b'{"a":' * DEPTH + content,
}


def failures(run: Callable[[int], str], count: int) -> list[str]:
    """What went wrong in the cases, the first ten; each can be run again by its number.

    `FUZZ_CASES` of the environment says how many there are; `FUZZ_ONLY` is one case alone.
    """
    only = os.environ.get("FUZZ_ONLY")
    numbers = [int(only)] if only else range(1, int(os.environ.get("FUZZ_CASES", count)) + 1)
    return [f"FUZZ_ONLY={number}: {failure}" for number in numbers if (failure := run(number))][:10]


def memory_mb(*, begin: bool = False) -> float:
    """The most memory that this process held since `begin`; 0 where the system does not say."""
    try:
        if begin:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0")
    return int(peak.split()[1]) / 1024
