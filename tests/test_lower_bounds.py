"""Every dependency has a lower bound, which `make lower-bounds` installs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.lower_bounds import lower_bounds

ROOT = Path(__file__).parents[1]


def test_every_dependency_has_one() -> None:
    lines = (ROOT / "pyproject.toml").read_text().partition("[tool.")[0]
    sections = re.findall(r"^(?:dependencies|[a-z]+) = \[(.*?)\]\s*(?:#[^\n]*)?$", lines, re.MULTILINE | re.DOTALL)
    named = [one for section in sections for one in re.findall(r'"([^"]+)"', section) if one not in ("hatchling",)]
    named = [one for one in named if not one.startswith(("LICENSE", "."))]
    assert len(named) > 50
    assert lower_bounds(named)["torch"] == "2.8"


def test_the_higher_of_two_counts_and_none_is_an_error() -> None:
    assert lower_bounds(["a[x]>=1.9,<3; extra == 'b'", "A>=1.10", "c>=2"]) == {"a": "1.10", "c": "2"}
    with pytest.raises(ValueError, match="d<3: no lower bound"):
        lower_bounds(["d<3"])
