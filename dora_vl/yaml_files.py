"""YAML that a person wrote: `1e-4` is a number, a key that occurs twice or a number that means another is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode, YAMLError

from dora_vl.errors import UserError, one_line, short_text

MOST_VALUES = 10_000
"""A file holds at most this many values, those of an alias at each use: ten lines of them can mean more than memory
holds, and settings are compared one with all."""
_OTHER_NUMBER = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc] - the C one where it was built
    """YAML in which `1e-4` is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> Any:
    """Returns a YAML file's content."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        sizes: dict[int, float] = {}
        if _check(yaml.compose(text, Loader=_Loader), sizes) > MOST_VALUES:
            raise UserError(f"it holds more than {MOST_VALUES:,} values, or aliases (*NAME) that expand to as many")
        return yaml.load(text, Loader=_Loader)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except YAMLError as error:
        reason = one_line(str(error).replace(' in "<unicode string>"', ""), 200)
        raise UserError(f"{path}: not valid YAML: {reason}; indent with spaces only") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # not UTF-8, or a day that no month has
        raise UserError(f"{path}: not valid YAML: {one_line(str(error), 200)}") from None
    except RecursionError:
        raise UserError(f"{path}: not readable YAML: it is nested too deeply") from None


def refuse_other_number(text: str) -> None:
    """Refuses text that YAML 1.1 takes for another number than a person: `1:30` is 90 there, `010` is 8."""
    if _OTHER_NUMBER.fullmatch(text):
        raise UserError(f"{text} is {yaml.safe_load(text)} in YAML; write the number that is meant")


def _check(node: Node | None, sizes: dict[int, float]) -> float:
    """Counts the values in a node, those of an alias at each use; `sizes` holds the counts by the node's id.

    Refuses such numbers, and doubled keys, of which YAML keeps the last: the first would be dropped silently.
    """
    if node is None or id(node) in sizes:  # an alias
        return sizes.get(id(node), 0.0)
    sizes[id(node)] = math.inf  # while it is looked through: what holds itself has no end
    size = 1.0
    if isinstance(node, ScalarNode) and not node.style:  # not in quotes
        refuse_other_number(node.value)
    elif isinstance(node, SequenceNode):
        size += sum(_check(inside, sizes) for inside in node.value)
    elif isinstance(node, MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if isinstance(key, ScalarNode):
                line, name = key.start_mark.line + 1, key.value
                if name in lines:
                    raise UserError(
                        f"{short_text(name)} occurs twice, in lines {lines[name]} and {line}; write it once"
                    )
                lines[name] = line
            size += _check(value, sizes)
    sizes[id(node)] = size
    return size
