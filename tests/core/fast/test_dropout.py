"""Dropout by drawn positions: its probability, its independence, and which layers share a mask."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.core.fast import dropout
from dora_vl.core.fast.dropout import SharedDropout, draw_dropped


def masks(count: int, size: int, probability: float) -> torch.Tensor:
    torch.manual_seed(0)
    like = torch.ones(count, size)
    return draw_dropped(like, probability).apply(like) == 0


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.8])
def test_probability_and_independence(probability):
    drawn = masks(20_000, 6, probability).double()
    share = drawn.mean()
    assert abs(share - probability) < 5 * (probability * (1 - probability) / drawn.numel()) ** 0.5
    covariance = torch.cov(drawn.t())
    variance = probability * (1 - probability)
    torch.testing.assert_close(covariance.diagonal(), torch.full((6,), variance).double(), rtol=0.06, atol=1e-3)
    off = covariance - torch.diag(covariance.diagonal())
    assert float(off.abs().max()) < 5 * variance / 20_000**0.5


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("mode", ["low_rank", "whole_change"])
def test_output_is_unbiased(method, mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    apply_dora(model, DoRAConfig(targets=("*",), rank=2, alpha=6.0, dropout=0.3, method=method, dropout_mode=mode))
    with torch.no_grad():
        model[0].lora_B.normal_()
        if model[0].magnitude is not None:
            model[0].magnitude.mul_(1.4)
    x = torch.randn(1, 6, dtype=torch.float64)
    expected = model.eval()(x)
    model.train()
    outputs = model(x.expand(4000, 6))  # each row draws its own
    error = (outputs.mean(dim=0) - expected[0]).abs()
    assert bool((error < 5 * outputs.std(dim=0) / 4000**0.5).all())


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
    import gc
    import weakref

    from dora_vl.core import linear

    model = nn.ModuleDict({"q": nn.Linear(6, 5), "k": nn.Linear(6, 3)})
    apply_dora(model, DoRAConfig(targets=("*",), rank=2, dropout=0.5))
    x = torch.randn(50, 6)
    with torch.autocast("cpu", torch.bfloat16):
        model["q"](x)
        drawn = linear.SHARED_DROPOUT._dropped
        model["k"](x)
        assert linear.SHARED_DROPOUT._dropped is drawn
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_keeps_no_mask(monkeypatch, reentrant):
    """Two blocks, since the last draw of all is kept for the layers that may share it."""
    masks: list[weakref.ReferenceType[torch.Tensor]] = []
    draw = dropout.draw_dropped

    def remembered(*operands):
        drawn = draw(*operands)
        masks.append(weakref.ref(drawn.positions))
        return drawn

    monkeypatch.setattr(dropout, "draw_dropped", remembered)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    apply_dora(model, DoRAConfig(targets=("*",), rank=2, alpha=6.0, dropout=0.3))
    y = torch.randn(40, 6, requires_grad=True)
    for layer in model:
        y = checkpoint(layer, y, use_reentrant=reentrant)
    gc.collect()
    assert [mask() is None for mask in masks] == [True, False]
    y.sum().backward()
