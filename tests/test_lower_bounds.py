"""Every dependency has a lower bound, which `make lower-bounds` installs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.lower_bounds import lower_bounds

ROOT = Path(__file__).parents[1]


def requirements() -> list[str]:
    lines = (ROOT / "pyproject.toml").read_text().partition("[tool.")[0]
    sections = re.findall(r"^(?:dependencies|[a-z]+) = \[(.*?)\]\s*(?:#[^\n]*)?$", lines, re.MULTILINE | re.DOTALL)
    named = [line for section in sections for line in re.findall(r'"([^"]+)"', section)]
    return [line for line in named if not line.startswith(("LICENSE", ".", "hatchling"))]


def test_every_dependency_has_a_bound() -> None:
    bounds = lower_bounds(requirements())
    assert len(bounds) > 40
    assert bounds["torch"] == "2.8"


def test_the_higher_of_two_counts_and_none_is_an_error() -> None:
    assert lower_bounds(["a[x]>=1.9,<3; extra == 'b'", "A>=1.10", "c>=2"]) == {"a": "1.10", "c": "2"}
    with pytest.raises(ValueError):  # noqa: PT011
        lower_bounds(["d<3"])


@pytest.mark.parametrize(("python", "bound"), [("3.10", "4.1.0"), ("3.11", "4.2.1"), ("3.13", "4.2.1")])
def test_what_is_for_another_python_does_not_count(python: str, bound: str) -> None:
    lines = ['filelock>=4.1.0; python_version < "3.11"', "filelock>=4.2.1; python_version >= '3.11' and extra == 'x'"]
    assert lower_bounds(lines, python) == {"filelock": bound}
