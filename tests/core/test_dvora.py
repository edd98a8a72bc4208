"""DVoRA and the starts of A and B, against computations written out here."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_vl.core import DoRAConfig, apply_dora


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("detach_norm", [True, False])
def test_dvora_equals_the_written_out_computation(detach_norm):
    model, x = Two().double(), torch.randn(4, 6, dtype=torch.float64)
    before = model(x)
    apply_dora(model, DoRAConfig(targets=("*",), rank=3, dropout=0.0, method="dvora", detach_norm=detach_norm))
    assert torch.equal(model(x), before)
    with torch.no_grad():
        for layer in (model.up, model.down):
            layer.lambda_b.normal_()
            layer.lambda_d.normal_()
            layer.magnitude.mul_(1.3)
    model(x).square().sum().backward()
    leaves, hidden = {}, x
    random_A, random_B = model.dvora_shared.random_A, model.dvora_shared.random_B
    assert not random_A.requires_grad
    for name in ("up", "down"):
        layer = getattr(model, name)
        d, b, m = (p.detach().clone().requires_grad_() for p in (layer.lambda_d, layer.lambda_b, layer.magnitude))
        leaves[name] = {"lambda_d": d, "lambda_b": b, "magnitude": m}
        rows, columns = layer.weight.shape
        direction = layer.weight + torch.diag(b) @ random_B[:rows] @ torch.diag(d) @ random_A[:, :columns]
        norm = direction.norm(dim=1)
        gain = m / (norm.detach() if detach_norm else norm)
        hidden = hidden @ (gain.unsqueeze(1) * direction).t() + layer.bias
        hidden = torch.tanh(hidden) if name == "up" else hidden
    torch.testing.assert_close(model(x), hidden, rtol=1e-10, atol=1e-10)
    hidden.square().sum().backward()
    for name, values in leaves.items():
        for leaf, value in values.items():
            found = getattr(getattr(model, name), leaf).grad
            torch.testing.assert_close(found, value.grad, rtol=1e-10, atol=1e-10, msg=f"{name} {leaf}")


def test_dvora_random_matrices_come_from_the_seed():
    matrices = []
    for seed in (1, 1, 2):
        model = Two()
        apply_dora(model, DoRAConfig(targets=("*",), rank=3, method="dvora", random_seed=seed))
        matrices.append(model.dvora_shared.random_A)
    assert torch.equal(matrices[0], matrices[1])
    assert not torch.equal(matrices[0], matrices[2])


def test_a_root_that_calls_its_children_in_turn():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)), torch.randn(4, 6)
    before = model(x)
    apply_dora(model, DoRAConfig(targets=("*",), rank=3, dropout=0.0, method="dvora"))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa"])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_every_start_leaves_the_output_as_it_was(init, method):
    model, x = Two().double(), torch.randn(4, 6, dtype=torch.float64)
    before = model(x)
    apply_dora(model, DoRAConfig(targets=("*",), rank=4, alpha=6.0, dropout=0.0, init=init, method=method))
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
    assert (float(model.up.lora_B.detach().abs().max()) > 0) == (init != "gaussian")


def test_pissa_holds_the_largest_singular_values():
    model = Two().double()
    weight = model.up.weight.detach().clone()
    apply_dora(model, DoRAConfig(targets=("up",), rank=2, alpha=6.0, dropout=0.0, init="pissa"))
    singular = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(3 * (model.up.lora_B @ model.up.lora_A))[:2], singular[:2])
    torch.testing.assert_close(torch.linalg.svdvals(model.up.weight)[0], singular[2])
