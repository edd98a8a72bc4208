"""A product in two halves of its rows is the product, taken only where it is faster and no bit of it differs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dora_vl.core import apply_dora
from dora_vl.core.fast import products
from dora_vl.core.fast.products import frozen_product, halves_have_the_bits, product_in_parts
from tests.core.dense_dora import config, move


@pytest.fixture(autouse=True)
def two_threads():
    """The question is asked with several threads alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def operands(rows: int = 515, inner: int = 391, columns: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (rows, inner), (columns, inner), (columns,)
    x, weight, bias = (torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes)
    return x, weight.t(), bias


def asked(monkeypatch: pytest.MonkeyPatch, answer: bool) -> list[tuple[int, ...]]:
    """Answers every question with `answer`; the shapes that were asked about are listed."""
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(products, "SIGHTINGS", 1)
    monkeypatch.setattr(products, "_halved", {})
    monkeypatch.setattr(products, "halves_are_faster", lambda rows, *_: shapes.append(tuple(rows.shape)) or answer)
    monkeypatch.setattr(products, "halves_have_the_bits", lambda *_: True)
    return shapes


@pytest.mark.parametrize("rows", [515, 512])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_halves_are_the_product(monkeypatch, rows, with_bias, transposed):
    asked(monkeypatch, True)
    x, matrix, bias = operands(rows)
    matrix = matrix if transposed else matrix.contiguous()
    output = frozen_product(x, matrix, bias if with_bias else None)
    expected = x.double() @ matrix.double() + (bias.double() if with_bias else 0)
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=1e-2)
    assert output.is_contiguous()


def test_a_layer_gives_the_same_with_halves_and_without(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(391, 400)).to(torch.bfloat16)
    apply_dora(model, config(rank=3))
    move(model)
    x = torch.randn(2, 300, 391).to(torch.bfloat16).requires_grad_()
    results = []
    for answer in (False, True):
        shapes = asked(monkeypatch, answer)
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
    x, matrix, bias = operands(639)
    for _ in range(3):
        frozen_product(x, matrix, bias)
    assert shapes == [(639, 391)]
    frozen_product(x[:300], matrix, bias)
    frozen_product(x, matrix)
    frozen_product(x, matrix.contiguous(), bias)
    frozen_product(x.half(), matrix.half(), bias.half())
    torch.set_num_threads(3)
    frozen_product(x, matrix, bias)
    assert shapes == [(639, 391), (300, 391), *[(639, 391)] * 4]


def test_a_shape_is_asked_about_when_it_comes_again_and_again_and_few_are_remembered(monkeypatch):
    shapes = asked(monkeypatch, True)
    monkeypatch.setattr(products, "SIGHTINGS", 3)
    monkeypatch.setattr(products, "MOST_SHAPES", 4)
    x, matrix, _ = operands(600)
    for count in range(300, 320):  # batches of varying length
        frozen_product(x[:count], matrix)
    assert shapes == []
    assert len(products._halved) == 4
    for _ in range(5):
        frozen_product(x, matrix)
        assert torch.equal(frozen_product(x[:301], matrix), product_in_parts(x[:301], matrix, None, 1))
    assert shapes == [(600, 391), (301, 391)]
    assert list(products._halved.values())[-2:] == [True, True]


def test_where_nothing_can_be_won_nothing_is_asked(monkeypatch):
    shapes = asked(monkeypatch, True)
    x, matrix, _ = operands()
    frozen_product(x[:255], matrix)
    frozen_product(x.expand(8, *x.shape).reshape(-1, 391), matrix)  # 4,120 rows
    frozen_product(x.float(), matrix.float())
    frozen_product(x, matrix[:, :300])
    frozen_product(x[:, ::2], matrix[::2])
    frozen_product(x[:, :390].contiguous(), matrix[:390])
    torch.set_num_threads(1)
    frozen_product(x, matrix)
    assert shapes == []


def in_parts(parts: int, backwards: bool = False):
    """A product as a library could take it: the terms of a sum in several parts, one after the other in float32."""

    def product(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        sums = torch.zeros(len(rows), matrix.shape[1])
        for part in torch.arange(len(matrix)).chunk(parts):
            partial = torch.zeros_like(sums)
            for term in part.flip(0) if backwards else part:
                partial.addr_(rows[:, term].float(), matrix[term].float())
            sums += partial
        return (sums if bias is None else sums + bias.float()).to(rows.dtype)

    return product


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("inner", [91, 128])
def test_another_order_of_sums_is_found(monkeypatch, inner, with_bias):
    """Two parts are the trap: terms that cancel between the parts would leave zero in any order within them."""
    x, matrix, bias = operands(100, inner, 90)
    arguments = (torch.zeros_like(x), matrix, bias if with_bias else None)  # as a gradient may be: not what is compared
    for halves, equal in (in_parts(2), True), (in_parts(2, True), False), (in_parts(1), False), (in_parts(3), False):
        ways = {1: in_parts(2), 2: halves}
        monkeypatch.setattr(products, "product_in_parts", lambda *args, ways=ways: ways[args[-1]](*args[:-1]))
        assert halves_have_the_bits(*arguments) is equal


@pytest.mark.parametrize(("rows", "columns", "inner"), [(600, 576, 576), (515, 400, 391), (300, 192, 768)])
@pytest.mark.parametrize("transposed", [True, False])
def test_what_was_found_equal_once_is_equal_for_other_numbers(rows, columns, inner, transposed):
    generator = torch.Generator().manual_seed(rows)

    def drawn() -> tuple[Tensor, Tensor, Tensor]:
        x, matrix, bias = operands(rows, inner, columns)
        x, matrix = (operand.clone().normal_(generator=generator) for operand in (x, matrix))
        return x, matrix if transposed else matrix.contiguous(), bias

    claimed = halves_have_the_bits(*drawn())
    samples = [drawn() for _ in range(3)]
    equal = all(torch.equal(*(product_in_parts(*sample, parts) for parts in (1, 2))) for sample in samples)
    assert equal or not claimed


def test_halves_with_other_bits_are_never_taken(monkeypatch):
    asked(monkeypatch, True)
    monkeypatch.setattr(products, "halves_have_the_bits", lambda *_: False)
    x, matrix, bias = operands()
    assert torch.equal(frozen_product(x, matrix, bias), product_in_parts(x, matrix, bias, 1))
    assert list(products._halved.values()) == [False]
