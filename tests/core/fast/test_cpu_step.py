"""The compiled training pass equals `functional.py`'s, and stands aside where it does not know the case."""

from __future__ import annotations

import copy
import sys
from subprocess import run
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.core.fast import cpu_step
from tests.core.dense_dora import move

DTYPES = (torch.float32, torch.bfloat16)
FLOOR = {torch.float32: 4e-6, torch.bfloat16: 2e-3}
"""Of an error's size beside the value's: a sum of one row that nearly cancels is exact by chance in one of the ways."""


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """Every pass is large enough here."""
    monkeypatch.delenv(cpu_step.SWITCH, raising=False)
    monkeypatch.setattr(cpu_step, "SMALLEST_OUTPUT", 0)
    monkeypatch.setattr(cpu_step, "SMALLEST_WEIGHT", 0)
    operation = cpu_step.compiled_operations
    operation.cache_clear()
    if operation() is None:
        pytest.skip("needs a C++ compiler and ninja: apt-get install g++, pip install ninja")
    yield
    operation.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """Counts the passes that ran compiled, and those that were found unsound."""
    counted = {"sound": 0, "unsound": 0}
    operations = cpu_step.compiled_operations()
    assert operations is not None

    def counting(*operands):
        result = operations.adapted_product(*operands)
        counted["sound" if result[1] else "unsound"] += 1
        return result

    counted_operations = SimpleNamespace(adapted_product=counting, adapted_output=operations.adapted_output)
    monkeypatch.setattr(cpu_step, "compiled_operations", lambda: counted_operations)
    return counted


def model_of(dtype: torch.dtype, *, rank: int = 5, bias: bool = True, **changes) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 301, bias=bias), nn.Tanh(), nn.Linear(301, 19, bias=bias)).to(dtype)
    apply_dora(model, DoRAConfig(**{"targets": ("*",), "rank": rank, "alpha": 7.0, "dropout": 0.0, **changes}))
    move(model)
    return model.train()


def results(model: nn.Module, x: torch.Tensor, run=None) -> list[torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = (run or model)(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    y.backward(upstream)
    return [y, x.grad, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]


def reference(model: nn.Module, x: torch.Tensor, monkeypatch, dtype=torch.float64) -> list[torch.Tensor]:
    """What `functional.py` gives, in float64."""
    with monkeypatch.context() as patch:
        patch.setattr(cpu_step, "compiled_operations", lambda: None)
        return results(copy.deepcopy(model).to(dtype), x.to(dtype))


def assert_near(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        scale = float(other.detach().abs().max())
        assert float((one.detach().double() - other.detach()).abs().max()) <= tolerance * scale


NO_BUILDER = """
import torch.utils.cpp_extension as builder
builder.load = None
from dora_vl.core.fast.cpu_step import compiled_operations
assert compiled_operations() is not None
"""


@pytest.mark.slow
def test_a_finished_library_is_loaded_without_the_builder():
    """The builder compiles anew for each checkout that shares the cache, since it compares paths and times."""
    assert cpu_step.compiled_operations() is not None
    run([sys.executable, "-c", NO_BUILDER], check=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 5, 16, 67])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(11,), (2, 3), (300,), (1,), ()])
def test_outputs_and_gradients_are_those_of_the_equation(monkeypatch, calls, dtype, rank, bias, shape):
    model = model_of(dtype, rank=rank, bias=bias)
    x = torch.randn(*shape, 37).to(dtype)
    exact, eager = (reference(model, x, monkeypatch, one) for one in (torch.float64, dtype))
    for found, wanted, python in zip(results(model, x), exact, eager, strict=True):
        errors = [float((one.double() - wanted).detach().norm() / wanted.detach().norm()) for one in (found, python)]
        assert errors[0] <= 2 * errors[1] + FLOOR[dtype], (errors, found.shape)
    assert calls == {"sound": 2, "unsound": 0}


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_draws_what_python_draws(monkeypatch, calls, dtype, edited):
    model = model_of(dtype, dropout=0.3)
    block = nn.Sequential(model[0], nn.ReLU(inplace=edited), model[2])
    x = torch.randn(23, 37).to(dtype)
    wide = copy.deepcopy(model).double()
    wide_block = nn.Sequential(wide[0], nn.ReLU(), wide[2])
    outcomes = []
    for layers, inputs, fast in ((block, x, True), (block, x, False), (wide_block, x.double(), False)):
        with monkeypatch.context() as patch:
            if not fast:
                patch.setattr(cpu_step, "compiled_operations", lambda: None)
            torch.manual_seed(8)
            outcomes.append([one.detach().double() for one in results(layers, inputs)])
    for found, python, wanted in zip(*outcomes, strict=True):
        errors = [float((one - wanted).norm() / wanted.norm()) for one in (found, python)]
        assert errors[0] <= 2 * errors[1] + FLOOR[dtype], (errors, found.shape)
    assert calls == {"sound": 2, "unsound": 0}


