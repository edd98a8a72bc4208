"""The fused passes against plain torch in float64, and whole layers through them against the eager ones.

Run by test_triton_kernels.py in a process of its own: Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dora_vl.core import DoRAConfig, DoRALinear
from dora_vl.core.fast.products import kernels_for
from dora_vl.core.gain import Gain

if kernels_for(torch.device(os.environ.get("CHECKED_DEVICE", "cpu")), torch.float32) is None:
    pytest.skip("runs in Triton's interpreter or on a GPU", allow_module_level=True)

from dora_vl.core.fast import triton as kernels
from dora_vl.core.fast.triton import Config, Operands, TiledKernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Odd sizes, one row as in decoding, several blocks and splits; ranks below, between and above blocks.
SHAPES = [(1, 5, 1), (7, 130, 3), (65, 70, 16), (130, 257, 130), (18, 33, 257)]


@pytest.fixture(autouse=True)
def device():
    torch.set_default_device(os.environ.get("CHECKED_DEVICE", "cpu"))
    torch.manual_seed(0)
    yield
    torch.set_default_device(None)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "", *, times: float = 1.0) -> None:
    size = expected.double().abs().max().clamp_min(1e-9)
    error = float((found.double() - expected.double()).abs().max() / size)
    assert found.shape == expected.shape
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
    return tensor.t().contiguous().t()


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
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
    assert torch.equal(kernels.adapted_output_(product, hidden, b, bias, gain.minus_one), y)
    assert torch.equal(product, y)
    found = kernels.backward_pass(dy, y, b, bias, gain, 0.7, with_bias_sum=with_bias)
    close(found.dz, (1 + gain.minus_one.double()) * dy.double(), dtype, "dz")
    z = y.double() - (0 if bias is None else bias.double())
    close(found.dm, gain.per_magnitude * (dy.double() * z).sum(0), torch.float32, "dm")
    assert found.dz.dtype == dtype
    assert (found.db is None) == (not with_bias)
    assert (found.dh is None) == (not low_rank)
    if found.db is not None:
        close(found.db, dy.double().sum(0), torch.float32, "db")
    if found.dh is not None and b is not None:
        assert found.dh.dtype == dtype
        close(found.dh, 0.7 * found.dz.double() @ b.to(dtype).double(), dtype, "dh")


@pytest.mark.parametrize("layout", [every_other, turned], ids=["gaps", "columns first"])
def test_any_layout_of_any_operand(layout):
    """Each operand in turn, and all together, gives the bits of contiguous ones."""
    rows, out, rank = 21, 75, 19
    gain = gain_of(out, torch.float32)
    forward = {
        "product": torch.randn(rows, out),
        "hidden": torch.randn(rows, rank),
        "lora_B": torch.randn(out, rank),
        "bias": torch.randn(out),
        "minus_one": gain.minus_one,
    }
    backward = {"dy": torch.randn(rows, out), "kept": torch.randn(rows, out), "lora_B": forward["lora_B"]}
    backward["bias"] = forward["bias"]

    def changed(operands: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
        fits = every_other if layout is every_other else turned
        return {
            name: (fits if one.ndim == 2 else every_other)(one) if name in names else one.clone()
            for name, one in operands.items()
        }

    plain = kernels.adapted_output(**forward)
    straight = kernels.backward_pass(**backward, gain=gain, scale=0.7, with_bias_sum=True)
    strided = Gain(gain.full, every_other(gain.minus_one), every_other(gain.per_magnitude))
    for names in [*({name} for name in forward), set(forward)]:
        assert torch.equal(kernels.adapted_output(**changed(forward, names)), plain), names
        operands = changed(forward, names)
        assert kernels.adapted_output_(**operands) is operands["product"]
        assert torch.equal(operands["product"], plain), names
    for names in [*({name} for name in backward), set(backward)]:
        found = kernels.backward_pass(**changed(backward, names), gain=strided, scale=0.7, with_bias_sum=True)
        for one, other in zip(found, straight, strict=True):
            assert torch.equal(one, other), names


@pytest.mark.parametrize("with_kept", [True, False])
@pytest.mark.parametrize("with_sum", [True, False])
def test_only_what_is_asked_for(with_kept, with_sum):
    dy, b, gain = torch.ones(()).expand(5, 12), torch.randn(12, 300), gain_of(12, torch.float32)
    kept = torch.randn(5, 12) if with_kept else None
    found = kernels.backward_pass(dy, kept, b, torch.randn(12), gain, 2.0, with_bias_sum=with_sum)
    close(found.dh, 2 * ((1 + gain.minus_one) * dy) @ b, torch.float32, "dh of a rank left to torch")
    assert (found.dm is None) == (not with_kept)
    assert (found.db is None) == (not with_sum)


def test_no_rows():
    gain, b = gain_of(12, torch.bfloat16), torch.randn(12, 3)
    empty = torch.empty(0, 12, dtype=torch.bfloat16)
    hidden = torch.empty(0, 3, dtype=torch.bfloat16)
    assert kernels.adapted_output_(empty, hidden, b, None, gain.minus_one).shape == (0, 12)
    found = kernels.backward_pass(empty, empty, b, torch.randn(12), gain, 2.0, with_bias_sum=True)
    assert found.dz.shape == (0, 12)
    assert found.dh.shape == (0, 3)
    assert torch.equal(found.dm, torch.zeros(12))
    assert torch.equal(found.db, torch.zeros(12))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_neutral_change_changes_no_bit(dtype):
    product, hidden, bias = torch.randn(9, 33).to(dtype), torch.randn(9, 3).to(dtype), torch.randn(33).to(dtype)
    y = kernels.adapted_output(product, hidden, torch.zeros(33, 3), bias, torch.zeros(33, dtype=dtype))
    assert torch.equal(y, product)


def test_a_large_bias_leaves_the_magnitude_its_gradient():
    """Subtracted after the sums, a bias of a thousand costs float32 three digits more than before them."""
    gain, bias = gain_of(40, torch.float32), 1e3 * torch.randn(40)
    z, dy = torch.randn(300, 40), torch.randn(300, 40) + 1
    y = z + bias
    found = kernels.backward_pass(dy, y, None, bias, gain, 1.0, with_bias_sum=False)
    exact = gain.per_magnitude.double() * (dy.double() * (y - bias).double()).sum(0)
    close(found.dm, exact, torch.float32, "dm")


@pytest.mark.parametrize("tiled", [kernels.OUTPUT, kernels.BACKWARD], ids=["output", "backward"])
def test_every_tile_gives_the_same(monkeypatch, tiled):
    """Up to the order of sums; the few-row tiles among them, on more rows than they have."""
    rows, out, rank = 150, 200, 20
    gain, b, bias = gain_of(out, torch.float32), torch.randn(out, rank), torch.randn(out)
    product, hidden, dy = torch.randn(rows, out), torch.randn(rows, rank), torch.randn(rows, out)
    results = []
    for config in tiled.space:
        monkeypatch.setattr(tiled, "config", lambda *_, config=config: config)
        y = kernels.adapted_output(product, hidden, b, bias, gain.minus_one)
        results.append((y, *kernels.backward_pass(dy, product, b, bias, gain, 0.7, with_bias_sum=True)))
    for other in results[1:]:
        for one, expected in zip(other, results[0], strict=True):
            close(one, expected, torch.float32)


class RecordingTuner:
    """Stands in for `triton.autotune`: overwrites what it is given, as timing does, and takes the last tile."""

    def __init__(self, tiled: TiledKernel) -> None:
        self.tiled, self.calls, self.best_config = tiled, 0, tiled.space[-1]

    def __getitem__(self, grid: object):
        def run(**named: object) -> None:
            self.calls += 1
            names = ("y",) if "y" in named else ("dz", "dh", "magnitude_parts", "bias_parts")
            for config in self.tiled.fitting(named):
                self.tiled.kernel[grid](**named, **config.all_kwargs())
            for name in names:
                named[name].fill_(float("nan"))

        return run


@pytest.mark.parametrize("which", ["output", "backward"])
def test_timing_writes_to_no_callers_buffer_and_runs_once_a_bucket(monkeypatch, which):
    tiled = replace(kernels.OUTPUT if which == "output" else kernels.BACKWARD, _chosen={}, _tuners={})
    monkeypatch.setattr(kernels, which.upper(), tiled)
    tiled._tuners["cpu"] = tuner = RecordingTuner(tiled)
    other = kernels.BACKWARD if which == "output" else kernels.OUTPUT
    monkeypatch.setitem(other._tuners, "cpu", RecordingTuner(other))
    monkeypatch.setattr(kernels, "_may_time", lambda device: True)
    gain, b, bias = gain_of(70, torch.float32), torch.randn(70, 5), torch.randn(70)
    for count, rows in enumerate((33, 40, 64, 65, 128, 5, 1), start=1):
        product, hidden, dy = torch.randn(rows, 70), torch.randn(rows, 5), torch.randn(rows, 70)
        expected = reference_output(product, hidden, b, bias, gain.minus_one)
        y = kernels.adapted_output_(product.clone(), hidden, b, bias, gain.minus_one)
        close(y, expected, torch.float32, "y")
        found = kernels.backward_pass(dy, y, b, bias, gain, 0.7, with_bias_sum=True)
        close(found.dz, gain.full * dy, torch.float32, "dz")
        close(found.dh, 0.7 * found.dz @ b, torch.float32, "dh")
        close(found.db, dy.sum(0), torch.float32, "db")
        assert tuner.calls == (1, 1, 1, 2, 2, 3, 3)[count - 1]


@pytest.mark.parametrize("which", ["output", "backward"])
def test_tritons_own_autotuner_runs_every_fitting_tile_and_the_quickest_is_taken(monkeypatch, which):
    """Times are made up: the interpreter's mean nothing."""
    other = kernels.BACKWARD if which == "output" else kernels.OUTPUT
    tiled = replace(getattr(kernels, which.upper()), _chosen={}, _tuners={})
    monkeypatch.setattr(kernels, which.upper(), tiled)
    monkeypatch.setattr(other, "config", lambda operands, *_: other.fixed(operands))
    monkeypatch.setattr(kernels, "_may_time", lambda device: True)
    times: list[float] = []

    def made_up(call, quantiles, **_):
        call()
        times.append([9.0, 8.0, 1.0, 7.0][len(times) % 4])
        return [times[-1]] * 3

    monkeypatch.setattr(kernels, "do_bench", made_up)
    gain, b = gain_of(70, torch.float32), torch.randn(70, 5)
    for scale in (0.7, 0.8):  # no reason to time again
        product, hidden, dy = torch.randn(33, 70), torch.randn(33, 5), torch.randn(33, 70)
        expected = reference_output(product, hidden, b, None, gain.minus_one)
        close(kernels.adapted_output_(product, hidden, b, None, gain.minus_one), expected, torch.float32, "y")
        found = kernels.backward_pass(dy, product, b, None, gain, scale, with_bias_sum=False)
        close(found.dh, scale * (gain.full * dy) @ b, torch.float32, "dh")
    fitting = tiled.fitting({"rows": 33, "BLOCK_RANK": 16, **dict.fromkeys(("factor", "dy", "minus_one"), product)})
    assert len(times) == len(fitting) > 3
    (chosen,) = tiled._chosen.values()
    assert chosen == fitting[2]


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


