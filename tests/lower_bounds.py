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


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    """Name -> lower bound, the higher one of a package that is named twice.

    Raises: ValueError for a requirement without one.
    """
    found: dict[str, str] = {}
    for line in requirements:
        named = REQUIREMENT.match(line)
        bound = named and LOWER.search(named["versions"])
        if not named or not bound:
            raise ValueError(f"{line}: no lower bound")
        name = named["name"].lower()
        found[name] = max(bound[1], found.get(name, bound[1]), key=_numbers)
    return found


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


if __name__ == "__main__":
    for package, version in sorted(lower_bounds(requires("dora-vl") or []).items()):
        sys.stdout.write(f"{package}=={version}\n")
