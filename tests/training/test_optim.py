"""Parameter groups: each part at its own rate; vectors never decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_vl.core import DoRAConfig, apply_dora, trained_parts
from dora_vl.errors import UserError
from dora_vl.training.optim import learning_rates, parameter_groups


def adapted() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    config = DoRAConfig(targets=("0",), rank=2, also_train={"projector": ("1.*", "2.*")})
    apply_dora(model, config)
    return model


def test_each_part_has_its_rate_and_only_matrices_decay() -> None:
    rates = learning_rates(1e-3, projector=2e-5, magnitude=5e-4, b_ratio=16.0)
    groups = parameter_groups(trained_parts(adapted()), rates, weight_decay=0.1)
    found = {(group["name"], group["lr"], group["weight_decay"]): len(group["params"]) for group in groups}
    assert found == {
        ("dora.A", 1e-3, 0.1): 1,
        ("dora.B", 1.6e-2, 0.1): 1,
        ("dora.magnitude", 5e-4, 0.0): 1,
        ("projector", 2e-5, 0.1): 1,
        ("projector", 2e-5, 0.0): 3,
    }


def test_every_trained_parameter_is_in_exactly_one_group() -> None:
    model = adapted()
    groups = parameter_groups(trained_parts(model), learning_rates(1e-3), weight_decay=0.0)
    grouped = [id(one) for group in groups for one in group["params"]]
    assert sorted(grouped) == sorted(id(one) for one in model.parameters() if one.requires_grad)
    torch.optim.AdamW(groups, lr=1e-3)


def test_magnitudes_do_not_follow_the_ratio_of_b() -> None:
    assert learning_rates(1e-3, b_ratio=16.0).of("dora.magnitude") == 1e-3


def test_a_rate_for_a_part_that_does_not_train_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    apply_dora(model, DoRAConfig(targets=("0",), rank=2))
    with pytest.raises(UserError, match="a learning rate is set for projector"):
        parameter_groups(trained_parts(model), learning_rates(1e-3, projector=1e-5), weight_decay=0.0)
