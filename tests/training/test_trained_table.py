"""Before the first step: what trains by part, with rank and rate, and what does not, with its share."""

from __future__ import annotations

import torch
from torch import nn

from dora_vl.core import DoRAConfig, apply_dora, trained_parts
from dora_vl.core.config import AdaptedPart
from dora_vl.training.optim import frozen_table, learning_rates, trained_table


class Small(nn.Module):
    """A tied head, an untied linear, experts as one tensor, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 10)
        self.first, self.second, self.third = nn.Linear(10, 20), nn.Linear(20, 30, bias=False), nn.Linear(30, 10)
        self.experts = nn.ParameterDict({"down_proj": torch.zeros(4, 10, 5)})
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 50, bias=False)
        self.head.weight = self.tokens.weight


def adapted() -> Small:
    model = Small()
    parts = {"later": AdaptedPart(targets=("second",), rank=3)}
    config = DoRAConfig(targets=("first",), rank=2, parts=parts, also_train={"norms": ("norm.*",)})
    apply_dora(model, config)
    return model


def rows(table: str) -> dict[str, list[str]]:
    return {line[:30].split("  ")[0].strip(): line.split()[1:] for line in table.splitlines()}


def test_a_line_for_each_part() -> None:
    model = adapted()
    table = trained_table(model, trained_parts(model), learning_rates(1e-3, by_part={"later": 2e-5}))
    total = sum(one.numel() for one in model.parameters())
    found = rows(str(table))
    assert found["dora.A"] == ["1", "20", f"{20 / total:.3%}", "2", "0.001"]
    assert found["later.B"] == ["1", "90", f"{90 / total:.3%}", "3", "2e-05"]
    assert found["later.magnitude"] == ["1", "30", f"{30 / total:.3%}", "2e-05"]
    assert found["norms"] == ["1", "20", f"{20 / total:.3%}", "0.001"]
    trained = 20 + 40 + 20 + 60 + 90 + 30 + 20
    assert found["trained"] == [f"{trained:,}", f"{trained / total:.3%}"]
    assert found["all"] == [f"{total:,}", "100.000%"]


def test_what_is_not_adapted_is_named_with_its_share() -> None:
    table = frozen_table(adapted())
    found = rows(str(table))
    assert found["experts that are one tensor"][-3:] == ["200", "9.479%", "experts.down_proj"]
    assert found["embeddings, tied to the head"][-3:] == ["500", "23.697%", "tokens.weight"]
    assert found["linear layers"][-3:] == ["300", "14.218%", "third.weight"]
    assert "first.weight" not in str(table)
    assert "second.weight" not in str(table)
