"""The GPU benchmark without a GPU: it refuses in a line; on tiny shapes in the interpreter it runs from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
NOT_NEEDED = ("deepspeed", "datasets", "timm", "open_clip", "bitsandbytes", "decord", "gguf", "jsonargparse")
"""Of this project's own requirements, what the benchmark runs without."""


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *words], env={**variables, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_without_cuda_it_is_one_line(tmp_path):
    done = run(str(SCRIPT), "--to", str(tmp_path / "gpu"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "no CUDA device; --device cpu --smoke runs the script on tiny shapes\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_whole_script_on_tiny_shapes(tmp_path):
    pytest.importorskip("triton", reason="torch's CPU builds bring no Triton: pip install triton")
    blocks = "; ".join(f"sys.modules[{name!r}] = None" for name in NOT_NEEDED)
    words = ["--device", "cpu", "--smoke", "--rounds", "1", "--to", str(tmp_path / "gpu")]
    code = (
        f"import runpy, sys; {blocks}; sys.argv[1:] = {words!r}; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = run("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())
    assert [row["case"]["name"] for row in written["cases"]] == ["tiny layer", "tiny block"]
    assert all(value > 0 for row in written["cases"] for value in row["train_ms"].values())
    assert "ours_compiled" in written["cases"][1]["decode_ms"]
    assert written["left_out"] == []
