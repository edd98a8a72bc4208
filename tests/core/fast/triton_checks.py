"""The Triton kernels against plain torch in float64, and whole layers through them against the eager ones.

Run by test_triton_kernels.py in a process of its own: Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import copy
import gc
import os
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dora_vl.core import DoRALinear, apply_dora, functional
from dora_vl.core import rows as rows_module
from dora_vl.core.fast import dropout
from dora_vl.core.fast.dropout import SHARED_DROPOUT, Dropped, draw_dropped
from dora_vl.core.fast.products import triton_kernels
from dora_vl.core.gain import CANCELLATION, Gain
from dora_vl.core.layer import AdaptedLayer
from tests.core.dense_dora import config, move_layer

if triton_kernels(torch.empty(1, device=os.environ.get("CHECKED_DEVICE", "cpu"))) is None:
    pytest.skip("runs in Triton's interpreter or on a GPU", allow_module_level=True)

from dora_vl.core.fast import triton as kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SCALE, LOW = 1.7, 2**32 - 1
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


def gain_of(out: int, dtype: torch.dtype) -> Gain:
    full = torch.linspace(0.5, 1.6, out)
    return Gain(full, (full - 1).to(dtype), torch.linspace(0.3, 2.0, out))


def reference_output(product: Tensor, hidden: Tensor | None, b: Tensor | None, bias: Tensor | None, minus_one: Tensor):
    wide = product.double() - (0 if bias is None else bias.double())
    if hidden is not None and b is not None:
        wide = wide + hidden.double() @ b.to(hidden.dtype).double().t()
    wide = (1 + minus_one.double()) * wide
    return wide if bias is None else wide + bias.double()


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


@pytest.mark.parametrize(("with_bias", "low_rank"), [(True, True), (False, True), (True, False)])
@each_dtype
# Odd sizes, one row as in decoding, several blocks and splits; ranks below, between and above blocks.
@pytest.mark.parametrize("shape", [(1, 5, 1), (7, 130, 3), *map(slow, [(130, 257, 130), (18, 33, 257)])], ids=str)
def test_both_passes(shape, dtype, with_bias, low_rank):
    rows, out, rank = shape
    product, dy, gain = torch.randn(rows, out, dtype=dtype), torch.randn(rows, out, dtype=dtype), gain_of(out, dtype)
    bias = torch.randn(out, dtype=dtype) if with_bias else None
    hidden = torch.randn(rows, rank, dtype=dtype) if low_rank else None
    b = torch.randn(out, rank) if low_rank else None
    before = product.clone()
    y = kernels.adapted_output(product, hidden, b, bias, gain.minus_one)
    assert torch.equal(product, before)
    assert y.dtype == dtype
    close(y, reference_output(product, hidden, b, bias, gain.minus_one), dtype, "y")
    assert torch.equal(kernels.adapted_output(product, hidden, b, bias, gain.minus_one, in_place=True), y)
    assert torch.equal(product, y)
    dz, dh, dm, db = kernels.backward_pass(dy, y, b, bias, gain, 0.7, with_bias_sum=with_bias)
    assert dz.dtype == dtype
    close(dz, (1 + gain.minus_one.double()) * dy.double(), dtype, "dz")
    z = y.double() - (0 if bias is None else bias.double())
    close(dm, gain.per_magnitude * (dy.double() * z).sum(0), torch.float32, "dm")
    assert (db is None) == (not with_bias)
    assert (dh is None) == (not low_rank)
    if db is not None:
        close(db, dy.double().sum(0), torch.float32, "db")
    if dh is not None and b is not None:
        assert dh.dtype == dtype
        close(dh, 0.7 * dz.double() @ b.to(dtype).double(), dtype, "dh")


@pytest.mark.parametrize("layout", [every_other, turned], ids=["gaps", "columns first"])
def test_any_layout_of_any_operand(layout):
    """Each operand in turn, and all together, gives the bits of contiguous ones."""
    rows, out, rank = 21, 75, 19
    gain = gain_of(out, torch.float32)
    b, bias = torch.randn(out, rank), torch.randn(out)
    forward = {"product": torch.randn(rows, out), "hidden": torch.randn(rows, rank)}
    forward |= {"lora_B": b, "bias": bias, "minus_one": gain.minus_one}
    backward = {"dy": torch.randn(rows, out), "kept": torch.randn(rows, out), "lora_B": b, "bias": bias}

    def changed(operands: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
        return {name: layout(operand) if name in names else operand.clone() for name, operand in operands.items()}

    plain = kernels.adapted_output(**forward)
    straight = kernels.backward_pass(**backward, gain=gain, scale=0.7, with_bias_sum=True)
    strided = Gain(gain.full, every_other(gain.minus_one), every_other(gain.per_magnitude))
    for names in [*({name} for name in forward), set(forward)]:
        assert torch.equal(kernels.adapted_output(**changed(forward, names)), plain), names
        operands = changed(forward, names)
        assert kernels.adapted_output(**operands, in_place=True) is operands["product"]
        assert torch.equal(operands["product"], plain), names
    for names in [*({name} for name in backward), set(backward)]:
        results = kernels.backward_pass(**changed(backward, names), gain=strided, scale=0.7, with_bias_sum=True)
        assert all(torch.equal(value, other) for value, other in zip(results, straight, strict=True)), names


@pytest.mark.parametrize("with_kept", [True, False])
@pytest.mark.parametrize("with_sum", [True, False])
def test_only_what_is_asked_for(with_kept, with_sum):
    dy, b, gain = torch.ones(()).expand(5, 12), torch.randn(12, 300), gain_of(12, torch.float32)
    kept = torch.randn(5, 12) if with_kept else None
    _, dh, dm, db = kernels.backward_pass(dy, kept, b, torch.randn(12), gain, 2.0, with_bias_sum=with_sum)
    close(dh, 2 * ((1 + gain.minus_one) * dy) @ b, torch.float32, "dh of a rank left to torch")
    assert (dm is None, db is None) == (not with_kept, not with_sum)


def test_no_rows():
    gain, b, seed = gain_of(12, torch.bfloat16), torch.randn(12, 3), torch.tensor(1)
    empty, hidden = torch.empty(0, 12, dtype=torch.bfloat16), torch.empty(0, 3, dtype=torch.bfloat16)
    assert kernels.adapted_output(empty, hidden, b, None, gain.minus_one, in_place=True).shape == (0, 12)
    dz, dh, dm, db = kernels.backward_pass(empty, empty, b, torch.randn(12), gain, 2.0, with_bias_sum=True)
    assert (dz.shape, dh.shape) == ((0, 12), (0, 3))
    assert torch.equal(dm, torch.zeros(12))
    assert torch.equal(db, torch.zeros(12))
    assert kernels.masked_copy(empty, seed, 0.5).shape == (0, 12)
    assert kernels.add_masked_product_(empty, hidden, torch.randn(3, 12), seed, 0.5) is empty


@each_dtype
def test_a_neutral_change_changes_no_bit(dtype):
    product, hidden, bias = torch.randn(9, 33).to(dtype), torch.randn(9, 3).to(dtype), torch.randn(33).to(dtype)
    y = kernels.adapted_output(product, hidden, torch.zeros(33, 3), bias, torch.zeros(33, dtype=dtype))
    assert torch.equal(y, product)


def test_a_large_bias_leaves_the_magnitude_its_gradient():
    """Subtracted after the sums, a bias of a thousand costs float32 three digits more than before them."""
    gain, bias = gain_of(40, torch.float32), 1e3 * torch.randn(40)
    z, dy = torch.randn(300, 40), torch.randn(300, 40) + 1
    y = z + bias
    _, _, dm, _ = kernels.backward_pass(dy, y, None, bias, gain, 1.0, with_bias_sum=False)
    close(dm, gain.per_magnitude.double() * (dy.double() * (y - bias).double()).sum(0), torch.float32, "dm")


# -- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiled", [kernels.OUTPUT, kernels.BACKWARD], ids=["output", "backward"])
def test_every_tile_gives_the_same(monkeypatch, tiled):
    """Up to the order of sums; the few-row tiles among them, on more rows than they have."""
    rows, out, rank = 150, 200, 20
    gain, b, bias = gain_of(out, torch.float32), torch.randn(out, rank), torch.randn(out)
    product, hidden, dy = torch.randn(rows, out), torch.randn(rows, rank), torch.randn(rows, out)
    results = []
    for tile in tiled.space:
        monkeypatch.setattr(tiled, "config", lambda *_, tile=tile: tile)
        y = kernels.adapted_output(product, hidden, b, bias, gain.minus_one)
        results.append((y, *kernels.backward_pass(dy, product, b, bias, gain, 0.7, with_bias_sum=True)))
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            close(value, expected, torch.float32)


@pytest.mark.parametrize("which", ["OUTPUT", "BACKWARD"])
def test_tiles_are_timed_once_a_bucket_into_scratch_memory_and_the_quickest_is_taken(monkeypatch, which):
    """By Triton's own autotuner; times are made up, since the interpreter's mean nothing."""
    tiled = replace(getattr(kernels, which), _chosen={}, _tuners={})
    other = kernels.BACKWARD if which == "OUTPUT" else kernels.OUTPUT
    monkeypatch.setattr(kernels, which, tiled)
    monkeypatch.setattr(other, "config", lambda named, *_: other.fitting(named)[0])
    monkeypatch.setattr(kernels, "_may_time", lambda device: True)
    times: list[float] = []

    def made_up(call, quantiles, **_):
        call()
        times.append([9.0, 8.0, 1.0, 7.0][len(times) % 4])
        return [times[-1]] * 3

    monkeypatch.setattr(kernels, "do_bench", made_up)
    gain, b, bias = gain_of(70, torch.float32), torch.randn(70, 5), torch.randn(70)
    timed = []
    for rows, scale in ((33, 0.7), (40, 0.8), (64, 0.7), (65, 0.7), (5, 0.7)):
        product, hidden, dy = torch.randn(rows, 70), torch.randn(rows, 5), torch.randn(rows, 70)
        expected = reference_output(product, hidden, b, bias, gain.minus_one)
        y = kernels.adapted_output(product, hidden, b, bias, gain.minus_one, in_place=True)
        close(y, expected, torch.float32, "y")
        dz, dh, _, db = kernels.backward_pass(dy, y, b, bias, gain, scale, with_bias_sum=True)
        close(dz, gain.full * dy, torch.float32, "dz")
        close(dh, scale * dz @ b, torch.float32, "dh")
        close(db, dy.sum(0), torch.float32, "db")
        timed.append(len(tiled._chosen))
    assert timed == [1, 1, 1, 2, 3]
    fitting = tiled.fitting({"rows": 33, "BLOCK_RANK": 16, **dict.fromkeys(("factor", "dy", "minus_one"), gain.full)})
    assert next(iter(tiled._chosen.values())) == fitting[2]
    assert len(times) > len(fitting) > 3


def test_what_forbids_timing(monkeypatch):
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.delenv(kernels.SWITCH, raising=False)
    card = torch.device("cuda", 0)
    assert kernels._may_time(card)
    assert not kernels._may_time(torch.device("cpu"))
    capturing[0] = True
    assert not kernels._may_time(card)
    capturing[0] = False
    monkeypatch.setenv(kernels.SWITCH, "fixed")
    assert not kernels._may_time(card)
    monkeypatch.delenv(kernels.SWITCH)
    torch.use_deterministic_algorithms(True)
    try:
        assert not kernels._may_time(card)
    finally:
        torch.use_deterministic_algorithms(False)


def test_products_follow_torchs_precision():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert [kernels.dot_precision(torch.float32, rank) for rank in (16, 128)] == ["ieee", "tf32x3"]
        torch.set_float32_matmul_precision("high")
        assert [kernels.dot_precision(torch.float32, rank) for rank in (16, 128)] == ["tf32", "tf32"]
    finally:
        torch.set_float32_matmul_precision(before)


# -- whole layers -----------------------------------------------------------------------------------------------------


class Sealed(nn.Module):
    """A linear layer that is only ever called."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = 33, 70
        self.secret = nn.Parameter(torch.randn(70, 33), requires_grad=False)
        self.bias = nn.Parameter(3 * torch.randn(70), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.secret.dtype), self.secret, self.bias)


