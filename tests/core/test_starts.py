"""DVoRA, and how A and B start, against computations written out here."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.core import apply_dora
from tests.core.dense_dora import config, move
from tests.core.test_inject import Small


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
    apply_dora(model, config(rank=3, method="dvora", detach_norm=detach_norm))
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
            gradient = getattr(getattr(model, name), leaf).grad
            torch.testing.assert_close(gradient, value.grad, rtol=1e-10, atol=1e-10, msg=f"{name} {leaf}")


def test_dvora_random_matrices_come_from_the_seed_under_a_root_that_calls_its_children():
    matrices, x = [], torch.randn(4, 6)
    for seed in (1, 1, 2):
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
        before = model(x)
        apply_dora(model, config(rank=3, method="dvora", random_seed=seed))
        assert torch.equal(model(x), before)
        matrices.append(model.dvora_shared.random_A)
    assert torch.equal(matrices[0], matrices[1])
    assert not torch.equal(matrices[0], matrices[2])


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa"])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_every_start_leaves_the_output_as_it_was(init, method):
    model, x = Two().double(), torch.randn(4, 6, dtype=torch.float64)
    before = model(x)
    apply_dora(model, config(rank=4, init=init, method=method))
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
    assert (float(model.up.lora_B.detach().abs().max()) > 0) == (init != "gaussian")


def test_pissa_holds_the_largest_singular_values():
    model = Two().double()
    weight = model.up.weight.detach().clone()
    apply_dora(model, config(targets=("up",), init="pissa"))
    singular = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(3 * (model.up.lora_B @ model.up.lora_A))[:2], singular[:2])
    torch.testing.assert_close(torch.linalg.svdvals(model.up.weight)[0], singular[2])


@pytest.mark.parametrize("scaling", ["linear", "sqrt"])
def test_pissa_as_a_change_of_the_original_weight(scaling, tmp_path):
    """What `AdapterSet` needs: the same outputs, and no frozen weight changes."""
    model, x = Small(), torch.randn(2, 6)
    apply_dora(model, config(targets=("text.*_proj",), init="pissa", rank_scaling=scaling))
    move(model)
    save_adapter(model, tmp_path / "a")
    fresh = Small()
    load_adapter(fresh, tmp_path / "a", change_base=False)
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(fresh.text[0].q_proj.weight, Small().text[0].q_proj.weight)
