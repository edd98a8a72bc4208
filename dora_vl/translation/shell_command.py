"""Settings out of a shell script: the one command that trains, with the script's own variables filled in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from yaml import YAMLError, safe_load

from dora_vl.errors import UserError, shown

_ASSIGNED = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)")
_SUM = re.compile(r"\$\(\(?\s*(?:expr\s+)?(\d+)\s*\\?([-+*/])\s*(\d+)\s*\)?\)")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::-([^}]*))?\}|(\w+))")


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command line."""

    words: tuple[str, ...]
    environment: dict[str, str]
    """What stands before it as NAME=VALUE."""


def commands(text: str) -> Iterator[Command]:
    """Every command of a script, its lines joined and its variables filled in where the script sets them.

    Raises: ValueError where a line's quotes do not close.
    """
    variables: dict[str, str] = {}
    for words in _lines(text, variables):
        assigned = [_ASSIGNED.fullmatch(word) for word in words if word != "export"]
        if words and all(assigned):
            variables |= {found[1]: found[2] for found in assigned if found}
            continue
        for command in _parts(words):
            count = next((n for n, word in enumerate(command) if not _ASSIGNED.fullmatch(word)), len(command))
            leading = [found for word in command[:count] if (found := _ASSIGNED.fullmatch(word))]
            yield Command(words=tuple(command[count:]), environment={found[1]: found[2] for found in leading})


def _lines(text: str, variables: Mapping[str, str]) -> Iterator[list[str]]:
    """The words of each line; one whose quotes are open goes on in the next."""
    waiting, problem = "", None
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        waiting = f"{waiting}\n{line}" if problem else line
        filled = _VARIABLE.sub(partial(_filled, variables=variables), waiting)
        try:
            words = shlex.split(_SUM.sub(_summed, filled), comments=True)
        except ValueError as error:
            problem = error
            continue
        problem = None
        yield words
    if problem:
        raise problem


def _summed(found: re.Match[str]) -> str:
    """`$(expr 16 / 4)` and `$((16 / 4))`, as a shell counts."""
    left, sign, right = int(found[1]), found[2], int(found[3])
    if sign == "/":
        return str(left // right) if right else found[0]
    return str({"*": left * right, "+": left + right, "-": left - right}[sign])


def _filled(found: re.Match[str], variables: Mapping[str, str]) -> str:
    name = found[1] or found[3]
    default = found[2]
    return variables.get(name, found[0] if default is None else default)


def _parts(words: Sequence[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for word in words:
        if word in ("&&", ";", "||", "|", "&"):
            yield part
            part = []
        else:
            part.append(word)
    yield part


def options(words: Sequence[str], file: Path) -> dict[str, Any]:
    """`--name value`, `--name=value`, `--name` alone (true) and `--name a b`, with each value as YAML reads it.

    Raises:
        UserError: a word before any option, or a variable that the script does not set.
    """
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if equals else []
        elif not name:
            raise UserError(f"{file}: {shown(word)} stands before the first option of the command")
        else:
            found[name].append(word)
    return {name: _value(name, values, file) for name, values in found.items()}


def _value(name: str, values: Sequence[str], file: Path) -> Any:
    if open_one := next((value for value in values if _VARIABLE.search(value)), None):
        raise UserError(f"{file}: --{name} is {shown(open_one)}, which the script does not set; write its value in")
    read = [scalar(value) for value in values]
    return True if not read else read[0] if len(read) == 1 else read


def scalar(text: str) -> Any:
    """A word as YAML reads it, `True` and `False` of Python included, and numbers such as 2e-4."""
    try:
        value = safe_load(text)
    except YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value) if re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", value, re.IGNORECASE) else value
        except ValueError:
            return value
    return value if value is not None else text
