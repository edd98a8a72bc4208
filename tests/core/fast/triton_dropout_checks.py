"""Dropout drawn inside the kernels: Philox as written down, the same mask in every pass, at every tile and checkpoint.

Run by test_triton_kernels.py in a process of its own: Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import copy
import gc
import os
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dora_vl.core import DoRAConfig, DoRALinear, apply_dora, linear
from dora_vl.core.fast import dropout
from dora_vl.core.fast.dropout import Dropped, draw_dropped
from dora_vl.core.fast.products import kernels_for

if kernels_for(torch.device(os.environ.get("CHECKED_DEVICE", "cpu")), torch.float32) is None:
    pytest.skip("runs in Triton's interpreter or on a GPU", allow_module_level=True)

from dora_vl.core.fast import triton as kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOW = 2**32 - 1


@pytest.fixture(autouse=True)
def device():
    torch.set_default_device(os.environ.get("CHECKED_DEVICE", "cpu"))
    torch.manual_seed(0)
    yield
    torch.set_default_device(None)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 as in Salmon et al. 2011, with Python's whole numbers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = second >> 32 ^ c1 ^ k0, second & LOW, first >> 32 ^ c3 ^ k1, first & LOW
        k0, k1 = k0 + 0x9E3779B9 & LOW, k1 + 0xBB67AE85 & LOW
    return [c0, c1, c2, c3]


def kept_of(seed: int, rows: int, columns: int, probability: float) -> Tensor:
    key = seed & LOW, seed >> 32
    drawn = [
        [number for quad in range(-(-columns // 4)) for number in philox((quad, row, 0, 0), key)][:columns]
        for row in range(rows)
    ]
    return torch.tensor(drawn) >= round(probability * 2**32)


def test_philox_as_published():
    """The generator's known answers (Random123, kat_vectors)."""
    assert philox((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox((LOW, LOW, LOW, LOW), (LOW, LOW)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("probability", [0.05, 0.9])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 515)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_copys_mask_is_philoxs(dtype, shape, probability):
    seed, x = 0x1234_5678_9ABC_DEF, torch.rand(shape).to(dtype) + 1
    kept = kept_of(seed, *shape, probability)
    found = kernels.masked_copy(x, torch.tensor(seed), probability)
    assert found.dtype == dtype
    assert torch.equal(found, torch.where(kept, x, 0.0).to(dtype))
    gaps = torch.full((shape[0], 2 * shape[1]), float("nan"), dtype=dtype)
    gaps[:, ::2] = x
    assert torch.equal(kernels.masked_copy(gaps[:, ::2], torch.tensor(seed), probability), found)


def test_what_is_dropped_leaves_no_infinity():
    seed, x = torch.tensor(5), torch.full((4, 30), float("inf"))
    found = kernels.masked_copy(x, seed, 0.5)
    assert set(found.unique().tolist()) == {0.0, float("inf")}


@pytest.mark.parametrize("rank", [1, 3, 16, 130, 257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_pass_repeats_the_mask(dtype, rank):
    seed, rows, columns = torch.tensor(2**61 + 7), 37, 75
    dx, dh, a = torch.randn(rows, columns).to(dtype), torch.randn(rows, rank).to(dtype), torch.randn(rank, columns)
    kept = kernels.masked_copy(torch.ones(rows, columns, dtype=dtype), seed, 0.3).double()
    expected = dx.double() + kept * (dh.double() @ a.to(dtype).double())
    found = kernels.add_masked_product_(dx.clone(), dh, a, seed, 0.3)
    size = float(expected.abs().max())
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert float((found.double() - expected).abs().max()) <= tolerance * size
    assert torch.equal(found[kept == 0], dx[kept == 0]), "where x was dropped, nothing is added"
    wide = torch.zeros(rows, 2 * columns, dtype=dtype)
    wide[:, ::2] = dx
    strided = kernels.add_masked_product_(wide[:, ::2], dh.t().contiguous().t(), a.t().contiguous().t(), seed, 0.3)
    assert torch.equal(strided, found)
    assert torch.equal(wide[:, ::2], found)
    assert not wide[:, 1::2].any()


def test_no_rows():
    seed = torch.tensor(1)
    assert kernels.masked_copy(torch.empty(0, 5), seed, 0.5).shape == (0, 5)
    empty = torch.empty(0, 5)
    assert kernels.add_masked_product_(empty, torch.empty(0, 2), torch.randn(2, 5), seed, 0.5) is empty


def test_the_mask_hangs_on_no_tile(monkeypatch):
    seed, dh, a = torch.tensor(11), torch.ones(140, 2), torch.ones(2, 150)
    expected = 2 * kernels.masked_copy(torch.ones(140, 150), seed, 0.4)
    for config in kernels.MASKED_PRODUCT.space:
        monkeypatch.setattr(kernels.MASKED_PRODUCT, "config", lambda *_, config=config: config)
        assert torch.equal(kernels.add_masked_product_(torch.zeros(140, 150), dh, a, seed, 0.4), expected)
    for rows, columns in ((1, 16), (16, 64), (64, 1024)):
        monkeypatch.setattr(kernels, "COPIED_ROWS", rows)
        monkeypatch.setattr(kernels, "COPIED_COLUMNS", columns)
        assert torch.equal(2 * kernels.masked_copy(torch.ones(140, 150), seed, 0.4), expected)


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.5, 0.999])
def test_the_rate_and_the_independence_of_neighbours(probability):
    """Shares within five standard deviations of the binomial's; pairs of neighbours along either axis, and of seeds."""
    rows, columns = 300, 700
    masks = [
        draw_dropped(torch.ones(rows, columns), probability).apply(torch.ones(rows, columns)) == 0 for _ in range(2)
    ]
    one = masks[0]

    def assert_share(hits: Tensor, chance: float) -> None:
        bound = 5 * (chance * (1 - chance) / hits.numel()) ** 0.5
        assert abs(float(hits.double().mean()) - chance) < bound

    assert_share(one, probability)
    for pair in (one[:, 1:] & one[:, :-1], one[1:] & one[:-1], one & masks[1], one[:, 4:] & one[:, :-4]):
        assert_share(pair, probability**2)


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


def adapted(out: int = 70) -> DoRALinear:
    layer = DoRALinear(nn.Linear(33, out), DoRAConfig(targets=("*",), rank=5, alpha=7.0, dropout=0.4))
    layer.weight.requires_grad_(False)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.3)
        layer.magnitude.mul_(torch.linspace(0.5, 1.7, out))
    return layer


def test_a_layer_equals_the_eager_one_under_the_same_mask(monkeypatch):
    narrow, seed = adapted(), torch.tensor(77)
    wide, x, upstream = copy.deepcopy(narrow).double(), torch.randn(2, 9, 33), torch.randn(2, 9, 70)
    dropped = (kernels.masked_copy(torch.ones(18, 33), seed, 0.4) == 0).flatten().nonzero().flatten()
    results = []
    for layer, dtype, positions in ((narrow, torch.float32, seed), (wide, torch.float64, dropped)):
        monkeypatch.setattr(linear.SHARED_DROPOUT, "draw", lambda *_, p=positions: Dropped(0.4, p))
        inputs = x.detach().to(dtype).requires_grad_()
        y = layer(inputs)
        y.backward(upstream.to(dtype))
        gradients = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
        results.append({"y": y.detach(), "x": inputs.grad, **gradients})
    for name, expected in results[1].items():
        error = float((results[0][name].double() - expected).abs().max() / expected.abs().max())
        assert error < 1e-5, (name, error)


def test_layers_share_a_seed_and_a_masked_copy_that_no_graph_keeps(monkeypatch):
    copies: list[weakref.ReferenceType[Tensor]] = []
    real = kernels.masked_copy

    def watched(*operands: object) -> Tensor:
        made = real(*operands)
        copies.append(weakref.ref(made))
        return made

    monkeypatch.setattr(kernels, "masked_copy", watched)
    model = nn.ModuleDict({"q": nn.Linear(6, 5), "k": nn.Linear(6, 3)})
    apply_dora(model, DoRAConfig(targets=("*",), rank=2, dropout=0.5))
    x = torch.randn(50, 6, requires_grad=True)
    q = model["q"](x)
    drawn = linear.SHARED_DROPOUT._dropped
    y = q.sum() + model["k"](x).sum()
    assert linear.SHARED_DROPOUT._dropped is drawn
    assert len(copies) == 1, "one for both"
    assert q.grad_fn.saved_tensors[0].data_ptr() == x.data_ptr(), "what is kept is x"
    linear.SHARED_DROPOUT.draw(torch.randn(2, 2), 0.5, 0)
    del drawn
    gc.collect()
    assert copies[0]() is None, "the next draw lets go of it"
    y.backward()
    assert len(copies) == 3, "each layer draws it again"


def test_an_output_edited_in_place_has_the_same_gradients():
    """z is then computed again, from x without its mask."""
    layer, x = adapted(), torch.randn(12, 33)
    results = []
    for edit in (torch.relu, torch.relu_):
        torch.manual_seed(5)
        layer.zero_grad()
        edit(layer(x)).sum().backward()
        results.append([p.grad.clone() for p in layer.parameters() if p.requires_grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_the_same(reentrant):
    model = nn.Sequential(adapted(33), adapted(33))
    x, results = torch.randn(12, 33), []
    for checkpointed in (False, True):
        torch.manual_seed(9)
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        y = inputs
        for layer in model:
            y = checkpoint(layer, y, use_reentrant=reentrant) if checkpointed else layer(y)
        y.square().sum().backward()
        results.append([y.detach(), inputs.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_keeps_no_seed(monkeypatch, reentrant):
    seeds, draw = [], dropout.draw_dropped

    def remembered(*operands):
        drawn = draw(*operands)
        seeds.append(weakref.ref(drawn.positions))
        return drawn

    monkeypatch.setattr(dropout, "draw_dropped", remembered)
    y = torch.randn(40, 33, requires_grad=True)
    for layer in (adapted(33), adapted(33)):
        y = checkpoint(layer, y, use_reentrant=reentrant)
    gc.collect()
    assert [seed() is None for seed in seeds] == [True, False]
    y.sum().backward()


def test_a_copy_has_the_masks_gradient():
    x, seed = torch.randn(3, 4, 9, requires_grad=True), torch.tensor(3)
    dropped = Dropped(0.5, seed)
    y = dropped.apply(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, (y != 0).to(x.dtype))
