"""An adapted model under `torch.compile`: one graph, the eager numbers, fresh norms after an optimizer step.

Run by test_compile.py.

`aot_eager` traces and differentiates as the default compiler does, without its C++ build; one test pays for that.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dora_vl.core import DoRAConfig, adapted_layers, apply_dora, merge_dora


class Block(nn.Module):
    """An embedding, a convolution, and linear layers with and without bias, one tensor feeding two of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.q, self.k = nn.Linear(6, 10), nn.Linear(6, 10, bias=False)
        self.out = nn.Linear(10, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        return self.out(torch.tanh(self.q(x)) * self.k(x))


@torch.no_grad()
def adapted(**changes) -> Block:
    model = Block()
    settings = {"targets": ("*",), "kinds": ("linear", "embedding", "conv"), "rank": 3, "alpha": 7.0, "dropout": 0.0}
    apply_dora(model, DoRAConfig(**{**settings, **changes}))
    for _, layer in adapted_layers(model):
        for leaf in ("lora_B", "lambda_b"):
            if layer._parameters.get(leaf) is not None:
                layer._parameters[leaf].normal_(std=0.3)
        if layer.magnitude is not None:
            layer.magnitude.mul_(torch.linspace(0.5, 1.7, layer.magnitude.numel()))
        layer.forget_norms()
    return model


def ids(rows: int = 3) -> torch.Tensor:
    return torch.randint(11, (rows, 5), generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_eager(model: Block, compiled: object) -> None:
    expected = model(ids())
    found = compiled(ids())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    wanted, got = (gradients(model, y.square().sum()) for y in (expected, found))
    assert wanted.keys() == got.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "lora"},
        {"method": "magnitude"},
        {"method": "dvora", "targets": ("q", "k", "out"), "kinds": ("linear",)},
        {"detach_norm": False},
    ],
    ids=["dora", "lora", "magnitude", "dvora", "live norm"],
)
def test_one_graph_equals_eager(changes):
    model = adapted(**changes).train()
    assert_equal_to_eager(model, torch.compile(model, fullgraph=True, backend="aot_eager"))


def test_an_edit_of_the_frozen_weight_is_seen():
    model = adapted().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal_to_eager(model, compiled)
    with torch.no_grad():
        model.q.weight.mul_(1.5)
        model.conv.weight[2].add_(0.4)
    assert_equal_to_eager(model, compiled)


class Sealed(nn.Module):
    """A linear layer that is only ever called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_features, self.out_features = 6, 4
        self.secret = nn.Parameter(torch.randn(4, 6), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.secret, self.bias)


@pytest.mark.parametrize("detach_norm", [True, False])
def test_quantised_layers_too(detach_norm):
    model = nn.Sequential(Sealed())
    path = f"{Sealed.__module__}.{Sealed.__qualname__}"
    config = DoRAConfig(targets=("*",), opaque_layers=(path,), rank=2, alpha=3.0, dropout=0.0, detach_norm=detach_norm)
    apply_dora(model, config)
    with torch.no_grad():
        model[0].lora_B.normal_(std=0.3)
    x = torch.randn(5, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
    wanted, got = (gradients(model, net(x).square().sum()) for net in (model, compiled))
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    model[0].adapter = replace(model[0].adapter, dropout=0.5)
    assert not torch.equal(compiled(x), compiled(x))


def test_norms_are_fresh_after_a_step_and_in_eval():
    model = adapted().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        assert_equal_to_eager(model, compiled)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids()), model(ids()), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(compiled(ids(7)), model(ids(7)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["low_rank", "whole_change"])
def test_dropout_in_a_graph_is_unbiased_and_off_in_eval(mode):
    model = adapted(targets=("out",), kinds=("linear",), dropout=0.5, dropout_mode=mode)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = ids(1).expand(4000, 5)
    model.eval()
    with torch.no_grad():
        expected = model(x)[0]
        torch.testing.assert_close(compiled(x)[0], expected, rtol=1e-5, atol=1e-6)
        model.train()
        drawn = compiled(x)
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn.mean(dim=0), expected, rtol=0.05, atol=0.03)


def test_merged_weights_in_a_graph():
    model = adapted().eval()
    expected = model(ids())
    merge_dora(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids()), expected, rtol=1e-5, atol=1e-5)


def test_checkpointing_inside_a_graph():
    model = adapted().train()

    def recomputed(batch: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(model, batch, use_reentrant=False)

    assert_equal_to_eager(model, torch.compile(recomputed, fullgraph=True, backend="aot_eager"))


@pytest.mark.slow
def test_the_default_compiler():
    model = adapted().train()
    assert_equal_to_eager(model, torch.compile(model, fullgraph=True))
