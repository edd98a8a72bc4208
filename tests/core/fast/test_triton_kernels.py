"""The fused kernels equal plain torch: on CPU through Triton's interpreter, on a GPU as they are compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dora_vl.core.fast import kernels
from dora_vl.core.fast.kernels import SWITCH, kernels_for, triton_kernels

ROOT = Path(__file__).parents[3]
LOWEST = "3.9"
"""Version whose interpreter and compiler take these checks; 3.2 and 3.4 do not, nor 3.5 beside numpy 2.4."""
quick_and_slow = pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])


def run_checks(file: str, marked: str, **environment: str) -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    pytest.importorskip(
        "triton", minversion=LOWEST, reason=f'torch\'s CPU builds bring no Triton: pip install "triton>={LOWEST}"'
    )
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(file)), "-m", marked]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@quick_and_slow
def test_kernels_equal_torch_in_the_interpreter(marked):
    run_checks("triton_checks.py", marked, TRITON_INTERPRET="1", DORA_VL_CPU_STEP="0")


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@quick_and_slow
def test_kernels_become_machine_code_without_a_gpu(monkeypatch, marked):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run_checks("triton_compile_checks.py", marked)


@pytest.fixture
def interpreted(monkeypatch):
    """As in a process that runs the interpreter and asked for no kernels yet."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv(SWITCH, raising=False)
    kernels._kernels.clear()
    yield
    kernels._kernels.clear()


@pytest.mark.usefixtures("interpreted")
def test_where_kernels_run_and_what_turns_them_off(monkeypatch):
    assert triton_kernels(torch.empty(1, dtype=torch.bfloat16)) is not None
    assert triton_kernels(torch.empty(1, dtype=torch.float64)) is None
    assert triton_kernels(torch.empty(1, device="meta")) is None
    assert kernels_for(torch.empty(1, dtype=torch.bfloat16), 1) is not None
    with kernels.without_kernels():
        assert kernels_for(torch.empty(1, dtype=torch.bfloat16), 1) is None
    monkeypatch.setenv(SWITCH, "0")
    kernels._kernels.clear()
    assert triton_kernels(torch.empty(1, dtype=torch.bfloat16)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("tiles", ["fixed", "timed"])
def test_kernels_on_a_gpu(monkeypatch, tiles):
    monkeypatch.delenv(SWITCH, raising=False)
    kernels._kernels.clear()
    assert triton_kernels(torch.empty(1, device="cuda")) is not None
    assert triton_kernels(torch.empty(1, device="cuda", dtype=torch.float64)) is None
    run_checks("triton_checks.py", "slow or not slow", CHECKED_DEVICE="cuda", DORA_VL_TRITON_TILES=tiles)
