"""Runs peft_compile_checks.py in a process of its own: `torch.compile` cannot trace through the suite's type checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKS = Path(__file__).with_name("peft_compile_checks.py")


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_compiled_equals_peft(which):
    words = ["-q", "-o", "addopts=--import-mode=importlib", "-m", which, str(CHECKS)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
