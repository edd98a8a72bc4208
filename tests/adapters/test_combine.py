"""Weighted combinations: W + sum w_i (W'_i - W), as one adapter, and exactly the adapter for a single weight of 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dora_vl.adapters.adapter import Adapter, Factors, read_adapter
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.combine import combine, combine_factors
from dora_vl.errors import UserError
from tests.adapters.foreign_files import dora, factors, saved, tiny_llama
from tests.adapters.peft_folders import moved_peft

ADAPTERS = {"one": {"seed": 1}, "two": {"seed": 2, "r": 2, "lora_alpha": 9}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, dict[str, Adapter]]:
    root = tmp_path_factory.mktemp("adapters")
    base = saved(tiny_llama(), root / "base")
    for name, settings in ADAPTERS.items():
        moved_peft(tiny_llama(), **settings).save_pretrained(root / name)
    return base, {name: read_adapter(root / name) for name in ADAPTERS}


def test_weight_one_of_one_adapter_is_that_adapter_and_unknown_names_are_refused(folders):
    base, adapters = folders
    with BaseWeights(base) as opened:
        assert combine(adapters, {"one": 1.0, "two": 0.0}, opened).adapter is adapters["one"]
        for shares in ({"three": 1.0}, {"one": 0.0}):
            with pytest.raises(UserError):
                combine(adapters, shares, opened)


def test_smaller_rank_states_its_error(folders):
    base, adapters = folders
    shares = {"one": 0.7, "two": 0.6}
    with BaseWeights(base) as opened:
        enough = combine(adapters, shares, opened, rank=5)
        fewer = combine(adapters, shares, opened, rank=2)
        exact = combine(adapters, shares, opened).adapter
        for layer, error in fewer.errors.items():
            weight = opened.read(f"{layer}.weight")
            wanted, found = (side.factors[layer].merged(weight) for side in (exact, fewer.adapter))
            assert error == pytest.approx(float((found - wanted).norm() / (wanted - weight).norm()), rel=1e-3)
    assert max(enough.errors.values()) < 1e-5
    assert min(fewer.errors.values()) > 0.01


def test_a_row_whose_gain_vanishes_is_still_close():
    """c = 0 in a row: there no DoRA over W is exact; the row is off by a hundred-thousandth of W's."""
    weight = torch.randn(8, 6)
    a, b, _ = factors(weight)
    magnitude = (weight + 2 * b @ a).norm(dim=1) * torch.linspace(0, 2, 8)  # g = 0 in row 0
    found = Factors(lora_A=a, lora_B=b, magnitude=magnitude, scale=2.0)
    plain = Factors(lora_A=a * 0.5, lora_B=b, magnitude=None, scale=1.0)
    combined = combine_factors(weight, [(1.0, found), (0.5, plain)])
    expected = dora(weight, a, b, magnitude, 2.0) + 0.5 * b @ a * 0.5
    torch.testing.assert_close(combined.merged(weight), expected, rtol=1e-4, atol=1e-4)
