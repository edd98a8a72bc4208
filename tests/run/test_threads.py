"""OpenMP's threads wait as the user says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dora_vl.errors import SPINS

ROOT = Path(__file__).parents[2]
SCRIPTS = ("llava_instruct", "vlbart_image", "vlbart_video", "commonsense", "image_qa", "video_qa")


def printed(code: str, **stated: str) -> list[str]:
    """The words of a program's last line."""
    environment = {name: value for name, value in os.environ.items() if name not in SPINS}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), **stated},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, [*SPINS.values()]),
        ({"GOMP_SPINCOUNT": "7"}, ["7", SPINS["KMP_BLOCKTIME"]]),
        ({"OMP_WAIT_POLICY": "active"}, ["None", "None"]),
    ],
)
def test_threads_do_not_spin_but_as_the_user_says(stated: dict[str, str], expected: list[str]) -> None:
    """OpenMP's library reads it when torch loads it, so no entry may import torch before."""
    code = f"""
import importlib, os, sys
before = dict(os.environ)
for name in {("dora_vl.cli", *(f"tasks.{name}" for name in SCRIPTS))}:
    importlib.import_module(name)
assert dict(os.environ) == before and "torch" not in sys.modules
sys.modules["dora_vl.cli"].main(["--version"])
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("KMP_BLOCKTIME"), "torch" in sys.modules)
"""
    assert printed(code, **stated) == [*expected, "False"]
