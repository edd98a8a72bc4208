"""What becomes of one setting: it is set here under another name, it is always so here, or it has no counterpart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dora_vl.core.config import Method
from dora_vl.errors import UserError, shown


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One setting of a file, and what else a rule may need to know."""

    key: str
    value: Any
    settings: Mapping[str, Any]
    """All of the file's, with the tool's defaults beneath."""
    method: Method
    """What the file trains, in our words."""
    file: Path


@dataclass(frozen=True, kw_only=True)
class Found:
    """What it is on the other side."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted name -> value; empty where nothing need be set, or can be."""
    note: str = ""
    is_lost: bool = False
    """It has no counterpart, and `note` says why; beside settings: they say a part of it, and `note` what is left."""


Rule = Callable[[Asked], Found]
Reading = Callable[[Asked], Any]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One side of a translation."""

    name: str
    table: Mapping[str, Rule]
    otherwise: Rule
    """For settings that the table does not name."""
    method: Callable[[Mapping[str, Any]], Method]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What it takes where a file is silent, of settings whose default is another one on the other side."""
    always: Mapping[str, Found] = field(default_factory=dict)
    """What each of its runs does and no setting says, by a few words."""
    needed: Mapping[str, Any] = field(default_factory=dict)
    """What the other side cannot do without -> what to write where the file does not say it."""


def to(name: str, read: Reading | None = None, note: str = "") -> Rule:
    """The same value under another name.

    Args:
        read: makes the value of what the file says; default: as it is.
    """

    def rule(asked: Asked) -> Found:
        return Found(settings={name: asked.value if read is None else read(asked)}, note=note)

    return rule


def same(why: str) -> Rule:
    """Nothing to set, whatever it says: it is always so."""
    return lambda asked: Found(note=why)


def lost(why: str) -> Rule:
    """No counterpart, whatever it says."""
    return lambda asked: Found(note=why, is_lost=True)


def unless(usual: Any, why: str) -> Rule:
    """Nothing to set where it has the usual value; any other has no counterpart."""
    return lambda asked: Found() if asked.value == usual else Found(note=why, is_lost=True)


def one_of(name: str, values: Mapping[Any, Any], why: str) -> Rule:
    """Another name, and other words for its values; a value that is not named has no counterpart."""

    def rule(asked: Asked) -> Found:
        if not isinstance(asked.value, str | int | float) or asked.value not in values:
            return Found(note=why, is_lost=True)
        return Found(settings={name: values[asked.value]})

    return rule


def whole(asked: Asked) -> int:
    """A whole number.

    Raises: UserError if it is none.
    """
    value = _number(asked)
    if value != int(value):
        raise UserError(f"{asked.file}: {asked.key} is {shown(asked.value)}, no whole number")
    return int(value)


def number(asked: Asked) -> float:
    """A number; YAML reads 2e-4 as text.

    Raises: UserError if it is none.
    """
    return _number(asked)


def _number(asked: Asked) -> float:
    try:
        if isinstance(asked.value, bool):
            raise ValueError
        return float(asked.value)
    except (TypeError, ValueError):
        raise UserError(f"{asked.file}: {asked.key} is {shown(asked.value)}, no number") from None


def words(asked: Asked) -> list[str]:
    """Several names: a list, or text with commas or spaces between.

    Raises: UserError if it is neither.
    """
    value = asked.value
    if isinstance(value, str):
        return [one for part in value.split(",") for one in part.split()]
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value
    raise UserError(f"{asked.file}: {asked.key} is {shown(value)}, no list of names")


def is_on(value: Any) -> bool:
    """Whether a switch is on, as YAML or a command line says it."""
    return (
        value is True or (isinstance(value, str) and value.strip().lower() in {"true", "yes", "1", "on"}) or value == 1
    )
