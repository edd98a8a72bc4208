"""Preferences on pictures: trees, plain rows and one prompt at a time are the same loss, against a written-out one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional

from dora_vl.backbones.encoder import Encoder, open_encoder
from dora_vl.backbones.model import DecoderBackbone, language_targets, open_backbone, projector_patterns
from dora_vl.core import DoRAConfig, adapted_layers, apply_dora
from dora_vl.data.batches import Collator
from dora_vl.data.example import Example
from dora_vl.data.samples import Sample
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample
from dora_vl.heads.preferences import LOSSES, Scale
from dora_vl.training.pipeline import PreferenceLoss
from dora_vl.training.reference import Reference
from tests.backbones.image_text_conversations import BLUE, RED, inputs_of

EXAMPLES = (
    Example(
        "a", ("red",), (Turn("user", "<image>\nSay the colour."), Turn("assistant", "It is red.")), rejected=("blue",)
    ),
    Example(
        "b", ("red",), (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "red")), rejected=("No", "It is two.")
    ),
    Example(
        "c", ("blue",), (Turn("user", "<image>\nSay it."), Turn("assistant", "blue")), rejected=("It is a red one.",)
    ),
)
PICTURES: dict[str, Image.Image] = {"red": RED, "blue": BLUE}
OBJECTIVE = {"dpo": 0.8, "bco": 0.2, "sft": 1.0}


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


def items(encoder: Encoder, examples: Sequence[Example] = EXAMPLES) -> list[Sample]:
    return [
        Sample(**vars(encoder.encode_answers(row, [PICTURES[name] for name in row.images])), index=index, id=row.id)
        for index, row in enumerate(examples)
    ]


def disturb(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator).to(weight.dtype) * 0.05)


def result(loss: PreferenceLoss, batches: Sequence[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    loss.zero_grad()
    values = [loss(**batch) for batch in batches]
    total = torch.stack([value["loss"] for value in values]).sum()
    total.backward()
    gradients = {name: weight.grad.clone() for name, weight in loss.named_parameters() if weight.grad is not None}
    return total.item(), gradients


def batch_of(encoder: Encoder, samples: Sequence[Sample], packing: Any) -> dict[str, Any]:
    return inputs_of(Collator(encoder.pad_token_id, packing=packing, compares=True)(samples))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_trees_and_plain_rows_are_the_same(name: str, encoder: Encoder, backbone: DecoderBackbone) -> None:
    reference = Reference(backbone.model)
    disturb(backbone.model)
    loss = PreferenceLoss(backbone, objective={name: 1.0}, scale=Scale(beta=0.3), reference=reference)
    samples = items(encoder)
    trees, plain = (result(loss, [batch_of(encoder, samples, packing)]) for packing in ("trees", "plain"))
    assert trees[0] == pytest.approx(plain[0], rel=1e-4)
    assert trees[1].keys() == plain[1].keys()
    for parameter, gradient in plain[1].items():
        torch.testing.assert_close(trees[1][parameter], gradient, rtol=2e-3, atol=2e-5)


def test_loss_is_that_of_two_models_and_single_rows(encoder: Encoder, backbone: DecoderBackbone) -> None:
    before, reference = copy.deepcopy(backbone), Reference(backbone.model)
    disturb(backbone.model)
    samples = items(encoder)

    def log_prob(model: DecoderBackbone, sample: Sample) -> tuple[torch.Tensor, int]:
        inputs = {name: value for name, value in sample.inputs.items() if name != "attention_mask"}
        with torch.no_grad():
            logits = model.model(input_ids=sample.input_ids[None], **inputs).logits[0, :-1].log_softmax(-1)
        targets = sample.labels[1:]
        return logits[targets >= 0].gather(1, targets[targets >= 0, None]).sum(), int((targets >= 0).sum())

    pairs, learned, tokens = list[tuple[float, float]](), 0.0, 0
    for item in samples:
        rows = [(log_prob(backbone, row), log_prob(before, row)) for row in item.rows()]
        chosen, *others = [0.3 * float(now[0] - then[0]) for now, then in rows]
        pairs += [(chosen, other) for other in others]
        learned, tokens = learned + float(rows[0][0][0]), tokens + rows[0][0][1]

    def log_sigmoid(value: float) -> float:
        return float(functional.logsigmoid(torch.tensor(value)))

    each = [-0.8 * log_sigmoid(w - o) - 0.2 * (log_sigmoid(w) + log_sigmoid(-o)) for w, o in pairs]
    expected = sum(each) / len(each) - learned / tokens
    margins = [w - o for w, o in pairs]
    loss = PreferenceLoss(backbone, objective=OBJECTIVE, scale=Scale(beta=0.3), reference=reference)
    output = loss(**batch_of(encoder, samples, "trees"))
    assert output["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert output["rewards/margin"].item() == pytest.approx(sum(margins) / len(margins), rel=1e-3)
    assert output["labelled_tokens"].item() == sum(
        int((row.labels != -100).sum()) for item in samples for row in item.rows()
    )


def test_prompt_and_picture_stand_once_for_all_answers(encoder: Encoder) -> None:
    samples = items(encoder)
    trees, plain = (batch_of(encoder, samples, packing) for packing in ("trees", "plain"))
    assert len(trees["pixel_values"]) == 2
    assert len(plain["pixel_values"]) == 7
    assert trees["input_ids"].numel() < 0.6 * plain["input_ids"].numel()
    assert trees["weights"].tolist() == [1, -1, 1, -1, -1, 1, -1]


@pytest.mark.parametrize("packing", ["trees", "plain"])
def test_kto_measures_by_answers_to_other_prompts(packing: Any, encoder: Encoder, backbone: DecoderBackbone) -> None:
    reference, before = Reference(backbone.model), copy.deepcopy(backbone)
    disturb(backbone.model)
    samples = items(encoder)
    batch = inputs_of(Collator(encoder.pad_token_id, packing=packing, compares=True, unmatched=True)(samples))
    assert batch["weights"].tolist() == [1, -1, 0, 1, -1, -1, 0, 1, -1, 0]
    loss = PreferenceLoss(backbone, objective={"kto": 1.0}, scale=Scale(beta=0.3), reference=reference)
    value = loss(**batch)["loss"].item()

    def gain(prompt: Example, text: str) -> float:
        pictures = [PICTURES[name] for name in prompt.images]
        sample = Sample(**vars(encoder.encode_choice(prompt.turns[:1], text, pictures)))
        batch, sums = inputs_of(Collator(encoder.pad_token_id)([sample])), []
        with torch.no_grad():
            sums = [-model(**batch).losses.sum().item() for model in (backbone, before)]
        return sums[0] - sums[1]

    others = [gain(EXAMPLES[number], EXAMPLES[number - 1].turns[-1].text) for number in range(3)]
    level = max(0.0, sum(others) / len(others))
    values = [
        1 - torch.sigmoid(torch.tensor(sign * 0.3 * (gain(row, text) - level))).item()
        for row in EXAMPLES
        for sign, text in ((1, row.turns[-1].text), *((-1, text) for text in row.rejected))
    ]
    assert value == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_steps_raise_the_margin(encoder: Encoder, backbone: DecoderBackbone) -> None:
    loss = PreferenceLoss(backbone, objective={"dpo": 1.0}, scale=Scale(beta=0.5), reference=Reference(backbone.model))
    optimizer = torch.optim.AdamW([weight for weight in backbone.parameters() if weight.requires_grad], lr=0.01)
    batch, margins, output = batch_of(encoder, items(encoder), "trees"), [], {}
    for _ in range(8):
        output = loss(**batch)
        margins.append(output["rewards/margin"].item())
        output["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert margins[0] == pytest.approx(0, abs=1e-5)
    assert margins[-1] > 0.1
    assert output["rewards/accuracy"].item() == 1


def test_answers_that_are_too_long_are_refused_by_name(tiny_llava: Path) -> None:
    encoder = open_encoder(str(tiny_llava), max_tokens=24)
    long = replace(EXAMPLES[0], rejected=("It is red. " * 12,))
    with pytest.raises(BadSample) as error:
        items(encoder, [long])
    assert error.value.sample_id == "a"


class Counted(Reference):
    """Counts how often the reference takes the model's place."""

    calls = 0

    def in_place(self) -> Any:
        self.calls += 1
        return super().in_place()


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_what_the_reference_says_is_kept_for_later_epochs(
    name: str, encoder: Encoder, backbone: DecoderBackbone
) -> None:
    samples, collate = (
        items(encoder),
        Collator(encoder.pad_token_id, packing="trees", compares=True, unmatched=name == "kto"),
    )
    epochs = [[samples[:2], samples[2:]], [samples[::2], samples[1:2]], [samples]]
    losses = dict[bool, list[torch.Tensor]]()
    start = copy.deepcopy(backbone.state_dict())
    for keeps in (False, True):
        reference = Counted(backbone.model)
        loss = PreferenceLoss(backbone, objective={name: 1.0}, scale=Scale(beta=0.3), reference=reference, keeps=keeps)
        optimizer = torch.optim.SGD([weight for weight in backbone.parameters() if weight.requires_grad], lr=0.5)
        losses[keeps] = []
        for batch in (inputs_of(collate(rows)) for epoch in epochs for rows in epoch):
            value = loss(**batch)["loss"]
            value.backward()
            losses[keeps].append(value.detach())
            optimizer.step()
            optimizer.zero_grad()
        assert reference.calls == (2 if keeps and name == "dpo" else 5)
        if keeps and name == "dpo":  # the validation data counts its samples anew
            loss.eval()
            loss(**inputs_of(collate(samples[:1])))
            assert reference.calls == 3
        backbone.load_state_dict(start)
        for _, layer in adapted_layers(backbone.model):
            layer.forget_norms()
    torch.testing.assert_close(torch.stack(losses[True]), torch.stack(losses[False]), rtol=2e-5, atol=2e-5)
    assert abs(float(losses[True][0] - losses[True][-1])) > 1e-3
