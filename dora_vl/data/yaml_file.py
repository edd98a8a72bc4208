"""YAML that a person writes, read so that it means what stands there, and with no other error than `UserError`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode, YAMLError

from dora_vl.errors import UserError, one_line, shown_text

MOST_VALUES = 100_000
"""Of a file of settings, each reference to an earlier part counted as what it stands for."""
_FLOAT, _SCIENTIFIC = "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_OTHER_NUMBER = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc] - the C one where it was built
    """YAML in which `1e-4` is a number."""


_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> Any:
    """What a file says.

    Raises:
        UserError: it cannot be read, is no YAML, holds a key twice or a number that YAML takes for another, or its
            aliases stand for more than memory holds.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        _check(yaml.compose(text, Loader=_Loader), set())
        content = yaml.load(text, Loader=_Loader)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except YAMLError as error:
        said = one_line(str(error).replace(' in "<unicode string>"', ""), 200)
        raise UserError(f"{path}: no YAML: {said}; indent with spaces alone") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # no UTF-8, or a day that no month has
        raise UserError(f"{path}: no YAML: {one_line(str(error), 200)}") from None
    except RecursionError:
        raise UserError(f"{path}: no YAML that can be read: it is nested too deeply") from None
    if _values(content, {}) > MOST_VALUES:
        raise UserError(
            f"{path}: its aliases (*name) stand for more than {MOST_VALUES:,} values, or for themselves; write out "
            "what is meant"
        )
    return content


def refuse_other_number(text: str) -> None:
    """Refuses text that YAML 1.1 takes for another number than a person: `1:30` is 90 there, `010` is 8.

    Raises:
        UserError: it is such text.
    """
    if _OTHER_NUMBER.fullmatch(text):
        raise UserError(f"{text} is {yaml.safe_load(text)} in YAML; write the number that is meant")


def _check(node: Node | None, seen: set[int]) -> None:
    """Refuses such numbers, and doubled keys, of which YAML keeps the last: the first would go without a word."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, ScalarNode) and not node.style:  # not in quotes
        refuse_other_number(node.value)
    elif isinstance(node, SequenceNode):
        for inside in node.value:
            _check(inside, seen)
    elif isinstance(node, MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if isinstance(key, ScalarNode):
                line, name = key.start_mark.line + 1, key.value
                if name in lines:
                    raise UserError(
                        f"{shown_text(name)} stands twice, in lines {lines[name]} and {line}; write it once"
                    )
                lines[name] = line
            _check(value, seen)


def _values(value: object, known: dict[int, int | float]) -> int | float:
    """How many values there are; infinitely many in one that holds itself. Each is looked at once."""
    if not isinstance(value, Mapping | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        inside = value.values() if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(_values(one, known) for one in inside)
    return known[id(value)]
