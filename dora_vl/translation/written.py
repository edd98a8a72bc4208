"""A translation as text: the table, a line a setting, and the settings as YAML or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from dora_vl.errors import shown_text
from dora_vl.translation.translate import Row, Translation, nested

LONGEST_KEY, LONGEST_VALUE, LONGEST_RESULT = 34, 44, 400


def table(translation: Translation) -> Iterator[str]:
    """A line a setting: its name and value there, and what it is here. Names in brackets are not in the file."""
    rows = [(_key(row), _value(row), _result(row)) for row in translation.rows]
    first = min(max((len(key) for key, _, _ in rows), default=0), LONGEST_KEY)
    second = min(max((len(value) for _, value, _ in rows), default=0), LONGEST_VALUE)
    for key, value, result in rows:
        yield f"{key:{first}}  {value:{second}}  {result}".rstrip()


def _key(row: Row) -> str:
    if row.is_said or row.key.startswith("("):
        return row.key
    return f"({row.key})" if row.key else "(not said)"


def _value(row: Row) -> str:
    return "" if row.value is None else shown_text(_plain(row.value), LONGEST_VALUE)


def _result(row: Row) -> str:
    found = row.found
    if found.is_lost and not found.settings:
        return shown_text(f"NO COUNTERPART: {found.note}", LONGEST_RESULT)
    if not found.settings:
        return f"as here: {found.note}" if found.note else "as here"
    made = "; ".join(f"{name}: {_plain(value)}" for name, value in found.settings.items())
    note = f"IN PART: {found.note}" if found.is_lost else found.note
    return shown_text(f"{made}  ({note})" if note else made, LONGEST_RESULT)


def _plain(value: Any) -> str:
    """A value as YAML writes it in a line."""
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str, ensure_ascii=False)


def summary(translation: Translation) -> str:
    """How many settings are taken over, and which are not; defaults of the tool in brackets, as in the table."""
    said = [row for row in translation.rows if row.is_said]
    named = [
        f"{len(keys)} {how}: {', '.join(keys)}"
        for how, keys in (
            ("without a counterpart", [_key(row) for row in translation.lost if not row.found.settings]),
            ("in part", [_key(row) for row in translation.lost if row.found.settings]),
        )
        if keys
    ]
    return f"{len(said)} settings, {'; '.join(named) or 'each has its counterpart'}"


def as_yaml(settings: Mapping[str, Any], *, flat: bool = False) -> str:
    """Settings as a YAML file's text.

    Args:
        flat: dotted names are names, as tools with one level have them.
    """
    content = dict(settings) if flat else _in_order(nested(settings))
    return yaml.safe_dump(_as_data(content), sort_keys=False, allow_unicode=True, width=110)


def _in_order(settings: Mapping[str, Any]) -> dict[str, Any]:
    from dora_vl.run.command_line import SECTIONS

    first = [name for name in SECTIONS if name in settings]
    return {name: settings[name] for name in (*first, *(name for name in settings if name not in first))}


def _as_data(value: Any) -> Any:
    """Tuples and mappings of any kind as YAML's own."""
    if isinstance(value, Mapping):
        return {key: _as_data(one) for key, one in value.items()}
    return [_as_data(one) for one in value] if isinstance(value, list | tuple) else value
