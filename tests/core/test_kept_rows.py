"""Frozen tensors in the adapter folder, whole or some of their rows: saved, loaded, restored alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.core import apply_dora
from dora_vl.core.trainable import kept_tensors, split_rows
from dora_vl.errors import UserError
from tests.core.dense_dora import config

ROWS = "words.weight[-3:]"


class Words(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.linear = nn.Embedding(10, 4), nn.Linear(4, 4)


def adapted(seed: int, keep: str = ROWS) -> Words:
    model = Words(seed)
    apply_dora(model, config(targets=("linear",), also_keep=(keep,)))
    return model


def test_only_the_named_rows_travel(tmp_path: Path) -> None:
    model, plain = adapted(0), Words(1)
    save_adapter(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.words.weight[-3:]"], model.words.weight[-3:])
    before = plain.words.weight.detach().clone()
    load_adapter(plain, tmp_path / "adapter")
    assert torch.equal(plain.words.weight[-3:], model.words.weight[-3:])
    assert torch.equal(plain.words.weight[:-3], before[:-3])
    assert list(kept_tensors(plain)) == [ROWS]  # and they are kept again when it is saved again


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(0, "words.weight[-2:]"), tmp_path / "adapter")
    with pytest.raises(UserError):
        load_adapter(adapted(1), tmp_path / "adapter")
    with pytest.raises(UserError):
        adapted(0, "nothing.*[-2:]")
    assert split_rows("a.weight[2:5]") == ("a.weight", slice(2, 5))
    assert split_rows("a.weight") == ("a.weight", slice(None))
