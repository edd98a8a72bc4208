"""Runs the checks of `torch.compile` in a process of their own: it cannot trace through the suite's type checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CORE, PEFT = "tests/core/fast/compile_checks.py", "tests/adapters/peft_compile_checks.py"


@pytest.mark.parametrize(
    "words",
    [
        (CORE, "-k", "(one_graph_equals_eager and (dora or live)) or unfrozen"),
        pytest.param((CORE,), marks=pytest.mark.slow),
        pytest.param((PEFT,), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_compiled_equals_eager(words: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
