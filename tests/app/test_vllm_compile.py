"""Runs vllm_compile_checks.py in a process of its own: `torch.compile` cannot trace through the suite's type checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECKS = Path(__file__).with_name("vllm_compile_checks.py")


def test_compiled_equals_eager() -> None:
    words = ["-q", "-o", "addopts=--import-mode=importlib", str(CHECKS)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
