"""The Triton kernels against plain torch in float64, and whole layers through them against the eager ones.

Run by test_compiled.py in a process of its own: Triton decides when it is imported whether it interprets.
"""

import copy
import os
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dora_vl.core import apply_dora, functional
from dora_vl.core.fast.dropout import SHARED_DROPOUT, Dropped
from dora_vl.core.fast.kernels import triton_kernels
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.step import CANCELLATION, Gain
from tests.core.dense_dora import config, move_layer
from tests.core.test_layers import PATH, Sealed

if triton_kernels(torch.empty(1, device=os.environ.get("CHECKED_DEVICE", "cpu"))) is None:
    pytest.skip("runs in Triton's interpreter or on a GPU", allow_module_level=True)

from dora_vl.core.fast import triton as kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SCALE = 1.7
slow = partial(pytest.param, marks=pytest.mark.slow)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def device():
    torch.set_default_device(os.environ.get("CHECKED_DEVICE", "cpu"))
    torch.manual_seed(0)
    yield
    torch.set_default_device(None)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "", *, times: float = 1.0) -> None:
    size = expected.double().abs().max().clamp_min(1e-9)
    error = float((actual.double() - expected.double()).abs().max() / size)
    assert actual.shape == expected.shape
    assert error <= times * TOLERANCE[dtype], (what, dtype, error)


