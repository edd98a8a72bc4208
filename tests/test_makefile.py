"""`make clean` removes what the demos and tools left, and nobody's own run; a demo that was stopped goes on."""

from __future__ import annotations

import os
import shutil
import stat
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
STANDS_FOR = """#!/bin/sh
# A program that says what it is started with, makes what a demo's later parts ask for, and is stopped at $STOP_AT.
call="$(basename "$0") $*"
echo "$call" >> calls
case "$call" in *"$STOP_AT"*) exit 130;; esac
case "$call" in *video*) folder=runs/demo-video;; *) folder=runs/demo-vlbart;; esac
case "$call" in
  *"--variant pretrain"*) mkdir -p $folder/pretrain/adapter;;
  *" merge "*) mkdir -p $folder/base;;
  *data_prep.features*) mkdir -p $folder/features;;
esac
"""
PARTS = ("data_prep.features", "--variant pretrain", " merge ", "--variant adapt")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile with programs that only say what they would do."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "deepspeed", "dora-vl"):
        (programs / name).write_text(STANDS_FOR)
        (programs / name).chmod(stat.S_IRWXU)
    (tmp_path / ".venv" / ".installed").touch()
    return tmp_path


def started(checkout: Path, target: str, *, stop_at: str = "nothing of all this") -> tuple[int, list[str]]:
    """The status of a demo's start, and which of `PARTS` were started."""
    (checkout / "calls").unlink(missing_ok=True)
    environment = {**os.environ, "STOP_AT": stop_at}
    done = subprocess.run(["make", target], cwd=checkout, env=environment, capture_output=True, check=False)
    lines = (checkout / "calls").read_text().splitlines()
    return done.returncode, [part for part in PARTS if any(part in line for line in lines)]


@pytest.mark.parametrize("target", ["demo-vlbart", "demo-video"])
def test_a_stopped_demo_goes_on_and_a_whole_one_loses_nothing(checkout: Path, target: str) -> None:
    folder = checkout / "runs" / target
    for number, part in enumerate(PARTS):
        status, parts = started(checkout, target, stop_at=part)
        assert status != 0
        assert parts == list(PARTS[: number + 1])  # each finds by itself what is done
        (folder / "features").mkdir(parents=True, exist_ok=True)
        (folder / "features" / "computed").touch()
    assert started(checkout, target) == (0, [PARTS[0], PARTS[1], PARTS[3]])  # the base is merged already
    for name in ("features/computed", "pretrain/adapter", "base"):
        assert (folder / name).exists()


def test_clean_keeps_what_the_demos_did_not_make(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (*MADE, *KEPT):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("1")
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert [name for name in MADE if (tmp_path / name).exists()] == []
    assert [name for name in KEPT if not (tmp_path / name / "file").is_file()] == []
