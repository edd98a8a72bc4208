"""Losses in chunks against a log-softmax written out, their gradients against those of all scores; closed answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dora_vl.backbones.generation import says_true
from dora_vl.backbones.model import DecoderBackbone
from dora_vl.data.batches import Collator
from dora_vl.heads import next_token
from dora_vl.heads.answer import AnswerHead, answer_loss
from dora_vl.heads.next_token import label_losses, losses_of
from tests.backbones.image_text_conversations import inputs_of
from tests.backbones.test_decoder import language_samples
from tests.backbones.tiny_language import tiny_language


@pytest.fixture(autouse=True)
def chunks_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_token, "CHUNK", 3)


def case(labels: int) -> tuple[Tensor, Tensor, torch.nn.Linear]:
    torch.manual_seed(3)
    head = torch.nn.Linear(5, 11).double().requires_grad_(False)
    return torch.randn(labels, 5, dtype=torch.float64, requires_grad=True), torch.randint(11, (labels,)), head


@pytest.mark.parametrize("labels", [1, 3, 8])
def test_losses_and_gradients_equal_those_of_all_scores_at_once(labels: int) -> None:
    hidden, targets, head = case(labels)
    weights = torch.rand(labels)  # a sample's share of the loss, say
    losses = label_losses(hidden, targets, head)
    scores = head(hidden).float().tolist()
    by_hand = [
        math.log(sum(map(math.exp, row))) - row[target] for row, target in zip(scores, targets.tolist(), strict=True)
    ]
    assert losses.tolist() == pytest.approx(by_hand, abs=1e-5)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), hidden)
    (expected,) = torch.autograd.grad((losses_of(head(hidden), targets) * weights).sum(), hidden)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


def test_half_precision_scores_are_summed_in_float32() -> None:
    hidden, targets, head = case(4)
    assert label_losses(hidden.bfloat16(), targets, head.bfloat16()).dtype == torch.float32


def test_no_label_is_a_zero_with_a_graph() -> None:
    hidden, targets, head = case(0)
    loss = label_losses(hidden, targets, head).sum()
    loss.backward()
    assert (float(loss.detach()), hidden.grad is not None) == (0.0, True)


@pytest.mark.parametrize(("family", "chunked"), [("llama", True), ("gemma2", False), ("granite", False)])
def test_a_model_that_changes_its_scores_keeps_them_whole(monkeypatch, family, chunked) -> None:
    """Gemma 2 caps them, Granite scales them: what stands behind the output layer is theirs."""
    monkeypatch.setattr(next_token, "SMALL_VOCABULARY", 0)
    model = tiny_language(family)
    model.get_output_embeddings().requires_grad_(False)
    backbone, batch = DecoderBackbone(model), inputs_of(Collator(0)(language_samples()))
    whole = backbone(**batch, keep_logits=True)
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, scores: rows.append(scores.shape[1]))
    again = backbone(**batch)
    assert (rows == [1]) == chunked
    assert again.logits is None
    torch.testing.assert_close(again.losses, losses_of(whole.logits, whole.targets))
    weight = model.get_decoder().layers[0].self_attn.k_proj.weight
    gradients = [torch.autograd.grad(features.losses.mean(), [weight])[0] for features in (whole, again)]
    torch.testing.assert_close(*gradients)


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
