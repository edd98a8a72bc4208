"""Ways in which a published file or a file of predictions goes wrong, drawn by a seed: bytes, JSON values, cells."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

DEPTH = 100_000
"""Brackets of the deepest nesting: far beyond what Python reads."""
HUGE = 60_000
"""Characters of the longest value, and bytes that are put in at once."""

Place = tuple[Any, Any]
"""A list or an object, and the index or name of one of its values."""


class Raw(str):
    """JSON text that stands in a file as it is, such as a number that no Python value is written as."""

    __slots__ = ()


VALUES: Mapping[str, Any] = {
    "null": None,
    "true": True,
    "false": False,
    "zero": 0,
    "negative": -1,
    "fraction": 0.5,
    "empty text": "",
    "space": " \t\n",
    "text": "a",
    "line breaks": "a\r\nb\u2028c\x85d",
    "NUL": "a\x00b",
    "huge text": "x" * HUGE,
    "path out": "../../../x",
    "long name": "a" * 300 + "/" + "b" * 300,
    "surrogate": "\ud83d",
    "other script": "٣",
    "digit that is no number": "²",
    "many digits": "1" * 5_000,
    "empty list": [],
    "list": [1, "a", None],
    "nested list": [[[1]], {"a": [2]}],
    "empty object": {},
    "object": {"text": "a", "answer": "b", "a": {"b": 1}},
    "long list": [0] * 5_000,
    "deep": Raw("[" * 900 + "]" * 900),
    "too deep": Raw("[" * DEPTH + "]" * DEPTH),
    "infinity": Raw("1e999"),
    "NaN": Raw("NaN"),
    "minus infinity": Raw("-Infinity"),
    "64 bits": 2**63,
    "huge number": Raw("9" * 4_000),
    "number of too many digits": Raw("9" * 5_000),
    "tiny number": Raw("1e-999"),
}


@dataclass(frozen=True)
class Mutated:
    """A file's new content, and what was done to it, for a message."""

    content: bytes
    said: str


def mutate(content: bytes, name: str, draw: Random) -> Mutated:
    """One mutation of a file; of JSON and tables mostly one that leaves them JSON and tables."""
    if name.endswith((".json", ".jsonl")) and draw.random() < 0.7:
        changed = _json_change(content, draw)
        if changed is not None:
            return changed
    if name.endswith((".csv", ".tsv")) and draw.random() < 0.6:
        return _cell_change(content, b"\t" if name.endswith(".tsv") else b",", draw)
    if name.endswith(".yaml") and draw.random() < 0.6:
        return _setting_change(content, draw)
    kind = draw.choice(list(BYTE_CHANGES))
    return Mutated(BYTE_CHANGES[kind](content, draw), kind)


def _json_change(content: bytes, draw: Random) -> Mutated | None:
    """A value, a name or an entry is another one; None for a file that is no JSON."""
    try:
        text = content.decode()
        lines = text.lstrip().startswith("{") and len(text.strip().splitlines()) > 1 and _is_json(text.splitlines()[0])
        document = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
        places = list(_places(document))
        if not places:
            return None
        inside, at = draw.choice(places)
        kind = draw.choice(list(JSON_CHANGES))
        said = f"{kind} at {str(at)[:40]!r}: {JSON_CHANGES[kind](inside, at, draw)}"
        written = "\n".join(map(_dumped, document)) + "\n" if lines else _dumped(document)
    except (ValueError, RecursionError):  # no JSON, or nested deeply by an earlier mutation
        return None
    return Mutated(written.encode("utf-8", "surrogatepass"), said)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _places(value: Any) -> Iterator[Place]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for at, inside in entries:
        yield value, at
        yield from _places(inside)


def _dumped(value: Any) -> str:
    """JSON with every `Raw` as it is."""
    raws: list[str] = []

    def marked(part: Any) -> Any:
        if isinstance(part, Raw):
            raws.append(str(part))
            return f"\x01raw {len(raws) - 1}\x01"
        if isinstance(part, dict):
            return {name: marked(inside) for name, inside in part.items()}
        return [marked(inside) for inside in part] if isinstance(part, list) else part

    text = json.dumps(marked(value))
    for number, raw in enumerate(raws):
        text = text.replace(f'"\\u0001raw {number}\\u0001"', raw)
    return text


def _other_value(inside: Any, at: Any, draw: Random) -> str:
    name = draw.choice(list(VALUES))
    inside[at] = VALUES[name]
    return name


def _removed(inside: Any, at: Any, draw: Random) -> str:
    del inside[at]
    return ""


def _renamed(inside: Any, at: Any, draw: Random) -> str:
    if not isinstance(inside, dict):
        return _other_value(inside, at, draw)
    name = draw.choice([f"{at}_", str(at).upper(), "", "id", "answer", "row", "x" * HUGE, "a\nb", "\ud83d"])
    inside[name] = inside.pop(at)
    return f"{name[:20]!r}"


