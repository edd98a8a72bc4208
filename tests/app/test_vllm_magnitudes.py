"""Magnitudes taken out of an adapter's tensors: each paired with its layer, or refused in a line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dora_vl.serving.vllm.layer import UnservableAdapter, as_factor, take_magnitudes

Q, V = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.self_attn.v_proj"


def tensors() -> dict[str, Tensor]:
    return {
        f"{Q}.lora_A.weight": torch.full((4, 6), 1.0),
        f"{Q}.lora_B.weight": torch.full((5, 4), 2.0),
        f"{Q}.lora_magnitude_vector": torch.arange(5).to(torch.bfloat16),
        f"{V}.lora_A.weight": torch.full((2, 6), 3.0),
        f"{V}.lora_B.weight": torch.full((7, 2), 4.0),
        f"{V}.lora_magnitude_vector.weight": torch.arange(7).float().view(7, 1),
    }


def test_magnitudes_go_out_and_factors_stay() -> None:
    file, before = tensors(), tensors()
    found = take_magnitudes(file, use_dora=True)
    assert found.keys() == {Q, V}
    assert torch.equal(found[Q], torch.arange(5.0))
    assert torch.equal(found[V], torch.arange(7.0))
    assert file.keys() == {name for name in before if "magnitude" not in name}
    assert all(torch.equal(file[name], before[name]) for name in file)


def test_a_lora_is_left_as_it_is() -> None:
    file = {name: tensor for name, tensor in tensors().items() if "magnitude" not in name}
    before = dict(file)
    assert take_magnitudes(file, use_dora=False) == {}
    assert file == before


BROKEN: dict[str, tuple[list[str], dict[str, Tensor]]] = {
    "a magnitude lost": ([f"{Q}.lora_magnitude_vector"], {}),
    "B lost": ([f"{Q}.lora_B.weight"], {}),
    "too short": ([], {f"{Q}.lora_magnitude_vector": torch.ones(4)}),
    "ranks differ": ([], {f"{Q}.lora_A.weight": torch.ones(3, 6)}),
    "no numbers": ([], {f"{Q}.lora_magnitude_vector": torch.full((5,), torch.inf)}),
    "an embedding": ([], {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 9)}),
}
"""What of a file is taken away, and what is put in."""


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_belong_together_is_refused(case: str) -> None:
    gone, changed = BROKEN[case]
    file = {name: tensor for name, tensor in {**tensors(), **changed}.items() if name not in gone}
    before = dict(file)
    with pytest.raises(UnservableAdapter):
        take_magnitudes(file, use_dora=True)
    assert file == before


def test_the_flag_and_the_file_must_agree() -> None:
    with pytest.raises(UnservableAdapter):
        take_magnitudes(tensors(), use_dora=False)
    without = {name: tensor for name, tensor in tensors().items() if "magnitude" not in name}
    with pytest.raises(UnservableAdapter):
        take_magnitudes(without, use_dora=True)


def test_names_that_vllm_reads() -> None:
    assert as_factor(f"{Q}.lora_magnitude_vector") == f"{Q}.lora_B.weight"
    assert as_factor(f"{Q}.lora_magnitude_vector.weight") == f"{Q}.lora_B.weight"
    assert as_factor(f"{Q}.lora_A.weight") == f"{Q}.lora_A.weight"
