"""An adapted model under `torch.compile`: one graph, the eager numbers, fresh norms after an optimizer step.

Run by test_compiled.py.

`aot_eager` traces and differentiates as the default compiler does, without its C++ build; one test pays for that.
"""

from typing import Any

import pytest
import torch
from torch import nn

from dora_vl.core import adapted_layers, apply_dora
from tests.core.dense_dora import config, move_layer, passed
from tests.core.test_layers import PATH, Sealed


class Block(nn.Module):
    """An embedding, a convolution, and linear layers with and without bias, one tensor feeding two of them."""

    def __init__(self, *, opaque: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.q, self.k = nn.Linear(6, 10), nn.Linear(6, 10, bias=False)
        self.out = Sealed(10, 4) if opaque else nn.Linear(10, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        return self.out(torch.tanh(self.q(x)) * self.k(x))


@torch.no_grad()
def adapted(*, opaque: bool = False, **changes: Any) -> Block:
    model = Block(opaque=opaque)
    kinds, changes = ("linear", "embedding", "conv"), {"rank": 3, "opaque_layers": (PATH,), **changes}
    apply_dora(model, config(**{"kinds": kinds, **changes}))
    for _, layer in adapted_layers(model):
        move_layer(layer)
        if layer._parameters.get("lambda_b") is not None:
            layer._parameters["lambda_b"].normal_(std=0.3)
        layer.forget_norms()
    return model


def ids(rows: int = 3) -> torch.Tensor:
    return torch.randint(11, (rows, 5), generator=torch.Generator().manual_seed(3))


def in_one_graph(model: Any) -> Any:
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def assert_equal_to_eager(model: Block, compiled: Any) -> None:
    results = [passed(model, ids(), run=run) for run in (model, compiled)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


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
        {"opaque": True},
        {"opaque": True, "detach_norm": False},
    ],
    ids=["dora", "lora", "magnitude", "dvora", "live norm", "opaque", "opaque with live norm"],
)
def test_one_graph_equals_eager(changes):
    model = adapted(**changes).train()
    assert_equal_to_eager(model, in_one_graph(model))


def test_an_unfrozen_weight_is_refused_in_a_graph_too():
    model = adapted().train()
    model.q.weight.requires_grad_(True)
    with pytest.raises(RuntimeError):
        torch.compile(model, backend="aot_eager")(ids())


def test_norms_are_fresh_after_steps_edits_and_in_eval():
    model = adapted().train()
    compiled = in_one_graph(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        assert_equal_to_eager(model, compiled)
        optimizer.step()
        assert_equal_to_eager(model, compiled)
        with torch.no_grad():
            model.q.weight.mul_(1.5)
            model.conv.weight[2].add_(0.4)
    model.eval()
    with torch.no_grad():
        for rows in (3, 7):
            torch.testing.assert_close(compiled(ids(rows)), model(ids(rows)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["low_rank", "whole_change"])
@pytest.mark.parametrize("opaque", [False, True])
def test_dropout_in_a_graph_is_unbiased_and_off_in_eval(mode, opaque):
    model = adapted(opaque=opaque, targets=("out",), kinds=("linear",), dropout=0.5, dropout_mode=mode)
    compiled, x = in_one_graph(model), ids(1).expand(4000, 5)
    model.eval()
    with torch.no_grad():
        expected = model(x)[0]
        torch.testing.assert_close(compiled(x)[0], expected, rtol=1e-5, atol=1e-6)
        model.train()
        drawn = compiled(x)
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn.mean(dim=0), expected, rtol=0.05, atol=0.03)


def test_checkpointing_inside_a_graph():
    model = adapted().train()

    def recomputed(batch: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(model, batch, use_reentrant=False)

    assert_equal_to_eager(model, in_one_graph(recomputed))


@pytest.mark.slow
def test_the_default_compiler():
    model = adapted().train()
    assert_equal_to_eager(model, torch.compile(model, fullgraph=True))
