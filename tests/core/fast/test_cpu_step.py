"""The compiled passes equal `functional.py`'s, and stand aside where they do not know the case."""

import copy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_vl.core import apply_dora
from dora_vl.core.fast import cpu_step
from tests.core.dense_dora import config, move

DTYPES = (torch.float32, torch.bfloat16)
FLOOR = {torch.float32: 4e-6, torch.bfloat16: 5e-3}
"""Of an error's size beside the value's: a sum of one row that nearly cancels is exact by chance in one of the ways."""
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """Every pass is large enough here."""
    monkeypatch.delenv(cpu_step.SWITCH, raising=False)
    monkeypatch.setattr(cpu_step, "SMALLEST", 0)
    operation = cpu_step.compiled_operations
    operation.cache_clear()
    if operation() is None:
        pytest.skip("needs a C++ compiler and ninja: apt-get install g++, pip install ninja")
    yield
    operation.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    counted: Counter[str] = Counter()

    def counting(name: str) -> None:
        real = getattr(cpu_step, name)
        monkeypatch.setattr(cpu_step, name, lambda *operands: counted.update([name]) or real(*operands))

    for name in ("output", "gradients", "factor_gradients", "gains", "norms"):
        counting(name)
    return counted


ONE_STEP = dict.fromkeys(("output", "gradients", "factor_gradients", "gains", "norms"), 2)
"""A step of two layers is these passes."""


def model_of(dtype: torch.dtype, *, rank: int = 5, bias: bool = True, **changes: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 301, bias=bias), nn.Tanh(), nn.Linear(301, 19, bias=bias)).to(dtype)
    apply_dora(model, config(rank=rank, alpha=7.0, **changes))
    move(model)
    return model.train()


def results(model: nn.Module, x: torch.Tensor, run=None) -> list[torch.Tensor]:
    if not torch.is_grad_enabled():
        return [model(x)]
    model.zero_grad()
    torch.manual_seed(8)
    x = x.clone().requires_grad_()
    y = (run or model)(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    y.backward(upstream)
    return [y, x.grad, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]


def assert_as_good_as_python(monkeypatch, model: nn.Module, x: torch.Tensor, *, passes=None) -> None:
    """Beside the same pass in float64, the compiled one is no further off than Python's in the same dtype."""
    outputs = results(model, x, passes and passes(model))
    with monkeypatch.context() as patch:
        patch.setattr(cpu_step, "compiled_operations", lambda: None)
        python, exact = (
            results(twin, x.to(dtype), passes and passes(twin))
            for dtype, twin in ((x.dtype, copy.deepcopy(model)), (torch.float64, copy.deepcopy(model).double()))
        )
    for ours, eager, wide in zip(outputs, python, exact, strict=True):
        size = wide.detach().norm() + 1e-30
        errors = [float((value.detach().double() - wide.detach()).norm() / size) for value in (ours, eager)]
        assert errors[0] <= 2 * errors[1] + FLOOR[x.dtype], (errors, ours.shape)
        assert (ours.shape, ours.dtype) == (wide.shape, eager.dtype)


@each_dtype
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(
    ("rank", "bias", "shape"),
    [(1, True, (2, 3)), (5, False, (11,)), (16, True, (300,)), (67, True, (1,)), (67, False, (8,)), (5, True, ())],
)
def test_outputs_and_gradients_are_those_of_the_equation(monkeypatch, calls, dtype, graph, rank, bias, shape):
    model = model_of(dtype, rank=rank, bias=bias)
    with torch.set_grad_enabled(graph):
        assert_as_good_as_python(monkeypatch, model, torch.randn(*shape, 37).to(dtype))
    assert (calls if graph else calls["output"]) == (ONE_STEP if graph else 2)
    with torch.no_grad():
        assert model(torch.empty(0, 37, dtype=dtype)).shape == (0, 19)


@each_dtype
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reentrant", [True, False, None])
def test_dropout_checkpoints_and_edits_in_place(monkeypatch, calls, dtype, inplace, reentrant):
    model = model_of(dtype, dropout=0.3)

    def passes(model: nn.Module):
        block = nn.Sequential(model[0], nn.ReLU(inplace=inplace), model[2])
        return block if reentrant is None else lambda x: checkpoint(block, x, use_reentrant=reentrant)

    assert_as_good_as_python(monkeypatch, model, torch.randn(23, 37).to(dtype), passes=passes)
    assert calls["gradients"] == 2


@each_dtype
def test_nothing_changes_bit_by_bit_at_the_start(calls, dtype):
    torch.manual_seed(0)
    base, x = nn.Linear(37, 301).to(dtype), torch.randn(70, 37).to(dtype)
    model = nn.Sequential(copy.deepcopy(base))
    apply_dora(model, config(rank=4, alpha=9.0))
    assert torch.equal(model(x), base(x))
    assert calls["output"] == 1


def test_it_follows_steps_and_edits_and_keeps_the_norm_between(monkeypatch, calls):
    model, x = model_of(torch.float32), torch.randn(9, 37)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        assert_as_good_as_python(monkeypatch, model, x)
        norms = calls["norms"]
        results(model, x)
        assert calls["norms"] == norms
        optimizer.step()
        assert_as_good_as_python(monkeypatch, model, x)
        model[0].lora_B.data.mul_(1.2)
        with torch.no_grad():
            model[2].weight.mul_(0.8)
    assert_as_good_as_python(monkeypatch, model, x)


@pytest.mark.parametrize("damage", ["cancelling row", "zero row", "nan"])
def test_rows_that_need_care(monkeypatch, calls, damage):
    model, x = model_of(torch.float32), torch.randn(9, 37)
    with torch.no_grad():
        if damage == "cancelling row":
            model[0].weight[3] = -model[0].adapter.scale * (model[0].lora_B @ model[0].lora_A)[3] * 1.01
        elif damage == "zero row":
            model[0].weight[3], model[0].lora_B[3] = 0, 0
        else:
            model[0].lora_B[3, 1] = float("nan")
    outputs = results(model, x)
    if damage == "nan":
        assert outputs[0].isnan().any()
    else:
        assert_as_good_as_python(monkeypatch, model, x)


def test_what_it_does_not_know_runs_in_python(calls):
    x = torch.randn(9, 37)
    for settings in ({"method": "lora"}, {"method": "magnitude"}, {"detach_norm": False}):
        results(model_of(torch.float32, **settings), x)
    results(model_of(torch.float64), x.double())
    assert calls == {}


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "magnitude"])
def test_a_part_that_does_not_train_gets_no_gradient(monkeypatch, calls, frozen):
    model, x = model_of(torch.float32), torch.randn(9, 37)
    for layer in (model[0], model[2]):
        getattr(layer, frozen).requires_grad_(False)
    model[0].bias.requires_grad_(True)
    assert_as_good_as_python(monkeypatch, model, x)
    assert getattr(model[0], frozen).grad is None
    assert calls == ONE_STEP


