"""`make clean` removes what the demos and tools left, and nobody's own run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MADE = (
    *("runs/demo", "runs/demo-vlbart", "runs/demo-video", "runs/fresh-install", "runs/lower-bounds"),
    *("build", "dist", ".cache", ".pytest_cache", ".ruff_cache"),
)
KEPT = ("runs/my/adapter", "runs/demo-of-mine", "records/pope", "configs")


pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def test_clean_keeps_what_the_demos_did_not_make(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (*MADE, *KEPT):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("1")
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert [name for name in MADE if (tmp_path / name).exists()] == []
    assert [name for name in KEPT if not (tmp_path / name / "file").is_file()] == []
