"""Dropout by drawn positions: its probability, its independence, and which layers share a mask."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from dora_vl.core import apply_dora
from dora_vl.core.fast.dropout import SHARED_DROPOUT, SharedDropout, draw_dropped
from tests.core.dense_dora import config


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.8])
def test_probability_and_independence(probability):
    torch.manual_seed(0)
    like = torch.ones(20_000, 6)
    drawn = (draw_dropped(like, probability).apply(like) == 0).double()
    variance = probability * (1 - probability)
    assert abs(drawn.mean() - probability) < 5 * (variance / drawn.numel()) ** 0.5
    covariance = torch.cov(drawn.t())
    torch.testing.assert_close(covariance.diagonal(), torch.full((6,), variance).double(), rtol=0.06, atol=1e-3)
    off = covariance - torch.diag(covariance.diagonal())
    assert float(off.abs().max()) < 5 * variance / 20_000**0.5


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
    model = nn.ModuleDict({"q": nn.Linear(6, 5), "k": nn.Linear(6, 3)})
    apply_dora(model, config(dropout=0.5))
    x = torch.randn(50, 6)
    with torch.autocast("cpu", torch.bfloat16):
        model["q"](x)
        drawn = SHARED_DROPOUT._dropped
        model["k"](x)
        assert SHARED_DROPOUT._dropped is drawn
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None