SEALED = f"{Sealed.__module__}.{Sealed.__qualname__}"


@pytest.fixture
def launches(monkeypatch):
    """How often the kernel of the output ran."""
    calls: list[int] = []
    real = kernels.adapted_output
    monkeypatch.setattr(kernels, "adapted_output", lambda *args, **named: calls.append(1) or real(*args, **named))
    return calls


def adapted_layer(kind: str, *, bias: bool = True, through_zero: bool = False, **changes: Any) -> Any:
    model = nn.Sequential(Sealed(bias=bias) if kind == "opaque" else nn.Linear(33, 70, bias=bias))
    apply_dora(model, config(rank=changes.pop("rank", 5), alpha=7.0, opaque_layers=(SEALED,), **changes))
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
        {"through_zero": True, "large_bias": True},  # rows that keep their product
        {"trained_bias": True},
    ],
    ids=str,
)
def test_layers_equal_the_eager_ones(monkeypatch, launches, kind, changes):
    """Through the kernels in float32, and eagerly in float64 under the same mask."""
    changes = dict(changes)
    edit, trained_bias = changes.pop("edit", kind == "opaque"), changes.pop("trained_bias", False)
    large_bias = changes.pop("large_bias", False)
    narrow = adapted_layer(kind, **changes)
    if large_bias:
        with torch.no_grad():
            narrow.bias[::7] = 1e3
    if narrow.bias is not None:
        narrow.bias.requires_grad_(trained_bias)
    wide, x, upstream = copy.deepcopy(narrow).double(), torch.randn(2, 9, 33), torch.randn(2, 9, 70)
    seed = torch.tensor(13)
    positions = (kernels.masked_copy(torch.ones(18, 33), seed, 0.4) == 0).flatten().nonzero().flatten()
    masks = {torch.float32: seed, torch.float64: positions}
    monkeypatch.setattr(SHARED_DROPOUT, "draw", lambda tensor, p, user: Dropped(p, masks[tensor.dtype]))
    eager = changes.get("method") == "lora" or (kind == "opaque" and not changes.get("detach_norm", True))
    results = passed(narrow, x, upstream, edit=edit)
    assert len(launches) == (0 if eager else 1)
    expected = passed(wide, x.double(), upstream, edit=edit)
    assert results.keys() == expected.keys()
    for name, reference in expected.items():
        loose = "magnitude" in name and changes.get("through_zero", False)
        close(results[name], reference, torch.float32, name, times=30 if loose else 4)
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
    layer = adapted_layer("linear", dropout=0.4)
    layer.weight.requires_grad_(False)
    layer(torch.randn(4, 33, requires_grad=True)).sum().backward()
    weight, a, b = layer.weight.detach(), layer.lora_A.detach(), layer.lora_B.detach()
    kernels.norms(weight, weight.square().sum(1), a, b, 2.0)
    assert len(launched) == 8, "masked copy, output, backward, sums, masked copy and product, two for the norms"
    assert entered == [layer.weight.device] * 8


