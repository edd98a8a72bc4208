"""`make clean` keeps everybody's own runs; what `make lower-bounds` installs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.lower_bounds import lower_bounds

ROOT = Path(__file__).parents[1]
MADE = (
    *("runs/demo", "runs/demo-vlbart", "runs/demo-video", "runs/fresh-install", "runs/lower-bounds", "runs/newest"),
    *("build", "dist", ".cache", ".pytest_cache", ".ruff_cache"),
)
KEPT = ("runs/my/adapter", "runs/demo-of-mine", "records/pope", "configs")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_clean_keeps_what_the_demos_did_not_make(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (*MADE, *KEPT):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("1")
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert [name for name in MADE if (tmp_path / name).exists()] == []
    assert [name for name in KEPT if not (tmp_path / name / "file").is_file()] == []


def test_every_dependency_has_a_bound() -> None:
    lines = (ROOT / "pyproject.toml").read_text().partition("[tool.")[0]
    sections = re.findall(r"^(?:dependencies|[a-z]+) = \[(.*?)\]\s*(?:#[^\n]*)?$", lines, re.MULTILINE | re.DOTALL)
    named = [line for section in sections for line in re.findall(r'"([^"]+)"', section)]
    bounds = lower_bounds(line for line in named if not line.startswith(("LICENSE", ".", "hatchling")))
    assert len(bounds) > 40
    assert bounds["torch"] == "2.8"


def test_the_higher_of_those_for_this_python_counts_and_none_is_an_error() -> None:
    lines = [
        "a[x]>=1.9,<3; extra == 'b'",
        "A>=1.10",
        'f>=4.1; python_version < "3.11"',
        "f>=4.2; python_version >= '3.11'",
    ]
    assert lower_bounds(lines, "3.10") == {"a": "1.10", "f": "4.1"}
    assert lower_bounds(lines, "3.13") == {"a": "1.10", "f": "4.2"}
    with pytest.raises(ValueError):  # noqa: PT011
        lower_bounds(["d<3"])