def test_only_tiles_that_fit_are_timed():
    def fitting(tiled: TiledKernel, rows: int, rank: int, dtype: torch.dtype) -> list[Config]:
        tensors = {name: torch.empty(1, dtype=dtype) for name in ("factor", "dy", "minus_one")}
        constants = {"BLOCK_RANK": min(rank, 64) if tiled is kernels.OUTPUT else rank, "HAS_LOW_RANK": True}
        return tiled.fitting(Operands(tensors, {"rows": rows}, constants).everything())

    for tiled in (kernels.OUTPUT, kernels.BACKWARD):
        assert {config.kwargs["BLOCK_ROWS"] for config in fitting(tiled, 1, 16, torch.bfloat16)} == {16}
        assert len(fitting(tiled, 4096, 16, torch.bfloat16)) == len(tiled.space), "small ranks exclude nothing"
    wide = fitting(kernels.BACKWARD, 4096, 256, torch.bfloat16)
    assert 0 < len(wide) < len(kernels.BACKWARD.space)
    assert all(config.kwargs["BLOCK_ROWS"] * 256 <= 128 * 32 * config.num_warps for config in wide)


def test_products_follow_torchs_precision():
    from dora_vl.core.fast.triton import dot_precision

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert dot_precision(torch.float32, 16) == "ieee"
        assert dot_precision(torch.float32, 128) == "tf32x3"
        torch.set_float32_matmul_precision("high")
        assert dot_precision(torch.float32, 16) == dot_precision(torch.float32, 128) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def adapted_layer(*, bias: bool = True, **changes) -> DoRALinear:
    settings = {"targets": ("*",), "rank": 5, "alpha": 7.0, "dropout": 0.0}
    layer = DoRALinear(nn.Linear(33, 70, bias=bias), DoRAConfig(**{**settings, **changes}))
    layer.weight.requires_grad_(False)
    with torch.no_grad():
        if layer.lora_B is not None:
            layer.lora_B.normal_(std=0.3)
        if layer.magnitude is not None:
            layer.magnitude.mul_(torch.linspace(0.5, 1.7, 70))
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("changes", [{}, {"method": "magnitude"}, {"rank": 130}, {"detach_norm": False}], ids=str)
def test_layers_equal_the_eager_ones(changes, bias):
    """Forward and backward through the kernels in float32, and eagerly in float64."""
    narrow = adapted_layer(bias=bias, **changes)
    wide, x, upstream = copy.deepcopy(narrow).double(), torch.randn(2, 9, 33), torch.randn(2, 9, 70)
    results: list[dict[str, Tensor]] = []
    for layer, dtype in ((narrow, torch.float32), (wide, torch.float64)):
        inputs = x.detach().to(dtype).requires_grad_()
        y = layer(inputs)
        y.backward(upstream.to(dtype))
        gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "x": inputs.grad, **gradients})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        close(results[0][name], expected, torch.float32, name, times=3)
    with torch.no_grad():
        close(narrow.eval()(x), wide.eval()(x.double()), torch.float32, "eval", times=3)
