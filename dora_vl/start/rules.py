"""The engine of `dora-vl translate`: a table a tool says what becomes of each setting, and this reads it.

A setting is set here under another name, is always so here, or has no counterpart; nothing is left out in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dora_vl.core.config import Method
from dora_vl.errors import UserError, shown, shown_text
from dora_vl.training.settings_files import SECTIONS

LONGEST_KEY, LONGEST_VALUE, LONGEST_RESULT = 34, 44, 400


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a file, and what else a rule may need to know."""

    key: str
    value: Any
    settings: Mapping[str, Any]
    """All of the file's, with the tool's defaults beneath."""
    method: Method
    """What the file trains, in our words."""
    file: Path


@dataclass(frozen=True, kw_only=True)
class Counterpart:
    """What a setting is here."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted name -> value; empty where nothing need be set, or can be."""
    note: str = ""
    is_lost: bool = False
    """It has none, and `note` says why; beside settings: they say a part of it, and `note` what is left."""


Rule = Callable[[Setting], Counterpart]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool's settings and what they are here."""

    name: str
    table: Mapping[str, Rule]
    otherwise: Rule
    """For settings that the table does not name."""
    method: Callable[[Mapping[str, Any]], Method]
    defaults: Mapping[str, Any]
    """What it takes where a file is silent, of settings whose default is another one here."""
    always: Mapping[str, Counterpart] = field(default_factory=dict)
    """What each of its runs does and no setting says, by a few words."""
    needed: Mapping[str, Any] = field(
        default_factory=lambda: {
            "model.base": "BASE",
            "data.train": "train.json",
            "training.output_dir": "runs/translated",
        }
    )
    """What a run cannot do without -> what to write where the file does not say it."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table above a translated file."""

    key: str
    value: Any
    counterpart: Counterpart
    is_in_file: bool = True


@dataclass(frozen=True, kw_only=True)
class Translation:
    """Every setting's row, and the run that they make, by dotted names."""

    rows: tuple[Row, ...]
    settings: Mapping[str, Any]


def translate(tool: Tool, given: Mapping[str, Any], file: Path) -> Translation:
    """All settings of one file.

    Args:
        given: the file's settings; null is silence.
        file: its name, for messages, and where its paths may start.

    Raises:
        UserError: a value that its setting cannot have.
    """
    spoken = {key: value for key, value in given.items() if value is not None}
    settings = {**tool.defaults, **spoken}
    method = tool.method(settings)

    def row(key: str, *, is_in_file: bool) -> Row:
        setting = Setting(key=key, value=settings[key], settings=settings, method=method, file=file)
        rule = tool.table.get(key, tool.otherwise)
        return Row(key=key, value=settings[key], counterpart=rule(setting), is_in_file=is_in_file)

    rows = [row(key, is_in_file=True) for key in spoken]
    settled = {name for line in rows for name in line.counterpart.settings}
    silence = Counterpart(note="null: as if it were not there")
    rows += [Row(key=key, value=None, counterpart=silence) for key in given if key not in spoken]
    defaults = [row(key, is_in_file=False) for key in tool.defaults if key not in spoken]
    # A default whose setting the file says under another name (torch_dtype, dtype) is none of this run's.
    rows += [line for line in defaults if not line.counterpart.settings or line.counterpart.settings.keys() - settled]
    rows += [Row(key=key, value=None, counterpart=made, is_in_file=False) for key, made in tool.always.items()]
    made: dict[str, Any] = {}
    for line in rows:  # what the file says comes first, and wins
        for name, value in line.counterpart.settings.items():
            made.setdefault(name, value)
    missing = {name: value for name, value in tool.needed.items() if name not in made}
    note = "the file does not say it: put yours here"
    rows += [
        Row(key="", value=None, counterpart=Counterpart(settings={name: value}, note=note), is_in_file=False)
        for name, value in missing.items()
    ]
    return Translation(rows=tuple(rows), settings={**made, **missing})


# -- rules --------------------------------------------------------------------------------------------------------


def to(name: str, read: Callable[[Setting], Any] = lambda setting: setting.value, note: str = "") -> Rule:
    """The value, as `read` makes it, under another name."""
    return lambda setting: Counterpart(settings={name: read(setting)}, note=note)


def same(why: str) -> Rule:
    """Nothing to set, whatever it says: it is always so."""
    return lambda setting: Counterpart(note=why)


def lost(why: str) -> Rule:
    """No counterpart, whatever it says."""
    return lambda setting: Counterpart(note=why, is_lost=True)