@torch.no_grad()
def test_rows_of_several_adapters(monkeypatch, launches):
    """Each adapter's rows go through the kernel, in place; those of the base are left alone."""
    monkeypatch.setattr(rows_module, "ONE_PRODUCT", 0)
    linear, batch = nn.Linear(26, 37), rows_module.ActiveAdapters()
    layer, alone = rows_module.RowLayer(linear, batch, "rows"), {}
    for name, rank in (("one", 3), ("two", 5)):
        adapted = DoRALinear(linear, config(rank=rank, alpha=7.0)).eval()
        move_layer(adapted)
        layer.put(name, rows_module.RowChange.of(adapted, torch.float32))
        alone[name] = copy.deepcopy(adapted).double()
    x = torch.randn(4, 9, 26)
    with batch.holding(("one", None, "two", "two")):
        output = layer(x)
    assert launches == [1, 1]
    assert torch.equal(output[1], linear(x)[1])
    for number, name in ((0, "one"), (2, "two"), (3, "two")):
        torch.testing.assert_close(output[number].double(), alone[name](x[number].double()), rtol=1e-5, atol=1e-5)


# -- norms ------------------------------------------------------------------------------------------------------------


def norm_operands(out: int, columns: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(out, columns).to(dtype), 0.1 * torch.randn(rank, columns), 0.3 * torch.randn(out, rank)


def cancel(weight: Tensor, a: Tensor, b: Tensor, rows: list[int]) -> None:
    """Makes W_i nearly -s B_i A: what is left of V_i is a thousandth of it."""
    weight[rows] = (-SCALE * (b[rows] @ a) * 1.001).to(weight.dtype)


def dense_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.double() + SCALE * (b.double() @ a.double()), dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 3, 16, 130, 257])
@each_dtype
def test_squared_norms_of_several_layers(dtype, rank):
    layers = [norm_operands(75, 40, rank, dtype) for _ in range(3)]
    frozen = torch.stack([weight.float().square().sum(1) for weight, _, _ in layers])
    a, b = (torch.stack([layer[index] for layer in layers]).to(dtype) for index in (1, 2))
    weights = torch.stack([weight.float() for weight, _, _ in layers])
    on_A, gram = (weights @ a.float().mT).to(dtype), (a.float() @ a.float().mT).to(dtype)
    change = b.double() * (on_A.double() + SCALE / 2 * b.double() @ gram.double())
    expected = frozen.double() + 2 * SCALE * change.sum(-1)
    norms = kernels.norms_squared(frozen, b, on_A, gram, SCALE)
    torch.testing.assert_close(norms.double(), expected, rtol=2e-6, atol=2e-6 * float(expected.max()))
    strided = [operand.mT.contiguous().mT for operand in (b, on_A, gram)]
    assert torch.equal(kernels.norms_squared(frozen.t().contiguous().t(), *strided, SCALE), norms)
    for number in range(3):
        alone = [operand[number : number + 1] for operand in (frozen, b, on_A, gram)]
        assert torch.equal(kernels.norms_squared(*alone, SCALE)[0], norms[number]), "each as it would be alone"


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
    assert torch.equal(unchanged, functional.root(frozen)), "a gain of 1 to the last bit"