def test_nothing_changes_bit_by_bit_at_the_start(calls):
    for dtype in DTYPES:
        torch.manual_seed(0)
        base = nn.Linear(37, 301).to(dtype)
        model = nn.Sequential(copy.deepcopy(base))
        apply_dora(model, DoRAConfig(targets=("*",), rank=4, alpha=9.0, dropout=0.0))
        x = torch.randn(70, 37).to(dtype)
        assert torch.equal(model(x), base(x))
    assert calls["sound"] == 2


def test_it_follows_steps_and_edits_and_keeps_the_norm_between(monkeypatch, calls):
    model, x = model_of(torch.float32), torch.randn(9, 37)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        assert_near(results(model, x), reference(model, x, monkeypatch), 2e-5)
        kept = model[0].compiled_gain
        results(model, x)
        assert model[0].compiled_gain is kept
        optimizer.step()
        assert_near(results(model, x), reference(model, x, monkeypatch), 2e-5)
        model[0].lora_B.data.mul_(1.2)
        model[2].weight.data.mul_(0.8)
    assert_near(results(model, x), reference(model, x, monkeypatch), 2e-5)


@pytest.mark.parametrize("damage", ["cancelling row", "zero row", "gain near zero", "large bias", "nan"])
def test_rows_that_need_care_are_left_to_the_equation(monkeypatch, calls, damage):
    model, x = model_of(torch.float32), torch.randn(9, 37)
    with torch.no_grad():
        if damage == "cancelling row":
            model[0].weight[3] = -model[0].scale() * (model[0].lora_B @ model[0].lora_A)[3] * 1.01
        elif damage == "zero row":
            model[0].weight[3], model[0].lora_B[3] = 0, 0
        elif damage == "gain near zero":
            model[0].magnitude[3] = 1e-5
        elif damage == "large bias":
            model[0].bias[3] = 1e4
        else:
            model[0].lora_B[3, 1] = float("nan")
    found = results(model, x)
    assert calls == {"sound": 1, "unsound": 1}
    if damage == "nan":
        assert found[0].isnan().any()
        return
    assert_near(found, reference(model, x, monkeypatch), 5e-5)
    results(model, x)
    assert calls["unsound"] == 1, "asked again only after a change"


@pytest.mark.parametrize("reentrant", [True, False, None])
def test_checkpoints_and_edits_in_place(monkeypatch, calls, reentrant):
    model, x = model_of(torch.float32), torch.randn(9, 37)
    block = nn.Sequential(model[0], nn.ReLU(inplace=True), model[2])

    def run(x: torch.Tensor) -> torch.Tensor:
        return block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)

    wide = copy.deepcopy(model).double()
    wide_block = nn.Sequential(wide[0], nn.ReLU(), wide[2])
    with monkeypatch.context() as patch:
        patch.setattr(cpu_step, "compiled_operations", lambda: None)
        wanted = results(wide, x.double(), wide_block)
    assert_near(results(model, x, run), wanted, 2e-5)
    assert calls["sound"] >= 2


