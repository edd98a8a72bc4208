"""The resolved settings of runs as rows: of one run what is not its default first, of several what differs first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dora_vl.report.run_record import RunRecord

ABSENT = "–"


@dataclass(frozen=True, kw_only=True)
class SettingRow:
    """One setting, its value in each run."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SettingTables:
    """Settings to be seen at once, and the rest."""

    first_title: str
    first: tuple[SettingRow, ...]
    others: tuple[SettingRow, ...]


def setting_tables(runs: Sequence[RunRecord]) -> SettingTables:
    """All settings of all runs, parted."""
    flat = [flattened(run.settings) for run in runs]
    names = list(dict.fromkeys(name for one in flat for name in one))
    rows = {name: SettingRow(name=name, values=tuple(_text(one.get(name, ABSENT)) for one in flat)) for name in names}
    if len(runs) > 1:
        first = [row for row in rows.values() if len(set(row.values)) > 1]
        title = "What differs"
    else:
        defaults = _defaults(runs[0])
        first = [rows[name] for name in names if name not in defaults or defaults[name] != flat[0][name]]
        title = "What is not the default"
    shown = {row.name for row in first}
    others = tuple(row for row in rows.values() if row.name not in shown)
    return SettingTables(first_title=title, first=tuple(first), others=others)


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value; an empty mapping is a value."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value} if prefix else {}
    named = {f"{prefix}.{key}" if prefix else str(key): one for key, one in value.items()}
    return {name: leaf for key, one in named.items() for name, leaf in flattened(one, key).items()}


def _defaults(run: RunRecord) -> dict[str, Any]:
    """What the run's kind of settings has where nothing is said, as JSON has it."""
    from dora_vl.run.command_line import run_parser

    parsed = run_parser("run", "", _kind(run)).get_defaults().as_dict()
    return flattened(json.loads(json.dumps(parsed, default=str)))


def _kind(run: RunRecord) -> type[Any]:
    """The settings' class, by what only one of them has."""
    from dora_vl.run.commonsense_recipe import CommonsenseRunConfig
    from dora_vl.run.recipe import RunConfig
    from dora_vl.run.vlbart_recipe import VlBartRunConfig

    if "scoring" in run.section("evaluation"):
        return CommonsenseRunConfig
    return VlBartRunConfig if "features" in run.section("data") else RunConfig


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
