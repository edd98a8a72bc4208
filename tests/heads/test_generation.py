"""The loss against a written-out log-softmax; no label leaves a zero that still has a graph."""

from __future__ import annotations

import math

import pytest
import torch

from dora_vl.backbones.generation import generation_loss

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.5, 0.0]])
TARGETS = torch.tensor([0, 2])


def by_hand() -> float:
    total = 0.0
    for row, target in zip(LOGITS.tolist(), TARGETS.tolist(), strict=True):
        total += math.log(sum(math.exp(value) for value in row)) - row[target]
    return total


def test_mean_over_the_labels_here_or_sum_over_a_given_number() -> None:
    result = generation_loss(LOGITS, TARGETS)
    assert float(result.loss) == pytest.approx(by_hand() / 2, abs=1e-6)
    assert int(result.labelled_tokens) == 2
    assert float(generation_loss(LOGITS, TARGETS, divide_by=5.0).loss) == pytest.approx(by_hand() / 5, abs=1e-6)


def test_half_precision_logits_are_summed_in_float32() -> None:
    assert generation_loss(LOGITS.bfloat16(), TARGETS).loss.dtype == torch.float32


def test_no_label_is_a_zero_with_a_graph() -> None:
    weight = torch.ones(4, 3, requires_grad=True)
    result = generation_loss(torch.zeros(0, 4) @ weight, torch.zeros(0, dtype=torch.int64))
    result.loss.backward()
    assert float(result.loss.detach()) == 0.0
    assert weight.grad is not None
    assert not weight.grad.any()
