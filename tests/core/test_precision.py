"""What trained in float32 over a half-precision base goes back to the dtype of before when the adapters go."""

from __future__ import annotations

import torch

from dora_vl.core import DoRAConfig, apply_dora, merge_dora, strip_adapters
from tests.core.dense_dora import move
from tests.core.test_inject import Small, Tied, config


def test_strip_gives_extras_their_dtype_back_and_casts_no_more():
    model, x = Small().bfloat16(), torch.randn(2, 6).bfloat16()
    expected = model(x)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    apply_dora(
        model, config(also_train={"projector": ("projector.*",), "bias": ("text.0.q_proj.bias", "text.*.norm.*")})
    )
    strip_adapters(model)
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == dtypes
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in model.modules()
    )
    assert torch.equal(model(x), expected)


def test_strip_keeps_a_tied_extra_tied():
    model = Tied().bfloat16()
    apply_dora(model, DoRAConfig(targets=("q",), rank=2, also_train={"table": ("table.weight",)}))
    strip_adapters(model)
    assert model.head.weight is model.table.weight
    assert model(torch.tensor([[1, 2]])).dtype == model.table.weight.dtype == torch.bfloat16


def test_a_trained_bias_over_a_half_precision_base_is_merged_beside():
    model, x = Small().bfloat16().eval(), torch.randn(2, 6).bfloat16()
    apply_dora(model, config(also_train={"bias": ("text.*.q_proj.bias",)}))
    move(model)
    with torch.no_grad():
        model.text[0].q_proj.bias.add_(1.5)
        expected = model(x)
        merge_dora(model)
        torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)
