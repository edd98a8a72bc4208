"""Adapted layers where numbers are hard, under edits and `torch.func`; what once came out wrong without a word."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dora_vl.core import DoRALinear, adapted_layers, apply_dora, strip_adapters
from dora_vl.core.fast import cpu_step
from dora_vl.core.fast.dropout import draw_dropped
from dora_vl.core.gain import kept_norms
from dora_vl.errors import UserError
from tests.core.dense_dora import (
    assert_same_gradients,
    config,
    move_layer,
    moved_layer,
    passed,
    reference_of,
    unchanged,
)
from tests.core.test_experts import adapted as adapted_experts
from tests.core.test_experts import inputs as expert_inputs
from tests.core.test_layers import KINDS, input_of, moved

methods = pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])


@pytest.mark.parametrize(("sizes", "rows"), [((6, 5, 2), 4), ((192, 576, 100), 96)])
@methods
@pytest.mark.parametrize("detach_norm", [True, False])
def test_float32_is_within_1e_6_of_float64(sizes, rows, method, detach_norm):
    """Of each tensor's largest value: a sum of many products cannot keep 1e-6 of a small element in float32.

    PEFT's float32 is as far from float64 (2e-7 to 6e-7 at 576 x 1536), so two float32 runs may differ by the sum.
    """
    torch.manual_seed(0)
    in_features, out_features, rank = sizes
    settings = config(rank=rank, alpha=2.3 * rank, method=method, detach_norm=detach_norm)
    narrow = moved_layer(settings, dtype=torch.float32, in_features=in_features, out_features=out_features)
    wide, x, upstream = copy.deepcopy(narrow).double(), torch.randn(rows, in_features), torch.randn(rows, out_features)
    results = passed(narrow, x, upstream)
    for name, expected in passed(wide, x.double(), upstream).items():
        error = (results[name].double() - expected).abs().max()
        assert error <= 1e-6 * expected.abs().max(), (name, float(error), float(expected.abs().max()))


@pytest.mark.parametrize("mode", ["low_rank", "whole_change"])
@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("shape", [(6,), (2, 4, 6)])
def test_dropout_with_a_known_mask(mode, method, detach_norm, shape):
    torch.manual_seed(1)
    layer = moved_layer(config(method=method, dropout=0.4, dropout_mode=mode, detach_norm=detach_norm))
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    torch.manual_seed(5)
    if mode == "low_rank" or method == "lora":
        kept = draw_dropped(x, 0.4).apply(torch.ones_like(x)) / 0.6
    else:
        kept = F.dropout(torch.ones_like(x), 0.4)
    assert 0 < int((kept == 0).sum()) < x.numel()
    torch.manual_seed(5)
    y = layer(x)
    assert_same_gradients(layer, x, y, reference_of(layer, x, kept=kept.detach()), tolerance=1e-10)


@pytest.mark.parametrize("detach_norm", [True, False])
def test_rows_that_the_change_cancels_take_the_dense_norm(detach_norm):
    """A factored norm loses all its digits where s B A is nearly -W; float32 must still be right."""
    torch.manual_seed(0)
    layer = moved_layer(config(rank=5, alpha=5.0, detach_norm=detach_norm), dtype=torch.float32, in_features=7)
    with torch.no_grad():
        layer.lora_A[0].copy_(layer.weight[1])
        layer.lora_B[1].copy_(torch.tensor([-(1 - 1e-5), 0, 0, 0, 0]))
    direction = layer.weight.double() + layer.lora_B.double() @ layer.lora_A.double()
    norms, x = torch.linalg.vector_norm(direction, dim=1), torch.randn(3, 7)
    assert float(norms[1].detach()) < 1e-4
    expected = x.double() @ ((layer.magnitude.double() / norms).unsqueeze(1) * direction).t()
    output = layer.eval()(x).double() - layer.bias.double()
    # The row is 1e-5 of W, known to 1e-7/1e-5 relative in float32; an uncorrected norm is off by a factor.
    torch.testing.assert_close(output, expected, rtol=5e-2, atol=1e-5)


def test_zero_rows_never_give_nan_once_B_moves():
    base = nn.Linear(6, 5)
    with torch.no_grad():
        base.weight[1].zero_()
    layer, x = DoRALinear(base, config()), torch.randn(4, 6)
    trained = (layer.lora_A, layer.lora_B, layer.magnitude)
    optimizer = torch.optim.SGD(trained, lr=0.3)
    for _ in range(4):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in trained)
        optimizer.step()
        assert torch.isfinite(layer(x)).all()
    assert float(layer.magnitude[1].detach().abs()) > 0, "the zero row's magnitude must be able to leave 0"


@methods
def test_autocast_computes_in_half_precision_with_float32_gradients(method):
    torch.manual_seed(0)
    layer = moved_layer(config(method=method, rank=4), dtype=torch.float32, in_features=64, out_features=33)
    x = torch.randn(8, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    expected, leaves = reference_of(layer, x)
    expected.square().mean().backward()
    # bfloat16 keeps 8 bits: 2^-8 an element, a few of them in a sum.
    torch.testing.assert_close(y.float(), expected, rtol=3e-2, atol=3e-2)
    for name, parameter in {**dict(layer.named_parameters()), "x": x}.items():
        if parameter.requires_grad and name != "bias":
            assert parameter.grad.dtype == torch.float32
            error = (parameter.grad - leaves[name].grad).norm() / leaves[name].grad.norm()
            assert float(error) < 2e-2, (name, float(error))


def test_the_magnitudes_gradient_under_a_bias_a_thousand_times_the_product():
    """W x + b is what is kept, as PEFT keeps it: such a bias hides three of its digits."""
    torch.manual_seed(0)
    layer = moved_layer(config(rank=4), dtype=torch.float32, in_features=64, out_features=48)
    with torch.no_grad():
        layer.bias.normal_(std=1e3)
    x, upstream = torch.randn(33, 64), torch.randn(33, 48)
    layer(x).backward(upstream)
    y, leaves = reference_of(copy.deepcopy(layer).double(), x.double())
    y.backward(upstream.double())
    expected = leaves["magnitude"].grad
    error = float((layer.magnitude.grad - expected).abs().max() / expected.abs().max())
    assert error < 1e-4, error


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(
        shape or (7, 6), dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    ).requires_grad_()


def gradients(layer: nn.Module, x: torch.Tensor, run) -> list[torch.Tensor]:
    """Of the input and of what trains, with the same dropout at each call."""
    torch.manual_seed(3)
    return list(passed(layer, x, run=run).values())[1:]


@pytest.mark.parametrize("edit", [torch.relu_, lambda y: y.mul_(1.7).tanh()], ids=["relu_", "mul_"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(2, 3, 6), (6,)])
def test_an_output_edited_in_place_has_the_gradients_of_one_that_was_not(edit, dropout, shape):
    layer, x = moved_layer(config(dropout=dropout)).train(), rows(*shape)
    expected = gradients(layer, x, lambda x: edit(layer(x).clone()))
    torch.testing.assert_close(gradients(layer, x, lambda x: edit(layer(x))), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["low_rank", "whole_change"])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_checkpoint_gives_the_same_gradients(reentrant, mode, inplace):
    layer, x = moved_layer(config(dropout=0.4, dropout_mode=mode)).train(), rows()
    block = nn.Sequential(layer, nn.ReLU(inplace=inplace))
    expected = gradients(layer, x, lambda x: torch.relu(layer(x)))
    checkpointed = gradients(layer, x, lambda x: checkpoint(block, x, use_reentrant=reentrant))
    torch.testing.assert_close(checkpointed, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("detach_norm", [True, False])
def test_func_grad_is_autograds_gradient(detach_norm):
    layer, x = moved_layer(config(detach_norm=detach_norm)), rows()
    values = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, values, (x,)).square().sum()

    of_values, of_x = torch.func.grad(loss, argnums=(0, 1))(values, x.detach())
    expected = gradients(layer, x, layer)
    trained = [of_values[name] for name, p in layer.named_parameters() if p.requires_grad]
    for actual, gradient in zip([of_x, *trained], expected, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-9)


def with_long_rows(layer: Any) -> Any:
    """A's rows have a norm of 400, whose square no float16 holds; B is small enough for the output."""
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_A.mul_(400 / layer.lora_A.flatten(1).norm(dim=1).min())
        layer.lora_B.normal_(std=2e-3)
        layer.forget_norms()
    return layer