def test_rows_of_A_that_are_long_in_float16():
    """||A_k||^2 is above what float16 holds; one layer's norms, and a family's."""
    weight, a, b = norm_operands(40, 30, 4, torch.float16)
    a, b = (400 * torch.nn.functional.normalize(a)).half().float(), (0.01 * b).half().float()
    frozen, expected = functional.row_norms_squared(weight), dense_norms(weight, a, b)
    torch.testing.assert_close(kernels.norms(weight, frozen, a, b, SCALE).double(), expected, rtol=2e-3, atol=0)
    model = nn.ModuleList(nn.Linear(30, 40) for _ in range(2)).half()
    apply_dora(model, config(rank=4, alpha=4 * SCALE))
    with torch.no_grad():
        for layer in model:
            layer.lora_A.copy_(a)
            layer.lora_B.copy_(b)
    for layer in model:
        layer(torch.randn(2, 30).half())
        expected = layer.magnitude.detach().double() / dense_norms(layer.weight.detach(), a, b)
        torch.testing.assert_close(layer.recall("gain").full.double(), expected, rtol=2e-3, atol=0)


def test_a_zero_row_whose_output_is_edited_in_place():
    layer = adapted_layer("linear")
    with torch.no_grad():
        layer.weight[3] = 0
        layer.magnitude[3] = 0
    wide, x, upstream = copy.deepcopy(layer).double(), torch.randn(6, 33), torch.randn(6, 70)
    values = passed(layer, x, upstream, edit=True)
    for name, expected in passed(wide, x.double(), upstream.double(), edit=False).items():
        if name == "magnitude":
            gradient = upstream.double() * (wide(x.double()) > 0)
            direction = wide.weight + wide.adapter.scale * wide.lora_B @ wide.lora_A
            expected = (gradient * (x.double() @ direction.t())).sum(0) / direction.norm(dim=1)
            close(values[name], expected.detach(), torch.float32, name, times=10)
            assert float(expected[3].detach().abs()) > 0


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
        norms = functional.trusted_norms(weight, frozen, a, b, SCALE)
    assert torch.equal(norms, functional.safe_norms(weight, frozen, a, b, SCALE))
    torch.testing.assert_close(norms.double(), dense_norms(weight, a, b), rtol=1e-4, atol=0)
    with Asked(), pytest.raises(AssertionError):
        functional.direction_norms(frozen, frozen)


