"""The fused kernels equal plain torch: on CPU through Triton's interpreter, on a GPU as they are compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dora_vl.core.fused import SWITCH, fused_kernels

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("interpreted_triton.py")


def run_checks(**environment: str) -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_kernels_equal_torch_in_the_interpreter():
    pytest.importorskip("triton", reason="torch's CPU builds bring no Triton: pip install triton")
    run_checks(TRITON_INTERPRET="1")


def test_cpu_without_the_interpreter_is_eager(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert fused_kernels(torch.empty(1)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_kernels_on_a_gpu(monkeypatch):
    pytest.importorskip("triton", reason="torch's CPU builds bring no Triton: pip install triton")
    monkeypatch.delenv(SWITCH, raising=False)
    kernels = fused_kernels(torch.empty(1, device="cuda"))
    assert kernels is not None
    assert fused_kernels(torch.empty(1, device="cuda", dtype=torch.float64)) is None
    monkeypatch.setenv(SWITCH, "0")
    assert fused_kernels(torch.empty(1, device="cuda")) is None
    run_checks(CHECKED_DEVICE="cuda")
