"""A folder and a model that is adapted already: what decides the function must agree, and dropout stays the model's."""

from __future__ import annotations

import pytest
import torch

from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.core import apply_dora
from dora_vl.errors import UserError
from tests.adapters.test_folder import trained_small
from tests.core.test_inject import Small, config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 64.0}, r"text\.0\.q_proj has alpha 6\.0 there, and 64\.0 in this model; load it into a fresh base"),
        ({"alpha_pattern": {"text.1.v*": 5.0}}, r"text\.1\.v_proj has alpha 6\.0 there, and 5\.0"),
        ({"rank": 3}, r"has rank 2 there, and 3"),
        ({"rank_scaling": "sqrt"}, "has rank_scaling 'linear' there, and 'sqrt'"),
        ({"method": "lora"}, "has method 'dora' there, and 'lora'"),
        ({"init": "pissa"}, "has init 'kaiming' there, and 'pissa'"),
        ({"method": "full", "targets": ("text.*_proj",)}, "method is 'dora', this model has 0 adapted layers"),
        ({"dropout": 0.2, "dropout_mode": "whole_change"}, "dropout_mode 'low_rank' there, and 'whole_change'"),
    ],
)
def test_a_model_adapted_otherwise_is_refused(changes, message, tmp_path):
    source = Small()
    apply_dora(source, config(dropout=0.1))
    save_adapter(source, tmp_path / "a")
    model = Small()
    apply_dora(model, config(**changes))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_adapter(model, tmp_path / "a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_dropout_stays_the_models_own(tmp_path):
    save_adapter(trained_small("settings"), tmp_path / "a")
    model = Small()
    apply_dora(model, config(dropout=0.0))
    load_adapter(model, tmp_path / "a")
    assert model.text[0].q_proj.adapter.dropout == 0.0