@pytest.mark.parametrize("count", [1, 3])
def test_rows_of_A_that_are_long_in_float16(count) -> None:
    """One layer's gain by itself, and several of one shape in one go; with a graph and without."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(count))).half()
    apply_dora(model, config(rank=4, alpha=4.0))
    x = torch.randn(5, 16).half()
    for _, layer in adapted_layers(model):
        with_long_rows(layer)
        wide = copy.deepcopy(layer).double()
        wide.lora_A.data, wide.lora_B.data = (layer.lora_A.half().double(), layer.lora_B.half().double())
        expected = reference_of(wide, x.double())[0]
        for graph in (True, False):
            with torch.set_grad_enabled(graph):
                torch.testing.assert_close(layer(x).double(), expected, rtol=2e-2, atol=2e-2)


def test_long_rows_of_experts_in_float16() -> None:
    for _, layer in adapted_layers(adapted_experts().half()):
        with_long_rows(layer)
        weight, a, b = (t.half().double() for t in (layer.frozen_matrix(), layer.lora_A, layer.lora_B))
        expected = (weight + layer.adapter.scale * torch.bmm(b, a)).norm(dim=2)
        torch.testing.assert_close(kept_norms(layer).double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unfrozen_weight_is_refused_where_it_would_get_no_gradient(kind) -> None:
    model, x = moved(kind).eval(), input_of(kind)
    before = model(x)
    layer = model.inner["layer"]
    layer.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"inner\.layer"):
        model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)
    layer.weight.requires_grad_(False)
    torch.testing.assert_close(model(x), before)


def test_an_unfrozen_weight_of_experts_is_refused() -> None:
    model = adapted_experts()
    next(layer for _, layer in adapted_layers(model)).weight.requires_grad_(True)
    with pytest.raises(RuntimeError):
        model(*expert_inputs())


def test_a_view_of_a_flat_parameter_in_the_weights_place_is_taken() -> None:
    """As FSDP1 has it: one parameter holds all of a module, frozen or not, and requires a gradient."""
    layer, x = moved_layer(config()), torch.randn(3, 6, dtype=torch.float64)
    expected = layer(x)
    flat = nn.Parameter(layer.weight.detach().flatten())
    del layer._parameters["weight"]
    layer.weight = flat.view(5, 6)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        ({}, True),
        ({"method": "lora"}, True),
        ({"detach_norm": False}, True),
        ({"method": "magnitude"}, False),
        ({"dropout": 0.3}, False),
        ({"dropout": 0.3, "dropout_mode": "whole_change"}, False),
    ],
    ids=str,
)
def test_an_input_edited_in_place_is_refused_or_changes_no_gradient(changes, is_refused) -> None:
    layer, x = moved_layer(config(**changes)).train(), torch.randn(7, 6, dtype=torch.float64)

    def gradients(*, edited: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        between = leaf * 1.0
        y = layer(between)
        if edited:
            between.mul_(2)
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        return list(torch.autograd.grad(y.square().sum(), [leaf, *trained]))

    expected = gradients(edited=False)
    if is_refused:
        with pytest.raises(RuntimeError):
            gradients(edited=True)
    else:
        torch.testing.assert_close(gradients(edited=True), expected)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_float64_into_a_float32_layer_is_refused_as_torch_does(method) -> None:
    layer = moved_layer(config(method=method), dtype=torch.float32)
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, 6, dtype=torch.float64))


@pytest.mark.parametrize(("compiled", "rank"), [(True, 16), (False, 16), (True, 128)])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_torchs_counter_sees_all_products_of_a_step(monkeypatch, compiled, rank, method) -> None:
    if not compiled:
        monkeypatch.setattr(cpu_step, "SMALLEST", 2**60)
    layer = DoRALinear(nn.Linear(256, 512), config(method=method, rank=rank))
    x = torch.randn(512, 256, requires_grad=True)
    layer(x).sum().backward()  # the norm is kept
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    low_rank = 3 * (256 + 512) * rank  # forward, of the input, of A and B
    assert counter.get_total_flops() == 2 * 512 * (2 * 256 * 512 + low_rank)


@pytest.mark.parametrize("training", [True, False])
def test_a_gain_too_small_for_bfloat16_is_in_the_output(training) -> None:
    """bfloat16 has nothing between 1 and 1.0078."""
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(64, 32, bias=False, dtype=torch.bfloat16), config(rank=4)).train(training)
    x = torch.randn(256, 64).bfloat16()
    with torch.no_grad():
        before = layer(x).double()
        layer.magnitude.mul_(1.003)
    after = layer(x.requires_grad_(training)).detach().double()
    assert float((after * before).sum() / before.square().sum()) == pytest.approx(1.003, abs=5e-4)


def test_pissa_of_a_weight_with_nan_is_refused_and_changes_nothing() -> None:
    model = nn.ModuleDict({"q": nn.Linear(6, 6), "k": nn.Linear(6, 6)})
    with torch.no_grad():
        model["k"].weight[0, 0] = float("nan")
    with unchanged(model), pytest.raises(UserError):
        apply_dora(model, config(init="pissa"))


@pytest.mark.parametrize("target", ["linear1", "linear2"])
@pytest.mark.parametrize("nested", [False, True])
def test_torchs_encoder_gives_the_adapters_output_in_eval(target, nested) -> None:
    """Its fused pass reads the layers' weights; a padding mask makes its inputs nested tensors."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(block, 2) if nested else block
    x, padding = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [2]])
    apply_dora(model, config(targets=(f"*{target}",)))
    for _, layer in adapted_layers(model):
        move_layer(layer)
    named = {"src_key_padding_mask": padding} if nested else {}
    kept = ~padding if nested else torch.ones_like(padding)
    expected = model.train()(x, **named)[kept]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, **named)[kept], expected, rtol=1e-5, atol=1e-5)
        base = copy.deepcopy(model)
        strip_adapters(base)
        assert not torch.allclose(base(x, **named)[kept], expected, atol=1e-2)
