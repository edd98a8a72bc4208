"""Killed at any moment, merge, init and compare leave whole folders or none, and the next start clears up.

KILLS=20 python -m pytest -m slow tests/kills/test_killed_folders.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_what_killed_commands_leave_is_whole_or_absent() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kills.killed_folders", "--count", os.environ.get("KILLS", "6")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
