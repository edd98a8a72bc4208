"""True or false by two logits, and the closed answer list."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dora_vl.backbones.generation import says_true
from dora_vl.heads.answer import AnswerHead, answer_loss


def test_true_or_false_reads_two_logits_alone() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0], [9.0, 2.0, 1.0], [0.0, 1.0, 1.0]])
    assert says_true(logits, true_token=2, false_token=1).tolist() == [True, False, False]


def test_the_answer_list_scores_each_answer_on_its_own() -> None:
    torch.manual_seed(0)
    head = AnswerHead(6, ("yes", "no", "two"))
    assert [tuple(value.shape) for value in head.state_dict().values()] == [(12, 6), (12,), (12,), (12,), (3, 12), (3,)]
    hidden = torch.randn(2, 6)
    scores = head(hidden)
    targets = head.targets([{"yes": 0.9, "two": 0.3}, {"elsewhere": 1.0}])
    assert targets.tolist() == [[pytest.approx(0.9), 0.0, pytest.approx(0.3)], [0.0, 0.0, 0.0]]
    chance = scores.sigmoid()
    by_hand = -(targets * chance.log() + (1 - targets) * (1 - chance).log()).sum() / 2
    torch.testing.assert_close(answer_loss(scores, targets), by_hand)
    assert head.chosen(torch.tensor([[0.0, 2.0, 1.0]])) == ["no"]
    gelu = functional.gelu(head.logit_fc[0](hidden))
    torch.testing.assert_close(scores, head.logit_fc[3](head.logit_fc[2](gelu)))
    with pytest.raises(ValueError, match="twice"):
        AnswerHead(6, ("yes", "yes"))