def test_a_family_computes_its_gains_through_them(monkeypatch):
    calls = []
    real = kernels.norms_squared
    monkeypatch.setattr(kernels, "norms_squared", lambda *operands: calls.append(1) or real(*operands))
    model = nn.ModuleList(nn.Linear(30, 40) for _ in range(3))
    apply_dora(model, config(rank=5, alpha=5 * SCALE))
    for layer in model:
        move_layer(layer)
    for layer in model:
        layer(torch.randn(2, 30))
        norms = dense_norms(layer.weight.detach(), layer.lora_A.detach(), layer.lora_B.detach())
        expected = layer.magnitude.detach().double() / norms
        torch.testing.assert_close(layer.recall("gain").full.double(), expected, rtol=1e-5, atol=0)
    assert calls == [1]


# -- dropout ----------------------------------------------------------------------------------------------------------


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 as in Salmon et al. 2011, with Python's whole numbers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = second >> 32 ^ c1 ^ k0, second & LOW, first >> 32 ^ c3 ^ k1, first & LOW
        k0, k1 = k0 + 0x9E3779B9 & LOW, k1 + 0xBB67AE85 & LOW
    return [c0, c1, c2, c3]


def test_philox_as_published():
    """The generator's known answers (Random123, kat_vectors)."""
    assert philox((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox((LOW, LOW, LOW, LOW), (LOW, LOW)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.slow
@pytest.mark.parametrize("probability", [0.05, 0.9])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 515)], ids=str)
@each_dtype
def test_the_copys_mask_is_philoxs(dtype, shape, probability):
    seed, x = 0x1234_5678_9ABC_DEF, torch.rand(shape).to(dtype) + 1
    (rows, columns), key = shape, (seed & LOW, seed >> 32)
    drawn = [
        [number for quad in range(-(-columns // 4)) for number in philox((quad, row, 0, 0), key)][:columns]
        for row in range(rows)
    ]
    kept = torch.tensor(drawn) >= round(probability * 2**32)
    output = kernels.masked_copy(x, torch.tensor(seed), probability)
    assert output.dtype == dtype
    assert torch.equal(output, torch.where(kept, x, 0.0).to(dtype))
    assert torch.equal(kernels.masked_copy(every_other(x), torch.tensor(seed), probability), output)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 3, 16, 130, 257])
@each_dtype
def test_the_backward_pass_repeats_the_mask(dtype, rank):
    seed, rows, columns = torch.tensor(2**61 + 7), 37, 75
    dx, dh, a = torch.randn(rows, columns).to(dtype), torch.randn(rows, rank).to(dtype), torch.randn(rank, columns)
    kept = kernels.masked_copy(torch.ones(rows, columns, dtype=dtype), seed, 0.3).double()
    expected = dx.double() + kept * (dh.double() @ a.to(dtype).double())
    gradient = kernels.add_masked_product_(dx.clone(), dh, a, seed, 0.3)
    close(gradient, expected, dtype)
    assert torch.equal(gradient[kept == 0], dx[kept == 0]), "where x was dropped, nothing is added"
    strided = every_other(dx)
    assert torch.equal(kernels.add_masked_product_(strided, turned(dh), turned(a), seed, 0.3), gradient)
    assert torch.equal(strided, gradient)


def test_what_is_dropped_leaves_no_infinity():
    output = kernels.masked_copy(torch.full((4, 30), float("inf")), torch.tensor(5), 0.5)
    assert set(output.unique().tolist()) == {0.0, float("inf")}


@pytest.mark.slow
def test_the_mask_hangs_on_no_tile(monkeypatch):
    seed, dh, a = torch.tensor(11), torch.ones(140, 2), torch.ones(2, 150)
    expected = 2 * kernels.masked_copy(torch.ones(140, 150), seed, 0.4)
    for tile in kernels.MASKED_PRODUCT.space:
        monkeypatch.setattr(kernels.MASKED_PRODUCT, "config", lambda *_, tile=tile: tile)
        assert torch.equal(kernels.add_masked_product_(torch.zeros(140, 150), dh, a, seed, 0.4), expected)
    for rows, columns in ((1, 16), (16, 64), (64, 1024)):
        monkeypatch.setattr(kernels, "COPIED_ROWS", rows)
        monkeypatch.setattr(kernels, "COPIED_COLUMNS", columns)
        assert torch.equal(2 * kernels.masked_copy(torch.ones(140, 150), seed, 0.4), expected)


def test_a_seed_is_drawn_from_torchs_generator():
    def drawn() -> Tensor:
        return draw_dropped(torch.ones(9, 40), 0.5).apply(torch.ones(9, 40))

    torch.manual_seed(3)
    first, second = drawn(), drawn()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(drawn(), first)
    state = torch.get_rng_state() if not first.is_cuda else torch.cuda.get_rng_state()
    third = drawn()
    torch.set_rng_state(state) if not first.is_cuda else torch.cuda.set_rng_state(state)
    assert torch.equal(drawn(), third)
    assert draw_dropped(torch.ones(9, 40), 0.5).positions.ndim == 0, "no mask is kept"


def test_layers_share_a_seed_and_a_masked_copy_that_no_graph_keeps(monkeypatch):
    copies: list[weakref.ReferenceType[Tensor]] = []
    real = kernels.masked_copy

    def watched(*operands: object) -> Tensor:
        masked = real(*operands)
        copies.append(weakref.ref(masked))
        return masked

    monkeypatch.setattr(kernels, "masked_copy", watched)
    model = nn.ModuleDict({"q": nn.Linear(6, 5), "k": nn.Linear(6, 3)})
    apply_dora(model, config(dropout=0.5))
    x = torch.randn(50, 6, requires_grad=True)
    q = model["q"](x)
    drawn = SHARED_DROPOUT._dropped
    y = q.sum() + model["k"](x).sum()
    assert SHARED_DROPOUT._dropped is drawn
    assert len(copies) == 1, "one for both"
    assert q.grad_fn.saved_tensors[0].data_ptr() == x.data_ptr(), "what is kept is x"
    SHARED_DROPOUT.draw(torch.randn(2, 2), 0.5, 0)
    del drawn
    gc.collect()
    assert copies[0]() is None, "the next draw lets go of it"
    y.backward()
    assert len(copies) == 3, "each layer draws it again"


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_the_same_and_keeps_no_seed(monkeypatch, reentrant):
    seeds: list[weakref.ReferenceType[Tensor]] = []
    draw = dropout.draw_dropped

    def remembered(*operands):
        drawn = draw(*operands)
        seeds.append(weakref.ref(drawn.positions))
        return drawn

    monkeypatch.setattr(dropout, "draw_dropped", remembered)
    model = nn.Sequential(nn.Linear(33, 33), nn.Linear(33, 33))
    apply_dora(model, config(dropout=0.4))
    for layer in model:
        move_layer(layer)
    x, results = torch.randn(12, 33), []
    for checkpointed in (False, True):
        torch.manual_seed(9)
        model.zero_grad()
        seeds.clear()
        inputs = x.clone().requires_grad_()
        y = inputs
        for layer in model:
            y = checkpoint(layer, y, use_reentrant=reentrant) if checkpointed else layer(y)
        gc.collect()
        assert not checkpointed or [seed() is None for seed in seeds] == [True, False]
        y.square().sum().backward()
        results.append([y.detach(), inputs.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(value, other) for value, other in zip(*results, strict=True))


def test_a_copy_has_the_masks_gradient():
    x = torch.randn(3, 4, 9, requires_grad=True)
    y = Dropped(0.5, torch.tensor(3)).apply(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, (y != 0).to(x.dtype))
