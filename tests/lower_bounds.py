"""Every dependency of the installed dora-vl at its lower bound, as a constraints file for pip or uv.

    python tests/lower_bounds.py > constraints.txt

A resolver that is only asked for low versions takes a higher one where that lets another be lower; with constraints it
ends instead, and says which bound cannot be had. One that the package does not have a bound for is an error.
"""

import sys
from collections.abc import Iterable
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


def lower_bounds(requirements: Iterable[str], python: str = "{}.{}".format(*sys.version_info)) -> dict[str, str]:
    """Name -> lower bound, the higher one of a package that is named twice for this Python, whatever the extra.

    Raises: ValueError for a requirement without one.
    """
    bounds: dict[str, str] = {}
    for line in requirements:
        requirement = Requirement(line)
        extra = line.rpartition("extra == ")[2].strip("\"' ")
        if requirement.marker and not requirement.marker.evaluate({"python_version": python, "extra": extra}):
            continue
        lower = next((bound.version for bound in requirement.specifier if bound.operator == ">="), None)
        if lower is None:
            raise ValueError(f"{line}: no lower bound")
        name = canonicalize_name(requirement.name)
        bounds[name] = max(lower, bounds.get(name, lower), key=Version)
    return bounds


if __name__ == "__main__":
    for package, version in sorted(lower_bounds(requires("dora-vl") or []).items()):
        sys.stdout.write(f"{package}=={version}\n")
