"""Drawn answers and what is learned from them, against forward passes of single rows and the equation written out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_vl.backbones.encoder import Encoder, open_encoder
from dora_vl.backbones.model import DecoderBackbone, language_targets, open_backbone, projector_patterns
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.data.batches import Collator
from dora_vl.data.example import Example
from dora_vl.data.samples import BOOKKEEPING, Sample
from dora_vl.evaluation.assistant import Assistant, EncoderPrompts
from dora_vl.heads.rewards import REWARD_LOSSES
from dora_vl.run.folder import DRAWN, read_log
from dora_vl.training.pipeline import RewardLoss
from dora_vl.training.reference import Reference
from dora_vl.training.rollouts import Rollouts
from tests.training.test_preference_loss import EXAMPLES, PICTURES, disturb, items

GROUP, LONGEST = 5, 6


@pytest.fixture
def encoder(tiny_llava: Path) -> Encoder:
    return open_encoder(str(tiny_llava), max_tokens=512)


@pytest.fixture
def backbone(tiny_llava: Path) -> DecoderBackbone:
    backbone = open_backbone(str(tiny_llava))
    targets, projector = language_targets(backbone.model), {"projector": projector_patterns(backbone.model)}
    torch.manual_seed(3)
    apply_dora(backbone.model, DoRAConfig(targets=targets, rank=2, alpha=6.0, dropout=0.0, also_train=projector))
    return backbone.train()


def lengths_and_vowels(example: Example, answer: str) -> float:
    return 0.3 * len(answer) + sum(letter in "aeiou" for letter in answer)


def rollouts_of(encoder: Encoder, backbone: DecoderBackbone, folder: Path, **settings: Any) -> Rollouts:
    packing = settings.pop("packing", "trees")
    values: dict[str, Any] = {
        "loss": REWARD_LOSSES["grpo"],
        "rewards": {"vowels": lengths_and_vowels, "length": lambda example, answer: float(len(answer))},
        "weights": {"vowels": 1.0, "length": -0.5},
        "keeps_all": False,
        "never": (),
        **settings,
    }
    return Rollouts(
        assistant=Assistant(backbone, EncoderPrompts(encoder), while_training=True),
        collate=Collator(encoder.pad_token_id, packing=packing, keeps_samples=True),
        example_of=lambda index: EXAMPLES[index],
        group=GROUP,
        max_new_tokens=LONGEST,
        seed=7,
        run_folder=folder,
        autocast=None,
        **values,
    )


def collated(encoder: Encoder) -> dict[str, Any]:
    return Collator(encoder.pad_token_id, keeps_samples=True)(items(encoder))


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in BOOKKEEPING}


def alone(model: DecoderBackbone, sample: Sample) -> torch.Tensor:
    """The log-probabilities of a sample's labels, by transformers' model and the sample alone."""
    inputs = {name: value for name, value in sample.inputs.items() if name != "attention_mask"}
    logits = model.model(input_ids=sample.input_ids[None], **inputs).logits[0, :-1].log_softmax(-1)
    targets = sample.labels[1:]
    return logits[targets >= 0].gather(1, targets[targets >= 0, None])[:, 0]


@pytest.mark.parametrize(("name", "packing"), [*((name, "trees") for name in REWARD_LOSSES), ("grpo", "plain")])
def test_loss_and_gradient_are_the_equation(
    name: str, packing: str, encoder: Encoder, backbone: DecoderBackbone, tmp_path: Path
) -> None:
    reference, before = Reference(backbone.model), copy.deepcopy(backbone)
    disturb(backbone.model)
    rollouts = rollouts_of(encoder, backbone, tmp_path, loss=REWARD_LOSSES[name], packing=packing, keeps_all=True)
    batches = [rollouts.collate(several) for several in (items(encoder)[:1], items(encoder)[1:])]
    answered, divisor, numbers = rollouts.answered(batches, step=4)
    module = RewardLoss(backbone, kl=0.3, reference=reference)
    outputs, trained = [], [weight for weight in backbone.model.parameters() if weight.requires_grad]
    gradients = [torch.zeros_like(weight) for weight in trained]
    for batch in answered:  # two micro-batches of a step
        outputs.append(module(**inputs_of(batch), num_items_in_batch=divisor))
        for gradient, more in zip(gradients, torch.autograd.grad(outputs[-1]["loss"], trained), strict=True):
            gradient += more

    rows = [row for batch in answered for item in batch["made_of"] for row in item.rows()]
    assert len(rows) == 3 * GROUP
    log_probs = [alone(backbone, row) for row in rows]
    with torch.no_grad():
        references = [alone(before, row) for row in rows]
    lengths = [len(values) for values in log_probs]
    texts = [encoder.decode(row.labels[row.labels >= 0]) for row in rows]
    rewards = [lengths_and_vowels(EXAMPLES[0], text) - 0.5 * len(text) for text in texts]
    assert numbers["rewards/mean"].item() == pytest.approx(sum(rewards) / len(rewards))
    total = torch.zeros(())
    for number, (now, then) in enumerate(zip(log_probs, references, strict=True)):
        group = rewards[number // GROUP * GROUP :][:GROUP]
        mean = sum(group) / GROUP
        advantage = rewards[number] - mean
        if name in ("grpo", "dapo"):
            advantage /= (sum((reward - mean) ** 2 for reward in group) / (GROUP - 1)) ** 0.5 + 1e-4
        if name == "rloo":
            advantage = rewards[number] - (sum(group) - rewards[number]) / (GROUP - 1)
        weight = {
            "grpo": 1 / (lengths[number] * len(rows)),
            "dr_grpo": 1 / (LONGEST * len(rows)),
            "dapo": 1 / sum(lengths),
            "rloo": 1 / len(rows),
        }[name]
        total = total - weight * (advantage * now - 0.3 * ((then - now).exp() - (then - now) - 1)).sum()
    expected = torch.autograd.grad(total, trained)
    for gradient, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=2e-3, atol=2e-5)
    assert max(output["log_probs/gap"].item() for output in outputs) < 1e-4
    assert sum(output["labelled_tokens"].item() for output in outputs) == sum(lengths)


def test_prompts_are_those_that_inference_asks(encoder: Encoder, backbone: DecoderBackbone, tmp_path: Path) -> None:
    rollouts = rollouts_of(encoder, backbone, tmp_path)
    (batch,), _, _ = rollouts.answered([rollouts.collate(items(encoder))], step=0)
    for item, example in zip(batch["made_of"], EXAMPLES, strict=True):
        prompt = encoder.encode_prompt(example.turns[:1], [PICTURES[name] for name in example.images])
        for row in item.rows():
            start = int((row.labels >= 0).int().argmax())
            assert torch.equal(row.input_ids[:start], prompt.input_ids)
            assert torch.equal(row.labels[start:], row.input_ids[start:])


def test_no_picture_s_token_is_drawn(encoder: Encoder, backbone: DecoderBackbone, tmp_path: Path) -> None:
    (batch,), _, _ = rollouts_of(encoder, backbone, tmp_path).answered([collated(encoder)], step=1)
    drawn = {
        token for item in batch["made_of"] for row in item.rows() for token in row.labels[row.labels >= 0].tolist()
    }
    rollouts = rollouts_of(encoder, backbone, tmp_path, never=drawn)
    (batch,), _, _ = rollouts.answered([collated(encoder)], step=1)
    others = {token for item in batch["made_of"] for row in item.rows() for token in row.labels.tolist()} - {-100}
    assert others
    assert not others & drawn


def test_draws_depend_on_seed_and_step_alone(encoder: Encoder, backbone: DecoderBackbone, tmp_path: Path) -> None:
    rollouts = rollouts_of(encoder, backbone, tmp_path)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    ids = [rollouts.answered([rollouts.collate(items(encoder))], step=step)[0][0]["input_ids"] for step in (2, 3)]
    assert torch.equal(torch.get_rng_state(), state)  # dropout goes on as if nothing was drawn
    torch.manual_seed(9)
    again = rollouts.answered([rollouts.collate(items(encoder))], step=2)[0][0]["input_ids"]
    assert torch.equal(again, ids[0])
    assert ids[1].shape != again.shape or not torch.equal(ids[1], again)
    assert [line["step"] for line in read_log(tmp_path / DRAWN)] == [3, 4, 3]


def test_draws_follow_the_model_s_probabilities(encoder: Encoder, backbone: DecoderBackbone, tmp_path: Path) -> None:
    """First tokens of many draws against the softmax that they are drawn from, and their entropy."""
    disturb(backbone.model)
    (sample,) = items(encoder)[:1]
    rollouts = rollouts_of(encoder, backbone, tmp_path)
    counts, steps, numbers = torch.zeros(len(encoder.tokenizer)), 30, dict[str, torch.Tensor]()
    for step in range(steps):
        (batch,), _, numbers = rollouts.answered([rollouts.collate([sample])], step=step)
        for row in batch["made_of"][0].rows():
            counts[row.labels[row.labels >= 0][0]] += 1
    start = int((sample.labels >= 0).int().argmax())
    inputs = {name: value for name, value in sample.inputs.items() if name != "attention_mask"}
    with torch.no_grad():
        chances = backbone.model(input_ids=sample.input_ids[None, :start], **inputs).logits[0, -1].softmax(-1)
    likely = chances.topk(len(chances) // 2).indices
    share, expected = counts[likely].sum().item() / (steps * GROUP), chances[likely].sum().item()
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / (steps * GROUP)) ** 0.5)
    assert numbers["answers/entropy"].item() == pytest.approx(-(chances * chances.log()).sum().item(), rel=0.05)
