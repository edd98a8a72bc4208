"""A product in two halves of its rows is the product, and is taken only where it was seen to be equal and faster."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dora_vl.core import DoRAConfig, apply_dora, row_halves
from dora_vl.core.row_halves import RowHalves, halved_product, halves_are_faster, whole_product


@pytest.fixture(autouse=True)
def two_threads():
    """The question is asked with several threads alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def operands(rows: int = 515, inner: int = 391, columns: int = 400, dtype: torch.dtype = torch.bfloat16):
    generator = torch.Generator().manual_seed(3)
    shapes = (rows, inner), (columns, inner), (columns,)
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight.t(), bias


def asked(monkeypatch: pytest.MonkeyPatch, answer: bool) -> list[tuple[int, ...]]:
    """Answers every question with `answer`; the shapes that were asked about are listed."""
    shapes: list[tuple[int, ...]] = []

    def answered(rows: Tensor, *_: Tensor | None) -> bool:
        shapes.append(tuple(rows.shape))
        return answer

    monkeypatch.setattr(row_halves, "halves_are_faster", answered)
    return shapes


@pytest.mark.parametrize("rows", [515, 512])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_halves_are_the_product(monkeypatch, rows, with_bias, transposed):
    asked(monkeypatch, True)
    x, matrix, bias = operands(rows)
    matrix = matrix if transposed else matrix.contiguous()
    found = RowHalves().product(x, matrix, bias if with_bias else None)
    expected = x.double() @ matrix.double() + (bias.double() if with_bias else 0)
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-2)
    assert found.is_contiguous()


def test_a_layer_gives_the_same_with_halves_and_without(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(391, 400)).to(torch.bfloat16)
    apply_dora(model, DoRAConfig(targets=("*",), rank=3, alpha=5.0, dropout=0.0))
    with torch.no_grad():
        model[0].lora_B.normal_(std=0.1)
        model[0].magnitude.mul_(1.2)
    x = torch.randn(2, 300, 391).to(torch.bfloat16).requires_grad_()
    results = []
    for answer in (False, True):
        shapes = asked(monkeypatch, answer)
        monkeypatch.setattr(row_halves.ROW_HALVES, "_halved", {})
        output = model(x)
        gradients = torch.autograd.grad(output.float().square().sum(), [x, *model[0].factors()])
        with torch.no_grad():
            results.append([output, model.eval()(x), *gradients])
        model.train()
        assert shapes == [(600, 391), (600, 400)], "forward and backward are asked about, and evaluation knows"
    for whole, halves in zip(*results, strict=True):
        torch.testing.assert_close(halves, whole, rtol=2**-7, atol=2**-7 * whole.detach().abs().max().item())


def test_a_shape_is_asked_about_once_and_other_products_again(monkeypatch):
    shapes = asked(monkeypatch, True)
    products = RowHalves()
    x, matrix, bias = operands(639)
    for _ in range(3):
        products.product(x, matrix, bias)
    assert shapes == [(639, 391)]
    products.product(x[:300], matrix, bias)
    products.product(x, matrix)
    products.product(x, matrix.contiguous(), bias)
    products.product(x.half(), matrix.half(), bias.half())
    torch.set_num_threads(3)
    products.product(x, matrix, bias)
    assert shapes == [(639, 391), (300, 391), (639, 391), (639, 391), (639, 391), (639, 391)]


def test_where_nothing_can_be_won_nothing_is_asked(monkeypatch):
    shapes = asked(monkeypatch, True)
    products = RowHalves()
    x, matrix, _ = operands()
    products.product(x[:255], matrix)
    products.product(x.expand(8, *x.shape).reshape(-1, 391), matrix)  # 4,120 rows
    products.product(x.float(), matrix.float())
    products.product(x, matrix[:, :300])
    torch.set_num_threads(1)
    products.product(x, matrix)
    assert shapes == []


def test_the_best_of_several_timings_decides(monkeypatch):
    timed = {whole_product: iter([9.0, 1.0, 9.0, 9.0, 9.0]), halved_product: iter([0.99, 5.0, 0.92, 5.0, 5.0])}
    monkeypatch.setattr(row_halves, "_seconds", lambda way, *_: next(timed[way]))
    assert halves_are_faster(*operands()) is True
    timed.update({whole_product: iter([1.0] * 5), halved_product: iter([0.94] * 5)})
    assert halves_are_faster(*operands()) is False


def test_halves_with_other_bits_are_never_taken(monkeypatch):
    def off_by_a_bit(*given: Tensor) -> Tensor:
        product = whole_product(*given)
        product[-1, -1] *= 1 + 2**-7
        return product

    monkeypatch.setattr(row_halves, "halved_product", off_by_a_bit)
    monkeypatch.setattr(row_halves, "_seconds", lambda way, *_: 0.1 if way is off_by_a_bit else 1.0)
    assert halves_are_faster(*operands()) is False
