"""Every dependency of the installed dora-vl at its lower bound, as a constraints file for pip or uv.

    python tests/lower_bounds.py > constraints.txt

A resolver that is only asked for low versions takes a higher one where that lets another be lower; with constraints it
ends instead, and says which bound cannot be had. One that the package does not have a bound for is an error.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import requires

REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[\w,]+\])?(?P<versions>[^;]*)")
LOWER = re.compile(r">=\s*([\w.]+)")
PYTHON = re.compile(r"python_version\s*(?P<sign><|>=)\s*['\"](?P<version>[\d.]+)['\"]")


def lower_bounds(requirements: list[str], python: tuple[int, ...] = sys.version_info[:2]) -> dict[str, str]:
    """Name -> lower bound, the higher one of a package that is named twice for this Python.

    Raises: ValueError for a requirement without one.
    """
    found: dict[str, str] = {}
    for line in requirements:
        if not _is_for(line, python):
            continue
        named = REQUIREMENT.match(line)
        bound = named and LOWER.search(named["versions"])
        if not named or not bound:
            raise ValueError(f"{line}: no lower bound")
        name = named["name"].lower()
        found[name] = max(bound[1], found.get(name, bound[1]), key=_numbers)
    return found


def _is_for(requirement: str, python: tuple[int, ...]) -> bool:
    of = PYTHON.search(requirement.partition(";")[2])
    if not of:
        return True
    is_older = list(python) < _numbers(of["version"])
    return is_older if of["sign"] == "<" else not is_older


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


if __name__ == "__main__":
    for package, version in sorted(lower_bounds(requires("dora-vl") or []).items()):
        sys.stdout.write(f"{package}=={version}\n")
