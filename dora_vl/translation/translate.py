"""Puts a file's settings through a tool's table: a row for each, and what all of them make together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_vl.translation.rules import Asked, Found, Tool


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one setting."""

    key: str
    value: Any
    found: Found
    is_said: bool = True
    """Whether the file says it; otherwise it is the tool's default, or what its runs always do."""


@dataclass(frozen=True, kw_only=True)
class Translation:
    """Every setting of a file, and the settings on the other side."""

    rows: tuple[Row, ...]
    settings: Mapping[str, Any]
    """Dotted name -> value."""

    @property
    def lost(self) -> tuple[Row, ...]:
        """Those without a counterpart."""
        return tuple(row for row in self.rows if row.found.is_lost)


def translate(tool: Tool, said: Mapping[str, Any], file: Path) -> Translation:
    """All settings of one file.

    Args:
        said: the file's settings; null is silence.
        file: its name, for messages, and where its paths may start.

    Raises:
        UserError: a value that its setting cannot have.
    """
    spoken = {key: value for key, value in said.items() if value is not None}
    settings = {**tool.defaults, **spoken}
    method = tool.method(settings)

    def row(key: str, value: Any, *, is_said: bool) -> Row:
        asked = Asked(key=key, value=value, settings=settings, method=method, file=file)
        return Row(key=key, value=value, found=tool.table.get(key, tool.otherwise)(asked), is_said=is_said)

    silent = {key: value for key, value in tool.defaults.items() if key not in spoken}
    rows = [row(key, value, is_said=True) for key, value in spoken.items()]
    rows += [
        Row(key=key, value=None, found=Found(note="null: as if it were not there")) for key in said if key not in spoken
    ]
    settled = {name for made_here in rows for name in made_here.found.settings}
    usual = [row(key, value, is_said=False) for key, value in silent.items()]
    # A default whose setting the file says under another name (torch_dtype, dtype) is none of this run's.
    rows += [
        default for default in usual if not default.found.settings.keys() or default.found.settings.keys() - settled
    ]
    rows += [Row(key=key, value=None, found=found, is_said=False) for key, found in tool.always.items()]
    made: dict[str, Any] = {}
    for one in rows:  # what is said comes first, and wins
        for name, value in one.found.settings.items():
            made.setdefault(name, value)
    missing = {name: value for name, value in tool.needed.items() if name not in made}
    note = "the file does not say it: put yours here"
    rows += [
        Row(key="", value=None, found=Found(settings={name: value}, note=note), is_said=False)
        for name, value in missing.items()
    ]
    return Translation(rows=tuple(rows), settings={**made, **missing})


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as mappings in mappings."""
    made: dict[str, Any] = {}
    for name, value in settings.items():
        *outer, last = name.split(".")
        place = made
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    return made
