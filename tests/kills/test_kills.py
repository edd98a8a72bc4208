"""Killed at any moment, a run resumes to the same bits, and whatever else writes leaves whole files or none.

On other ranks or another engine a run resumes to rounding. KILLS=100 python -m pytest -m slow tests/kills
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize(
    "words",
    [("killed_runs",), ("killed_runs", "--change"), ("killed_folders",)],
    ids=["the same shape", "another shape", "folders"],
)
def test_nothing_is_lost_by_a_kill(words: tuple[str, ...]) -> None:
    module, *options = words
    command = [sys.executable, "-m", f"tests.kills.{module}", "--count", os.environ.get("KILLS", "6"), *options]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