def unless(usual: Any, why: str) -> Rule:
    """Nothing to set where it has the usual value; any other has no counterpart."""
    return lambda setting: Counterpart() if setting.value == usual else Counterpart(note=why, is_lost=True)


def unless_off(why: str) -> Rule:
    """Nothing to set where it is empty or off."""
    return lambda setting: Counterpart(note="off") if not is_on(setting.value) else Counterpart(note=why, is_lost=True)


def where_on(settings: Mapping[str, Any], note: str = "") -> Rule:
    """A switch that stands for settings of ours."""
    return lambda setting: (
        Counterpart(settings=settings, note=note) if is_on(setting.value) else Counterpart(note="off")
    )


def one_of(name: str, values: Mapping[Any, Any], why: str) -> Rule:
    """Another name, and other words for its values; a value that is not named has no counterpart."""

    def rule(setting: Setting) -> Counterpart:
        if not isinstance(setting.value, str | int | float) or setting.value not in values:
            return Counterpart(note=why, is_lost=True)
        return Counterpart(settings={name: values[setting.value]})

    return rule


def number(setting: Setting) -> float:
    """A number; YAML reads 2e-4 as text.

    Raises: UserError if it is none.
    """
    try:
        if isinstance(setting.value, bool):
            raise ValueError
        return float(setting.value)
    except (TypeError, ValueError):
        raise UserError(f"{setting.file}: {setting.key} is {shown(setting.value)}, no number") from None


def whole(setting: Setting) -> int:
    """A whole number.

    Raises: UserError if it is none.
    """
    if (value := number(setting)) != int(value):
        raise UserError(f"{setting.file}: {setting.key} is {shown(setting.value)}, no whole number")
    return int(value)


def words(setting: Setting) -> list[str]:
    """Several names: a list, or text with commas or spaces between.

    Raises: UserError if it is neither.
    """
    value = setting.value
    if isinstance(value, str):
        return value.replace(",", " ").split()
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return value
    raise UserError(f"{setting.file}: {setting.key} is {shown(value)}, no list of names")


def is_on(value: Any) -> bool:
    """Whether a switch is on, as YAML or a command line says it."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "false", "no", "0", "off", "none", "null")
    return bool(value)


# -- text ---------------------------------------------------------------------------------------------------------


def table(translation: Translation) -> Iterator[str]:
    """A line a setting: its name and value there, and what it is here. Names in brackets are not in the file."""
    rows = [(_key(row), _value(row), _result(row)) for row in translation.rows]
    first = min(max((len(key) for key, _, _ in rows), default=0), LONGEST_KEY)
    second = min(max((len(value) for _, value, _ in rows), default=0), LONGEST_VALUE)
    for key, value, result in rows:
        yield f"{key:{first}}  {value:{second}}  {result}".rstrip()


def _key(row: Row) -> str:
    if row.is_in_file or row.key.startswith("("):
        return row.key
    return f"({row.key or 'not said'})"


def _value(row: Row) -> str:
    return "" if row.value is None else shown_text(_plain(row.value), LONGEST_VALUE)


def _result(row: Row) -> str:
    settings, note = row.counterpart.settings, row.counterpart.note
    if not settings:
        head = "NO COUNTERPART" if row.counterpart.is_lost else "as here"
        return shown_text(f"{head}: {note}" if note else head, LONGEST_RESULT)
    made = "; ".join(f"{name}: {_plain(value)}" for name, value in settings.items())
    note = f"IN PART: {note}" if row.counterpart.is_lost else note
    return shown_text(f"{made}  ({note})" if note else made, LONGEST_RESULT)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def summary(translation: Translation) -> str:
    """How many settings are taken over, and which are not; the tool's defaults in brackets, as in the table."""
    count = sum(row.is_in_file for row in translation.rows)
    lost_rows = [row for row in translation.rows if row.counterpart.is_lost]
    groups = {
        "without a counterpart": [_key(row) for row in lost_rows if not row.counterpart.settings],
        "in part": [_key(row) for row in lost_rows if row.counterpart.settings],
    }
    named = [f"{len(keys)} {how}: {', '.join(keys)}" for how, keys in groups.items() if keys]
    return f"{count} settings, {'; '.join(named) or 'each has its counterpart'}"


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Settings by dotted names as a run's YAML, sections in their usual order."""
    nested: dict[str, Any] = {}
    order = (*SECTIONS, "")
    for name in sorted(
        settings, key=lambda name: order.index(head if (head := name.partition(".")[0]) in order else "")
    ):
        *outer, last = name.split(".")
        section = nested
        for part in outer:
            section = section.setdefault(part, {})
        section[last] = settings[name]
    return yaml.safe_dump(_as_data(nested), sort_keys=False, allow_unicode=True, width=110)