def test_the_number_of_threads_changes_no_bit_of_the_sums(calls):
    """Inputs and weights are whole numbers, so that the product, which is a library's, is exact in any order."""
    model, x = model_of(torch.float32, bias=False)[:1], torch.randint(-3, 4, (400, 37)).float()
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(-3, 4, (301, 37)))
        model[0].lora_B.zero_()
        model[0].magnitude.copy_(torch.linspace(5, 20, 301))
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(model, x)[-1])  # the magnitude's gradient
    finally:
        torch.set_num_threads(before)
    assert float(found[0].abs().max()) > 0
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert calls["sound"] == 3


def test_a_second_derivative_is_an_error_and_no_zero(calls):
    model, x = model_of(torch.float32), torch.randn(9, 37, requires_grad=True)
    (gradient,) = torch.autograd.grad(model[0](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
    assert calls["sound"] == 1


def test_what_it_does_not_know_runs_in_python(calls):
    x = torch.randn(9, 37)
    for settings in ({"method": "lora"}, {"method": "magnitude"}, {"detach_norm": False}):
        results(model_of(torch.float32, **settings), x)
    results(model_of(torch.float64), x.double())
    model = model_of(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    model[0].lora_A.ds_status = "here"  # as DeepSpeed ZeRO-3 marks its parameters
    results(model, x)
    assert calls == {"sound": 1, "unsound": 0}, "the last model's second layer alone"


def test_without_a_compiler_or_switched_off_it_stands_aside(monkeypatch, caplog):
    monkeypatch.setenv(cpu_step.SWITCH, "0")
    cpu_step.compiled_operations.cache_clear()
    assert cpu_step.compiled_operations() is None
    monkeypatch.delenv(cpu_step.SWITCH)
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpu_step.compiled_operations.cache_clear()
    with caplog.at_level("INFO"):
        assert cpu_step.compiled_operations() is None
        assert cpu_step.compiled_operations() is None
    assert len(caplog.records) == 1
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(cpu_step, "FLAGS", ("--no-such-flag",))
    cpu_step.compiled_operations.cache_clear()
    assert cpu_step.compiled_operations() is None
    assert "could not be built" in caplog.text
    results(model_of(torch.float32), torch.randn(9, 37))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 5, 16, 67])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1, 1), (2, 3), (8,), (9,), (300,), (0,)])
def test_without_a_graph_outputs_are_those_of_the_equation(monkeypatch, dtype, rank, bias, shape):
    model = model_of(dtype, rank=rank, bias=bias).eval()
    x = torch.randn(*shape, 37).to(dtype)
    with torch.no_grad():
        found = model(x)
        assert all(layer._factors.compiled for layer in (model[0], model[2]))
        monkeypatch.setattr(cpu_step, "compiled_operations", lambda: None)
        python, exact = (copy.deepcopy(model).to(one)(x.to(one)).double() for one in (dtype, torch.float64))
    assert found.shape == exact.shape
    assert found.dtype == dtype
    size = float(exact.norm()) or 1.0
    assert float((found.double() - exact).norm()) / size <= 2 * float((python - exact).norm()) / size + FLOOR[dtype]


def test_without_a_graph_a_change_of_anything_is_seen():
    model = model_of(torch.float32).eval()
    x, layer = torch.randn(1, 37), model[0]
    with torch.no_grad():
        for change in (
            lambda: layer.lora_A.mul_(1.5),
            lambda: layer.lora_B.data.add_(0.1),
            lambda: layer.magnitude.mul_(0.7),
            lambda: layer.weight.mul_(1.1),
            lambda: layer.bias.add_(1.0),
        ):
            before = layer(x)
            change()
            after, dense = layer(x), copy.deepcopy(layer).double()(x.double())
            assert not torch.allclose(before, after)
            assert torch.allclose(after.double(), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "magnitude"])
def test_a_part_that_does_not_train_gets_no_gradient(monkeypatch, calls, frozen):
    model, x = model_of(torch.float32), torch.randn(9, 37)
    for layer in (model[0], model[2]):
        getattr(layer, frozen).requires_grad_(False)
    model[0].bias.requires_grad_(True)
    assert_near(results(model, x), reference(model, x, monkeypatch), 2e-5)
    assert getattr(model[0], frozen).grad is None
    assert calls["sound"] == 2
