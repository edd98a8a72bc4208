"""Triton kernels and `torch.compile`, checked in processes of their own; dropout by drawn positions."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from dora_vl.core import apply_dora
from dora_vl.core.fast import kernels
from dora_vl.core.fast.dropout import SHARED_DROPOUT, SharedDropout, draw_dropped
from dora_vl.core.fast.kernels import SWITCH, kernels_for, triton_kernels
from tests.core.dense_dora import config

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


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.8])
def test_probability_and_independence(probability):
    torch.manual_seed(0)
    like = torch.ones(20_000, 6)
    drawn = (draw_dropped(like, probability).apply(like) == 0).double()
    variance = probability * (1 - probability)
    assert abs(drawn.mean() - probability) < 5 * (variance / drawn.numel()) ** 0.5
    covariance = torch.cov(drawn.t())
    torch.testing.assert_close(covariance.diagonal(), torch.full((6,), variance).double(), rtol=0.06, atol=1e-3)
    off = covariance - torch.diag(covariance.diagonal())
    assert float(off.abs().max()) < 5 * variance / 20_000**0.5


def test_layers_that_read_one_tensor_share_and_a_second_pass_draws_again():
    shared, x = SharedDropout(), torch.randn(40, 7)
    first = [shared.draw(x, 0.3, user) for user in (1, 2, 3)]
    assert first[0] is first[1] is first[2]
    again = shared.draw(x, 0.3, 1)
    assert again is not first[0]
    assert shared.draw(x, 0.3, 2) is again
    assert shared.draw(x, 0.2, 3) is not again, "another probability is another mask"
    assert shared.draw(x.clone(), 0.3, 4) is not again, "an equal tensor is another tensor"
    before = shared.draw(x, 0.3, 5)
    x.add_(1)
    assert shared.draw(x, 0.3, 6) is not before, "changed in place"


def test_sharing_holds_under_autocast_and_keeps_nothing_alive():
    model = nn.ModuleDict({"q": nn.Linear(6, 5), "k": nn.Linear(6, 3)})
    apply_dora(model, config(dropout=0.5))
    x = torch.randn(50, 6)
    with torch.autocast("cpu", torch.bfloat16):
        model["q"](x)
        drawn = SHARED_DROPOUT._dropped
        model["k"](x)
        assert SHARED_DROPOUT._dropped is drawn
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None