def _twice(inside: Any, at: Any, draw: Random) -> str:
    if isinstance(inside, list):
        inside.insert(draw.randrange(len(inside) + 1), inside[at])
    else:
        inside[at] = [inside[at], inside[at]]
    return ""


def _neighbours(inside: Any, at: Any, draw: Random) -> str:
    """The value of another member or entry."""
    other = draw.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
    inside[at] = inside[other]
    return f"that of {str(other)[:40]!r}"


JSON_CHANGES: Mapping[str, Callable[[Any, Any, Random], str]] = {
    "other value": _other_value,
    "another value": _other_value,
    "removed": _removed,
    "renamed": _renamed,
    "twice": _twice,
    "neighbour": _neighbours,
}


def _cell_change(content: bytes, delimiter: bytes, draw: Random) -> Mutated:
    """One cell of one line is another."""
    lines = content.split(b"\n")
    row = draw.randrange(len(lines))
    cells = lines[row].split(delimiter)
    at = draw.randrange(len(cells))
    cell = cells[at]
    cells[at] = draw.choice(
        [
            b"",
            b'"',
            b'"' + cell,
            cell + b'"',
            cell[: len(cell) // 2],
            cell + delimiter + cell,
            b"x" * HUGE,
            "ä".encode(),
            b"\xff\xfe",
            b"\x00",
            b"nan",
            b"-1",
            b"9" * 5_000,
            b"\r",
            b"a\nb",
            cell * 2,
        ]
    )
    lines[row] = delimiter.join(cells)
    return Mutated(b"\n".join(lines), f"cell {at} of line {row + 1}: {cells[at][:20]!r}")


SETTINGS = (
    *("", "null", "true", "0", "-1", "1.5", "1e999", ".nan", "9" * 5_000, "x" * HUGE, "[" * 2_000),
    *("[1, [2]]", "{a: 1}", "2024-13-45", "&a [*a]", "!!python/object:os.system x", "!!binary x"),
    *("../../x", "/", '"\\ud83d"', '"a\\0b"'),
)
"""What stands for a setting in YAML."""


def _setting_change(content: bytes, draw: Random) -> Mutated:
    """A setting's value or name is another one."""
    lines = content.decode("utf-8", "replace").split("\n")
    row = draw.randrange(len(lines))
    name, _, value = lines[row].partition(":")
    setting = draw.choice(SETTINGS)
    lines[row] = draw.choice((f"{name}: {setting}", f"{name}: {setting}", f"{name}_:{value}", f"{setting}:{value}", ""))
    return Mutated("\n".join(lines).encode(), f"setting {name[:20]!r}: {lines[row][:30]!r}")


def _flipped(content: bytes, draw: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _put_in(piece: bytes) -> Callable[[bytes, Random], bytes]:
    def change(content: bytes, draw: Random) -> bytes:
        place = draw.randrange(len(content) + 1)
        return content[:place] + piece + content[place:]

    return change


def _cut(content: bytes, draw: Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _left_out(content: bytes, draw: Random) -> bytes:
    first, second = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return content[:first] + content[second:]


def _lines_mixed(content: bytes, draw: Random) -> bytes:
    lines = content.split(b"\n")
    draw.shuffle(lines)
    return b"\n".join(lines)


def _encoded(encoding: str) -> Callable[[bytes, Random], bytes]:
    return lambda content, draw: content.decode("utf-8", "replace").encode(encoding, "replace")


BYTE_CHANGES: Mapping[str, Callable[[bytes, Random], bytes]] = {
    "bytes flipped": _flipped,
    "bytes flipped again": _flipped,
    "cut": _cut,
    "cut elsewhere": _cut,
    "a part left out": _left_out,
    "doubled": lambda content, draw: content + content,
    "doubled on a new line": lambda content, draw: content + b"\n" + content,
    "lines mixed": _lines_mixed,
    "empty": lambda content, draw: b"",
    "white space alone": lambda content, draw: b" \r\n\t\n",
    "BOM": lambda content, draw: b"\xef\xbb\xbf" + content,
    "two BOMs": lambda content, draw: b"\xef\xbb\xbf" * 2 + content,
    "UTF-16": _encoded("utf-16"),
    "UTF-32": _encoded("utf-32"),
    "Latin-1": _encoded("latin-1"),
    "CRLF": lambda content, draw: content.replace(b"\n", b"\r\n"),
    "CR": lambda content, draw: content.replace(b"\n", b"\r"),
    "NUL put in": _put_in(b"\x00"),
    "many NULs": lambda content, draw: content + b"\x00" * 4_096,
    "quotation mark put in": _put_in(b'"'),
    "bracket put in": _put_in(b"]"),
    "comma put in": _put_in(b","),
    "line break put in": _put_in(b"\n"),
    "not UTF-8 put in": _put_in(b"\xff\xfe\xfa"),
    "huge piece put in": _put_in(b"y" * HUGE),
    "nested deeply": lambda content, draw: b"[" * DEPTH + content,
    "objects nested deeply": lambda content, draw: b'{"a":' * DEPTH + content,
}