def test_without_a_compiler_or_switched_off_it_stands_aside_and_says_so_once(monkeypatch, caplog):
    caplog.set_level("INFO")
    for lines, patch in enumerate(
        (
            lambda: monkeypatch.setenv(cpu_step.SWITCH, "0"),
            lambda: (monkeypatch.delenv(cpu_step.SWITCH), monkeypatch.setenv("CXX", "no-such-compiler")),
            lambda: (monkeypatch.delenv("CXX"), monkeypatch.setattr(cpu_step, "FLAGS", ("--no-such-flag",))),
        )
    ):
        patch()
        cpu_step.compiled_operations.cache_clear()
        assert cpu_step.compiled_operations() is None
        assert cpu_step.compiled_operations() is None
        assert len(caplog.records) == (0, 1, 3)[lines]  # before the last one it says that it compiles
    results(model_of(torch.float32), torch.randn(9, 37))


def test_a_library_that_others_may_have_written_is_not_loaded(monkeypatch, tmp_path) -> None:
    """Nor one whose bytes are not those that were built."""
    built: list[str] = []
    loaded: list[Path] = []

    def build(name: str, sources: list[str], *, build_directory: str, **_: Any) -> None:
        built.append(name)
        Path(build_directory, f"{name}.so").write_bytes(b"library")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("torch.utils.cpp_extension.load", build)
    monkeypatch.setattr(torch, "ops", SimpleNamespace(dora_vl_cpu=SimpleNamespace(), load_library=loaded.append))
    for _ in range(2):
        cpu_step._compile()
    (library,) = tmp_path.glob("*/finished-*.so")
    assert len(built) == 1
    assert [Path(path) for path in loaded] == [library]
    assert library.parent.stat().st_mode & 0o077 == 0
    for path, mode in ((library, 0o666), (library.parent, 0o777)):
        before = path.stat().st_mode
        path.chmod(mode)
        with pytest.raises(PermissionError):
            cpu_step._compile()
        path.chmod(before)
    library.write_bytes(b"another")
    cpu_step._compile()
    assert len(built) == 2
    assert len(loaded) == 1
    assert library.read_bytes() == b"library"