def _as_data(value: Any) -> Any:
    """Tuples and mappings of any kind as YAML's own."""
    if isinstance(value, Mapping):
        return {key: _as_data(inside) for key, inside in value.items()}
    return [_as_data(inside) for inside in value] if isinstance(value, list | tuple) else value


# Names of layers as PEFT reads them, a list of endings or a regular expression, as our patterns of full names.


ALL_LINEAR = "all-linear"
OUTPUT_HEAD = "lm_head"
"""Stands at the top of a model: no dot before it."""
TOPS = ("model", "transformer", "language_model", "vision_tower", "visual")
"""What stands at the top of models of transformers."""
_SPECIAL = re.compile(r"[*?\[]")
MOST = 64
"""Patterns that one expression may become."""


def globs_of_endings(names: Iterable[str]) -> list[str]:
    """PEFT's list: a name that it equals, or that it ends with behind a dot."""
    return [name if name == OUTPUT_HEAD or _is_full(name) else f"*.{name}" for name in names]


def _is_full(name: str) -> bool:
    """From the model's top, with a layer's number: as tools write the layers that they have adapted."""
    parts = name.split(".")
    return parts[0] in TOPS and any(part.isdecimal() for part in parts)


def globs_of_expression(expression: str) -> list[str]:
    """A regular expression that has to fit a whole name, as patterns that hit the same names.

    Raises: ValueError where it cannot be said so; the message is the part that cannot.
    """
    text = expression.removeprefix("^")
    text = text.removesuffix("$")
    reader = _Expression(text)
    globs = reader.choices()
    if reader.place != len(text):
        raise ValueError(text[reader.place :])
    return list(dict.fromkeys(re.sub(r"\*+", "*", one) for one in globs))


class _Expression:
    """Reads one expression from the left: texts, `.`, `.*`, `.+`, `\\d+`, classes, groups of choices, `?`."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0

    def choices(self) -> list[str]:
        """What stands between `|`, up to the end or a closing bracket."""
        found = self._sequence()
        while self._takes("|"):
            found += self._sequence()
        return found

    def _sequence(self) -> list[str]:
        found = [""]
        while self.place < len(self.text) and self.text[self.place] not in "|)":
            ends = self._element()
            found = [start + end for start in found for end in ends]
            if len(found) > MOST:
                raise ValueError(f"more than {MOST} patterns")
        return found

    def _element(self) -> list[str]:
        if self._takes("("):
            return self._group()
        single = self._single()
        if single == "?" and self._takes("*"):
            self._takes("?")  # lazy: the whole name has to fit all the same
            return ["*"]
        if single in ("?", "[0-9]") and self._takes("+"):
            self._takes("?")
            return [single + "*"]
        if self._takes("?"):
            return [single, ""]
        if self.place < len(self.text) and self.text[self.place] in "*+{":
            raise ValueError(self.text[self.place :])
        return [single]

    def _group(self) -> list[str]:
        if self._takes("?") and not self._takes(":"):
            raise ValueError(f"(?{self.text[self.place :]}")
        found = self.choices()
        if not self._takes(")"):
            raise ValueError("( is not closed")
        if self._takes("?"):
            return [*found, ""]
        if self.place < len(self.text) and self.text[self.place] in "*+{":
            raise ValueError(self.text[self.place :])
        return found

    def _single(self) -> str:
        character = self.text[self.place]
        self.place += 1
        if character == ".":
            return "?"
        if character == "\\":
            return self._escaped()
        if character == "[":
            return self._class()
        if character in "^$*+?{":
            raise ValueError(self.text[self.place - 1 :])
        return character

    def _escaped(self) -> str:
        if self.place == len(self.text):
            raise ValueError("\\")
        character = self.text[self.place]
        self.place += 1
        if character == "d":
            return "[0-9]"
        if character.isalnum():
            raise ValueError(f"\\{character}")
        return f"[{character}]" if _SPECIAL.match(character) else character

    def _class(self) -> str:
        end = self.text.find("]", self.place)
        inside = self.text[self.place : end]
        if end < 0 or "\\" in inside or not inside:
            raise ValueError(self.text[self.place - 1 :])
        self.place = end + 1
        return f"[{'!' + inside[1:] if inside.startswith('^') else inside}]"

    def _takes(self, sign: str) -> bool:
        if not self.text.startswith(sign, self.place):
            return False
        self.place += len(sign)
        return True