class Operands(NamedTuple):
    """Those of `output`, and of `gradients` but its dy, which is `product` here."""

    product: Tensor
    x: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    gain: Gain
    scale: float = SCALE

    @classmethod
    def drawn(cls, rows: int, out: int, rank: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> "Operands":
        shapes = (rows, out), (rows, 26), (rank, 26), (out, rank)
        product, x, a, b = (torch.randn(shape).to(dtype) for shape in shapes)
        gain = Gain(torch.linspace(0.5, 1.6, out), torch.linspace(0.3, 2.0, out), dtype)
        return cls(product, x, a / 5, b, torch.randn(out).to(dtype) if bias else None, gain)

    def output(self) -> tuple[Tensor, Tensor]:
        return kernels.output(*self)

    def gradients(self, dy: Tensor) -> tuple[Tensor, ...]:
        return kernels.gradients(dy, self.product, self.b, self.bias, self.gain, self.scale)


def every_other(tensor: Tensor) -> Tensor:
    """The same values, in a layout with gaps along every axis."""
    wide = tensor.new_full([2 * size for size in tensor.shape], float("nan"))
    view = wide[(slice(None, None, 2),) * tensor.ndim]
    view.copy_(tensor)
    return view


def turned(tensor: Tensor) -> Tensor:
    """The same values, columns first."""
    return tensor.t().contiguous().t() if tensor.ndim == 2 else every_other(tensor)


# -- the passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [True, False])
@each_dtype
# Odd sizes, one row as in decoding, several blocks and splits; ranks below, between and above blocks.
@pytest.mark.parametrize("shape", [(1, 5, 1), (7, 130, 3), *map(slow, [(130, 257, 130), (18, 33, 257)])], ids=str)
def test_both_passes(shape, dtype, with_bias):
    of = Operands.drawn(*shape, dtype, with_bias)
    dy, before = torch.randn_like(of.product), of.product.clone()
    y, hidden = of.output()
    assert torch.equal(of.product, before)
    assert (y.dtype, hidden.dtype) == (dtype, dtype)
    close(hidden, SCALE * of.x.double() @ of.a.double().t(), dtype, "h")
    frozen = of.product.double() - (0 if of.bias is None else of.bias.double())
    wide = (1 + of.gain.minus_one.double()) * (frozen + hidden.double() @ of.b.double().t())
    close(y, wide if of.bias is None else wide + of.bias.double(), dtype, "y")
    dz, dh, dm, db = of.gradients(dy)
    assert (dz.dtype, dh.dtype) == (dtype, dtype)
    close(dz, (1 + of.gain.minus_one.double()) * dy.double(), dtype, "dz")
    close(dm, (dy.double() * frozen).sum(0), torch.float32, "dm")
    close(db, dy.double().sum(0), torch.float32, "db")
    close(dh, SCALE * dz.double() @ of.b.double(), dtype, "dh")


@pytest.mark.parametrize("layout", [every_other, turned], ids=["gaps", "columns first"])
def test_any_layout_of_any_operand(layout):
    """Each operand in turn gives the bits of contiguous ones."""
    of, dy = Operands.drawn(21, 75, 19), torch.randn(21, 75)
    plain, straight = of.output(), of.gradients(dy)
    strided = Gain(of.gain.full, of.gain.per_norm, of.gain.dtype)
    strided.__dict__["minus_one"] = every_other(of.gain.minus_one)
    for name in ("product", "b", "bias"):
        other = of._replace(gain=strided, **{name: layout(getattr(of, name))})
        for results, expected in ((other.output(), plain), (other.gradients(layout(dy)), straight)):
            assert all(torch.equal(value, same) for value, same in zip(results, expected, strict=True)), name


@each_dtype
def test_a_neutral_change_changes_no_bit(dtype):
    of = Operands.drawn(9, 33, 3, dtype)
    gain = Gain(torch.ones(33), torch.ones(33), dtype)
    assert torch.equal(of._replace(b=torch.zeros_like(of.b), gain=gain).output()[0], of.product)


def test_a_large_bias_leaves_the_magnitude_its_gradient():
    """Subtracted after the sums, a bias of a thousand costs float32 three digits more than before them."""
    of, dy = Operands.drawn(300, 40, 3), torch.randn(300, 40) + 1
    bias = 1e3 * torch.randn(40)
    of = of._replace(product=of.product + bias, bias=bias)
    close(of.gradients(dy)[2], (dy.double() * (of.product - bias).double()).sum(0), torch.float32, "dm")


# -- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiled", [kernels.OUTPUT, kernels.BACKWARD], ids=["output", "backward"])
def test_every_tile_gives_the_same(monkeypatch, tiled):
    """Up to the order of sums; the few-row tiles among them, on more rows than they have."""
    of, dy = Operands.drawn(150, 200, 20), torch.randn(150, 200)
    results = []
    for tile in tiled.space:
        monkeypatch.setattr(tiled, "config", lambda *_, tile=tile: tile)
        results.append((*of.output(), *of.gradients(dy)))
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            close(value, expected, torch.float32)


# -- whole layers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """How often the kernel of the output ran."""
    calls: list[int] = []
    real = kernels.output
    monkeypatch.setattr(kernels, "output", lambda *operands: calls.append(1) or real(*operands))
    return calls


def adapted_layer(kind: str, *, bias: bool = True, through_zero: bool = False, **changes: Any) -> Any:
    base: Any = Sealed(33, 70) if kind == "opaque" else nn.Linear(33, 70)
    base.bias = base.bias if bias else None
    model = nn.Sequential(base)
    apply_dora(model, config(rank=changes.pop("rank", 5), alpha=7.0, opaque_layers=(PATH,), **changes))
    layer = model[0]
    assert isinstance(layer, AdaptedLayer)
    move_layer(layer)
    if through_zero and layer.magnitude is not None:
        with torch.no_grad():
            layer.magnitude.mul_(torch.linspace(-0.04, 1.0, 70))
    return layer


def passed(layer: nn.Module, x: Tensor, upstream: Tensor, *, edit: bool) -> dict[str, Tensor]:
    """Output and gradients; a reader may change the output in place."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    values = {"y": y.detach().clone()}
    if edit:
        y = y.relu_() if y.dtype == torch.float32 else y.relu()
    y.backward(upstream.to(y.dtype))
    return {
        **values,
        "x": x.grad,
        **{name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None},
    }


@pytest.mark.parametrize("kind", ["linear", "opaque"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": False},
        {"method": "magnitude"},
        {"method": "lora"},
        {"rank": 130},
        {"detach_norm": False},
        {"dropout": 0.4},
        {"dropout": 0.4, "edit": True},
        {"through_zero": True, "edit": True},
        {"through_zero": True},
        {"trained_bias": True},
    ],
    ids=str,
)
def test_layers_equal_the_eager_ones(monkeypatch, launches, kind, changes):
    """Through the kernels in float32, and eagerly in float64 under the same mask."""
    changes = dict(changes)
    edit, trained_bias = changes.pop("edit", kind == "opaque"), changes.pop("trained_bias", False)
    narrow = adapted_layer(kind, **changes)
    if narrow.bias is not None:
        narrow.bias.requires_grad_(trained_bias)
    wide, x, upstream = copy.deepcopy(narrow).double(), torch.randn(2, 9, 33), torch.randn(2, 9, 70)
    positions = torch.randperm(18 * 33)[:230]
    monkeypatch.setattr(SHARED_DROPOUT, "draw", lambda tensor, p, user: Dropped(p, positions))
    eager = changes.get("method", "dora") != "dora" or not changes.get("detach_norm", True)
    results = passed(narrow, x, upstream, edit=edit)
    assert len(launches) == (0 if eager else 1)
    expected = passed(wide, x.double(), upstream, edit=edit)
    assert results.keys() == expected.keys()
    for name, reference in expected.items():
        close(results[name], reference, torch.float32, name, times=4)
    with torch.no_grad():
        for _ in range(2):
            close(narrow.eval()(x), wide.eval()(x.double()), torch.float32, "eval", times=4)


def test_every_launch_is_on_its_tensors_device(monkeypatch):
    """Triton launches on the current device; a model spread over several has its layers on others."""
    assert isinstance(kernels.on_device(torch.device("cuda", 1)), torch.cuda.device)
    assert kernels.on_device(torch.device("cuda", 1)).idx == 1
    entered: list[torch.device] = []
    monkeypatch.setattr(kernels, "on_device", lambda device: entered.append(device) or nullcontext())
    launched: list[str] = []
    jit = type(kernels._output_kernel)
    run = jit.run
    monkeypatch.setattr(
        jit, "run", lambda kernel, *operands, **named: launched.append(str(kernel)) or run(kernel, *operands, **named)
    )
    layer = adapted_layer("linear")
    layer.weight.requires_grad_(False)
    layer(torch.randn(4, 33, requires_grad=True)).sum().backward()
    weight, a, b = layer.weight.detach(), layer.lora_A.detach(), layer.lora_B.detach()
    kernels.norms(weight, weight.square().sum(1), a, b, 2.0)
    assert len(launched) == 7, "two for the norms, output, backward, sums, two for the norms"
    assert entered == [layer.weight.device] * 5


# -- norms ------------------------------------------------------------------------------------------------------------


def norm_operands(out: int, columns: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(out, columns).to(dtype), 0.1 * torch.randn(rank, columns), 0.3 * torch.randn(out, rank)


def cancel(weight: Tensor, a: Tensor, b: Tensor, rows: list[int]) -> None:
    """Makes W_i nearly -s B_i A: what is left of V_i is a thousandth of it."""
    weight[rows] = (-SCALE * (b[rows] @ a) * 1.001).to(weight.dtype)


def dense_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.double() + SCALE * (b.double() @ a.double()), dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True], ids=["out x in", "in x out"])
@pytest.mark.parametrize("rows", [[], [0], [3, 16, 17, 74], list(range(75))], ids=lambda rows: f"{len(rows)} cancel")
@pytest.mark.parametrize(("dtype", "rank"), [(torch.float32, 1), (torch.bfloat16, 5), (torch.float16, 130)], ids=str)
def test_rows_that_cancel_are_dense(dtype, rank, rows, transposed):
    weight, a, b = norm_operands(75, 100, rank, dtype)
    cancel(weight, a, b, rows)
    weight = turned(weight) if transposed else weight
    frozen = functional.row_norms_squared(weight)
    norms, expected = kernels.norms(weight, frozen, a, b, SCALE), dense_norms(weight, a, b)
    cancelled = expected.square() <= CANCELLATION * frozen
    assert int(cancelled.sum()) >= len(rows)
    torch.testing.assert_close(norms[cancelled].double(), expected[cancelled], rtol=1e-4, atol=0)
    factored = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(norms[~cancelled].double(), expected[~cancelled], rtol=factored, atol=0)


def test_rows_without_length_and_a_change_of_nothing():
    weight, a, b = norm_operands(40, 30, 4, torch.float32)
    weight[5], b[5] = 0, 0
    frozen = functional.row_norms_squared(weight)
    assert float(kernels.norms(weight, frozen, a, b, SCALE)[5]) == 0
    unchanged = kernels.norms(weight, frozen, a, torch.zeros_like(b), SCALE)
    assert torch.equal(unchanged, functional.safe_sqrt(frozen)), "a gain of 1 to the last bit"


def test_rows_of_A_that_are_long_in_float16():
    """||A_k||^2 is above what float16 holds."""
    weight, a, b = norm_operands(40, 30, 4, torch.float16)
    a, b = (400 * torch.nn.functional.normalize(a)).half().float(), (0.01 * b).half().float()
    frozen, expected = functional.row_norms_squared(weight), dense_norms(weight, a, b)
    torch.testing.assert_close(kernels.norms(weight, frozen, a, b, SCALE).double(), expected, rtol=2e-3, atol=0)


class Asked(TorchDispatchMode):
    """Fails on whatever makes the host wait for a number of the device."""

    def __torch_dispatch__(self, func, types, positional=(), named=None):
        assert str(func).split(".")[1] not in {"nonzero", "_local_scalar_dense", "masked_select", "index"}, func
        return func(*positional, **(named or {}))


def test_the_host_asks_for_nothing():
    weight, a, b = norm_operands(40, 30, 4, torch.float32)
    cancel(weight, a, b, [7])
    frozen = functional.row_norms_squared(weight)
    with Asked():  # a mode sees the operation from outside alone, hence its inside
        norms = functional.norms(weight, frozen, a, b, SCALE)
    assert torch.equal(norms, functional.norms_in_graph(weight, frozen, a, b, SCALE))
    torch.testing.assert_close(norms.double(), dense_norms(weight, a, b), rtol=1e-4, atol=0)
    with Asked(), pytest.raises(AssertionError):
        functional.direction_norms(frozen, frozen)
