"""Frozen tensors in the adapter folder, whole or some of their rows: saved, loaded, restored alone, merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.core.trainable import kept_tensors, split_rows
from dora_vl.errors import UserError

ROWS = "words.weight[-3:]"


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.linear = nn.Linear(4, 4)


def adapted(seed: int, keep: str = ROWS) -> Words:
    torch.manual_seed(seed)
    model = Words()
    apply_dora(model, DoRAConfig(targets=("linear",), rank=2, also_keep=(keep,)))
    return model


def test_only_the_named_rows_travel(tmp_path: Path) -> None:
    model = adapted(0)
    save_adapter(model, tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(held["base_model.model.words.weight[-3:]"], model.words.weight[-3:])
    torch.manual_seed(1)
    plain = Words()
    before = plain.words.weight.detach().clone()
    load_adapter(plain, tmp_path / "adapter")
    assert torch.equal(plain.words.weight[-3:], model.words.weight[-3:])
    assert torch.equal(plain.words.weight[:-3], before[:-3])
    assert list(kept_tensors(plain)) == [ROWS]  # and they are kept again when it is saved again


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    save_adapter(adapted(0, "words.weight[-2:]"), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"words\.weight\[-3:\]"):
        load_adapter(adapted(1), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"also_keep.*nothing"):
        adapted(0, "nothing.*[-2:]")
    assert split_rows("a.weight[2:5]") == ("a.weight", slice(2, 5))
    assert split_rows("a.weight") == ("a.weight", slice(None))
